"""The schedule of the memory term: its weight, its warm-up, and the ramp between them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, TypedDict

from xbm import backends, checks
from xbm.backends import Array, device_of
from xbm.integers import at_most
from xbm.memory_state import MemoryState
from xbm.options import Options, number, option, whole

DRIFT_DECAY = 0.9  # of the running mean of the drift, per call with returning samples


class WarmUp(NamedTuple):
    """State of a warm-up that ends when the drift is small."""

    drift: Array  #: () float32, running mean of the squared distance of returning samples; NaN before the first
    counted: Array  #: () integer, calls since the memory term began to count, at most `ramp`; 0 during the warm-up


@dataclass(frozen=True, kw_only=True)
class Schedule(Options):
    """When the memory term counts, and with which weight."""

    weight: float = option(
        1.0,
        number(at_least=0),
        """Weight of the memory term, at least 0. With 0, rows are stored but never compared.""",
    )
    warmup: int = option(
        1000,
        whole(at_least=0),
        """Training calls before the memory term counts. Rows are stored meanwhile.""",
    )
    settle: float | None = option(
        None,
        checks.positive,
        """Squared distance, above 0. After `warmup` calls, the memory term starts to count as soon as the drift is at
        most this: the running mean of the squared distance between the new and old rows of returning samples. Training
        calls then need ids.""",
    )
    ramp: int = option(
        0,
        whole(at_least=0),
        """Calls over which the weight of the memory term rises to `weight`; 0 = full weight from the first call on.""",
    )

    def begin_warmup(self, memory: MemoryState) -> WarmUp | None:
        """Return the state of the warm-up before the first call; None if the step number alone decides."""
        if self.settle is None:
            return None
        xp, _ = backends.of(memory.embeddings)
        device = device_of(memory.embeddings)
        return WarmUp(
            drift=xp.full((), xp.nan, dtype=xp.float32, device=device),
            counted=xp.zeros((), dtype=memory.count.dtype, device=device),
        )

    def observe(self, state: WarmUp | None, drift: Array, step: Array) -> WarmUp | None:
        """Return the state of the warm-up after a call with this drift, () floating point, NaN if unknown."""
        if state is None or self.settle is None:
            return state
        xp, _ = backends.of(state.drift)
        new = xp.astype(drift, state.drift.dtype, copy=False)
        mean = xp.where(xp.isnan(state.drift), new, DRIFT_DECAY * state.drift + (1 - DRIFT_DECAY) * new)
        mean = xp.where(xp.isnan(new), state.drift, mean)
        counts = (state.counted > 0) | ((step >= self.warmup) & (mean <= self.settle))
        more = at_most(state.counted + 1, max(self.ramp, 1))
        return WarmUp(mean, xp.where(counts, more, state.counted))

    def calls_counted(self, state: WarmUp | None, step: Array) -> Array:
        """Return (), how many calls the memory term has counted in, this one included; below 1 in the warm-up."""
        return step - self.warmup + 1 if self.settle is None or state is None else state.counted

    def weight_after(self, counted: Array, dtype: Any) -> Any:
        """Return the weight of the memory term, from `calls_counted`."""
        if not self.ramp:
            return self.weight
        xp, _ = backends.of(counted)
        return self.weight * xp.astype(at_most(xp.clip(counted, min=0), self.ramp), dtype) / self.ramp


class ScheduleOptions(TypedDict, total=False):
    """The options of a `Schedule`, for type checkers."""

    weight: float
    warmup: int
    settle: float | None
    ramp: int
