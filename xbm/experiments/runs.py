"""`xbm train`: start, interrupt, resume and finish a run on the user's own pictures, stored in a folder."""

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
K = (1, 10)  # k of R@k in metrics.json
QUERIES = 12  # shown in the report


def begin(config, out, console):
    """Start a run in the folder `out` and train to the end; return the number of the signal that stopped it, or 0.

    Raises
    ------
    InputError
        If the input is invalid, before anything is written; or if the training diverges.
    """
    there = [name for name in FILES if (out / name).exists()]
    if there:
        raise InputError(
            f"{out} already contains a run ({', '.join(there)}): continue it with --resume, or choose another --out"
        )
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
    """Resume the run in the folder `out`; return the number of the signal that stopped it, or 0.

    Parameters
    ----------
    out : Path
    given : dict
        Options that the user repeated. They must equal the run's options; only "data" may be another path to the same
        pictures.
    console : rich.console.Console

    Raises
    ------
    InputError
        If there is no run, or its files, options or pictures have changed; nothing is written then. Also if the
        training diverges.
    """
    tensors, values = checkpoint.read(out / checkpoint.NAME)
    with checkpoint.sound(out / checkpoint.NAME):
        record = {name: values.pop(name) for name in ("config", "data", "versions")}
        config = Config(**record["config"])
        if values["step"] not in range(config.steps + 1):
            raise ValueError(f"step must be in 0 .. {config.steps}, got {values['step']}")
    _check_config(out, record)
    config = replace(config, data=given.pop("data", config.data))
    for name, value in given.items():
        if value != getattr(config, name):
            asked, began = f"--{name.replace('_', '-')} {value}", getattr(config, name)
            why = " (the learning rate schedule depends on it)" if name == "steps" else ""
            raise InputError(
                f"{asked} differs from {began} of the run in {out}: options cannot change on --resume{why}"
            )
    if all((out / name).exists() for name in (METRICS, REPORT)):
        console.print(f"The run in {out} is finished: {values['step']} of {config.steps} steps.", soft_wrap=True)
        return 0
    with console.status("Reading the pictures"):
        data = pictures.load(config.data, size=config.size)
    with checkpoint.sound(out / checkpoint.NAME):
        if data.fingerprint() != record["data"]["fingerprint"]:
            raise InputError(f"the pictures in {config.data} differ from those the run in {out} was started with")
        parts = {which: data.of(names) for which, names in record["data"]["classes"].items()}
        del data
        began, now = _told(record["versions"]), _told(versions())
        if began != now:
            console.print(f"Started with {began}, resumed with {now}: not bit-identical.", soft_wrap=True)
        training = _prepared(config, parts, console)
        training.load(tensors, values)
    ranks.agree()
    return _see_through(training, record, parts, out, console)


def _check_config(out, record):
    """Raise an error if config.json was modified, because the run would not follow it."""
    try:
        told = json.loads((out / CONFIG).read_bytes())
    except (OSError, ValueError) as error:
        raise InputError(f"{out / CONFIG} cannot be read: {error}") from error
    if told != record:
        raise InputError(f"{out / CONFIG} was modified: restore it, options cannot change on --resume")


def _prepared(config, parts, console):
    """Return a new `Training` on the training classes; print the size of each part."""
    for which, part in parts.items():
        console.print(f"{which.capitalize():10} {len(part.names):6,} classes {len(part.labels):9,} pictures")
    ours, batch = parts["train"], config.classes * config.instances
    if config.classes > len(ours.names):
        raise InputError(
            f"--classes must be at most the number of training classes, got {config.classes} for {len(ours.names)}"
        )
    if batch > len(ours.labels):
        raise InputError(
            f"a batch must not be larger than the training set, got {config.classes} x {config.instances} pictures "
            f"for {len(ours.labels)}: reduce --classes or --instances"
        )
    if ranks.size() > 1 and batch < 2 * ranks.size():
        raise InputError(
            f"a batch needs at least 2 pictures per process, got {config.classes} x {config.instances} pictures "
            f"for {ranks.size()} processes"
        )
    height, width = ours.images.shape[2:]
    if config.shift >= min(height, width):
        raise InputError(
            f"--shift must be less than the sides of the pictures, got {config.shift} for {width} x {height} pixels"
        )
    torch.set_num_threads(config.threads)
    torch.backends.cudnn.deterministic = True  # so that a resumed run reproduces an uninterrupted one
    ranks.take_device(config.device)
    device_of(config.device)
    try:
        return Training(config, ours, parts["validation"], measures=ranks.first())
    except (TypeError, ValueError) as error:  # errors of the library, such as a reduction the loss does not support
        raise InputError(str(error)) from error
    except (RuntimeError, MemoryError) as error:
        rows, dim = f"{config.capacity:,}", f"{config.dim:,}"
        raise InputError(
            f"not enough memory for --capacity {rows} and a network with --dim {dim}: reduce one of them"
        ) from error


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
            advice = "Try a smaller --learning-rate, a longer --warmup or --precision float32"
            raise InputError(f"{error}. {advice}. {out} has the checkpoint of step {kept}") from error
    if ended:
        again = shlex.join([*ranks.launcher(), "xbm", "train", "--out", str(out), "--resume"])
        console.print(f"Stopped after step {training.step} of {config.steps}; resume with: {again}", soft_wrap=True)
    elif ranks.first():
        _finish(training, parts, out, console)
    ranks.agree()
    return ended


def _finish(training, parts, out, console):
    """Measure the test classes, for the first and only time, and write metrics and report."""
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
    """Return what else must be equal for bit-identical results, beside config and machine: versions, process count."""
    libraries = {"xbm": __version__, "torch": torch.__version__, "numpy": np.__version__}
    several = {"processes": str(ranks.size())} if ranks.size() > 1 else {}
    return libraries | {"python": platform.python_version()} | several


def _told(some):
    return ", ".join(f"{name} {version}" for name, version in some.items())
