"""Drift: how far a row has moved since it was stored, D(x, t; dt) = |f(x; theta_t) - f(x; theta_{t-dt})|^2.

`Probe` measures the drift as the XBM paper does, on a fixed set of samples that are embedded again and again.
`returning` measures it without an extra forward pass: when a sample returns, the memory still holds its old row.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from xbm import backends, checks
from xbm.backends import Array, device_of
from xbm.integers import at_most
from xbm.lookup import bounded, look_up
from xbm.memory_state import MemoryState
from xbm.normalization import normalize as unit
from xbm.ranks import ONE, Ranks, total


class Drift(NamedTuple):
    """Mean over the stored rows of returning samples; NaN without any."""

    distance: Array  #: () squared Euclidean distance between new and old row
    age: Array  #: () training calls since the old row was stored


class Returned(NamedTuple):
    """Samples of a batch that have an old row in the memory, in arrays of fixed length n = min(B, M)."""

    old: Array  #: (n,) integer, slots of the old rows, newest first
    new: Array  #: (n,) integer, index in the batch of the new rows
    valid: Array  #: (n,) bool, entries that hold a sample


def returning(state: MemoryState, embeddings: Array, ids: Array, ranks: Ranks = ONE) -> Drift:
    """Measure the drift of returning samples, before their new rows are written.

    It takes O(M log B + B D): the batch's ids are sorted, and at most B old rows, the newest, are read.

    Parameters
    ----------
    state : MemoryState
        The memory before the batch is stored.
    embeddings : (B, D)
        New rows, as they will be stored.
    ids : (B,) integer
        Samples of the new rows, negative = none.
    ranks : Ranks
        The ranks that hold the memory's shards; at most B old rows of each shard are read.

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
    return measured(state, embeddings, returned(state, ids, ranks), ranks)


def returned(state: MemoryState, ids: Array, ranks: Ranks = ONE) -> Returned | None:
    """Return the samples of a batch with ids (B,) that have an old row in the memory or a shard; None if B is 0."""
    xp, ops = backends.of(state.embeddings)
    device = device_of(state.embeddings)
    rows, batch, integer = state.ids.shape[0], ops.length(ids), state.ids.dtype
    if isinstance(batch, int) and batch == 0:
        return None
    order = xp.argsort(ids, stable=True)
    behind = state.cursor - ranks.shard.first(rows)
    behind = xp.where(
        (behind > 0) & (behind <= rows), behind, rows
    )  # the newest row of this shard is in the slot before
    newest_first = xp.remainder(behind - 1 - xp.arange(rows, dtype=integer, device=device), rows)
    theirs = xp.take(state.ids, newest_first)
    place, known = look_up(bounded(xp.take(ids, order)), theirs)
    hit = known & (theirs >= 0)

    # The n-th hit is where the running count of hits reaches n: fixed shapes, without sorting M numbers.
    found = ops.running_sum(xp.astype(hit, integer))
    nth = xp.searchsorted(found, 1 + xp.arange(ops.length(ids, most=rows), dtype=integer, device=device))
    valid = nth < rows
    nth = at_most(nth, rows - 1)
    return Returned(xp.take(newest_first, nth), xp.take(order, xp.where(valid, xp.take(place, nth), 0)), valid)


def measured(state: MemoryState, embeddings: Array, found: Returned | None, ranks: Ranks = ONE) -> Drift:
    """Return the drift of returning samples, before their new rows (B, D) are written."""
    xp, _ = backends.of(state.embeddings)
    if found is None:
        nothing = xp.full((), xp.nan, dtype=embeddings.dtype, device=device_of(state.embeddings))
        return Drift(nothing, nothing)
    old, new, valid = found
    moved = xp.take(embeddings, new, axis=0) - xp.astype(
        xp.take(state.embeddings, old, axis=0), embeddings.dtype, copy=False
    )
    distance = xp.sum(moved**2, axis=1)
    age = xp.astype(state.step - xp.take(state.stored_at, old), embeddings.dtype)
    valid = valid & xp.isfinite(distance)
    sums = [xp.sum(xp.where(valid, one, 0.0)) for one in (distance, age, xp.ones_like(distance))]
    *sums, n = total(ranks.each, *sums) if ranks.sharded else sums
    return Drift(*(xp.where(n > 0, one / xp.where(n > 0, n, 1.0), xp.nan) for one in sums))


def between(old: Array, new: Array, *, normalize: bool = True) -> Array:
    """Return the mean squared distance between two embeddings of the same samples, in [0, 4] for unit rows.

    Parameters
    ----------
    old, new : (n, D) floating point
        Row i of both is the same sample.
    normalize : bool
        Compare x / max(|x|, 1e-6), as the memory stores them, or x itself.

    Returns
    -------
    () floating point

    Raises
    ------
    TypeError, ValueError
        If the two differ in library, device or shape.

    Examples
    --------
    >>> import numpy as np, xbm
    >>> old, new = np.asarray([[1.0, 0.0], [0.0, 1.0]]), np.asarray([[0.0, 3.0], [0.0, 2.0]])
    >>> float(xbm.drift.between(old, new))
    1.0
    """
    checks.flag("normalize", normalize)
    xp, ops = backends.of(old)
    checks.same_library("new", new, old)
    shapes = tuple(old.shape), tuple(new.shape)
    if shapes[0] != shapes[1] or len(shapes[0]) != 2 or 0 in shapes[0]:
        raise ValueError(f"old and new must be (n, D) rows of the same samples, got {shapes[0]} and {shapes[1]}")
    if not all(dtype in checks.floats(xp) for dtype in (old.dtype, new.dtype)):
        raise TypeError(
            f"old and new must be floating point, got {checks.dtype_name(old.dtype)} and {checks.dtype_name(new.dtype)}"
        )
    dtype = xp.float64 if xp.float64 in (old.dtype, new.dtype) else xp.float32
    old, new = (xp.astype(ops.stop_gradient(rows), dtype, copy=False) for rows in (old, new))
    if normalize:
        (old, _), (new, _) = unit(old), unit(new)
    return xp.mean(xp.sum((new - old) ** 2, axis=1))


class Probe:
    """The slow drift over a training run: mean D(x, t; dt) of a fixed set of samples, for several dt.

    It needs embeddings at the steps that are `due`, and keeps them only while a later step needs them.

    Parameters
    ----------
    apart : sequence of int
        The dt, in training steps, each at least 1.
    every : int
        Steps between two readings: t is a multiple of it.
    past : mapping of int to (n, D), optional
        `past` of a saved probe, to continue from.

    Attributes
    ----------
    past : dict of int to (n, D)
        Embeddings of the samples by step, while a later step needs them.

    Raises
    ------
    TypeError, ValueError
        If a number is not an int of at least 1.

    Examples
    --------
    >>> import numpy as np, xbm
    >>> probe = xbm.drift.Probe(apart=(1, 2), every=4)
    >>> for step in range(9):
    ...     if probe.due(step):
    ...         turned = np.asarray([[np.cos(step / 10), np.sin(step / 10)]])
    ...         found = probe.record(step, turned)
    >>> {apart: round(D, 4) for apart, D in found.items()}  # steps 7 and 6 against step 8
    {1: 0.01, 2: 0.0399}

    References
    ----------
    Wang, Zhang, Huang, Scott, "Cross-Batch Memory for Embedding Learning", CVPR 2020, section 3.1.
    """

    def __init__(
        self,
        *,
        apart: Iterable[int] = (10, 100, 1000),
        every: int = 100,
        past: Mapping[int, Array] | None = None,
    ) -> None:
        self.apart, self.every = tuple(apart), every
        for name, value in (*(("apart", one) for one in self.apart), ("every", every)):
            checks.whole_number(name, value, at_least=1)
        self.past = dict(past or {})

    def due(self, step: int) -> bool:
        """Return whether this step's embeddings are needed, for a reading at this step or a later one."""
        return step % self.every == 0 or any(self._reading_needs(step, apart) for apart in self.apart)

    def record(self, step: int, embeddings: Array) -> dict[int, float]:
        """Store the samples' embeddings at a step that is due, and return {dt: mean D} where both steps are known.

        Empty unless the step is a multiple of `every`. Reading the distances synchronises the device.

        Parameters
        ----------
        step : int
            Training steps so far, larger at each call.
        embeddings : (n, D) floating point
            Embeddings of the same samples in the same order at each call, from the encoder in evaluation mode.
        """
        found = {}
        if step % self.every == 0:
            old = {apart: self.past[step - apart] for apart in self.apart if step - apart in self.past}
            found = {apart: float(between(rows, embeddings)) for apart, rows in old.items()}
        _, ops = backends.of(embeddings)
        self.past[step] = ops.stop_gradient(embeddings)
        self.past = {then: rows for then, rows in self.past.items() if self._needed_after(then, step)}
        return found

    def _reading_needs(self, then: int, apart: int) -> bool:
        return (then + apart) % self.every == 0

    def _needed_after(self, then: int, now: int) -> bool:
        return any(then + apart > now and self._reading_needs(then, apart) for apart in self.apart)
