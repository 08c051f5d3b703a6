"""The figures of one call."""

from __future__ import annotations

from typing import NamedTuple, Self

from xbm import backends
from xbm.backends import Array


class Report(NamedTuple):
    """Figures of one call, each () float32; NaN if it was not measured."""

    batch_loss: Array  #: in-batch term, as it enters the loss
    memory_loss: Array  #: memory term with its weight, as it enters the loss
    fill: Array  #: filled part of the memory, in [0, 1]
    pairs: Array  #: pairs of an anchor and a memory row with a non-zero weight
    drift: Array  #: mean squared distance between the new and old rows of returning samples; needs ids
    drift_age: Array  #: mean age of these old rows, in calls
    skipped: Array  #: rows not stored so far because they were not finite
    drift_before: Array  #: mean squared distance of the last map's pairs, old row to fresh row
    drift_after: Array  #: the same after each pair was moved by a map fitted without it
    rejected: Array  #: maps so far that were rejected, so that the memory did not move

    def rounded(self) -> Self:
        """Return the figures as float32 constants."""
        xp, ops = backends.of(self.fill)
        return type(self)(*(ops.stop_gradient(xp.astype(one, xp.float32, copy=False)) for one in self))

    def stacked(self) -> Array:
        """Return the figures as one (10,) float32 array."""
        return backends.array_namespace(self.fill).stack(list(self))


REPORT = Report._fields
"""Names of a call's figures, in the order of `Report`."""
