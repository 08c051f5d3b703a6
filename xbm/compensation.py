"""Drift compensation: a memory that moves with the network.

Rows go stale because the network moves on, and most of that motion is common to all of them. What a few rows have moved
by tells, within limits, how to move the others:

- `Compensation.follow` shifts the memory after the mean of the rows that each batch brings: no forward pass, no ids.
- `Compensation.move` fits an affine map to pairs of old and fresh rows of the same samples, such as a few rows embedded
  anew every so many calls or those that come back with a batch, and moves every row by it.

Neither believes itself: a shift is made only while such shifts bring the memory nearer to the batch *after* the one
they are read from, and a map only if it takes pairs nearer to their fresh rows when fitted to the others.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from xbm import backends, checks, noise
from xbm.backends import Array, device_of
from xbm.blocks import rows_at_a_time
from xbm.drift import Met
from xbm.integers import at_most
from xbm.memory import MemoryState
from xbm.normalization import EPS
from xbm.normalization import normalize as unit
from xbm.ranks import ONE, WHOLE, Ranks, Shard

RIDGES = (0.1, 0.3, 1.0, 3.0, 10.0)  # tried for each map, as multiples of the mean variance of the pairs' dimensions
LEAST_PAIRS = 8  # below, leaving one out says nothing
WINDOW = 64  # rows of batches whose mean the memory follows, about
SAMPLE = 1024  # rows that the memory's mean is read from
MEMORY_OF_TRUST = 0.9  # of the running mean of what shifts are worth, per call
CACHE = 2**16  # numbers of the memory that are moved at a time on a CPU: they stay in its cache


class Motion(NamedTuple):
    """What is remembered of the rows' motion, beside the rows (D = embedding size); float32 but for the integers."""

    shift: Array  # (D,) the shift that the last batch asked for
    trust: Array  # () running mean of the squared distance that shifts win on the batch after; they are made while > 0
    before: Array  # () mean squared distance of the last fit's rows from their fresh ones; NaN before the first
    after: Array  # () the same once moved by what was fitted without them
    rejected: Array  # () integer, fits so far that left the memory as it was
    drift: Array  # () running mean of the squared distance of samples that came back; NaN before the first
    settled: Array  # () integer, 0 until `drift` was small enough for the memory to count, then 1, or up to the ramp


class Map(NamedTuple):
    """Row v, exposed by a in [0, 1], moves to v + a (shift + (v - centre) matrix)."""

    centre: Array  # (D,)
    shift: Array  # (D,)
    matrix: Array | None  # (D, D); None where rows are shifted only
    before: Array  # () mean squared distance of the pairs
    after: Array  # () the same of each pair after a move fitted to the others
    good: Array  # () bool, whether to move


def init(state: MemoryState) -> Motion:
    """Return the motion of a memory that has not moved yet."""
    xp, _ = backends.of(state.embeddings)
    device = device_of(state.embeddings)

    def scalar(value: float) -> Array:
        return xp.full((), value, dtype=xp.float32, device=device)

    return Motion(
        shift=xp.zeros((state.embeddings.shape[1],), dtype=xp.float32, device=device),
        trust=scalar(0.0),
        before=scalar(xp.nan),
        after=scalar(xp.nan),
        rejected=xp.zeros((), dtype=state.count.dtype, device=device),
        drift=scalar(xp.nan),
        settled=xp.zeros((), dtype=state.count.dtype, device=device),
    )


def clear(state: MemoryState, motion: Motion) -> Motion:
    """Return the motion of a memory that was cleared: none, but a warm-up that is over stays over.

    Parameters
    ----------
    state : MemoryState
        The memory, from `xbm.clear`.
    motion : Motion
        What it had before.
    """
    return init(state)._replace(settled=motion.settled)


@dataclass(frozen=True, kw_only=True)
class Compensation:
    """How a memory follows the network.

    Parameters
    ----------
    follow : bool
        Whether every call shifts the memory after the mean of its batch. It takes no forward pass and no ids, and a
        walk over the memory.
    returning : bool
        Whether every call with ids fits a map to the samples that come back: their old rows are still in the memory.
        No forward pass either. Of each class one counts, since classmates move alike and would vouch for each other:
        so it is for batches of many classes, most of whose samples come back.
    probes : int
        Rows embedded anew in each round, of which a map is made; they replace the old ones. 0 = no such rounds. The
        extra cost is probes / every forward passes a call, without gradients.
    every : int
        Calls from one round to the next.
    form : {"affine", "shift"}
        What is fitted to pairs: a shift and a linear map, or the shift alone.
    ridge : float, optional
        How strongly the linear map is drawn to nothing, in multiples of the mean variance of the pairs' dimensions; 0
        fits them exactly. If left out, that of `RIDGES` which does best on pairs left out.
    window : int
        Rows that the mean which `follow` follows is taken over, about: a batch of B moves the memory B / (B + window)
        of the way.

    Raises
    ------
    TypeError, ValueError
        If an option is out of range.

    Examples
    --------
    >>> import numpy as np, xbm
    >>> rng = np.random.default_rng(0)
    >>> turn, _ = np.linalg.qr(rng.normal(size=(4, 4)))
    >>> old = rng.normal(size=(64, 4))
    >>> old /= np.linalg.norm(old, axis=1, keepdims=True)
    >>> state = xbm.init(capacity=64, dim=4, dtype=np.float64)
    >>> state = xbm.advance(xbm.enqueue(state, old, np.arange(64), ids=np.arange(64)))
    >>> compensation = xbm.Compensation(probes=16, every=1, ridge=0.0)
    >>> slots, _ = compensation.slots(state)
    >>> fresh = old[state.ids[slots]] @ turn  # what the network makes of these samples by now
    >>> state, motion = compensation.move(state, xbm.compensation.init(state), slots, fresh)
    >>> bool(np.allclose(state.embeddings, old @ turn)), float(motion.before) > 1, float(motion.after) < 1e-20
    (True, True, True)

    References
    ----------
    The shift is XBN's (Ajanthan et al., "Adaptive Cross Batch Normalization for Metric Learning", 2023), of whose
    moments it takes the first. The held-out error of a ridge regression in closed form is PRESS (Allen 1974).
    """

    follow: bool = True
    returning: bool = False
    probes: int = 0
    every: int = 8
    form: Literal["affine", "shift"] = "affine"
    ridge: float | None = None
    window: int = WINDOW

    def __post_init__(self) -> None:
        checks.flag("follow", self.follow)
        checks.flag("returning", self.returning)
        checks.whole_number("probes", self.probes, at_least=0)
        checks.whole_number("every", self.every, at_least=1)
        checks.choice("form", self.form, ("affine", "shift"))
        checks.whole_number("window", self.window, at_least=0)
        for name in ("probes", "every", "window"):  # plain numbers: NumPy's own would widen what they meet
            object.__setattr__(self, name, int(getattr(self, name)))
        if self.ridge is not None:
            object.__setattr__(self, "ridge", checks.number("ridge", self.ridge, at_least=0))
        if 0 < self.probes < LEAST_PAIRS:
            raise ValueError(f"probes must be 0 or at least {LEAST_PAIRS}, to make a map of them, got {self.probes}")
        if not (self.follow or self.returning or self.probes):
            raise ValueError("nothing is compensated: give follow, returning or probes")

    def due(self, step: int) -> bool:
        """Tell whether a round comes before the call that `step` others came before."""
        return self.probes > 0 and step > 0 and step % self.every == 0

    def slots(self, state: MemoryState, *, n: int | None = None, shard: Shard = WHOLE) -> tuple[Array, Array]:
        """Return which rows to embed anew: evenly spaced over the ring, so of every age, others in every round.

        A function of the state alone, so that a resumed run asks for the same ones.

        Parameters
        ----------
        state : MemoryState
            The memory, or a shard of it.
        n : int, optional
            How many; `probes` if left out.
        shard : Shard
            Which slots the state holds.

        Returns
        -------
        slots : (p,) integer, p = min(n, M)
            None twice.
        filled : (p,) bool
            Which of them have a row.
        """
        xp, _ = backends.of(state.embeddings)
        m, count = state.labels.shape[0], _count(state, shard)
        p = min(self.probes if n is None else n, m)
        nought = xp.zeros_like(count)
        high, low = noise.absorbed((nought, nought), state.step)
        nth = xp.arange(p, dtype=count.dtype, device=device_of(state.labels))
        spaced = nth * (count // p) + nth * (count % p) // p + (high * 32768 + low // 2) % xp.clip(count, min=1)
        slots = xp.where(count >= p, xp.remainder(spaced, xp.clip(count, min=1)), nth)
        return slots, slots < count

    def move(
        self,
        state: MemoryState,
        motion: Motion,
        slots: Array,
        fresh: Array,
        valid: Array | None = None,
        *,
        normalize: bool = True,
        ranks: Ranks = ONE,
    ) -> tuple[MemoryState, Motion]:
        """Fit a map to some rows and what the network makes of their samples by now; move every row by it.

        The pairs' own rows are replaced by the fresh ones. One walk over the memory, in place, of O(M D^2); the fit
        takes O(p D k + k^3) for each ridge, with k the smaller of p and D.

        Parameters
        ----------
        state : MemoryState
            Consumed: use only the returned one.
        motion : Motion
        slots : (p,) integer
            Where the old rows are, none twice.
        fresh : (p, D) floating point
            Embeddings of the same samples by the network as it is now.
        valid : (p,) bool, optional
            Which pairs count. One that is not finite never does.
        normalize : bool
            Whether rows have unit length, and keep it; `fresh` is then normalised first.
        ranks : Ranks
            Who holds the memory's shards, each bringing p pairs of its own; all are moved alike.

        Returns
        -------
        MemoryState, Motion

        Raises
        ------
        TypeError, ValueError
            If an input does not fit the memory; it is then as it was.
        """
        checks.embeddings("fresh", fresh, state.embeddings)
        checks.integers("slots", slots, fresh, state.embeddings, of="fresh rows")
        if valid is not None:
            checks.mask("valid", valid, fresh, state.embeddings, of="fresh rows")
        checks.flag("normalize", normalize)
        xp, ops = backends.of(state.embeddings)
        slots = xp.astype(slots, state.cursor.dtype, copy=False)
        fresh = xp.astype(ops.stop_gradient(fresh), _wide(state, fresh), copy=False)
        if normalize:
            fresh, _ = unit(fresh)
        usable = xp.all(xp.abs(fresh) <= float(xp.finfo(state.embeddings.dtype).max), axis=1)
        usable = usable & (slots < _count(state, ranks.shard))
        usable = usable if valid is None else usable & valid
        state, found = self._fitted(state, slots, fresh, usable, self.every, normalize, ranks)
        motion = _told(motion, found, rejected=~found.good)
        kept = xp.astype(xp.take(state.embeddings, slots, axis=0), fresh.dtype, copy=False)
        rows = xp.astype(xp.where(usable[:, None], fresh, kept), state.embeddings.dtype, copy=False)
        return state._replace(embeddings=ops.write_rows(state.embeddings, slots, rows)), motion

    def within(
        self,
        state: MemoryState,
        motion: Motion,
        rows: Array,
        labels: Array,
        met: Met | None = None,
        *,
        normalize: bool = True,
        ranks: Ranks = ONE,
    ) -> tuple[MemoryState, Motion]:
        """Move the memory by what a batch alone tells, before it is stored: the part of `Objective.step`.

        Parameters
        ----------
        state : MemoryState
            Consumed: use only the returned one.
        motion : Motion
        rows : (K, D) floating point
            The batch's rows as they will be stored, of all ranks.
        labels : (K,) integer
            Their classes.
        met : Met, optional
            Which of them have an old row in the memory.
        normalize : bool
            Whether rows have unit length, and keep it.
        ranks : Ranks
            Who holds the memory's shards.
        """
        xp, _ = backends.of(rows)
        if self.returning and met is not None:
            fresh = xp.take(rows, met.new, axis=0)
            usable = met.valid & xp.all(xp.isfinite(fresh), axis=1)
            classes = xp.take(labels, met.new)
            state, found = self._fitted(state, met.old, fresh, usable, 1, normalize, ranks, classes)
            # Where no sample came back, nothing was fitted.
            motion = _told(motion, found, rejected=~found.good & ~xp.isnan(found.before))
        if self.follow:
            state, motion = self._followed(state, motion, rows, normalize, ranks)
        return state, motion

    def _fitted(
        self,
        state: MemoryState,
        slots: Array,
        fresh: Array,
        usable: Array,
        interval: int,
        normalize: bool,
        ranks: Ranks,
        classes: Array | None = None,
    ) -> tuple[MemoryState, Map]:
        """Move every row by the map that is fitted to pairs, of classes (p,) that are given to one of each."""
        xp, _ = backends.of(fresh)
        old = xp.astype(xp.take(state.embeddings, slots, axis=0), fresh.dtype, copy=False)
        exposed = xp.where(usable, xp.take(_exposure(state, interval, fresh.dtype, ranks.shard), slots), 0.0)
        if ranks.sharded:
            old, fresh, exposed = (_of_all(ranks, one) for one in (old, fresh, exposed))
            classes = None if classes is None else _of_all(ranks, classes)
        if classes is not None:
            exposed = xp.where(_repeated(classes, exposed > 0), 0.0, exposed)
        ridges = () if self.form == "shift" else RIDGES if self.ridge is None else (self.ridge,)
        found = fit(old, fresh, exposed, ridges=ridges, normalize=normalize)
        return moved(state, found, interval=interval, normalize=normalize, shard=ranks.shard), found

    def _followed(
        self, state: MemoryState, motion: Motion, rows: Array, normalize: bool, ranks: Ranks
    ) -> tuple[MemoryState, Motion]:
        """Shift every row towards the batch's mean, if such shifts have lately been good for the batch after."""
        xp, _ = backends.of(rows)
        mean, n = _mean(rows, xp.all(xp.isfinite(rows), axis=1))
        m = state.labels.shape[0]
        some = xp.arange(0, m, -(-m // SAMPLE), dtype=state.count.dtype, device=device_of(rows))
        read = xp.astype(xp.take(state.embeddings, some, axis=0), rows.dtype, copy=False)
        of_memory, m = _mean(read, some < _count(state, ranks.shard), ranks)
        apart = xp.where((n > 0) & (m > 0), mean - of_memory, xp.zeros_like(mean))
        # How far the memory would be had it not been shifted last time, and how far with that shift.
        shift = xp.astype(motion.shift, rows.dtype, copy=False)
        without = apart + xp.where(motion.trust > 0, shift, xp.zeros_like(shift))
        won = xp.sum(without**2) - xp.sum((without - shift) ** 2)
        trust = MEMORY_OF_TRUST * motion.trust + (1 - MEMORY_OF_TRUST) * xp.astype(won, xp.float32, copy=False)
        shift = apart * (n / xp.clip(n + self.window, min=1.0))
        told = (n > 0) & xp.all(xp.isfinite(shift))
        motion = motion._replace(
            shift=xp.where(told, xp.astype(shift, xp.float32, copy=False), motion.shift),
            trust=xp.where(told, trust, motion.trust),
        )
        found = Map(xp.zeros_like(shift), shift, None, xp.sum(apart**2), xp.sum(apart**2), told & (motion.trust > 0))
        return moved(state, found, interval=1, normalize=normalize, shard=ranks.shard), motion


def fit(old: Array, fresh: Array, exposure: Array, *, ridges: tuple[float, ...], normalize: bool) -> Map:
    """Fit fresh = old + a (shift + (old - centre) matrix), by least squares with a ridge on the matrix.

    Among no move at all, the shift alone, and the maps of all ridges, the one is taken that does best on pairs left
    out, one at a time: in closed form, the residual of a pair over one minus its leverage. It is good if it wins more
    than the standard error of what it wins. Shapes are fixed.

    Parameters
    ----------
    old, fresh : (p, D) floating point
        Row i of either is of the same sample.
    exposure : (p,) floating point
        Which part of the motion row i has missed, a in [0, 1]; 0 = no pair.
    ridges : tuple of float
        Candidates, in multiples of the mean variance of the dimensions; none for the shift alone.
    normalize : bool
        Whether moved rows are normalised before they are compared with the fresh ones.

    Returns
    -------
    Map
    """
    xp, ops = backends.of(old)
    a, eps = exposure[:, None], float(xp.finfo(old.dtype).eps)
    old = unit(old)[0] if normalize else old  # as the fresh ones are, to the last bit
    old, motion = (xp.where(a > 0, one, 0.0) for one in (old, fresh - old))
    fresh = xp.where(a > 0, fresh, 0.0)
    n, squares = xp.sum(xp.astype(a > 0, a.dtype)), xp.sum(a**2)
    weight = a / xp.where(squares > 0, squares, 1.0)
    centre, shift = xp.sum(weight * a * old, axis=0), xp.sum(weight * motion, axis=0)
    U, R, leverage = a * (old - centre), motion - a * shift, weight * a

    def errors(residual: Array, leverage: Array) -> Array:
        told = 1 - leverage  # a pair that is fitted exactly, whatever it is, tells nothing: 0 / 0
        found = fresh - residual / xp.clip(told, min=eps**0.5)
        found = unit(found)[0] if normalize else found
        each = xp.sum(xp.where(a > 0, (found - fresh) ** 2, 0.0), axis=1)
        return xp.where(xp.min(told) > eps**0.5, each, float(xp.finfo(old.dtype).max) ** 0.25)

    still, least = xp.sum(motion**2, axis=1), errors(R, leverage)
    matrix = None
    varied = xp.sum(U**2)
    if ridges:
        p, D = ops.length(U), U.shape[1]
        primal, across = isinstance(p, int) and p > D, xp.matrix_transpose(U)
        with ops.full_precision(old):
            square, right = (across @ U, across @ R) if primal else (U @ across, R)
            square = xp.where(xp.all(xp.isfinite(square)), square, 0.0)
            place = xp.arange(D if primal else p, device=device_of(old))
            diagonal = xp.astype(place[:, None] == place[None, :], old.dtype)
            best = xp.zeros_like(right)
            for ridge in ridges:
                # Never singular: an eigendecomposition in float32 may fail to converge where most pairs are none.
                added = xp.where(varied > 0, varied / D * xp.clip(D * n * eps, min=ridge), 1.0)
                inverse = xp.linalg.inv(square + added * diagonal)
                tried = inverse @ right
                more = xp.sum((U @ inverse) * U if primal else square * inverse, axis=1, keepdims=True)
                each = errors(R - (U if primal else square) @ tried, leverage + more)
                better = xp.sum(each) < xp.sum(least)
                best, least = xp.where(better, tried, best), xp.where(better, each, least)
            matrix = best if primal else across @ best
    # Far from where the square of a moved row of length 1 would overflow.
    most = float(xp.finfo(old.dtype).max) ** (0.25 if normalize else 1)
    before, after = (xp.sum(one) / xp.where(n > 0, n, xp.nan) for one in (still, least))
    won = before - after
    spread = xp.sum(xp.where(exposure > 0, (still - least - won) ** 2, 0.0))
    good = (n >= LEAST_PAIRS) & (won > xp.sqrt(spread / xp.clip(n * (n - 1), min=1.0)))
    good = good & xp.all(xp.abs(shift) <= most)
    if matrix is not None:
        # Equal pairs vary by the rounding of their rows, and of the mean that was taken from them.
        good = good & (varied > n * (n * eps**2) * xp.sum((a * old) ** 2)) & xp.all(xp.abs(matrix) <= most)
    return Map(centre, shift, matrix, before, after, good)


def moved(state: MemoryState, by: Map, *, interval: int, normalize: bool, shard: Shard = WHOLE) -> MemoryState:
    """Return the memory with every row moved, in place; a row that would not be finite stays.

    Parameters
    ----------
    state : MemoryState
        Consumed: use only the returned one.
    by : Map
        Where it is not `good`, no bit changes.
    interval : int
        Calls that the map is the motion of: younger rows go that part of the way which they have missed.
    normalize : bool
        Whether rows have unit length, and keep it.
    shard : Shard
        Which slots the state holds.
    """
    xp, ops = backends.of(state.embeddings)
    V, dtype = state.embeddings, by.shift.dtype
    exposure = xp.where(by.good, _exposure(state, interval, dtype, shard), 0.0)
    largest, matrix = float(xp.finfo(V.dtype).max), by.matrix
    with ops.full_precision(by.shift):
        offset = by.shift if matrix is None else by.shift - by.centre[None, :] @ matrix
    # What is not good need not be finite.
    offset = xp.where(by.good, offset, xp.zeros_like(offset))
    matrix = None if matrix is None else xp.where(by.good, matrix, xp.zeros_like(matrix))

    def visit(rows: Array, a: Array) -> Array:
        a, v = a[:, None], xp.astype(rows, dtype, copy=False)
        drift = offset if matrix is None else v @ matrix + offset
        new = v + (drift if interval == 1 else a * drift)  # of one call, rows have missed all or nothing
        if normalize:
            length = xp.sqrt(xp.sum(new * new, axis=1, keepdims=True))
            going = (a > 0) & (length > EPS)
            scale = xp.where(going, 1 / xp.where(going, length, 1.0), 0.0)
            # A sum of what goes and what stays, all finite: several times as fast as a choice between rows.
            found = new * scale + v * xp.where(going, xp.zeros_like(a), 1.0)
        else:
            going = (a > 0) & xp.all(xp.abs(new) <= largest, axis=1, keepdims=True)
            found = xp.where(going, new, v)
        return xp.astype(found, rows.dtype, copy=False)

    size = rows_at_a_time(V, V.shape[0], width=V.shape[1], host=CACHE)
    with ops.full_precision(by.shift):
        return state._replace(embeddings=ops.rewrite(V, visit, exposure, size))


def _told(motion: Motion, found: Map, *, rejected: Array) -> Motion:
    """Return the motion with what a fit has found, if it had any pairs."""
    xp, _ = backends.of(found.before)
    told, after = xp.isfinite(found.before), xp.where(found.good, found.after, found.before)
    return motion._replace(
        before=xp.where(told, xp.astype(found.before, xp.float32, copy=False), motion.before),
        after=xp.where(told, xp.astype(after, xp.float32, copy=False), motion.after),
        rejected=motion.rejected + xp.astype(rejected, motion.rejected.dtype),
    )


def _repeated(labels: Array, some: Array) -> Array:
    """Tell which of some rows (n,) come after another of them with the same label (n,)."""
    xp, ops = backends.of(labels)
    place = xp.arange(ops.length(labels), device=device_of(labels))
    before = some[None, :] & (place[None, :] < place[:, None])
    return xp.any(before & (labels[None, :] == labels[:, None]), axis=1)


def _exposure(state: MemoryState, interval: int, dtype: Any, shard: Shard) -> Array:
    """Return (m,) which part of the last so many calls each row has been in the memory; 0 where there is none."""
    xp, _ = backends.of(state.embeddings)
    filled = xp.arange(state.labels.shape[0], dtype=state.count.dtype, device=device_of(state.labels))
    age = xp.clip(state.step - state.stored_at, min=0, max=interval)
    return xp.where(filled < _count(state, shard), xp.astype(age, dtype) / interval, 0.0)


def _count(state: MemoryState, shard: Shard) -> Array:
    """Return how many of the slots that a state holds are filled: the first so many."""
    xp, _ = backends.of(state.embeddings)
    m = state.labels.shape[0]
    return at_most(xp.clip(state.count - shard.first(m), min=0), m)


def _wide(state: MemoryState, fresh: Array) -> Any:
    """Return the dtype of all arithmetic."""
    xp, _ = backends.of(fresh)
    return xp.float64 if xp.float64 in (fresh.dtype, state.embeddings.dtype) else xp.float32


def _mean(rows: Array, some: Array, ranks: Ranks = ONE) -> tuple[Array, Array]:
    """Return the mean (D,) of some rows, 0 if there are none, and how many they are."""
    xp, _ = backends.of(rows)
    sums, n = xp.sum(xp.where(some[:, None], rows, 0.0), axis=0), xp.sum(xp.astype(some, rows.dtype))
    if ranks.sharded:
        each = ranks.each.gather(xp.concat([sums, n[None]])[None, :])
        summed = xp.sum(each, axis=0)
        sums, n = summed[:-1], summed[-1]
    return sums / xp.clip(n, min=1.0), n


def _of_all(ranks: Ranks, x: Array) -> Array:
    """Return the rows (R p, ...) of all ranks, from the p rows (p, ...) that each has."""
    xp, _ = backends.of(x)
    every = ranks.each.gather(x[None, ...])
    return xp.reshape(every, (every.shape[0] * every.shape[1], *every.shape[2:]))
