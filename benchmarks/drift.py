"""The cost of stale rows, and the gain of each form of compensation, measured by whole training runs.

`python -m benchmarks.drift` trains on the glyphs or on your own pictures: without a memory, with a stale memory, with
each form of compensation, and with a zero-drift oracle, which re-embeds all its rows every few steps. Recall is
measured on classes held out from the training classes, for choosing a form, and on the test classes. This takes far
longer than the other benchmarks.
"""

import json
import time
from collections import defaultdict
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import mean, stdev

import click
import numpy as np
import torch
from rich.console import Console

from benchmarks import machine
from benchmarks.tables import Table
from xbm.compensation import Compensation
from xbm.experiments import glyphs, pictures
from xbm.experiments.engines.torch import Engine, as_input
from xbm.experiments.pictures import Pictures
from xbm.experiments.plan import Plan
from xbm.experiments.retrieval import retrieval
from xbm.experiments.split import split
from xbm.experiments.training import Training
from xbm.integrations.torch.compensation import unchanged_statistics

SETTLED = 0.4  # `settle` of the objective: the memory loss starts once the squared drift is below this
ORACLE_EVERY = 5  # steps between refreshes of the oracle's memory
CHUNK = 256  # rows embedded at a time
STEP = 3  # cost of a training step per sample, in forward passes: one forward, two for the backward pass


@dataclass(frozen=True, kw_only=True)
class Form(Plan):
    """A training run with any form of compensation."""

    name: str = "stale memory"
    options: dict = field(default_factory=dict)  # options of `Compensation`; empty = no compensation
    counts: dict = field(default_factory=dict)  # options of the objective that schedule the memory loss
    refresh: int = 0  # steps between refreshes of the whole memory, 0 = none

    @property
    def compensation(self):
        """The memory's `Compensation`; None if it is off."""
        return Compensation(**self.options) if self.options else None

    @property
    def forward_passes(self):
        """Extra forward passes per training sample."""
        probes = self.options.get("probes", 0) / self.options.get("every", 8)
        return probes / (self.classes * self.instances)


FORMS = {
    "no memory": {"weight": 0.0},
    "stale memory": {},
    "follow": {"options": {"follow": True}},
    "returning ids": {"options": {"follow": False, "returning": True}},
    "follow + returning ids": {"options": {"follow": True, "returning": True}},
    "shift, 32 every 8": {"options": {"follow": False, "probes": 32, "every": 8, "form": "shift"}},
    "map, 32 every 8": {"options": {"follow": False, "probes": 32, "every": 8}},
    "map, 64 every 4": {"options": {"follow": False, "probes": 64, "every": 4}},
    "map, 256 every 4": {"options": {"follow": False, "probes": 256, "every": 4}},
    "follow + map, 32 every 8": {"options": {"follow": True, "probes": 32, "every": 8}},
    "follow + map, 64 every 4": {"options": {"follow": True, "probes": 64, "every": 4}},
    "follow + map, 64 every 16": {"options": {"follow": True, "probes": 64, "every": 16}},
    "ramp 500": {"counts": {"ramp": 500}},
    "follow, settle": {"options": {"follow": True}, "counts": {"settle": SETTLED}, "warmup": 0},
    "oracle": {"refresh": ORACLE_EVERY},
    "oracle, every step": {"refresh": 1},
    "larger batch": {"classes": 1.25},
}


class Studied(Engine):
    """A torch engine with the additional options of a `Form`, such as the oracle's refresh of the whole memory."""

    def __init__(self, plan, images):
        super().__init__(plan, images, **plan.counts)
        self.images, self.refresh, self.steps = images, plan.refresh, 0

    def step(self, images, labels, ids, rate):
        """Take one step, after a refresh if one is due."""
        if self.refresh and self.steps % self.refresh == 0:
            self._refresh()
        self.steps += 1
        return super().step(images, labels, ids, rate)

    @torch.no_grad()
    def _refresh(self):
        n = int(self.xbm.count)
        with unchanged_statistics():
            for start in range(0, n, CHUNK):
                ids = self.xbm.ids[start : min(start + CHUNK, n)].cpu().numpy()
                fresh = self.encoder(as_input(self.images[ids], self.device))
                self.xbm.embeddings[start : start + len(ids)] = torch.nn.functional.normalize(fresh)


def parts_of(data):
    """Return the pictures of the training classes, the held-out classes and the test classes."""
    if data is None:
        train, test = (
            Pictures(one.images[:, None], one.labels, list(one.characters)) for one in glyphs.split(glyphs.load())
        )
        shuffled = np.random.default_rng(7).permutation(len(train.names))
        held_out = {train.names[i] for i in shuffled[: len(shuffled) // 6]}
        kept = [[name for name in train.names if (name in held_out) is out] for out in (False, True)]
        return train.of(kept[0]), train.of(kept[1]), test
    every = pictures.load(data)
    groups = pictures.groups(data, "alphabet", every)
    return tuple(every.of(names) for names in split(every.names, groups=groups, by="alphabet").values())


def one_run(form, parts):
    """Train once; return the results as JSON-serializable values."""
    train, held_out, test = parts
    training = Training(form, train, held_out, measures=False)
    training.engine = Studied(form, train.images)
    started = time.process_time()
    training.run()
    seconds = time.process_time() - started
    found = {"seconds": seconds, "figures": training.engine.figures(), "passes": form.forward_passes}
    for name, part in (("held_out", held_out), ("test", test)):
        scores = retrieval(training.engine.embed(part.images), part.labels)
        found[name] = {"recall_at_1": scores.recall[1], "map_at_r": scores.map_at_r}
    return found


def table(runs, part):
    """Return a table of the means over seeds on a part of the classes, and each form's share of the oracle's gain."""
    result = Table(
        f"{part.replace('_', '-').capitalize()} classes",
        ("data", "M", "form", "seeds", "R@1", "MAP@R", "of the gain", "passes", "seconds"),
        "Means over seeds, with standard deviations in brackets. Of the gain: share of the oracle's gain in MAP@R over "
        "no memory. Passes: extra forward passes per training sample. Seconds: CPU time.",
    )
    seeds = defaultdict(dict)
    for one in runs:
        seeds[one["data"], one["capacity"], one["form"]][one["seed"]] = one
    for (data, capacity, name), by_seed in seeds.items():
        limits = [seeds.get((data, capacity, of), {}) for of in ("no memory", "oracle")]
        common = set(by_seed).intersection(*limits)

        def score(found, which="map_at_r", common=common):
            return mean(found[seed][part][which] for seed in common)

        gain = "-"
        if common:
            low, high = map(score, limits)
            gain = f"{100 * (score(by_seed) - low) / (high - low):.0f} %" if high > low else "-"
        cells = []
        for which in ("recall_at_1", "map_at_r"):
            values = [one[part][which] for one in by_seed.values()]
            cells.append(f"{mean(values):.3f}" + (f" ({stdev(values):.3f})" if len(values) > 1 else ""))
        passes, seconds = (mean(one[key] for one in by_seed.values()) for key in ("passes", "seconds"))
        result.add(
            {"data": data, "capacity": capacity, "form": name, "seeds": by_seed},
            *(data, f"{capacity:,}", name, str(len(by_seed)), *cells, gain, f"{passes:.2g}", f"{seconds:.0f}"),
        )
    return result


@click.command(context_settings={"show_default": True})
@click.argument("forms", nargs=-1, type=click.Choice(list(FORMS)))
@click.option(
    "--data", type=click.Path(exists=True), help="An .npz with images, labels and alphabet; default: the glyphs."
)
@click.option("--capacity", "capacities", multiple=True, default=[2048], type=click.IntRange(min=1))
@click.option("--seed", "seeds", multiple=True, default=[0], type=int)
@click.option("--steps", type=click.IntRange(min=1), help="Training steps; default: 2,500 on the glyphs, else 2,000.")
@click.option("--json", "path", type=click.Path(dir_okay=False, path_type=Path), help="Append the runs to this file.")
@click.option("--part", default="held_out", type=click.Choice(["held_out", "test"]), help="Classes to show.")
@click.option("--markdown", is_flag=True, help="Print Markdown.")
def main(forms, data, capacities, seeds, steps, path, part, markdown):
    """Train with each of FORMS; without FORMS, show the runs stored in the --json file."""
    machine.use_threads(1)
    lines = path.read_text().splitlines() if path and path.exists() else []
    runs = [json.loads(line) for line in lines]
    progress = Console(stderr=True)
    parts = parts_of(data) if forms else None
    base = Form(**({} if data is None else {"classes": 8, "steps": 2000, "shift": 2}))
    base = replace(base, steps=steps or base.steps)
    for seed in seeds:
        for capacity in capacities:
            for name in forms:
                options = dict(FORMS[name])
                options["classes"] = round(base.classes * options.get("classes", 1))
                form = replace(base, name=name, seed=seed, capacity=capacity, **options)
                with progress.status(f"{name}, {capacity:,} rows, seed {seed}"):
                    found = one_run(form, parts)
                called = "glyphs" if data is None else Path(data).stem
                runs.append({"data": called, "capacity": capacity, "form": name, "seed": seed} | found)
                if path:
                    with path.open("a") as file:
                        file.write(json.dumps(runs[-1]) + "\n")
    out = Console(width=None if markdown else 200, soft_wrap=markdown)
    shown = table(runs, part)
    out.print(shown.markdown() if markdown else shown.rich(), highlight=False, markup=False)


if __name__ == "__main__":
    main(prog_name="python -m benchmarks.drift")
