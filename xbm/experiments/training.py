"""The training loop: one run, with or without a memory, that can be interrupted and resumed after any step."""

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

READ_EVERY = 10  # steps between two records of the figures
PROBES = 256  # number of pictures whose slow drift is measured
SHIFT = 0x5817F7  # separates the random stream of the shifts from that of the batches, which share a seed


class Training:
    """A training run after `step` steps.

    The run is stateless in its random numbers: the initial weights are a function of the seed, the batch and shifts of
    a step are functions of seed and step, and the learning rate is a function of the step. Except for the initial
    weights, all are the same with every framework.

    Parameters
    ----------
    plan : Plan
    pictures : Pictures
        Training pictures.
    watched : Pictures
        Pictures of other classes, for measuring recall during training.
    framework : str
        One of `plan.FRAMEWORKS`.
    measures : bool
        Whether to measure figures, drift and recall during training. With several processes, one is enough.

    Attributes
    ----------
    engine : Engine
        Network, optimiser and memory, from `engines.<framework>`.
    step : int
        Number of steps taken.
    seconds : float
        Duration of the steps, without measurements. The first step is excluded, because libraries load and compile in
        it.
    curves : dict
        Measurements, named as in `report.Run`.
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
        """The last recorded figures, as {name: float}."""
        return {name: values[-1] for name, values in self.curves["figures"].items() if values}

    def run(self, after=lambda step: False):
        """Train until the last step, or until `after` returns true.

        Parameters
        ----------
        after : callable
            Called with the number of steps taken, after each step and its measurements. If it returns true, the
            training stops; call `run` again to continue.

        Raises
        ------
        DivergenceError
            If the loss or an embedding is NaN or infinite. The weights and the memory are then unusable.
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
        """Take the measurements that are due after this step. Has no effect on the training."""
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
        """Evaluate on the given pictures; return the report's `Run` and the retrieval metrics."""
        embeddings = finite(self.engine.embed(pictures.images))
        found = retrieval(embeddings, pictures.labels, k)
        neighbours = metrics.neighbours(embeddings, k=min(SHOWN, len(embeddings) - 1))
        memory, moves = self.plan.weight > 0, self.plan.compensation is not None
        named = f"{'compensated ' if moves else ''}memory of {self.plan.capacity:,} rows"
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
        """Return the state to resume from: named tensors, and JSON-serializable values. PyTorch only.

        Raises
        ------
        DivergenceError
            If a weight is not finite, so that no broken state replaces a good checkpoint.
        """
        tensors, values = self.engine.state()
        for name, value in tensors.items():
            xp = array_namespace(value)
            if name.startswith("encoder.") and not xp.all(xp.isfinite(value)):
                raise DivergenceError(f"{name} is not finite after step {self.step}")
        tensors |= {f"probe.{step}": rows for step, rows in self.probe.past.items()}
        return tensors, values | {"step": self.step, "seconds": self.seconds, "curves": self.curves}

    def load(self, tensors, values):
        """Load a state of the same plan and pictures."""
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
    """The batches of a plan from step `start` on. Each is a function of seed and step, so prefetching is safe."""

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
    """Return the learning rate of each step: cosine decay from `rate` towards 0.

    Uses the recursion of `torch.optim.lr_scheduler.CosineAnnealingLR` and gives bit-identical values. Unlike that
    scheduler it has no state to save, and does not warn if a loss scaler skips the first step.
    """
    rates = [rate]
    for t in range(1, steps):
        rates.append((1 + math.cos(math.pi * t / steps)) / (1 + math.cos(math.pi * (t - 1) / steps)) * rates[-1])
    return rates


def shifted(images, most, *, seed):
    """Shift each picture of (n, C, H, W) at random, by at most `most` pixels in each direction; edge pixels repeat."""
    n, _, height, width = images.shape
    down, right = np.random.default_rng(seed).integers(-most, most, endpoint=True, size=(2, n, 1))
    rows = np.clip(np.arange(height) - down, 0, height - 1)
    columns = np.clip(np.arange(width) - right, 0, width - 1)
    moved = images[np.arange(n)[:, None, None], :, rows[:, :, None], columns[:, None, :]]  # (n, H, W, C)
    return np.ascontiguousarray(np.moveaxis(moved, -1, 1))
