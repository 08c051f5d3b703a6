"""The main job: the same training twice, without and with the memory, and what it did to recall."""

import platform
from dataclasses import asdict, replace

import numpy as np
import rich.table
import torch

from xbm import Contrastive, __version__
from xbm.experiments import glyphs, report
from xbm.experiments.pictures import Pictures
from xbm.experiments.progress import bars, shown
from xbm.experiments.training import Training

QUERIES = 12  # shown in the report


def run(plan, *, quick, out, console):
    """Train without and with the memory, print a table and write `report.html` into the folder `out`."""
    torch.set_num_threads(1)  # for so small a network a second gains little, and loses much where cores are shared
    with console.status("Drawing the glyphs (once; they are kept in the cache folder)"):
        train_set, test_set = glyphs.split(glyphs.load(quick=quick))
    console.print(
        f"Glyphs: {len(train_set.characters)} classes to train on ({len(train_set.labels)} pictures), "
        f"{len(test_set.characters)} others to test on ({len(test_set.labels)})"
    )
    with bars(console) as progress:
        runs = [one_run(plan, train_set, test_set, memory=memory, progress=progress) for memory in (False, True)]
    console.print(table(runs))
    queries = np.random.default_rng(plan.seed).choice(len(test_set.labels), QUERIES, replace=False)
    path = out / "report.html"
    report.write(
        path,
        runs,
        images=test_set.images,
        labels=test_set.labels,
        queries=queries,
        settings=settings(plan, train_set, test_set),
        warmup=plan.warmup,
    )
    console.print(f"Report: {path}", soft_wrap=True)
    return runs


def one_run(plan, train_set, test_set, *, memory, progress=None):
    """Train once, with the plan's memory or in-batch only, and return the report's `Run`.

    Parameters
    ----------
    plan : Plan
    train_set, test_set : Glyphs
        Of disjoint classes.
    memory : bool
    progress : rich.progress.Progress, optional
        Where to show a bar.
    """
    train_set, test_set = (Pictures(one.images[:, None], one.labels, one.characters) for one in (train_set, test_set))
    training = Training(plan if memory else replace(plan, weight=0.0), train_set, test_set)
    name = "with memory  " if memory else "in-batch only"
    for _ in training.steps() if progress is None else shown(training, progress, name):
        pass
    outcome, _ = training.outcome(test_set)
    return outcome


def table(runs):
    """Return the closing table."""
    result = rich.table.Table(title="Retrieval on classes never seen in training")
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


def settings(plan, train_set, test_set):
    """Return what was run, for the report."""
    return {
        **{name.replace("_", " "): value for name, value in asdict(plan).items()},
        "loss": Contrastive(),
        "training classes": len(train_set.characters),
        "test classes": len(test_set.characters),
        "versions": f"xbm {__version__}, torch {torch.__version__}, Python {platform.python_version()}",
        "threads": torch.get_num_threads(),
    }
