"""The main job: the same training twice, without and with the memory, and what it did to recall."""

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


def run(plan, *, framework, quick, out, console):
    """Train without and with the memory, print a table and write `report.html` into the folder `out`.

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
        runs = [one_run(plan, train_set, test_set, memory=memory, **options) for memory in (False, True)]
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


def one_run(plan, train_set, test_set, *, memory, framework="torch", progress=None):
    """Train once, with the plan's memory or in-batch only, and return the report's `Run`.

    Parameters
    ----------
    plan : Plan
    train_set, test_set : Glyphs
        Of disjoint classes.
    memory : bool
    framework : str
        Among `plan.FRAMEWORKS`.
    progress : rich.progress.Progress, optional
        Where to show a bar.
    """
    train_set, test_set = (Pictures(one.images[:, None], one.labels, one.characters) for one in (train_set, test_set))
    training = Training(plan if memory else replace(plan, weight=0.0), train_set, test_set, framework)
    if progress is None:
        training.run()
    else:
        training.run(shown(training, progress, "with memory  " if memory else "in-batch only"))
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
    without, with_memory = runs
    gain = (with_memory.recall_at_1 - without.recall_at_1, with_memory.map_at_r - without.map_at_r)
    more = with_memory.seconds - without.seconds
    extra = with_memory.memory_megabytes
    result.add_section()
    result.add_row("difference", f"{gain[0]:+.3f}", f"{gain[1]:+.3f}", f"{more:+.1f}", f"{extra:+.1f}")
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
