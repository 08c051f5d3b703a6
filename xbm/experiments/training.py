"""The training loop: one run, with or without a memory, that can be left and taken up again after any step."""

import math
import time

import numpy as np
from array_api_compat import to_device

from xbm import drift, metrics
from xbm.backends import array_namespace
from xbm.experiments import engines
from xbm.experiments.errors import DivergenceError
from xbm.experiments.report import SHOWN, Run
from xbm.experiments.retrieval import finite, retrieval
from xbm.report import REPORT
from xbm.sampling import PKSampler

READ_EVERY = 10  # steps between two readings of the figures
PROBES = 256  # pictures whose drift is followed
SHIFT = 0x5817F7  # tells the shifts' random numbers from the batches', which have the same seed


class Training:
    """A training run after `step` steps.

    No random generator has a state: the initial weights come from the seed, batch and shifts of a step from seed and
    step, its learning rate from the step. With every framework they are the same, but for the initial weights.

    Parameters
    ----------
    plan : Plan
    pictures : Pictures
        To train on.
    watched : Pictures
        Of other classes, on which recall is measured on the way.
    framework : str
        What trains, among `plan.FRAMEWORKS`.
    measures : bool
        Whether figures, drift and recall are measured on the way. One of several processes is enough.

    Attributes
    ----------
    engine : Engine
        Network, optimiser and memory, of `engines.<framework>`.
    step : int
        Steps taken.
    seconds : float
        Spent in them, without the first, in which libraries load and compile, and without what is measured.
    curves : dict
        What was measured, named as in `report.Run`.
    """

    def __init__(self, plan, pictures, watched, framework="torch", *, measures=True):
        self.plan, self.pictures, self.watched, self.measures = plan, pictures, watched, measures
        self.engine = engines.of(framework).Engine(plan, pictures.images)
        probes = np.linspace(0, len(pictures.images) - 1, min(PROBES, len(pictures.images))).round().astype(int)
        self.probed = pictures.images[probes]
        self.probe = drift.Probe(every=plan.probe_every)
        self.step, self.seconds = 0, 0.0
        self.curves = {
            "recall_steps": [],
            "recall": [],
            "figures_steps": [],
            "figures": {name: [] for name in (REPORT if plan.weight else REPORT[:1])},
            "probe_steps": [],
            "probe": {apart: [] for apart in self.probe.apart},
        }

    @property
    def now(self):
        """The figures as last read, name to float."""
        return {name: values[-1] for name, values in self.curves["figures"].items() if values}

    def run(self, after=lambda step: False):
        """Train to the end.

        Parameters
        ----------
        after : callable
            Called with the number of steps after each, once all is done that belongs to it; the training is left
            there, to be gone on with, if it returns true.

        Raises
        ------
        DivergenceError
            When the loss or an embedding is NaN or infinite. The weights and the memory are then no longer of use.
        """
        first = self.step + 1
        if self.step == 0:
            self._measure()

        def took(loss):
            nonlocal started
            taken = time.perf_counter() - started
            if not math.isfinite(loss):
                raise DivergenceError(f"the loss is {loss} at step {self.step + 1}")
            self.step += 1
            if self.step > first:
                self.seconds += taken
            self._measure()
            end = after(self.step)
            started = time.perf_counter()
            return end

        started = time.perf_counter()
        if self.step < self.plan.steps:
            self.engine.fit(Batches(self.plan, self.pictures, self.step), took)

    def _measure(self):
        """Read what is due after this step. Changes nothing that the training depends on."""
        if not self.measures:
            return
        step, curves, last = self.step, self.curves, self.step == self.plan.steps
        if step and (step % READ_EVERY == 0 or last):
            now = self.engine.figures()
            curves["figures_steps"].append(step)
            for name, values in curves["figures"].items():
                values.append(now[name])
        if self.probe.due(step):
            found = self.probe.record(step, finite(self.engine.embed(self.probed)))
            if found:
                curves["probe_steps"].append(step)
                for apart, values in curves["probe"].items():
                    values.append(found.get(apart, math.nan))
        if step % self.plan.evaluate_every == 0 or last:
            embeddings = finite(self.engine.embed(self.watched.images))
            curves["recall_steps"].append(step)
            curves["recall"].append(retrieval(embeddings, self.watched.labels).recall[1])

    def outcome(self, pictures, k=(1,)):
        """Return the report's `Run` on some pictures, and the retrieval metrics among them."""
        embeddings = finite(self.engine.embed(pictures.images))
        found = retrieval(embeddings, pictures.labels, k)
        neighbours = metrics.neighbours(embeddings, k=min(SHOWN, len(embeddings) - 1))
        memory, moves = self.plan.weight > 0, self.plan.compensation is not None
        named = f"{'moving ' if moves else ''}memory of {self.plan.capacity:,} rows"
        run = Run(
            name=named if memory else "in-batch only",
            **self.curves,
            recall_at_1=found.recall[1],
            r_precision=found.r_precision,
            map_at_r=found.map_at_r,
            seconds=self.seconds,
            memory_megabytes=self.engine.memory_bytes / 1e6 if memory else 0.0,
            neighbours=np.asarray(to_device(neighbours, "cpu")),
        )
        return run, found

    def state(self):
        """Return all that going on needs: tensors by name, and the rest as values that JSON holds. PyTorch's alone.

        Raises
        ------
        DivergenceError
            If a weight is not finite, so that nobody keeps such a state for a good one.
        """
        tensors, values = self.engine.state()
        for name, value in tensors.items():
            xp = array_namespace(value)
            if name.startswith("encoder.") and not xp.all(xp.isfinite(value)):
                raise DivergenceError(f"{name} is not finite after step {self.step}")
        tensors |= {f"probe.{step}": rows for step, rows in self.probe.past.items()}
        return tensors, values | {"step": self.step, "seconds": self.seconds, "curves": self.curves}

    def load(self, tensors, values):
        """Take up a state of the same plan and pictures."""
        self.engine.load(tensors, values)
        self.probe.past = {
            int(name.removeprefix("probe.")): rows.to(self.engine.device)
            for name, rows in tensors.items()
            if name.startswith("probe.")
        }
        self.step, self.seconds = values["step"], values["seconds"]
        probe = {int(apart): readings for apart, readings in values["curves"]["probe"].items()}
        self.curves = values["curves"] | {"probe": probe}


class Batches:
    """The batches of a plan from a step on, each a function of seed and step: whoever asks ahead disturbs nothing."""

    def __init__(self, plan, pictures, start=0):
        self.plan, self.pictures, self.start = plan, pictures, start
        self.rates = cosine(plan.learning_rate, plan.steps)
        self.sampler = PKSampler(pictures.labels, classes=plan.classes, instances=plan.instances, seed=plan.seed)

    def __len__(self):
        return self.plan.steps - self.start

    def __iter__(self):
        for step in range(self.start, self.plan.steps):
            rows = self.sampler.batch(step)
            images = self.pictures.images[rows]
            if self.plan.shift:
                images = shifted(images, self.plan.shift, seed=(self.plan.seed, SHIFT, step))
            yield engines.Batch(images, self.pictures.labels[rows], rows, self.rates[step])


def cosine(rate, steps):
    """Return the learning rate of each step: from `rate` towards 0 along half a cosine.

    Made as `torch.optim.lr_scheduler.CosineAnnealingLR` makes it, one from the other, to the last bit; that one has a
    state to keep, and complains where a loss scaler skips the first step.
    """
    rates = [rate]
    for t in range(1, steps):
        rates.append((1 + math.cos(math.pi * t / steps)) / (1 + math.cos(math.pi * (t - 1) / steps)) * rates[-1])
    return rates


def shifted(images, most, *, seed):
    """Return pictures (n, C, H, W), each moved by up to `most` pixels either way; its edges fill what is bared."""
    n, _, height, width = images.shape
    down, right = np.random.default_rng(seed).integers(-most, most, endpoint=True, size=(2, n, 1))
    rows = np.clip(np.arange(height) - down, 0, height - 1)
    columns = np.clip(np.arange(width) - right, 0, width - 1)
    moved = images[np.arange(n)[:, None, None], :, rows[:, :, None], columns[:, None, :]]  # (n, H, W, C)
    return np.ascontiguousarray(np.moveaxis(moved, -1, 1))
