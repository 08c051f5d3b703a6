"""The memory as a metric: the only place of an ordinary model whose state survives a step on every backend."""

from typing import Any

import keras

from xbm import backends
from xbm.integrations.keras.memory import Memory
from xbm.objective import Objective
from xbm.report import REPORT, Report

AVERAGED = {
    "memory_loss": "memory_loss",
    "memory_pairs": "pairs",
    "memory_drift": "drift",
    "memory_drift_before": "drift_before",
    "memory_drift_after": "drift_after",
}
"""Names that `fit` shows, and the figures they are averages of."""


class MemoryMetric(Memory, keras.metrics.Metric):
    """The memory of one model, and the running averages of its figures that `fit` shows.

    The variables of a metric pass through the compiled step of every backend. They are not weights of the model, and
    no optimizer sees them.
    """

    def __init__(self, capacity: int, dtype: str, objective: Objective, *, with_drift: bool) -> None:
        keras.metrics.Metric.__init__(self, name="xbm_memory", dtype="float32")
        self.capacity, self.row_dtype, self.objective = capacity, dtype, objective
        with_maps = objective.compensate is not None and objective.compensate.fits_maps
        shown = {"drift": with_drift, "drift_before": with_maps, "drift_after": with_maps}
        self.averaged = tuple(name for name, figure in AVERAGED.items() if shown.get(figure, True))
        self.attachment: Any = None  # the `Attachment` that uses this memory in the model's steps

        def variable(name: str, size: int, initial: str) -> keras.Variable:
            return keras.Variable(initial, shape=(size,), dtype="float32", trainable=False, autocast=False, name=name)

        self.figures = variable("figures", len(REPORT), "zeros")  # the last training call's
        self.sums, self.weights = (variable(name, len(self.averaged), "zeros") for name in ("sums", "weights"))

    def record(self, report: Report, size: Any, *, training: bool) -> None:
        """Add the figures of a call to the averages, weighted by the batch size; keep those of a training call."""
        if training:
            self.figures.assign(report.stacked())
        xp, _ = backends.of(report.fill)
        figures = xp.stack([getattr(report, AVERAGED[name]) for name in self.averaged])
        size = keras.ops.cast(size, "float32")
        # A drift can be unknown, which is left out; a NaN of the loss must show.
        known = [xp.zeros_like(size) if "drift" in name else size for name in self.averaged]
        weights = xp.where(keras.ops.isnan(figures), xp.stack(known), size)
        seen = xp.where(weights > 0, figures * weights, xp.zeros_like(weights))
        self.sums.assign(self.sums.value + seen)
        self.weights.assign(self.weights.value + weights)

    def result(self) -> dict[str, Any]:
        """Return the averages since the last reset, and the memory's fill; nothing if the memory is not in use."""
        if self.attachment is None or not self.begun:
            return {}
        averages = self.sums.value / self.weights.value
        found = {name: averages[i] for i, name in enumerate(self.averaged)}
        return found | {"memory_fill": keras.ops.cast(self.count.value, "float32") / self.capacity}

    def reset_state(self) -> None:
        """Reset the averages; the memory is unchanged."""
        for variable in (self.sums, self.weights):
            variable.assign(keras.ops.zeros_like(variable.value))
