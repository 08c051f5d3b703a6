"""The training loop: one run, with or without a memory, that can be left and taken up again after any step."""

import math
import time

import numpy as np
import torch

from xbm import drift, metrics
from xbm.experiments.errors import DivergenceError
from xbm.experiments.evaluation import as_input, embed, retrieval
from xbm.experiments.networks import BUILDERS
from xbm.experiments.report import SHOWN, Run
from xbm.integrations.torch import XBM
from xbm.objective import REPORT
from xbm.sampling import PKSampler

READ_EVERY = 10  # steps between two readings of the figures
PROBES = 256  # pictures whose drift is followed
SHIFT = 0x5817F7  # tells the shifts' random numbers from the batches', which have the same seed


class Training:
    """A training run after `step` steps.

    No random generator has a state: the initial weights come from the seed, batch and shifts of a step from seed and
    step, its learning rate from the step.

    Parameters
    ----------
    plan : Plan
    pictures : Pictures
        To train on.
    watched : Pictures
        Of other classes, on which recall is measured on the way.

    Attributes
    ----------
    step : int
        Steps taken.
    seconds : float
        Spent in them, without what is measured.
    curves : dict
        What was measured, named as in `report.Run`.
    """

    def __init__(self, plan, pictures, watched):
        self.plan, self.pictures, self.watched = plan, pictures, watched
        self.device = torch.device(plan.device)
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(plan.seed)
            encoder = BUILDERS[plan.network](plan.dim, pictures.images.shape[1:])
        self.encoder = encoder.to(self.device)
        memory = {"capacity": plan.capacity, "warmup": plan.warmup} if plan.weight else {"capacity": 1}
        self.xbm = XBM(
            plan.dim,
            loss=plan.loss,
            miner=plan.miner,
            reduction=plan.reduction,
            weight=plan.weight,
            device=self.device,
            **memory,
        )
        self.optimizer = torch.optim.Adam([*self.encoder.parameters(), *self.xbm.parameters()], lr=plan.learning_rate)
        self.rates = cosine(plan.learning_rate, plan.steps)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=plan.precision == "float16")
        self.autocast = torch.autocast(
            self.device.type, getattr(torch, plan.precision), enabled=plan.precision != "float32"
        )
        self.sampler = PKSampler(pictures.labels, classes=plan.classes, instances=plan.instances, seed=plan.seed)
        self.labels = torch.from_numpy(pictures.labels).to(self.device)
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

    def steps(self):
        """Train to the end; yield after each step, with all done that belongs to it.

        Raises
        ------
        DivergenceError
            When the loss or an embedding is NaN or infinite. The weights and the memory are then no longer of use.
        """
        begun = self.step
        if begun == 0:
            self._measure()
        while self.step < self.plan.steps:
            started = time.perf_counter()
            self._step()
            if self.step > begun + 1:  # in the first, libraries load
                self.seconds += time.perf_counter() - started
            self._measure()
            yield self.step

    def _step(self):
        rows = self.sampler.batch(self.step)
        images = self.pictures.images[rows]
        if self.plan.shift:
            images = shifted(images, self.plan.shift, seed=(self.plan.seed, SHIFT, self.step))
        ids = torch.from_numpy(rows).to(self.device)
        with self.autocast:
            embeddings = self.encoder(as_input(images, self.device))
        loss = self.xbm(embeddings, self.labels[ids], ids=ids)
        if not torch.isfinite(loss):
            raise DivergenceError(f"the loss is {loss.item()} at step {self.step + 1}")
        for group in self.optimizer.param_groups:
            group["lr"] = self.rates[self.step]
        self.optimizer.zero_grad()
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.step += 1

    def _measure(self):
        """Read what is due after this step. Changes nothing that the training depends on."""
        step, curves, last = self.step, self.curves, self.step == self.plan.steps
        if step and (step % READ_EVERY == 0 or last):
            now = dict(self.xbm.report)
            curves["figures_steps"].append(step)
            for name, values in curves["figures"].items():
                values.append(now[name])
        if self.probe.due(step):
            found = self.probe.record(step, embed(self.encoder, self.probed, self.device))
            if found:
                curves["probe_steps"].append(step)
                for apart, values in curves["probe"].items():
                    values.append(found.get(apart, math.nan))
        if step % self.plan.evaluate_every == 0 or last:
            embeddings = embed(self.encoder, self.watched.images, self.device)
            curves["recall_steps"].append(step)
            curves["recall"].append(retrieval(embeddings, self.watched.labels).recall[1])

    def outcome(self, pictures, k=(1,)):
        """Return the report's `Run` on some pictures, and the retrieval metrics among them."""
        embeddings = embed(self.encoder, pictures.images, self.device)
        found = retrieval(embeddings, pictures.labels, k)
        memory = self.plan.weight > 0
        run = Run(
            name=f"memory of {self.plan.capacity:,} rows" if memory else "in-batch only",
            **self.curves,
            recall_at_1=found.recall[1],
            r_precision=found.r_precision,
            map_at_r=found.map_at_r,
            seconds=self.seconds,
            memory_megabytes=sum(buffer.nbytes for buffer in self.xbm.buffers()) / 1e6 if memory else 0.0,
            neighbours=metrics.neighbours(embeddings, k=min(SHOWN, len(embeddings) - 1)).cpu().numpy(),
        )
        return run, found

    def state(self):
        """Return all that going on needs: tensors by name, and the rest as values that JSON holds.

        Raises
        ------
        DivergenceError
            If a weight is not finite, so that nobody keeps such a state for a good one.
        """
        tensors = {f"encoder.{name}": value for name, value in self.encoder.state_dict().items()}
        for name, value in tensors.items():
            if not torch.isfinite(value).all():
                raise DivergenceError(f"{name} is not finite after step {self.step}")
        tensors |= {f"xbm.{name}": value for name, value in self.xbm.state_dict().items()}
        for i, moments in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{i}.{name}": value for name, value in moments.items()}
        tensors |= {f"probe.{step}": rows for step, rows in self.probe.past.items()}
        values = {
            "step": self.step,
            "seconds": self.seconds,
            "scaler": self.scaler.state_dict(),
            "curves": self.curves,
        }
        return tensors, values

    def load(self, tensors, values):
        """Take up a state of the same plan and pictures."""
        self.encoder.load_state_dict(_below("encoder", tensors))
        self.xbm.load_state_dict(_below("xbm", tensors))
        moments = {}
        for name, value in _below("optimizer", tensors).items():
            i, _, which = name.partition(".")
            moments.setdefault(int(i), {})[which] = value
        self.optimizer.load_state_dict(self.optimizer.state_dict() | {"state": moments})
        if values["scaler"]:
            self.scaler.load_state_dict(values["scaler"])
        self.probe.past = {int(step): rows.to(self.device) for step, rows in _below("probe", tensors).items()}
        self.step, self.seconds = values["step"], values["seconds"]
        probe = {int(apart): readings for apart, readings in values["curves"]["probe"].items()}
        self.curves = values["curves"] | {"probe": probe}


def _below(part, tensors):
    return {name.removeprefix(f"{part}."): value for name, value in tensors.items() if name.startswith(f"{part}.")}


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
