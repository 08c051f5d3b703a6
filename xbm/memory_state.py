"""The memory's arrays: the state that every transition takes and returns, and the rows in it."""

from __future__ import annotations

from typing import NamedTuple

from xbm import backends, checks
from xbm.backends import Array, array_namespace


class MemoryState(NamedTuple):
    """The memory as arrays of fixed shapes (M = capacity, D = embedding size).

    In every state, slots 0 .. count - 1 are the filled ones, and the rows that one call appends stand in consecutive
    slots of the ring, from the cursor on.
    """

    embeddings: Array  #: (M, D) rows as stored, in the dtype fixed at `init`
    labels: Array  #: (M,) int64, class of each row
    ids: Array  #: (M,) int64, sample of each row; -1 = none
    stored_at: Array  #: (M,) int64, step of the call that stored the row; -1 = empty or stored before step 0
    cursor: Array  #: () int64 in [0, M), the slot written next
    count: Array  #: () int64 in [0, M], filled slots
    step: Array  #: () int64, training calls so far
    skipped: Array  #: () int64, rows not stored so far because they were not finite


class Rows(NamedTuple):
    """Filled rows, oldest first (n = count)."""

    embeddings: Array  #: (n, D)
    labels: Array  #: (n,)
    ids: Array  #: (n,)
    stored_at: Array  #: (n,)


def class_of_slot(slots: Array) -> Array:
    """Return classes (n,) for rows without labels, one for each slot: the lowest integers of the dtype."""
    return array_namespace(slots).iinfo(slots.dtype).min + slots


def inconsistency(state: MemoryState) -> str | None:
    """Return the first inconsistency of a loaded state as a clause for a message; None if there is none."""
    xp, _ = backends.of(state.embeddings)
    shapes = {name: tuple(array.shape) for name, array in state._asdict().items()}
    rows = shapes["embeddings"]
    if len(rows) != 2 or 0 in rows:
        return f"embeddings must have shape (M, D) with M and D at least 1, got {rows}"
    if state.embeddings.dtype not in checks.floats(xp):
        return f"embeddings must be floating point, got {checks.dtype_name(state.embeddings.dtype)}"
    capacity = rows[0]
    for name in MemoryState._fields[1:]:
        expected = (capacity,) if name in Rows._fields else ()
        if shapes[name] != expected:
            return f"{name} must have shape {expected} beside embeddings {rows}, got {shapes[name]}"
        dtype = getattr(state, name).dtype
        if not xp.isdtype(dtype, "integral"):
            return f"{name} must be integers, got {checks.dtype_name(dtype)}"
    cursor, count, step, skipped = (int(array) for array in state[-4:])
    if not (0 <= cursor < capacity and 0 <= count <= capacity) or (count < capacity and cursor != count):
        return f"cursor {cursor} and count {count} do not belong together in a ring of {capacity} slots"
    if step < 0 or skipped < 0:
        return f"step {step} and skipped {skipped} must be at least 0"
    return None
