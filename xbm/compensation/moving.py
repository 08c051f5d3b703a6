"""The walk that moves every row of the memory."""

from __future__ import annotations

from typing import Any

from xbm import backends
from xbm.backends import Array, device_of
from xbm.blocks import rows_at_a_time
from xbm.compensation.fitting import Map
from xbm.integers import at_most
from xbm.memory_state import MemoryState
from xbm.normalization import EPS
from xbm.ranks import WHOLE, Shard

CACHE = 2**16  # numbers of the memory in a block on a CPU, which stay in its cache


def moved(state: MemoryState, by: Map, *, interval: int, normalize: bool, shard: Shard = WHOLE) -> MemoryState:
    """Return the memory with every row moved, in place. A row that would not be finite stays.

    Parameters
    ----------
    state : MemoryState
        Consumed: use only the returned one.
    by : Map
        If it is not `good`, no bit changes.
    interval : int
        Calls that the map describes the motion of. A younger row moves by the part of it that the row has missed.
    normalize : bool
        Whether rows have unit length, and keep it.
    shard : Shard
        Slots that the state holds.
    """
    xp, ops = backends.of(state.embeddings)
    V, dtype = state.embeddings, by.shift.dtype
    exposure = xp.where(by.good, exposure_of(state, interval, dtype, shard), 0.0)
    largest, matrix = float(xp.finfo(V.dtype).max), by.matrix
    with ops.full_precision(by.shift):
        offset = by.shift if matrix is None else by.shift - by.centre[None, :] @ matrix
    # A map that is not good can hold NaN.
    offset = xp.where(by.good, offset, xp.zeros_like(offset))
    matrix = None if matrix is None else xp.where(by.good, matrix, xp.zeros_like(matrix))

    def visit(rows: Array, a: Array) -> Array:
        a, v = a[:, None], xp.astype(rows, dtype, copy=False)
        drift = offset if matrix is None else v @ matrix + offset
        new = v + (drift if interval == 1 else a * drift)  # interval 1: exposure is 0 or 1
        if normalize:
            length = xp.sqrt(xp.sum(new * new, axis=1, keepdims=True))
            going = (a > 0) & (length > EPS)
            scale = xp.where(going, 1 / xp.where(going, length, 1.0), 0.0)
            # A sum of finite products is several times as fast as `where` between rows.
            found = new * scale + v * xp.where(going, xp.zeros_like(a), 1.0)
        else:
            going = (a > 0) & xp.all(xp.abs(new) <= largest, axis=1, keepdims=True)
            found = xp.where(going, new, v)
        return xp.astype(found, rows.dtype, copy=False)

    size = rows_at_a_time(V, V.shape[0], width=V.shape[1], host=CACHE)
    with ops.full_precision(by.shift):
        return state._replace(embeddings=ops.rewrite(V, visit, exposure, size))


def exposure_of(state: MemoryState, interval: int, dtype: Any, shard: Shard) -> Array:
    """Return (m,) the part of the last `interval` calls that each row has been in the memory; 0 for an empty slot."""
    xp, _ = backends.of(state.embeddings)
    filled = xp.arange(state.labels.shape[0], dtype=state.count.dtype, device=device_of(state.labels))
    age = xp.clip(state.step - state.stored_at, min=0, max=interval)
    return xp.where(filled < count_of(state, shard), xp.astype(age, dtype) / interval, 0.0)


def count_of(state: MemoryState, shard: Shard) -> Array:
    """Return the number of filled slots of a state, which are its first ones."""
    xp, _ = backends.of(state.embeddings)
    m = state.labels.shape[0]
    return at_most(xp.clip(state.count - shard.first(m), min=0), m)
