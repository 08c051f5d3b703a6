"""`xbm train`: a run on the user's own pictures, kept in a folder: begun, left, gone on with, finished."""

import json
import platform
import shlex
from dataclasses import asdict, replace

import numpy as np
import torch

from xbm import __version__
from xbm.experiments import checkpoint, pictures, ranks, report
from xbm.experiments.errors import DivergenceError, InputError
from xbm.experiments.evaluation import device_of
from xbm.experiments.files import written_whole
from xbm.experiments.plan import Config
from xbm.experiments.progress import bars, shown
from xbm.experiments.retrieval import table
from xbm.experiments.signals import noted
from xbm.experiments.split import split
from xbm.experiments.training import Training

CONFIG, METRICS, REPORT = "config.json", "metrics.json", "report.html"
FILES = (CONFIG, METRICS, REPORT, checkpoint.NAME)
K = (1, 10)  # of R@K in metrics.json
QUERIES = 12  # shown in the report


def begin(config, out, console):
    """Begin a run in the folder `out` and see it through; return the signal that ended it, 0 if none did.

    Raises
    ------
    InputError
        Before anything is written, or where the training breaks down.
    """
    there = [name for name in FILES if (out / name).exists()]
    if there:
        raise InputError(f"{out} holds a run already ({', '.join(there)}): go on with it by --resume, or name another")
    with console.status("Reading the pictures"):
        data = pictures.load(config.data, size=config.size)
    groups = config.split_by and pictures.groups(config.data, config.split_by, data)
    classes = split(data.names, seed=config.split_seed, groups=groups, by=config.split_by)
    record = {
        "config": asdict(config),
        "data": {"fingerprint": data.fingerprint(), "shape": data.images.shape, "classes": classes},
        "versions": versions(),
    }
    parts = {which: data.of(names) for which, names in classes.items()}
    del data  # the parts are copies
    training = _prepared(config, parts, console)
    ranks.agree()
    if ranks.first():
        with written_whole(out / CONFIG) as file:
            file.write(checkpoint.dumps(record, indent=1).encode())
    return _see_through(training, record, parts, out, console)


def resume(out, given, console):
    """Go on with the run in the folder `out`; return the signal that ended it, 0 if none did.

    Parameters
    ----------
    out : Path
    given : dict
        Options that the user gave again: those of the run, but "data" may be another path to the same pictures.
    console : rich.console.Console

    Raises
    ------
    InputError
        If there is no run, or it is not as it began; nothing has been written then. Or where the training breaks down.
    """
    tensors, values = checkpoint.read(out / checkpoint.NAME)
    with checkpoint.sound(out / checkpoint.NAME):
        record = {name: values.pop(name) for name in ("config", "data", "versions")}
        config = Config(**record["config"])
        if values["step"] not in range(config.steps + 1):
            raise ValueError("a step beyond the last")
    _check_config(out, record)
    config = replace(config, data=given.pop("data", config.data))
    for name, value in given.items():
        if value != getattr(config, name):
            asked, began = f"--{name.replace('_', '-')} {value}", getattr(config, name)
            why = ", on which its learning rates depend" if name == "steps" else ""
            raise InputError(f"{asked} disagrees with the {began} of the run in {out}{why}: a run goes on as it began")
    if all((out / name).exists() for name in (METRICS, REPORT)):
        console.print(f"The run in {out} is finished: {values['step']} of {config.steps} steps.", soft_wrap=True)
        return 0
    with console.status("Reading the pictures"):
        data = pictures.load(config.data, size=config.size)
    with checkpoint.sound(out / checkpoint.NAME):
        if data.fingerprint() != record["data"]["fingerprint"]:
            raise InputError(f"the pictures in {config.data} are not those that the run in {out} began with")
        parts = {which: data.of(names) for which, names in record["data"]["classes"].items()}
        del data
        began, now = _told(record["versions"]), _told(versions())
        if began != now:
            console.print(f"Begun with {began}, going on with {now}: not to the last bit.", soft_wrap=True)
        training = _prepared(config, parts, console)
        training.load(tensors, values)
    ranks.agree()
    return _see_through(training, record, parts, out, console)


def _check_config(out, record):
    """Refuse a config.json that was changed: what it says would not be what is done."""
    try:
        told = json.loads((out / CONFIG).read_bytes())
    except (OSError, ValueError) as error:
        raise InputError(f"{out / CONFIG} cannot be read: {error}") from error
    if told != record:
        raise InputError(f"{out / CONFIG} is not as the run wrote it: a run goes on as it began")


def _prepared(config, parts, console):
    """Return a new `Training` on the pictures of some parts; say how many there are."""
    for which, part in parts.items():
        console.print(f"{which.capitalize():10} {len(part.names):6,} classes {len(part.labels):9,} pictures")
    ours, batch = parts["train"], config.classes * config.instances
    if config.classes > len(ours.names):
        raise InputError(f"--classes {config.classes} is more than the {len(ours.names)} classes there are to train on")
    if batch > len(ours.labels):
        raise InputError(
            f"a batch of {config.classes} x {config.instances} pictures is larger than the {len(ours.labels)} "
            f"there are to train on"
        )
    if ranks.size() > 1 and batch < 2 * ranks.size():
        raise InputError(
            f"a batch of {config.classes} x {config.instances} pictures is too small for {ranks.size()} processes: "
            f"each needs two of them"
        )
    height, width = ours.images.shape[2:]
    if config.shift >= min(height, width):
        raise InputError(f"--shift {config.shift} moves pictures of {width} x {height} pixels out of sight")
    torch.set_num_threads(config.threads)
    torch.backends.cudnn.deterministic = True  # or a resumed run would not repeat what an uninterrupted one does
    ranks.take_device(config.device)
    device_of(config.device)
    try:
        return Training(config, ours, parts["validation"], measures=ranks.first())
    except (TypeError, ValueError) as error:  # the library's own refusals, such as a reduction that a loss has not
        raise InputError(str(error)) from error
    except (RuntimeError, MemoryError) as error:
        rows, dim = f"{config.capacity:,}", f"{config.dim:,}"
        raise InputError(f"there is no room for {rows} rows and a network of {dim} dimensions here") from error


def _see_through(training, record, parts, out, console):
    config, file = training.plan, out / checkpoint.NAME

    def keep():
        if ranks.first():
            tensors, values = training.state()
            checkpoint.write(file, tensors, record | values)
        ranks.agree()
        return training.step

    with noted() as stop, bars(console) as progress:
        kept, ended = keep(), 0
        training.engine.forward = ranks.averaging(training.engine.encoder)
        show = shown(training, progress, "with memory" if config.weight else "in-batch only")

        def after(step):
            nonlocal kept, ended
            show(step)
            ended = ranks.agree(stop.signal)
            if ended or step == config.steps or step % config.checkpoint_every == 0:
                kept = keep()
            return ended

        try:
            training.run(after)
        except DivergenceError as error:
            advice = "a smaller --learning-rate, a longer --warmup or --precision float32 may help"
            raise InputError(f"{error}: {advice}; the checkpoint of step {kept} is kept in {out}") from error
    if ended:
        again = shlex.join([*ranks.launcher(), "xbm", "train", "--out", str(out), "--resume"])
        console.print(f"Stopped after step {training.step} of {config.steps}; go on with: {again}", soft_wrap=True)
    elif ranks.first():
        _finish(training, parts, out, console)
    ranks.agree()
    return ended


def _finish(training, parts, out, console):
    """Measure the test classes, once, and write metrics and report."""
    config, test = training.plan, parts["test"]
    run, found = training.outcome(test, K)
    console.print(table(test, found, "test classes"))
    metrics = {
        "test": {
            "classes": len(test.names),
            "pictures": len(test.labels),
            "recall_at": found.recall,
            "r_precision": found.r_precision,
            "map_at_r": found.map_at_r,
        },
        "validation": {"steps": run.recall_steps, "recall_at_1": run.recall},
        "steps": training.step,
        "seconds": run.seconds,
        "memory_megabytes": run.memory_megabytes,
    }
    with written_whole(out / METRICS) as file:
        file.write(checkpoint.dumps(metrics, indent=1).encode())
    options = {name.replace("_", " "): value for name, value in asdict(config).items() if value is not None}
    counts = {f"{which} classes": len(part.names) for which, part in parts.items()}
    photographs = np.moveaxis(test.images, 1, -1)
    report.write(
        out / REPORT,
        [run],
        images=np.broadcast_to(photographs, (*photographs.shape[:3], 3)),
        labels=test.labels,
        names=test.names,
        queries=np.random.default_rng(config.seed).permutation(len(test.labels))[:QUERIES],
        settings=options | counts | {"versions": _told(versions())},
        warmup=config.warmup,
        watched="validation",
    )
    console.print(f"Report: {out / REPORT}", soft_wrap=True)


def versions():
    """Return what a run's last bits depend on beside its config and the machine."""
    libraries = {"xbm": __version__, "torch": torch.__version__, "numpy": np.__version__}
    several = {"processes": str(ranks.size())} if ranks.size() > 1 else {}
    return libraries | {"python": platform.python_version()} | several


def _told(some):
    return ", ".join(f"{name} {version}" for name, version in some.items())
