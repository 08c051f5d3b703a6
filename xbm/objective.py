"""One training step: normalise, enqueue, compare, and the gradient of it all in closed form."""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

from array_api_compat import device as device_of

from xbm import backends, checks, drift, memory
from xbm.losses import Block, Contrastive, PairLoss
from xbm.mining import Mined, Miner
from xbm.normalization import normalize, through_normalize
from xbm.pairs import batch_pairs, memory_pairs
from xbm.scan import dense, scan

Array = Any

REPORT = ("batch_loss", "memory_loss", "fill", "pairs", "drift", "drift_age", "skipped")
"""Names of a step's figures, in their order: the two loss terms as they enter the loss (without and with the
weight), the memory's fill in [0, 1], pairs of anchors and memory rows with a non-zero weight, mean squared
distance and age in steps of returning samples' old rows (NaN without any), and rows skipped so far because they
were not finite."""

BLOCK_ELEMENTS = 2**18  # similarities in a block, unless that leaves fewer than 256 rows


class Step(NamedTuple):
    """What one call returns."""

    loss: Array  # () float32, or float64 if an input is
    gradient: Array | None  # (B, D) dL/dx in x's dtype; None if not asked for
    key_gradient: Array | None  # the same for keys; None without keys
    state: memory.MemoryState  # after the call
    report: Array  # (7,) float32, the figures named in REPORT


@dataclass(frozen=True, kw_only=True)
class Objective:
    r"""In-batch loss plus memory loss over the same pair loss: L = (1/B) sum_i (L_i^batch + weight L_i^memory).

    Parameters
    ----------
    loss : PairLoss
        The pair loss of both terms.
    miner : Miner, optional
        Choice of the pairs that count, in both terms.
    weight : float
        Weight of the memory term, at least 0; with 0 rows are stored and never compared.
    warmup : int
        Calls before the memory term counts. Rows are stored meanwhile.
    in_batch : bool
        Whether the in-batch term counts.
    normalize : bool
        Compare and store x / max(|x|, 1e-6), so similarities are cosines in [-1, 1]; else x itself.
    copies : {"exclude", "keep"}
        With ids, whether older rows of an anchor's own sample are left out of its pairs.
    on_nonfinite : {"skip", "raise"}
        See `enqueue`.
    block_rows : int, optional
        Memory rows compared at a time; extra memory is proportional to it. Chosen from B if left out.

    Raises
    ------
    TypeError, ValueError
        If an option is out of range, or the loss needs cosines and `normalize` is False.

    Examples
    --------
    >>> import numpy as np, xbm
    >>> rng = np.random.default_rng(0)
    >>> objective = xbm.Objective(warmup=1)
    >>> state = xbm.init(capacity=64, dim=8)
    >>> for _ in range(3):
    ...     x, labels = rng.normal(size=(16, 8)), rng.integers(4, size=16)
    ...     loss, gradient, _, state, report = objective.step(state, x, labels)
    >>> gradient.shape, int(state.count), round(float(loss), 3)
    ((16, 8), 48, 2.185)

    References
    ----------
    Wang, Zhang, Huang, Scott, "Cross-Batch Memory for Embedding Learning", CVPR 2020, arXiv 1912.06798.
    """

    loss: PairLoss = field(default_factory=Contrastive)
    miner: Miner | None = None
    weight: float = 1.0
    warmup: int = 1000
    in_batch: bool = True
    normalize: bool = True
    copies: str = "exclude"
    on_nonfinite: str = "skip"
    block_rows: int | None = None

    def __post_init__(self):
        if not isinstance(self.loss, PairLoss):
            raise TypeError(f"loss must be an xbm.PairLoss, got {self.loss!r} of type {type(self.loss).__name__}")
        checks.number("weight", self.weight, at_least=0)
        checks.whole_number("warmup", self.warmup, at_least=0)
        checks.flag("in_batch", self.in_batch)
        checks.flag("normalize", self.normalize)
        checks.choice("copies", self.copies, ("exclude", "keep"))
        checks.choice("on_nonfinite", self.on_nonfinite, ("skip", "raise"))
        if self.block_rows is not None:
            checks.whole_number("block_rows", self.block_rows, at_least=1)
        if self.loss.needs_cosines and not self.normalize:
            raise ValueError(f"{type(self.loss).__name__} is a function of cosines: it needs normalize=True")
        self.criterion  # noqa: B018 - refuses what is no miner

    @property
    def criterion(self):
        """The loss over the pairs that the miner selects."""
        return self.loss if self.miner is None else Mined(self.loss, self.miner)

    def step(self, state, x, labels, *, ids=None, mask=None, keys=None, key_labels=None):
        """Make one training call: store the batch, then compare it with the memory.

        Parameters
        ----------
        state : MemoryState
            Consumed: use only the returned one.
        x : (B, D) floating point
            Anchors. B may change from call to call and may be 0.
        labels : (B,) integer
            Classes of the anchors.
        ids : (B,) integer, optional
            Samples of the anchors (and keys), >= 0, negative = none: tells copies and measures drift.
        mask : (B,) bool, optional
            Rows to store. The others are anchors and batch-mates all the same.
        keys : (K, D) floating point, optional
            Rows to store and to compare with instead of x: two towers, or a momentum encoder. Key i is a candidate
            of query i.
        key_labels : (K,) integer, optional
            Classes of the keys; those of the anchors if left out.

        Returns
        -------
        Step

        Raises
        ------
        TypeError, ValueError
            If an input does not fit; the state is then as it was.
        """
        batch = _Batch.of(self, state, x, labels, ids, keys, key_labels, mask)
        xp, _ = backends.of(state.embeddings)
        keep, bad = memory.storable(state, batch.stored, mask=mask, on_nonfinite=self.on_nonfinite)
        nowhere = xp.full(labels.shape, -1, dtype=xp.int64, device=device_of(x))
        own = memory.own_slots(state, keep) if keys is None else nowhere
        moved = None if ids is None else drift.returning(state, batch.stored, batch.ids)
        state = memory.write(state, batch.stored, batch.stored_labels, batch.ids, keep, bad)
        result = self._compare(state, batch, own, moved, gradient=True)
        return result._replace(state=memory.advance(state))

    def evaluate(self, state, x, labels, *, ids=None, keys=None, key_labels=None, gradient=False):
        """Return the loss against the memory as it is; store and count nothing.

        Takes and returns what `step` does; `gradient` tells whether to compute the gradients.
        """
        batch = _Batch.of(self, state, x, labels, ids, keys, key_labels)
        xp, _ = backends.of(state.embeddings)
        own = xp.full(labels.shape, -1, dtype=xp.int64, device=device_of(x))
        return self._compare(state, batch, own, None, gradient=gradient)

    def store(self, state, x, labels, *, ids=None):
        """Return the state with a batch stored as rows of before this call, compared with nothing and not counted."""
        memory.check_batch(state, x, labels, ids=ids)
        batch = _Batch.of(self, state, x, labels, ids)
        return memory.enqueue(state, batch.stored, labels, ids=ids, on_nonfinite=self.on_nonfinite, age=1)

    def _compare(self, state, batch, own, moved, *, gradient):
        xp, _ = backends.of(state.embeddings)
        anchors = max(batch.z.shape[0], 1)
        value, dz, dk = self._batch_term(batch, gradient)
        memory_value, memory_dz, pairs = self._memory_term(state, batch, own, gradient)
        batch_loss = xp.sum(value) / anchors
        memory_loss = self.weight * xp.sum(memory_value) / anchors
        figures = {
            "batch_loss": batch_loss,
            "memory_loss": memory_loss,
            "fill": xp.astype(state.count, xp.float32) / state.labels.shape[0],
            "pairs": xp.nan if pairs is None else pairs,
            "drift": xp.nan if moved is None else moved.distance,
            "drift_age": xp.nan if moved is None else moved.age,
            "skipped": state.skipped,
        }
        device = device_of(batch.z)
        report = xp.stack([xp.astype(xp.asarray(figures[name], device=device), xp.float32) for name in REPORT])
        if not gradient:
            return Step(batch_loss + memory_loss, None, None, state, report)
        dz = (dz + self.weight * memory_dz) / anchors
        if batch.keys is None:
            return Step(batch_loss + memory_loss, batch.to_input(dz + dk / anchors), None, state, report)
        return Step(batch_loss + memory_loss, batch.to_input(dz), batch.keys.to_input(dk / anchors), state, report)

    def _batch_term(self, batch, gradient):
        """Return (L_i, dL/dz, dL/dk) of the batch against itself, or against its keys k."""
        xp, _ = backends.of(batch.z)
        K = batch.stored
        if not self.in_batch or 0 in (batch.z.shape[0], K.shape[0]):
            return xp.zeros_like(batch.z[:, 0]), xp.zeros_like(batch.z), xp.zeros_like(K)
        key_labels = None if batch.keys is None else batch.stored_labels
        P, N = batch_pairs(batch.labels, key_labels, dtype=batch.z.dtype)
        slots, anchors = (xp.arange(n, device=device_of(K)) for n in (K.shape[0], batch.z.shape[0]))
        value, W = dense(self.criterion, Block(batch.z @ K.T, P, N, slots, anchors))
        return (value, W @ K, W.T @ batch.z) if gradient else (value, None, None)

    def _memory_term(self, state, batch, own, gradient):
        """Return (L_i, dL/dz, pairs) of the batch against the memory, zeros while the memory warms up."""
        xp, ops = backends.of(state.embeddings)
        dtype, B = batch.z.dtype, batch.z.shape[0]
        nothing = xp.zeros_like(batch.z[:, 0]), xp.zeros_like(batch.z), xp.zeros((), dtype=dtype, device=device_of(own))
        step, count = ops.known(state.step), ops.known(state.count)
        if self.weight == 0 or count == 0 or (step is not None and step < self.warmup):
            return nothing

        def pairs(slots, columns):
            ids = batch.ids if self.copies == "exclude" else None
            return memory_pairs(
                slots, columns, labels=batch.labels, own=own, count=state.count, ids=ids, step=state.step, dtype=dtype
            )

        found = scan(
            self.criterion,
            batch.z,
            state.embeddings,
            (state.labels, state.ids, state.stored_at),
            pairs,
            block_rows=self.block_rows or max(256, BLOCK_ELEMENTS // max(B, 1)),
            limit=count,
            gradient=gradient,
        )
        # Selected, never multiplied by 0: an infinite loss must not reach the warm-up as NaN.
        warm = state.step >= self.warmup
        return tuple(None if one is None else xp.where(warm, one, xp.zeros_like(one)) for one in found)


class _Rows(NamedTuple):
    """Input rows x as they are compared: z, and the way back to x for their gradient."""

    z: Array  # (B, D) in the dtype of all arithmetic
    length: Array | None  # (B, 1) what x was divided by
    dtype: Any  # of x

    @classmethod
    def of(cls, x, like, unit):
        xp, ops = backends.of(x)
        wide = xp.float64 in (x.dtype, like.dtype)
        z, length = xp.astype(ops.stop_gradient(x), xp.float64 if wide else xp.float32, copy=False), None
        if unit:
            z, length = normalize(z)
        return cls(z, length, x.dtype)

    def to_input(self, dz):
        xp, _ = backends.of(dz)
        dx = dz if self.length is None else through_normalize(dz, self.z, self.length)
        return xp.astype(dx, self.dtype, copy=False)


class _Batch(NamedTuple):
    """One call's input, checked: anchors, what is stored of them or of their keys, labels and ids."""

    queries: _Rows
    keys: _Rows | None
    labels: Array  # (B,)
    stored_labels: Array  # (B,), or (K,) of the keys
    ids: Array | None  # (B,)

    @classmethod
    def of(cls, objective, state, x, labels, ids=None, keys=None, key_labels=None, mask=None):
        checks.embeddings("embeddings", x, state.embeddings)
        checks.integers("labels", labels, x, state.embeddings)
        if ids is not None:
            checks.integers("ids", ids, x, state.embeddings)
        if keys is None:
            if key_labels is not None:
                raise ValueError("key_labels were given without keys")
            stored, stored_labels = x, labels
        else:
            checks.embeddings("keys", keys, state.embeddings)
            stored, stored_labels = keys, labels if key_labels is None else key_labels
            checks.integers("key_labels", stored_labels, keys, state.embeddings)
            if ids is not None and keys.shape[0] != x.shape[0]:
                raise ValueError(
                    f"ids name both query i and key i, but there are {x.shape[0]} queries and {keys.shape[0]} keys"
                )
        if mask is not None:
            checks.mask("mask", mask, stored, state.embeddings)
        rows = [_Rows.of(one, state.embeddings, objective.normalize) for one in (x, keys) if one is not None]
        xp, _ = backends.of(x)
        exact = (None if one is None else xp.astype(one, xp.int64, copy=False) for one in (labels, stored_labels, ids))
        return cls(rows[0], rows[1] if keys is not None else None, *exact)

    @property
    def z(self):
        return self.queries.z

    @property
    def stored(self):
        return self.queries.z if self.keys is None else self.keys.z

    def to_input(self, dz):
        return self.queries.to_input(dz)
