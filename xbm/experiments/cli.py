"""The command line."""

from pathlib import Path
from tempfile import TemporaryFile

import click
from rich.console import Console

from xbm import __version__
from xbm.experiments.plan import FULL, QUICK, plan_of


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="xbm")
def main():
    """Cross-Batch Memory for training embeddings."""


@main.command()
@click.option("--seed", type=click.IntRange(0, 2**32 - 1), default=0, show_default=True, help="Of weights and batches.")
@click.option(
    "--steps",
    type=click.IntRange(min=1),
    help=f"Training steps of either run.  [default: {FULL.steps}; quick: {QUICK.steps}]",
)
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    default="xbm-demo",
    show_default=True,
    help="Folder for report.html.",
)
@click.option("--quick", is_flag=True, help="A small data set and few steps: seconds, and no result to speak of.")
def demo(seed, steps, out, quick):
    """Train a small network without and with the memory, and compare.

    Both runs start from the same weights and see the same batches of font glyphs. Ends with a table and a report.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        TemporaryFile(dir=out).close()
    except OSError as error:
        raise click.BadParameter(f"cannot write into {out}: {error.strerror}", param_hint="--out") from error
    from xbm.experiments.demo import run  # imports torch: seconds that --help need not wait for

    run(plan_of(seed=seed, steps=steps, quick=quick), quick=quick, out=out, console=Console())
