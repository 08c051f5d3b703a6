"""The demo: the same training without a memory, with a memory, and with a compensated memory, compared by recall."""

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
PROBES, EVERY = 32, 8  # the compensated memory re-embeds PROBES rows every EVERY steps
SHORT = {(False, False): "in-batch only", (True, False): "with memory", (True, True): "compensated"}  # progress bars


def run(plan, *, framework, quick, out, console):
    """Train without a memory, with a memory, and with a compensated memory; print a table and write `out/report.html`.

    Raises
    ------
    InputError
        If the framework, one of `plan.FRAMEWORKS`, is not installed.
    """
    engine = engines.of(framework)
    engine.one_thread()  # a second thread gains little for a small network, and costs much where cores are shared
    with console.status("Drawing the glyphs (only once; the cache folder keeps them)"):
        train_set, test_set = glyphs.split(glyphs.load(quick=quick))
    console.print(
        f"Glyphs: {len(train_set.characters)} training classes ({len(train_set.labels)} pictures), "
        f"{len(test_set.characters)} test classes ({len(test_set.labels)} pictures)"
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
    """Return the plans of the three runs: without a memory, with a memory, and with a compensated memory."""
    return replace(plan, weight=0.0), plan, replace(plan, follow=True, probes=PROBES, every=EVERY)


def one_run(plan, train_set, test_set, *, framework="torch", progress=None):
    """Train once and return the report's `Run`.

    Parameters
    ----------
    plan : Plan
    train_set, test_set : Glyphs
        Pictures of disjoint classes.
    framework : str
        One of `plan.FRAMEWORKS`.
    progress : rich.progress.Progress, optional
        Receives a progress bar for the run.
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
    """Return the table of results, with the library versions `made_of` as its caption."""
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
    result.add_row("last minus first", f"{gain[0]:+.3f}", f"{gain[1]:+.3f}", f"{more:+.1f}", f"{extra:+.1f}")
    return result


def settings(plan, train_set, test_set, framework, made_of):
    """Return the settings of the runs, for the report."""
    return {
        "framework": framework,
        **{name.replace("_", " "): value for name, value in asdict(plan).items()},
        "loss": Contrastive(),
        "training classes": len(train_set.characters),
        "test classes": len(test_set.characters),
        "versions": f"xbm {__version__}, {made_of}, Python {platform.python_version()}",
        "threads": 1,
    }
