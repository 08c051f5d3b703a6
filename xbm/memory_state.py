"""The memory's arrays: the state that every transition takes and returns, and the rows in it."""

from __future__ import annotations

from typing import NamedTuple

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
