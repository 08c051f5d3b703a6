"""The slots of the memory that store a batch: consecutive ones round the ring, or the slot of an older copy.

Shapes are fixed: a batch of B rows always writes min(B, M) different slots. A slot without a new row gets its old row
again.
"""

from __future__ import annotations

from typing import NamedTuple

from xbm import backends
from xbm.backends import Array, device_of
from xbm.integers import at_most
from xbm.memory_state import MemoryState
from xbm.ranks import HERE, WHOLE, Shard, Spread


class Placement(NamedTuple):
    """The places of a batch: if `valid[n]`, row `source[n]` goes to `slots[n]`, else the slot is rewritten as it is."""

    source: Array  #: (n,) integer, index in the batch; n = min(B, m)
    slots: Array  #: (n,) integer, all different, among the m rows of the state
    valid: Array  #: (n,) bool
    appended: Array  #: () integer, rows by which the cursor advances
    capacity: int  #: M, slots of the ring: m, or the sum over all shards
    own: Array | None  #: (B,) integer, slot of each row in the ring, -1 = none; None if all are appended: `own_slots`


def place(
    state: MemoryState,
    keep: Array,
    *,
    replace: Array | None = None,
    shard: Shard = WHOLE,
    spread: Spread = HERE,
) -> Placement:
    """Return the places of the rows of a batch.

    Parameters
    ----------
    state : MemoryState
        The memory before the batch is stored, or a shard of it.
    keep : (B,) bool
        Rows to store.
    replace : (B,) integer, optional
        Samples whose older rows are replaced, -1 = none, in the dtype of the memory's ids.
    shard : Shard
        Slots that the state holds. Rows of other slots are not stored here.
    spread : Spread
        How the batch is spread over the ranks that hold the shards.
    """
    m = state.labels.shape[0]
    capacity = m * shard.shards
    if replace is not None:
        own, appended = _replacing(state, keep, replace, shard, spread)
        return _spread(shard.local(own, m), appended, own, m, capacity)
    if shard.shards == 1:
        return _run(state, keep)
    xp, _ = backends.of(keep)
    own = _appended_slots(state, keep, capacity)
    return _spread(shard.local(own, m), xp.sum(xp.astype(keep, own.dtype)), own, m, capacity)


def own_slots(state: MemoryState, keep: Array, placement: Placement) -> Array:
    """Return (B,) the slot that will hold each row of a batch; -1 if none will."""
    return _appended_slots(state, keep, placement.capacity) if placement.own is None else placement.own


def _run(state: MemoryState, keep: Array) -> Placement:
    """Return the places of rows that are all appended.

    The kept rows are moved to the front, and the last n of them go to consecutive slots. If fewer than n are kept, the
    remaining entries are not valid.
    """
    xp, ops = backends.of(state.embeddings)
    capacity, integer = state.embeddings.shape[0], state.cursor.dtype
    run = ops.length(keep, most=capacity)
    kept = xp.sum(xp.astype(keep, integer))
    kept_first = xp.argsort(xp.astype(~keep, xp.int8), stable=True)
    nth = xp.clip(kept - run, min=0) + xp.arange(run, dtype=integer, device=device_of(state.embeddings))
    slots = xp.remainder(state.cursor + nth, capacity)
    return Placement(xp.take(kept_first, nth, axis=0), slots, nth < kept, kept, capacity, None)


def _appended_slots(state: MemoryState, keep: Array, capacity: int) -> Array:
    """Return (B,) the slot that holds each row after the rows of `keep` are appended; -1 if none does."""
    xp, ops = backends.of(state.embeddings)
    rank = ops.running_sum(xp.astype(keep, state.cursor.dtype)) - 1
    stays = keep & (rank >= xp.sum(xp.astype(keep, rank.dtype)) - capacity)
    return xp.where(stays, xp.remainder(state.cursor + rank, capacity), -1)


def _replacing(state: MemoryState, keep: Array, ids: Array, shard: Shard, spread: Spread) -> tuple[Array, Array]:
    """Return (B,) the slot that will hold each row, -1 = none, and () the number of rows that are appended.

    Rows are appended if their sample has no row yet. It takes O((m + B) log B).
    """
    xp, ops = backends.of(state.embeddings)
    device, integer, m = device_of(state.embeddings), state.ids.dtype, state.ids.shape[0]
    ids = xp.where(keep, ids, -1)
    every = xp.arange(ops.length(ids), dtype=integer, device=device)

    # The n-th renewed slot is where their running count reaches n: fixed shapes, without sorting m numbers.
    renews = _last(ids, state.ids)
    nth = 1 + xp.arange(ops.length(ids, most=m), dtype=integer, device=device)
    nth = xp.searchsorted(ops.running_sum(xp.astype(renews >= 0, integer)), nth)
    slots = at_most(nth, m - 1)
    filled = (nth < m) & (nth + shard.first(m) < state.count)
    place = _last(xp.where(filled, xp.take(renews, slots), -1), every)
    here = xp.where(place >= 0, shard.first(m) + xp.take(slots, xp.clip(place, min=0)), -1)
    slot = spread.largest(here)
    returns = slot >= 0

    newest = (ids < 0) | (_last(ids, ids) == every)
    appended = keep & newest & ~returns
    n = xp.sum(xp.astype(appended, integer))
    capacity = m * shard.shards
    evicted = xp.remainder(slot - state.cursor, capacity) < n
    return xp.where(returns & ~evicted, slot, _appended_slots(state, appended, capacity)), n


def _last(integers: Array, sought: Array) -> Array:
    """Return (m,) the index of the last of `integers` (n,) that equals each of `sought` (m,); -1 if none does.

    All numbers are at least -1, and -1 equals nothing.
    """
    xp = backends.array_namespace(integers)
    none = xp.full((1,), -1, dtype=integers.dtype, device=device_of(integers))
    padded = xp.concat([integers, none])  # so that a search always finds an entry
    order = xp.argsort(padded, stable=True)
    place = xp.take(order, xp.searchsorted(xp.take(padded, order), sought, side="right") - 1)
    return xp.where((sought >= 0) & (xp.take(padded, place) == sought), place, -1)


def _spread(local: Array, appended: Array, own: Array, m: int, capacity: int) -> Placement:
    """Return the places of rows that go to arbitrary slots `local` (B,) among the m of a state, -1 = none.

    First come the rows with a slot, in the order of their slots. The others get the first slots without a row: the k-th
    of these is k plus the number of taken slots before it.
    """
    xp, ops = backends.of(local)
    nth = xp.arange(ops.length(local, most=m), dtype=local.dtype, device=device_of(local))
    by_slot = xp.where(local >= 0, local, m)
    source = xp.take(xp.argsort(by_slot, stable=True), nth)
    owned = xp.take(by_slot, source)
    valid = owned < m
    free = xp.clip(nth - xp.sum(xp.astype(valid, local.dtype)), min=0)
    free = free + xp.searchsorted(xp.where(valid, owned - nth, m), free, side="right")
    return Placement(source, xp.where(valid, owned, free), valid, appended, capacity, own)
