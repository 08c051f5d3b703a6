"""The state of drift compensation: what a memory remembers of its rows' motion."""

from __future__ import annotations

from typing import NamedTuple

from xbm import backends
from xbm.backends import Array, device_of
from xbm.compensation.fitting import Map
from xbm.memory_state import MemoryState


class Motion(NamedTuple):
    """State of drift compensation (D = embedding size); float32, but for `rejected`."""

    shift: Array  #: (D,) shift from the last batch
    trust: Array  #: () running mean of the squared distance that a shift saved the next batch; shift only while > 0
    before: Array  #: () mean squared distance of the last map's pairs, old row to fresh row; NaN before the first map
    after: Array  #: () the same after each pair was moved by a map fitted without it
    rejected: Array  #: () integer, maps so far that were rejected, so that the memory did not move


def still(memory: MemoryState) -> Motion:
    """Return the motion of a memory that has not moved."""
    xp, _ = backends.of(memory.embeddings)
    device = device_of(memory.embeddings)

    def scalar(value: float) -> Array:
        return xp.full((), value, dtype=xp.float32, device=device)

    return Motion(
        shift=xp.zeros((memory.embeddings.shape[1],), dtype=xp.float32, device=device),
        trust=scalar(0.0),
        before=scalar(xp.nan),
        after=scalar(xp.nan),
        rejected=xp.zeros((), dtype=memory.count.dtype, device=device),
    )


def after_fit(motion: Motion, found: Map, *, rejected: Array) -> Motion:
    """Return the motion with the figures of a map, if the map had any pairs."""
    xp, _ = backends.of(found.before)
    fitted, after = xp.isfinite(found.before), xp.where(found.good, found.after, found.before)
    return motion._replace(
        before=xp.where(fitted, xp.astype(found.before, xp.float32, copy=False), motion.before),
        after=xp.where(fitted, xp.astype(after, xp.float32, copy=False), motion.after),
        rejected=motion.rejected + xp.astype(rejected, motion.rejected.dtype),
    )
