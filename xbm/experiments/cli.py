"""The command line."""

import os
import re
from contextlib import contextmanager
from math import isfinite
from pathlib import Path
from tempfile import TemporaryFile

import click
from click.core import ParameterSource
from rich.console import Console

from xbm import Compensation, Objective, __version__
from xbm.experiments.errors import DivergenceError, InputError, LostError, ToldError
from xbm.experiments.plan import (
    CURVE_POINTS,
    FRAMEWORKS,
    FULL,
    NETWORKS,
    PARTS,
    PRECISIONS,
    QUICK,
    Config,
    plan_of,
    warmup_of,
)
from xbm.losses import LOSSES, PAIR_REDUCTIONS, REDUCED
from xbm.mining import MINERS
from xbm.options import declared

# Modules that import torch are imported inside the commands, to keep --help fast.

SEED = click.IntRange(0, 2**32 - 1)
COUNT = click.IntRange(min=1)
THREADS = click.IntRange(1, 512)
SIDE = click.IntRange(1, 8192)  # pixels
EXISTING = click.Path(exists=True, path_type=Path)
FOLDER = click.Path(file_okay=False, path_type=Path)


class Finite(click.FloatRange):
    """A finite number in a range. click's own range check accepts NaN."""

    def convert(self, value, param, ctx):
        number = super().convert(value, param, ctx)
        return number if isfinite(number) else self.fail(f"{value} is not a finite number", param, ctx)


class OnRanks(click.Command):
    """A command that several processes may run together. On a user error of any rank, rank 0 prints it and all exit."""

    def make_context(self, *arguments, **options):
        try:
            return super().make_context(*arguments, **options)
        except click.ClickException:
            with _one_voice():
                raise

    def invoke(self, ctx):
        with _one_voice():
            return super().invoke(ctx)


def declared_option(source, name, *, note="", **settings):
    """Declare a command-line option for an option of `Objective` or `Compensation`, with its description from there.

    The default is the one of `Config`, unless given.
    """
    description = " ".join(declared(source)[name].metadata["description"].split())
    summary = re.split(r"[:.](?= |$)", description, maxsplit=1)[0]
    default = {} if name == "reduction" else {"default": getattr(Config, name), "show_default": True}
    return click.option(f"--{name}", help=f"{summary}. {note}".strip(), **default | settings)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="xbm")
def main():
    """Cross-Batch Memory for training embeddings."""


@main.command()
@click.option("--seed", type=SEED, default=0, show_default=True, help="Seed of weights and batches.")
@click.option("--steps", type=COUNT, help=f"Training steps of each run.  [default: {FULL.steps}; quick: {QUICK.steps}]")
@click.option(
    "--framework", type=click.Choice(FRAMEWORKS), default="torch", show_default=True, help="Training framework."
)
@click.option("--out", type=FOLDER, default="xbm-demo", show_default=True, help="Folder for report.html.")
@click.option("--quick", is_flag=True, help="Small data set and few steps: takes seconds, for a smoke test only.")
def demo(seed, steps, framework, out, quick):
    """Compare training without a memory, with a memory, and with a compensated memory.

    All runs start from the same weights and see the same batches of font glyphs. Prints a table and writes an HTML
    report.
    """
    _writable(out)
    with refusing():
        from xbm.experiments.demo import run

        plan = plan_of(seed=seed, steps=steps, quick=quick)
        run(plan, framework=framework, quick=quick, out=out, console=_console())


@main.command(cls=OnRanks)
@click.argument("data", required=False, type=EXISTING)
@click.option("--out", type=FOLDER, required=True, help="Folder for config, metrics, report and checkpoint.")
@click.option("--resume", is_flag=True, help="Resume the run in --out with its original options.")
@click.option("--network", type=click.Choice(NETWORKS), default=Config.network, show_default=True)
@click.option("--dim", type=COUNT, default=Config.dim, show_default=True, help="Embedding dimension.")
@declared_option(Objective, "loss", type=click.Choice(sorted(LOSSES)))
@declared_option(Objective, "miner", type=click.Choice([*sorted(MINERS), "none"]), default="none")
@declared_option(
    Objective,
    "reduction",
    type=click.Choice(PAIR_REDUCTIONS),
    note=f"For {', '.join(REDUCED)}.  [default: mean]",
)
@click.option("--capacity", type=COUNT, default=Config.capacity, show_default=True, help="Rows of the memory.")
@declared_option(
    Objective,
    "warmup",
    type=click.IntRange(min=0),
    default=None,
    note=f"[default: {Config.warmup}, at most a quarter of the steps]",
)
@declared_option(Objective, "weight", type=Finite(min=0), note="0 trains without a memory.")
@declared_option(Compensation, "follow", is_flag=True)
@declared_option(Compensation, "probes", type=click.IntRange(min=0), note="0, or at least 8.")
@declared_option(Compensation, "every", type=COUNT, metavar="STEPS")
@click.option(
    "--classes", type=click.IntRange(min=2), default=Config.classes, show_default=True, help="Classes per batch (P)."
)
@click.option(
    "--instances", type=COUNT, default=Config.instances, show_default=True, help="Pictures per class in a batch (K)."
)
@click.option("--steps", type=COUNT, default=Config.steps, show_default=True)
@click.option(
    "--learning-rate",
    type=Finite(min=0, min_open=True),
    default=Config.learning_rate,
    show_default=True,
    help="Initial learning rate of Adam, with cosine decay to 0.",
)
@click.option("--seed", type=SEED, default=Config.seed, show_default=True, help="Seed of weights, batches and shifts.")
@click.option("--device", default=Config.device, show_default=True, help="PyTorch device: cpu, cuda, cuda:1, ...")
@click.option("--precision", type=click.Choice(PRECISIONS), default=Config.precision, show_default=True)
@click.option("--threads", type=THREADS, help="CPU threads.  [default: PyTorch's default]")
@click.option(
    "--shift",
    type=click.IntRange(min=0),
    default=Config.shift,
    show_default=True,
    help="Maximum random translation of a picture, in pixels.",
)
@click.option("--size", type=SIDE, help="Resize every picture to SIZE x SIZE pixels.")
@click.option(
    "--split-by", metavar="NAME", help="Array of the .npz with a group per picture; the split keeps groups whole."
)
@click.option("--split-seed", type=SEED, default=Config.split_seed, show_default=True, help="Seed of the class split.")
@click.option("--checkpoint-every", type=COUNT, default=Config.checkpoint_every, show_default=True, metavar="STEPS")
@click.option("--evaluate-every", type=COUNT, metavar="STEPS", help="[default: a tenth of the steps]")
@click.pass_context
def train(ctx, data, out, resume, **options):
    """Train on your own pictures.

    DATA is a folder with one subfolder per class, or an .npz with the arrays `images` and `labels`. The classes are
    split at random: half for training, a tenth for validation during training, the rest for one test at the end.

    Ctrl-C and SIGTERM save a checkpoint; continue with --resume. Under torchrun, the processes share each batch.
    """
    if options["miner"] == "none":
        options["miner"] = None
    if data is not None:
        options["data"] = str(data.resolve())
        if out.resolve().is_relative_to(data.resolve()):
            raise click.BadParameter(f"{out} is inside the data folder {data}: choose another", param_hint="--out")
    if resume:
        again = [name for name in options if ctx.get_parameter_source(name) == ParameterSource.COMMANDLINE]
    elif data is None:
        raise click.UsageError("Missing argument 'DATA': the pictures to train on, required without --resume.")
    _writable(out, make=not resume)
    with refusing():
        from xbm.experiments import ranks, runs

        console = _console(quiet=not ranks.first())
        if resume:
            signal = runs.resume(out, {name: options[name] for name in again}, console)
        else:
            signal = runs.begin(resolved(options), out, console)
    if signal:
        ctx.exit(128 + signal)


def resolved(options):
    """Return the `Config` of the given options, with defaults for the options that were not given."""
    from torch import get_num_threads

    left_open = {
        "warmup": warmup_of(options["steps"]),
        "reduction": "mean" if options["loss"] in REDUCED else None,
        "threads": get_num_threads(),
        "evaluate_every": -(-options["steps"] // CURVE_POINTS),
    }
    return Config(**options | {name: value for name, value in left_open.items() if options[name] is None})


@main.command("eval")
@click.argument("run", type=EXISTING, metavar="RUN")
@click.option("--data", type=EXISTING, required=True, help="Pictures, as for train.")
@click.option("--classes", type=click.Choice([*PARTS, "all"]), help="[default: test for the run's own data, else all]")
@click.option("--k", type=COUNT, multiple=True, default=(1, 10), show_default=True, help="k of R@k (repeatable).")
@click.option("--size", type=SIDE, help="Resize every picture to SIZE x SIZE pixels.  [default: the run's size]")
@click.option("--device", default=Config.device, show_default=True, help="PyTorch device: cpu, cuda, cuda:1, ...")
@click.option("--threads", type=THREADS, help="CPU threads.  [default: PyTorch's default]")
def evaluate(run, data, classes, k, size, device, threads):
    """Print R@k, R-Precision and MAP@R of a run's encoder.

    RUN is the --out folder of a run, or a checkpoint file.
    """
    with refusing():
        from xbm.experiments import checkpoint, evaluation

        file = run / checkpoint.NAME if run.is_dir() else run
        options = {"size": size, "part": classes, "k": k, "device": device, "threads": threads}
        evaluation.evaluate(file, data, **options, console=_console())


def _console(*, quiet=False):
    """Return a console that prints text verbatim: a path may contain rich's markup."""
    return Console(markup=False, emoji=False, quiet=quiet)


class Refused(click.ClickException):
    """A user error, printed by click, with exit code 2."""

    exit_code = 2


@contextmanager
def refusing():
    """Turn user errors and failures to read or write files into a one-line message and exit code 2."""
    try:
        yield
    except (InputError, DivergenceError) as error:
        raise Refused(str(error)) from error
    except OSError as error:
        raise Refused(f"{error.filename or 'a file'} cannot be read or written: {error.strerror or error}") from error
    except KeyboardInterrupt:
        click.echo("Stopped immediately.", err=True)
        raise click.exceptions.Exit(130) from None


@contextmanager
def _one_voice():
    """Join the process group, if there is one. On a user error of any rank, rank 0 alone prints it and all exit."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        yield
        return
    from xbm.experiments import ranks

    try:
        with ranks.joined():
            try:
                yield
            except (click.ClickException, ToldError) as error:
                told = isinstance(error, ToldError)
                if ranks.first():
                    (Refused(str(error)) if told else error).show()
                if not told:
                    ranks.refuse(error.format_message())
                ranks.agree()  # otherwise the launcher may end rank 0 before it has printed the error
                raise click.exceptions.Exit(Refused.exit_code) from error
    except LostError as error:
        raise click.ClickException(str(error)) from error


def _writable(out, *, make=True):
    """Raise an error if the folder is not writable. If `make`, create it first."""
    try:
        if make:
            out.mkdir(parents=True, exist_ok=True)
        TemporaryFile(dir=out).close()
    except OSError as error:
        raise click.BadParameter(f"cannot write to {out}: {error.strerror}", param_hint="--out") from error
