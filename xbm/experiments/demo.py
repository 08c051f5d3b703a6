"""The main job: the same training without a memory, with one, and with one that moves; and what that did to recall."""

import platform
from dataclasses import asdict, replace

import numpy as np
import rich.table

from xbm import Contrastive, __version__
from xbm.experiments import engines, glyphs, report
from xbm.experiments.pictures import Pictures
from xbm.experiments.progress import bars, shown
from xbm.experiments.training import Training

QUERIES = 12  # shown in the report
PROBES, EVERY = 32, 8  # rows that are embedded anew every so many steps, for the memory that moves
SHORT = {(False, False): "in-batch only", (True, False): "with memory", (True, True): "that moves"}  # names of the bars


def run(plan, *, framework, quick, out, console):
    """Train without a memory, with one, and with one that moves; print a table, write `report.html` into `out`.

    Raises
    ------
    InputError
        If the framework, among `plan.FRAMEWORKS`, is not installed.
    """
    engine = engines.of(framework)
    engine.one_thread()  # for so small a network a second gains little, and loses much where cores are shared
    with console.status("Drawing the glyphs (once; they are kept in the cache folder)"):
        train_set, test_set = glyphs.split(glyphs.load(quick=quick))
    console.print(
        f"Glyphs: {len(train_set.characters)} classes to train on ({len(train_set.labels)} pictures), "
        f"{len(test_set.characters)} others to test on ({len(test_set.labels)})"
    )
    with bars(console) as progress:
        options = {"framework": framework, "progress": progress}
        runs = [one_run(each, train_set, test_set, **options) for each in plans(plan)]
    made_of = ", ".join(f"{name} {version}" for name, version in engine.versions().items())
    console.print(table(runs, made_of))
    queries = np.random.default_rng(plan.seed).choice(len(test_set.labels), QUERIES, replace=False)
    path = out / "report.html"
    report.write(
        path,
        runs,
        images=test_set.images,
        labels=test_set.labels,
        queries=queries,
        settings=settings(plan, train_set, test_set, framework, made_of),
        warmup=plan.warmup,
    )
    console.print(f"Report: {path}", soft_wrap=True)
    return runs


def plans(plan):
    """Return the plans of the runs: without the memory, with it, and with one that moves with the network."""
    return replace(plan, weight=0.0), plan, replace(plan, follow=True, probes=PROBES, every=EVERY)


def one_run(plan, train_set, test_set, *, framework="torch", progress=None):
    """Train once and return the report's `Run`.

    Parameters
    ----------
    plan : Plan
    train_set, test_set : Glyphs
        Of disjoint classes.
    framework : str
        Among `plan.FRAMEWORKS`.
    progress : rich.progress.Progress, optional
        Where to show a bar.
    """
    train_set, test_set = (Pictures(one.images[:, None], one.labels, one.characters) for one in (train_set, test_set))
    training = Training(plan, train_set, test_set, framework)
    if progress is None:
        training.run()
    else:
        training.run(shown(training, progress, f"{SHORT[bool(plan.weight), bool(plan.probes)]:13}"))
    outcome, _ = training.outcome(test_set)
    return outcome


def table(runs, made_of):
    """Return the closing table; what the runs were made of stands below it."""
    result = rich.table.Table(title="Retrieval on classes never seen in training", caption=made_of)
    result.add_column("")
    for column in ("R@1", "MAP@R", "seconds", "memory MB"):
        result.add_column(column, justify="right")
    for one in runs:
        result.add_row(
            one.name,
            f"{one.recall_at_1:.3f}",
            f"{one.map_at_r:.3f}",
            f"{one.seconds:.1f}",
            f"{one.memory_megabytes:.1f}",
        )
    without, with_memory = runs[0], runs[-1]
    gain = (with_memory.recall_at_1 - without.recall_at_1, with_memory.map_at_r - without.map_at_r)
    more = with_memory.seconds - without.seconds
    extra = with_memory.memory_megabytes
    result.add_section()
    result.add_row("last against first", f"{gain[0]:+.3f}", f"{gain[1]:+.3f}", f"{more:+.1f}", f"{extra:+.1f}")
    return result


def settings(plan, train_set, test_set, framework, made_of):
    """Return what was run, for the report."""
    return {
        "framework": framework,
        **{name.replace("_", " "): value for name, value in asdict(plan).items()},
        "loss": Contrastive(),
        "training classes": len(train_set.characters),
        "test classes": len(test_set.characters),
        "versions": f"xbm {__version__}, {made_of}, Python {platform.python_version()}",
        "threads": 1,
    }
