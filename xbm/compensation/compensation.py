"""The options of drift compensation, and its steps on a memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from xbm import backends, checks, noise
from xbm.backends import Array, device_of
from xbm.compensation.fitting import LEAST_PAIRS, RIDGES, Map, fit
from xbm.compensation.following import followed
from xbm.compensation.motion import Motion, after_fit
from xbm.compensation.moving import count_of, exposure_of, moved
from xbm.compensation.rounds import Probes
from xbm.drift import Returned
from xbm.memory_state import MemoryState
from xbm.normalization import normalize as unit
from xbm.options import Options, choice, documented, number, option, whole
from xbm.ranks import ONE, WHOLE, Ranks, Shard


@documented
@dataclass(frozen=True, kw_only=True)
class Compensation(Options):
    """How a memory follows the network.

    Parameters
    ----------
    {options}

    Raises
    ------
    TypeError, ValueError
        If an option is out of range.

    Examples
    --------
    >>> import numpy as np, xbm
    >>> rng = np.random.default_rng(0)
    >>> rotation, _ = np.linalg.qr(rng.normal(size=(4, 4)))
    >>> old = rng.normal(size=(64, 4))
    >>> old /= np.linalg.norm(old, axis=1, keepdims=True)
    >>> memory = xbm.init(capacity=64, dim=4, dtype=np.float64)
    >>> memory = xbm.advance(xbm.enqueue(memory, old, np.arange(64), ids=np.arange(64)))
    >>> compensation = xbm.Compensation(probes=16, every=1, ridge=0.0)
    >>> probes = compensation.probe(memory)
    >>> fresh = old[probes.ids] @ rotation  # the network's embeddings of these samples by now
    >>> memory, motion = compensation.move(memory, xbm.compensation.still(memory), probes.slots, fresh)
    >>> bool(np.allclose(memory.embeddings, old @ rotation)), float(motion.before) > 1, float(motion.after) < 1e-20
    (True, True, True)

    References
    ----------
    The shift is the first moment of XBN (Ajanthan et al., "Adaptive Cross Batch Normalization for Metric Learning",
    2023). The leave-one-out error of a ridge regression in closed form is PRESS (Allen 1974).
    """

    follow: bool = option(
        True,
        checks.flag,
        """Whether every call shifts the memory towards the mean of its batch. It needs no forward pass and no ids, and
        one pass over the memory.""",
    )
    returning: bool = option(
        False,
        checks.flag,
        """Whether every call with ids fits a map to the returning samples, whose old rows are still in the memory. It
        needs no forward pass. One sample of each class counts, since classmates move alike and would validate each
        other: so it suits batches of many classes, most of whose samples return.""",
    )
    probes: int = option(
        0,
        whole(at_least=0),
        """Rows to embed again in each round. A map is fitted to them, and they replace the old rows. 0 = no rounds. The
        extra cost is probes / every forward passes per call, without gradients.""",
    )
    every: int = option(8, whole(at_least=1), """Calls from one round to the next.""")
    form: Literal["affine", "shift"] = option(
        "affine",
        choice("affine", "shift"),
        """Map that is fitted to pairs of old and fresh rows: a shift and a linear map, or the shift alone.""",
    )
    ridge: float | None = option(
        None,
        number(at_least=0),
        """Regularisation of the linear map, in multiples of the mean variance of the pairs' dimensions; 0 fits them
        exactly. If left out, the candidate with the smallest leave-one-out error.""",
    )
    window: int = option(
        64,
        whole(at_least=0),
        """Approximate number of rows whose mean `follow` tracks: a batch of B rows moves the memory by B / (B + window)
        of the distance to its mean.""",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if 0 < self.probes < LEAST_PAIRS:
            raise ValueError(f"probes must be 0, or at least {LEAST_PAIRS} to fit a map, got {self.probes}")
        if not (self.follow or self.returning or self.probes):
            raise ValueError("nothing is compensated: set follow, returning or probes")

    @property
    def fits_maps(self) -> bool:
        """Whether maps are fitted to pairs of old and fresh rows."""
        return self.returning or self.probes > 0

    def due(self, calls: int) -> bool:
        """Return whether a round comes before the next training call, after `calls` of them."""
        return self.probes > 0 and calls > 0 and calls % self.every == 0

    def probe(self, memory: MemoryState, *, n: int | None = None, shard: Shard = WHOLE) -> Probes:
        """Return the rows to embed again: evenly spaced over the ring, so of every age, and different in each round.

        A function of the memory alone, so that a resumed run asks for the same rows.

        Parameters
        ----------
        memory : MemoryState
            The memory, or a shard of it.
        n : int, optional
            How many; `probes` if left out.
        shard : Shard
            Slots that the state holds.

        Returns
        -------
        Probes
            p = min(n, M) rows.
        """
        xp, _ = backends.of(memory.embeddings)
        m, count = memory.labels.shape[0], count_of(memory, shard)
        p = min(self.probes if n is None else n, m)
        offset = xp.remainder(noise.bits(memory.step), xp.clip(count, min=1))
        nth = xp.arange(p, dtype=count.dtype, device=device_of(memory.labels))
        spaced = nth * (count // p) + nth * (count % p) // p + offset
        slots = xp.where(count >= p, xp.remainder(spaced, xp.clip(count, min=1)), nth)
        filled = slots < count
        ids = xp.take(memory.ids, slots)
        return Probes(slots, filled, xp.where(filled, ids, xp.full_like(ids, -1)))

    def move(
        self,
        memory: MemoryState,
        motion: Motion,
        slots: Array,
        fresh: Array,
        valid: Array | None = None,
        *,
        normalize: bool = True,
        ranks: Ranks = ONE,
    ) -> tuple[MemoryState, Motion]:
        """Fit a map to some rows and their fresh embeddings, move every row by it, and store the fresh embeddings.

        It takes one walk over the memory, in place, of O(M D^2); the fit takes O(p D k + k^3) for each ridge, with k
        the smaller of p and D.

        Parameters
        ----------
        memory : MemoryState
            Consumed: use only the returned one.
        motion : Motion
        slots : (p,) integer
            Slots of the old rows, all different.
        fresh : (p, D) floating point
            Embeddings of the same samples by the current network.
        valid : (p,) bool, optional
            Pairs that count. A pair that is not finite never does.
        normalize : bool
            Whether rows have unit length, and keep it; `fresh` is then normalised first.
        ranks : Ranks
            The ranks that hold the memory's shards. Each passes p pairs of its own, and all rows are moved alike.

        Returns
        -------
        MemoryState, Motion

        Raises
        ------
        TypeError, ValueError
            If an input does not fit the memory, which is then unchanged.
        """
        checks.embeddings("fresh", fresh, memory.embeddings)
        checks.integers("slots", slots, fresh, memory.embeddings, of="fresh rows")
        if valid is not None:
            checks.mask("valid", valid, fresh, memory.embeddings, of="fresh rows")
        checks.flag("normalize", normalize)
        xp, ops = backends.of(memory.embeddings)
        slots = xp.astype(slots, memory.cursor.dtype, copy=False)
        wide = xp.float64 if xp.float64 in (fresh.dtype, memory.embeddings.dtype) else xp.float32
        fresh = xp.astype(ops.stop_gradient(fresh), wide, copy=False)
        if normalize:
            fresh, _ = unit(fresh)
        usable = xp.all(xp.abs(fresh) <= float(xp.finfo(memory.embeddings.dtype).max), axis=1)
        usable = usable & (slots < count_of(memory, ranks.shard))
        usable = usable if valid is None else usable & valid
        memory, found = self._fitted(memory, slots, fresh, usable, self.every, normalize, ranks)
        motion = after_fit(motion, found, rejected=~found.good)
        kept = xp.astype(xp.take(memory.embeddings, slots, axis=0), fresh.dtype, copy=False)
        rows = xp.astype(xp.where(usable[:, None], fresh, kept), memory.embeddings.dtype, copy=False)
        return memory._replace(embeddings=ops.write_rows(memory.embeddings, slots, rows)), motion

    def within(
        self,
        memory: MemoryState,
        motion: Motion,
        rows: Array,
        labels: Array,
        returned: Returned | None = None,
        *,
        normalize: bool = True,
        ranks: Ranks = ONE,
    ) -> tuple[MemoryState, Motion]:
        """Move the memory by a batch alone, before it is stored: the part of `Objective.step`.

        Parameters
        ----------
        memory : MemoryState
            Consumed: use only the returned one.
        motion : Motion
        rows : (K, D) floating point
            The batch's rows as they will be stored, of all ranks.
        labels : (K,) integer
            Classes of the rows.
        returned : Returned, optional
            The samples of the batch that have an old row in the memory.
        normalize : bool
            Whether rows have unit length, and keep it.
        ranks : Ranks
            The ranks that hold the memory's shards.
        """
        xp, _ = backends.of(rows)
        if self.returning and returned is not None:
            fresh = xp.take(rows, returned.new, axis=0)
            usable = returned.valid & xp.all(xp.isfinite(fresh), axis=1)
            classes = xp.take(labels, returned.new)
            memory, found = self._fitted(memory, returned.old, fresh, usable, 1, normalize, ranks, classes)
            # Without a returning sample there was no fit, and so no rejection.
            motion = after_fit(motion, found, rejected=~found.good & ~xp.isnan(found.before))
        if self.follow:
            memory, motion = followed(memory, motion, rows, window=self.window, normalize=normalize, ranks=ranks)
        return memory, motion

    def _fitted(
        self,
        memory: MemoryState,
        slots: Array,
        fresh: Array,
        usable: Array,
        interval: int,
        normalize: bool,
        ranks: Ranks,
        classes: Array | None = None,
    ) -> tuple[MemoryState, Map]:
        """Move every row by the map fitted to some pairs; with their classes (p,), to one pair of each class."""
        xp, _ = backends.of(fresh)
        old = xp.astype(xp.take(memory.embeddings, slots, axis=0), fresh.dtype, copy=False)
        exposed = xp.where(usable, xp.take(exposure_of(memory, interval, fresh.dtype, ranks.shard), slots), 0.0)
        if ranks.sharded:
            old, fresh, exposed = (_of_all(ranks, one) for one in (old, fresh, exposed))
            classes = None if classes is None else _of_all(ranks, classes)
        if classes is not None:
            exposed = xp.where(_repeated(classes, exposed > 0), 0.0, exposed)
        ridges = () if self.form == "shift" else RIDGES if self.ridge is None else (self.ridge,)
        found = fit(old, fresh, exposed, ridges=ridges, normalize=normalize)
        return moved(memory, found, interval=interval, normalize=normalize, shard=ranks.shard), found


def _repeated(labels: Array, some: Array) -> Array:
    """Return (n,) booleans, whether one of `some` rows before it has the same label (n,)."""
    xp, ops = backends.of(labels)
    place = xp.arange(ops.length(labels), device=device_of(labels))
    before = some[None, :] & (place[None, :] < place[:, None])
    return xp.any(before & (labels[None, :] == labels[:, None]), axis=1)


def _of_all(ranks: Ranks, x: Array) -> Array:
    """Return the rows (R p, ...) of all R ranks, from this rank's (p, ...)."""
    xp, _ = backends.of(x)
    every = ranks.each.gather(x[None, ...])
    return xp.reshape(every, (every.shape[0] * every.shape[1], *every.shape[2:]))
