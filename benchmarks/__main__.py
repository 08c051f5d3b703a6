"""The command `python -m benchmarks [step] [losses] [enqueue] [libraries] [memory] [retrieval] [ranks]`."""

import json
from dataclasses import dataclass
from pathlib import Path

import click
import torch
from rich.console import Console

from benchmarks import enqueue, libraries, machine, memory, ranks, retrieval, step
from benchmarks import losses as every_loss
from benchmarks.data import CLASSES
from xbm import losses

BENCHMARKS = {
    "step": step,
    "losses": every_loss,
    "enqueue": enqueue,
    "libraries": libraries,
    "memory": memory,
    "retrieval": retrieval,
    "ranks": ranks,
}


@dataclass(frozen=True, kw_only=True)
class Options:
    """The command line options."""

    threads: int
    device: str
    rounds: int
    searches: int
    sizes: tuple[int, ...]
    active: tuple[float, ...]
    batch: int
    dim: int
    classes: int
    loss: str
    limit: float
    peak_sizes: tuple[int, ...]
    peak_batch: int
    items: int
    features: int
    ranks: tuple[int, ...]


def several(kind, low, high=None):
    """Return a callback that reads comma-separated numbers."""

    def read(context, parameter, text):
        try:
            numbers = tuple(kind(one) for one in text.split(","))
        except ValueError:
            numbers = ()
        if not numbers or not all(low <= one and (high is None or one <= high) for one in numbers):
            most = "" if high is None else f" and at most {high}"
            raise click.BadParameter(f"expected comma-separated {kind.__name__}s of at least {low}{most}, got {text!r}")
        return numbers

    return read


count = click.IntRange(min=1)


@click.command(context_settings={"show_default": True})
@click.argument("names", nargs=-1, type=click.Choice(list(BENCHMARKS)))
@click.option("--threads", default=1, type=count, help="CPU threads of every contender.")
@click.option("--device", default="cpu", type=click.Choice(["cpu", "cuda"]))
@click.option("--rounds", default=30, type=count, help="Calls of each contender; ten times as many for enqueue.")
@click.option("--sizes", default="1024,8192,65536,262144", callback=several(int, 1), help="Memory capacities M.")
@click.option("--active", default="0,0.1,1", callback=several(float, 0, 1), help="Shares of active negatives.")
@click.option("--batch", default=64, type=count, help="Batch size B.")
@click.option("--dim", default=128, type=click.IntRange(min=2), help="Embedding dimension D.")
@click.option("--classes", default=CLASSES, type=click.IntRange(min=2), help="Classes in the memory, for losses.")
@click.option("--loss", default="contrastive", type=click.Choice(list(losses.LOSSES)))
@click.option("--limit", default=30.0, help="Maximum seconds per call; slower contenders are skipped and named.")
@click.option("--peak-sizes", default="65536,262144,1048576", callback=several(int, 1), help="Capacities, for memory.")
@click.option("--peak-batch", default=256, type=count, help="Batch size, for memory.")
@click.option("--items", default=60_000, type=click.IntRange(min=3), help="Rows to search, for retrieval.")
@click.option("--features", default=512, type=count, help="Embedding dimension, for retrieval.")
@click.option("--searches", default=2, type=count, help="Rounds, for retrieval.")
@click.option("--ranks", default="2,4", callback=several(int, 1), help="Numbers of processes, compared with one.")
@click.option("--markdown", is_flag=True, help="Print Markdown.")
@click.option("--json", "path", type=click.Path(dir_okay=False, path_type=Path), help="Write all figures to this file.")
def main(names, markdown, path, **options):
    """Run the benchmarks NAMES, by default all.

    The contenders take turns in one run. Close other programs: the figures depend on the load of the machine.
    """
    options = Options(**options)
    for batch, sizes in ((options.batch, options.sizes), (options.peak_batch, options.peak_sizes)):
        if batch > min(sizes):
            raise click.UsageError(f"the batch must be at most the capacity, got B = {batch} and M = {min(sizes)}")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise click.UsageError("--device cuda: PyTorch finds no CUDA device, use --device cpu")
    machine.use_threads(options.threads)
    out, progress = Console(width=None if markdown else 200, soft_wrap=markdown), Console(stderr=True)
    about = machine.described(options.device, options.threads)
    out.print(", ".join(f"{name} {value}" for name, value in about.items()), highlight=False)
    tables = {}
    for name in names or BENCHMARKS:
        with progress.status(name):
            tables[name] = BENCHMARKS[name].run(options)
        out.print()
        out.print(tables[name].markdown() if markdown else tables[name].rich(), highlight=False, markup=False)
        if path:  # written after each benchmark, so that an interrupted run keeps its results
            path.write_text(json.dumps({"machine": about} | {n: t.json() for n, t in tables.items()}, indent=1) + "\n")


if __name__ == "__main__":
    main(prog_name="python -m benchmarks")
