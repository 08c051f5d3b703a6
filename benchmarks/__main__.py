"""The command: `python -m benchmarks [step] [losses] [enqueue] [libraries] [memory] [retrieval] [ranks]`, or all."""

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
    """What the command was asked for."""

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
            raise click.BadParameter(
                f"expected {kind.__name__}s of at least {low}{most}, joined by commas, got {text!r}"
            )
        return numbers

    return read


count = click.IntRange(min=1)


@click.command(context_settings={"show_default": True})
@click.argument("names", nargs=-1, type=click.Choice(list(BENCHMARKS)))
@click.option("--threads", default=1, type=count, help="For every contender.")
@click.option("--device", default="cpu", type=click.Choice(["cpu", "cuda"]))
@click.option("--rounds", default=30, type=count, help="Calls of each contender; ten times as many of an enqueue.")
@click.option("--sizes", default="1024,8192,65536,262144", callback=several(int, 1), help="Memory rows, M.")
@click.option("--active", default="0,0.1,1", callback=several(float, 0, 1), help="Shares of active negatives.")
@click.option("--batch", default=64, type=count, help="B.")
@click.option("--dim", default=128, type=click.IntRange(min=2), help="D.")
@click.option("--classes", default=CLASSES, type=click.IntRange(min=2), help="Of the rows, for losses.")
@click.option("--loss", default="contrastive", type=click.Choice(list(losses.LOSSES)))
@click.option("--limit", default=30.0, help="Seconds a call may take; a slower contender is left out, and named.")
@click.option("--peak-sizes", default="65536,262144,1048576", callback=several(int, 1), help="M, for memory.")
@click.option("--peak-batch", default=256, type=count, help="B, for memory.")
@click.option("--items", default=60_000, type=click.IntRange(min=3), help="Rows to search, for retrieval.")
@click.option("--features", default=512, type=count, help="D, for retrieval.")
@click.option("--searches", default=2, type=count, help="Rounds, for retrieval.")
@click.option("--ranks", default="2,4", callback=several(int, 1), help="Processes, beside one.")
@click.option("--markdown", is_flag=True, help="Print Markdown.")
@click.option("--json", "path", type=click.Path(dir_okay=False, path_type=Path), help="Write every figure to a file.")
def main(names, markdown, path, **options):
    """Measure NAMES, or everything: what a step, the enqueue, the memory and a search cost.

    Contenders take turns in one run. The figures are of this machine as it is now: leave it to them.
    """
    options = Options(**options)
    for batch, sizes in ((options.batch, options.sizes), (options.peak_batch, options.peak_sizes)):
        if batch > min(sizes):
            raise click.UsageError(f"a batch must fit into the memory, got {batch} rows for M = {min(sizes)}")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise click.UsageError("this PyTorch sees no CUDA device here")
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
        if path:  # after each, so that a long run that is cut short leaves what it has
            path.write_text(json.dumps({"machine": about} | {n: t.json() for n, t in tables.items()}, indent=1) + "\n")


if __name__ == "__main__":
    main(prog_name="python -m benchmarks")
