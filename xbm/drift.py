"""Drift: how far a row has moved since it was stored.

When a sample comes back, the memory still holds its old row: the distance between the two is the slow drift of
the XBM paper, D(x, t; dt) = |f(x; theta_t) - f(x; theta_{t-dt})|^2, measured without one extra forward pass.
"""

from typing import Any, NamedTuple

from array_api_compat import device as device_of

from xbm import backends, checks

Array = Any


class Drift(NamedTuple):
    """Mean over the stored rows of samples that came back; NaN where none did."""

    distance: Array  # () squared Euclidean distance between new and old row
    age: Array  # () training calls since the old row was stored


def returning(state, embeddings, ids):
    """Measure the drift of samples that come back, before their new rows are written.

    Takes O(M log B + B D): ids are joined by sorting the batch's, and at most B old rows, the newest, are read.

    Parameters
    ----------
    state : MemoryState
        The memory before the batch is stored.
    embeddings : (B, D)
        New rows, as they will be compared and stored.
    ids : (B,) integer
        Samples of the new rows, negative = none.

    Returns
    -------
    Drift

    Raises
    ------
    TypeError, ValueError
        If an input does not fit the memory.

    Examples
    --------
    >>> import numpy as np, xbm
    >>> state = xbm.init(capacity=4, dim=2)
    >>> state = xbm.enqueue(state, np.asarray([[1.0, 0.0]]), np.asarray([0]), ids=np.asarray([7]))
    >>> drift = xbm.drift.returning(xbm.advance(state), np.asarray([[0.0, 1.0]]), np.asarray([7]))
    >>> float(drift.distance), float(drift.age)
    (2.0, 1.0)
    """
    checks.embeddings("embeddings", embeddings, state.embeddings)
    checks.integers("ids", ids, embeddings, state.embeddings)
    xp, _ = backends.of(state.embeddings)
    device = device_of(state.embeddings)
    capacity, batch = state.ids.shape[0], embeddings.shape[0]
    if batch == 0:
        nothing = xp.full((), xp.nan, dtype=embeddings.dtype, device=device)
        return Drift(nothing, nothing)

    order = xp.argsort(ids, stable=True)
    ours = xp.take(ids, order)
    newest_first = xp.remainder(state.cursor - 1 - xp.arange(capacity, dtype=xp.int64, device=device), capacity)
    theirs = xp.take(state.ids, newest_first)
    place = xp.clip(xp.searchsorted(ours, theirs), max=batch - 1)
    hit = (xp.take(ours, place) == theirs) & (theirs >= 0)

    # The n-th hit is where the running count of hits reaches n: fixed shapes, and no sort of M numbers.
    found = xp.cumulative_sum(xp.astype(hit, xp.int64))
    nth = xp.searchsorted(found, xp.arange(1, min(batch, capacity) + 1, dtype=xp.int64, device=device))
    valid = nth < capacity
    nth = xp.clip(nth, max=capacity - 1)
    old, new = xp.take(newest_first, nth), xp.take(order, xp.take(place, nth))

    moved = xp.take(embeddings, new, axis=0) - xp.astype(
        xp.take(state.embeddings, old, axis=0), embeddings.dtype, copy=False
    )
    distance = xp.sum(moved**2, axis=1)
    age = xp.astype(state.step - xp.take(state.stored_at, old), embeddings.dtype)
    valid = valid & xp.isfinite(distance)
    n = xp.sum(xp.astype(valid, embeddings.dtype))

    def mean(x):
        return xp.where(n > 0, xp.sum(xp.where(valid, x, 0.0)) / xp.where(n > 0, n, 1.0), xp.nan)

    return Drift(mean(distance), mean(age))
