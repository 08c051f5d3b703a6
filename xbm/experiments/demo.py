"""The main job: the same training twice, without and with the memory, and what it did to recall."""

import platform
from dataclasses import asdict

import numpy as np
import rich.table
import torch
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

from xbm import Contrastive, __version__
from xbm.experiments import glyphs, report
from xbm.experiments.training import train

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
        runs = [one_run(progress, plan, train_set, test_set, memory=memory) for memory in (False, True)]
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


def bars(console):
    """Return the progress bars: share of the steps, loss, fill, pairs in use and drift of either run."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=6),
        TaskProgressColumn(),
        TextColumn("{task.fields[figures]}"),
        TimeElapsedColumn(),
        console=console,
    )


def one_run(progress, plan, train_set, test_set, *, memory):
    """Train once under a progress bar of its own."""
    task = progress.add_task("with memory  " if memory else "in-batch only", total=plan.steps, figures="")

    def on_step(step, now):
        shown = f"loss {now['batch_loss'] + now['memory_loss']:.3f}"
        if memory:
            shown += f" fill {now['fill']:4.0%} pairs {now['pairs']:5.0f} drift {now['drift']:.3f}"
        progress.update(task, completed=step, figures=shown)

    return train(plan, train_set, test_set, memory=memory, on_step=on_step)


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
