"""One training step: normalise, enqueue, compare, and the gradient of it all in closed form."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Self

from xbm import backends, checks, drift, losses, memory, mining, placing
from xbm.backends import Array, device_of
from xbm.batch import Batch, read
from xbm.blocks import rows_at_a_time
from xbm.compensation import Compensation, Motion
from xbm.losses import Block, Contrastive, Differentiated, LossLike, PairLoss, RowLoss
from xbm.memory import MemoryState
from xbm.mining import Miner, MinerLike
from xbm.pairs import Ageing, MemoryPairs, OfLabels, Relation, batch_pairs
from xbm.ranks import ALONE, Group, Ranks, total
from xbm.scan import scan

REPORT = (
    "batch_loss",
    "memory_loss",
    "fill",
    "pairs",
    "drift",
    "drift_age",
    "skipped",
    "drift_before",
    "drift_after",
    "rejected",
)
"""Names of a step's figures, in their order: the two loss terms as they enter the loss (without and with the
weight), the memory's fill in [0, 1], pairs of anchors and memory rows with a non-zero weight, mean squared
distance and age in steps of returning samples' old rows (NaN without any), rows skipped so far because they
were not finite; of the last time that a map was fitted to rows and fresh ones, their mean squared distance before and
after they were moved, each by what was fitted without it, and how often so far the memory was left as it was (NaN
without a motion)."""

LEAST_ROWS = 256  # memory rows in a block, at least
CACHE = 2**19  # similarities of a block on a CPU: more fall out of its cache, fewer cost more calls
TYPICAL_BATCH = 64  # anchors, where a graph takes any number
MEMORY_OF_DRIFT = 0.9  # of its running mean, per call with samples that come back


class Step(NamedTuple):
    """What one call returns."""

    loss: Array  # () float32, or float64 if an input is; differentiable in x and keys where the library can
    gradient: Array | None  # (B, D) dL/dx in x's dtype; None if not asked for
    key_gradient: Array | None  # the same for keys; None without keys
    state: MemoryState  # after the call
    report: Array  # (10,) float32, the figures named in REPORT
    motion: Motion | None = None  # after the call; None if none was given


@dataclass(frozen=True, kw_only=True)
class Objective:
    r"""In-batch loss plus memory loss over the same pair loss: L = (1/B) sum_i (L_i^batch + weight L_i^memory).

    Parameters
    ----------
    loss : RowLoss, str or callable
        The pair loss of both terms: an object, a name among `xbm.losses.LOSSES`, or a function, see
        `xbm.losses.Differentiated`.
    miner : Miner, str or list of them, optional
        Choice of the pairs that count, in both terms: an object or a name among `xbm.mining.MINERS`. Of several each
        chooses among the pairs that the one before left.
    weight : float
        Weight of the memory term, at least 0; with 0 rows are stored and never compared.
    warmup : int
        Calls before the memory term counts. Rows are stored meanwhile.
    settle : float, optional
        Squared distance, above 0: after `warmup` calls, the memory term counts from the first call on in which
        `Motion.drift`, the running mean of the drift of samples that come back, is at most this; from then on always.
        `step` then wants ids and a `motion`.
    ramp : int
        Calls over which the memory term's weight rises to `weight`: the n-th that it counts in has n / ramp of it. 0 =
        all of it at once.
    balance : float, optional
        How many times as long as the in-batch term's gradient the memory term's is made, before `weight` multiplies it:
        by the norms of dL/dz of the whole batch. The factor is a constant, and 1 where either norm is 0 or infinite.
    max_age : int, optional
        Calls, at least 1: memory rows that were stored more calls ago are in no pair.
    half_life : float, optional
        Calls, above 0, in which what a memory row counts for halves: its pairs are weighted by 2^(-age / half_life),
        at least 2^-60. The rows of the call itself have age 0.
    in_batch : bool
        Whether the in-batch term counts.
    normalize : bool
        Compare and store x / max(|x|, 1e-6), so similarities are cosines in [-1, 1]; else x itself.
    copies : {"exclude", "keep", "replace"}
        With ids, whether older rows of an anchor's own sample are left out of its pairs, or also replaced by the new
        one, so that the memory holds one row for each sample: see `enqueue`.
    match : callable, optional
        Which pairs are positive: a function `(labels (B,), row_labels (m,)) -> (B, m)` booleans, in place of equal
        labels. Every other pair is negative. It is called with the batch's labels and with blocks of the memory's.
    pair_weights : callable, optional
        What a pair counts for: a function `(labels (B,), row_labels (m,)) -> (B, m), (1, m) or (B, 1)` floats, at
        least 0; 0 = no pair. A constant for the gradient. See `LogQ`.
    ignore_label : int, optional
        The class "other": its rows are positive to none, not even to each other, and negative to all.
    on_nonfinite : {"skip", "raise"}
        See `enqueue`.
    compensate : Compensation, optional
        How the memory follows the network; `step` then wants a `motion`.
    block_rows : int, optional
        Memory rows compared at a time; extra memory is proportional to it. Chosen from B if left out.

    Raises
    ------
    TypeError, ValueError
        If an option is out of range, the loss needs cosines and `normalize` is False, a function as a loss, which sees
        no weights, is given some, or `balance` has no in-batch term to go by.

    Examples
    --------
    >>> import numpy as np, xbm
    >>> rng = np.random.default_rng(0)
    >>> objective = xbm.Objective(warmup=1)
    >>> state = xbm.init(capacity=64, dim=8)
    >>> for _ in range(3):
    ...     x, labels = rng.normal(size=(16, 8)), rng.integers(4, size=16)
    ...     loss, gradient, _, state, report, _ = objective.step(state, x, labels)
    >>> gradient.shape, int(state.count), round(float(loss), 3)
    ((16, 8), 48, 2.185)

    References
    ----------
    Wang, Zhang, Huang, Scott, "Cross-Batch Memory for Embedding Learning", CVPR 2020, arXiv 1912.06798.
    """

    loss: LossLike = field(default_factory=Contrastive)
    miner: MinerLike = None
    weight: float = 1.0
    warmup: int = 1000
    settle: float | None = None
    ramp: int = 0
    balance: float | None = None
    max_age: int | None = None
    half_life: float | None = None
    in_batch: bool = True
    normalize: bool = True
    copies: Literal["exclude", "keep", "replace"] = "exclude"
    match: OfLabels | None = None
    pair_weights: OfLabels | None = None
    ignore_label: int | None = None
    on_nonfinite: Literal["skip", "raise"] = "skip"
    compensate: Compensation | None = None
    block_rows: int | None = None
    miners: tuple[Miner, ...] = field(init=False, repr=False, compare=False)  # the same, in their order
    relation: Relation = field(init=False, repr=False, compare=False)  # what labels say of a pair
    criterion: RowLoss = field(init=False, repr=False, compare=False)  # the loss over the pairs that the miner selects

    def __post_init__(self) -> None:
        loss, miners = losses.get(self.loss), mining.each(self.miner)
        object.__setattr__(self, "loss", loss)
        object.__setattr__(self, "miners", miners)
        object.__setattr__(self, "miner", (*miners, None)[0] if len(miners) < 2 else miners)
        # Plain numbers: NumPy's own would widen what they meet.
        object.__setattr__(self, "weight", checks.number("weight", self.weight, at_least=0))
        for name, least in (("warmup", 0), ("ramp", 0), ("max_age", 1)):
            if getattr(self, name) is not None:
                checks.whole_number(name, getattr(self, name), at_least=least)
                object.__setattr__(self, name, int(getattr(self, name)))
        for name in ("settle", "balance", "half_life"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, checks.positive(name, getattr(self, name)))
        checks.flag("in_batch", self.in_batch)
        checks.flag("normalize", self.normalize)
        checks.choice("copies", self.copies, ("exclude", "keep", "replace"))
        checks.choice("on_nonfinite", self.on_nonfinite, ("skip", "raise"))
        if self.compensate is not None and not isinstance(self.compensate, Compensation):
            raise TypeError(f"compensate must be an xbm.Compensation, got {self.compensate!r:.80}")
        if self.block_rows is not None:
            checks.whole_number("block_rows", self.block_rows, at_least=1)
        for name in ("match", "pair_weights"):
            function = getattr(self, name)
            if function is not None and not callable(function):
                raise TypeError(f"{name} must be callable as {name}(labels, row_labels), got {function!r}")
        if self.ignore_label is not None:
            checks.whole_number("ignore_label", self.ignore_label, at_least=-(2**63))
            if self.ignore_label >= 2**63:
                raise ValueError(f"ignore_label must fit int64, got {self.ignore_label}")
        for name in ("pair_weights", "half_life"):
            if getattr(self, name) is not None and isinstance(loss, Differentiated):
                raise ValueError(f"{loss!r} is a function of booleans, which tell no {name}: give an xbm.PairLoss")
        if self.balance is not None and not self.in_batch:
            raise ValueError("balance goes by the gradient of the in-batch term, and in_batch is False")
        parts: tuple[RowLoss | Miner, ...] = (loss, *miners)
        for one in parts:
            if one.needs_cosines and not self.normalize:
                raise ValueError(f"{one!r} is a function of cosines: it needs normalize=True")
        object.__setattr__(self, "relation", Relation(self.match, self.pair_weights, self.ignore_label))
        object.__setattr__(self, "criterion", mining.mined(loss, *miners))

    @property
    def needs_motion(self) -> bool:
        """Whether `step` wants the memory's motion: to compensate it, or to tell when it has settled."""
        return self.compensate is not None or self.settle is not None

    def refuse_shards(self) -> None:
        """Raise a ValueError if a shard of the memory is not enough for the loss or a miner, which see whole rows."""
        if not isinstance(self.criterion, PairLoss):
            raise ValueError(
                f"{self.criterion!r} sees whole rows, and a rank with a shard of the memory has none: give a loss and "
                f"miners that merge by blocks (an xbm.PairLoss), or let every rank hold the whole memory (shard=False)"
            )

    def step(
        self,
        state: MemoryState,
        x: Array,
        labels: Array | None = None,
        *,
        ids: Array | None = None,
        enqueue: Array | None = None,
        keys: Array | None = None,
        key_labels: Array | None = None,
        motion: Motion | None = None,
        group: Group = ALONE,
    ) -> Step:
        """Make one training call: store the batch, then compare it with the memory.

        Parameters
        ----------
        state : MemoryState
            Consumed: use only the returned one.
        x : (B, D) floating point
            Anchors. B may change from call to call and may be 0.
        labels : (B,) integer, optional
            Classes of the anchors. Left out, each sample is a class of its own: those of equal ids are, and query i
            with key i.
        ids : (B,) integer, optional
            Samples of the anchors (and keys), >= 0, negative = none: tells copies and measures drift. Needed with
            `settle`.
        enqueue : (B,) bool, optional
            Rows to store (of the keys, if there are any). The others are anchors and batch-mates all the same.
        keys : (K, D) floating point, optional
            Rows to store and to compare with instead of x: two towers, or a momentum encoder. Queries meet no queries.
            Key i is a candidate of query i, in the batch and in the memory; with ids, older keys of the query's id are
            not.
        key_labels : (K,) integer, optional
            Classes of the keys; those of the anchors if left out. Needed where K is not B.
        motion : Motion, optional
            The memory's, from `compensation.init` or the last step; where the objective `needs_motion`.
        group : Group
            The processes that train together, each calling this with a part of the batch. All store the whole batch, or
            their shards of it; the loss is that of the whole, and the gradient, times `Ranks.scale`, that of the part.

        Returns
        -------
        Step

        Raises
        ------
        TypeError, ValueError
            If an input does not fit; the state is then as it was.
        """
        _, ops = backends.of(state.embeddings)
        given = {"ids": ids, "keys": keys, "key_labels": key_labels, "enqueue": enqueue}
        if (motion is not None) != self.needs_motion:
            raise ValueError(
                "step wants the memory's motion, from xbm.compensation.init(state) or the last step, where the "
                "objective compensates or settles, and there alone"
            )
        batch, ranks = group.meet(lambda: self._read(state, x, labels, drifting=self.settle is not None, **given))
        batch = batch.gathered(ranks)
        keep, bad, placement = self._placed(state, batch, ranks)
        needed = batch.keys is None or batch.labels is None
        slots = placing.own_slots(state, keep, placement) if needed else None
        batch = batch.labelled(slots, placement.capacity)
        # Before anything changes: a loss may raise.
        in_batch = self._batch_term(batch, state.step, ranks, gradient=True)
        moved = met = None
        if batch.ids is not None:
            met = drift.met(state, batch.ids, ranks)
            moved = drift.of_met(state, batch.stored, met, ranks)
            # Old rows are read by now.
            placement = placement._replace(slots=ops.after(placement.slots, moved.distance))
            state = state._replace(step=ops.after(state.step, moved.distance))
            motion = self._settled(motion, moved, state.step)
        if self.compensate is not None and motion is not None:
            state, motion = self.compensate.within(
                state, motion, batch.stored, batch.stored_labels, met, normalize=self.normalize, ranks=ranks
            )
        state = memory.write(state, batch.stored, batch.stored_labels, batch.ids, keep, bad, placement)
        own = slots if batch.keys is None else None
        counted = self._counted(state, motion)
        in_memory = self._memory_term(state, batch, own, counted, ranks, gradient=True)
        weight = self._weight(batch, in_batch, in_memory, counted, ranks, gradient=True)
        state = memory.advance(state)
        return self._joined(state, batch, in_batch, in_memory, weight, moved, ranks, motion, gradient=True)

    def evaluate(
        self,
        state: MemoryState,
        x: Array,
        labels: Array | None = None,
        *,
        ids: Array | None = None,
        enqueue: Array | None = None,
        keys: Array | None = None,
        key_labels: Array | None = None,
        motion: Motion | None = None,
        gradient: bool = False,
        group: Group = ALONE,
    ) -> Step:
        """Return the loss against the memory as it is; store and count nothing, whatever `enqueue` says.

        Takes and returns what `step` does; `gradient` tells whether to return the gradients, without which nothing is
        scaled by `balance`. With `settle`, `motion` tells whether the memory counts.
        """
        if self.settle is not None and motion is None:
            raise ValueError("evaluate wants the memory's motion, from the last step, to tell whether it has settled")
        _, ops = backends.of(state.embeddings)
        given: dict[str, Any] = {"ids": ids, "keys": keys, "key_labels": key_labels, "enqueue": enqueue}
        batch, ranks = group.meet(lambda: self._read(state, x, labels, **given))
        batch = batch.gathered(ranks).labelled(None, state.labels.shape[0] * ranks.shard.shards)
        by_loss = any(ops.may_differentiate(one) for one in (x, keys) if one is not None)
        wanted = gradient or by_loss or ranks.size > 1  # or ranks would do different things
        in_batch = self._batch_term(batch, state.step, ranks, gradient=wanted)
        counted = self._counted(state, motion)
        in_memory = self._memory_term(state, batch, None, counted, ranks, gradient=wanted)
        weight = self._weight(batch, in_batch, in_memory, counted, ranks, gradient=gradient)
        result = self._joined(state, batch, in_batch, in_memory, weight, None, ranks, gradient=wanted)
        return result if gradient else result._replace(gradient=None, key_gradient=None)

    def store(
        self, state: MemoryState, x: Array, labels: Array, *, ids: Array | None = None, group: Group = ALONE
    ) -> MemoryState:
        """Return the state with a batch stored as rows of before this call, compared with nothing and not counted."""
        batch, ranks = group.meet(lambda: self._read(state, x, labels, ids=ids))
        batch = batch.gathered(ranks)
        placed = self._placed(state, batch, ranks)
        return memory.write(state, batch.stored, batch.labels, batch.ids, *placed, age=1)

    def _placed(self, state: MemoryState, batch: Batch, ranks: Ranks) -> tuple[Array, Array, placing.Placement]:
        """Return which rows of a batch to store, which are refused as not finite, and where they go."""
        keep, bad = memory.storable(state, batch.stored, mask=batch.enqueue, on_nonfinite=self.on_nonfinite)
        replaced = batch.ids if self.copies == "replace" else None
        return keep, bad, placing.place(state, keep, replace=replaced, shard=ranks.shard, spread=ranks.keys)

    def _read(
        self, state: MemoryState, x: Array, labels: Array | None, *, drifting: bool = False, **options: Any
    ) -> Batch:
        if drifting and options["ids"] is None:
            raise ValueError("settle goes by the drift of samples that come back: step wants their ids")
        batch = read(state, x, labels, unit=self.normalize, **options)
        for miner in self.miners:
            miner.refuse(x.shape[1])
        return batch

    def _joined(
        self,
        state: MemoryState,
        batch: Batch,
        in_batch: _Term,
        in_memory: _Term,
        weight: Any,
        moved: drift.Drift | None,
        ranks: Ranks,
        motion: Motion | None = None,
        *,
        gradient: bool,
    ) -> Step:
        """Return the step whose two terms these are, the memory's to be multiplied by a weight."""
        xp, ops = backends.of(batch.z)
        B = ops.length(batch.z)
        B = max(B, 1) if isinstance(B, int) else xp.astype(xp.clip(B, min=1), batch.z.dtype)
        batch_loss, memory_loss = xp.sum(in_batch.value) / B, weight * xp.sum(in_memory.value) / B

        loss, gradients = batch_loss + memory_loss, []
        if gradient:
            of_anchors = ranks.queries.sum_own(in_batch.gradient + weight * in_memory.gradient) * ranks.scale / B
            of_keys = in_batch.of_keys * ranks.scale / B
            if batch.keys is None:
                known = [(batch.queries, of_anchors + of_keys)]
            else:
                known = [(batch.queries, of_anchors), (batch.keys, of_keys)]
            wide = [(side.x, side.to_input(dz)) for side, dz in known]
            loss = ops.attach_gradient(loss, *wide)
            gradients = [xp.astype(dx, x.dtype, copy=False) for x, dx in wide]
        dx, dk = (*gradients, None, None)[:2]

        nothing = xp.full((), xp.nan, dtype=xp.float32, device=device_of(batch.z))
        figures = {
            "batch_loss": batch_loss,
            "memory_loss": memory_loss,
            "fill": xp.astype(state.count, xp.float32) / (state.labels.shape[0] * ranks.shard.shards),
            "pairs": total(ranks.each, in_memory.pairs)[0] if gradient else nothing,
            "drift": moved.distance if moved else nothing,
            "drift_age": moved.age if moved else nothing,
            "skipped": state.skipped,
            "drift_before": motion.before if motion else nothing,
            "drift_after": motion.after if motion else nothing,
            "rejected": motion.rejected if motion else nothing,
        }
        report = ops.stop_gradient(xp.stack([xp.astype(figures[name], xp.float32) for name in REPORT]))
        return Step(loss, dx, dk, state, report, motion)

    def _batch_term(self, batch: Batch, step: Array, ranks: Ranks, *, gradient: bool) -> _Term:
        """Compare the batch with itself, or with its keys; the gradient is two-sided. A rank compares its own rows."""
        xp, ops = backends.of(batch.z)
        Z, V, mine = batch.z, batch.stored, ranks.keys.own
        if 0 in (Z.shape[0], V.shape[0]) or (not self.in_batch and self.relation.is_equality):
            return _Term.zero(Z, mine(V))
        labels, columns, none = batch.stored_labels, xp.arange(ops.length(V), device=device_of(Z)), False
        if isinstance(self.criterion, PairLoss):
            none = mine(columns).shape[0] == 0
            some = _first if none else mine  # a row stands in that is in no pair: a reduction needs one
            V, labels, columns = some(V), some(labels), some(columns)
        own = columns if batch.keys is None else None
        P, N = batch_pairs(batch.labels, labels, own=own, dtype=Z.dtype, relation=self.relation)  # may refuse
        if none:
            P, N = xp.zeros_like(P), xp.zeros_like(N)
        if not self.in_batch:
            return _Term.zero(Z, mine(batch.stored))
        anchors = xp.arange(ops.length(Z), device=device_of(Z))
        with ops.full_precision(Z):
            block = Block(Z @ xp.matrix_transpose(V), P, N, columns, anchors, step)
            if isinstance(self.criterion, PairLoss):
                value, W = self.criterion.whole(block, ranks.queries.merge)
            else:
                value, W = self.criterion.whole(block)
                V, W = mine(V), xp.matrix_transpose(mine(xp.matrix_transpose(W)))
            if none or not gradient:
                return _Term.zero(Z, mine(batch.stored))._replace(value=value)
            return _Term(value, W @ V, xp.matrix_transpose(W) @ Z)

    def _settled(self, motion: Motion | None, moved: drift.Drift, step: Array) -> Motion | None:
        """Return the motion with a call's drift in the running mean, and whether the memory has settled by now."""
        if motion is None:
            return None
        xp, _ = backends.of(motion.drift)
        mean, new = motion.drift, xp.astype(moved.distance, motion.drift.dtype, copy=False)
        mean = xp.where(xp.isnan(mean), new, MEMORY_OF_DRIFT * mean + (1 - MEMORY_OF_DRIFT) * new)
        motion = motion._replace(drift=xp.where(xp.isnan(new), motion.drift, mean))
        if self.settle is None:
            return motion
        counts = (motion.settled > 0) | ((step >= self.warmup) & (motion.drift <= self.settle))
        return motion._replace(
            settled=xp.where(counts, xp.clip(motion.settled + 1, max=max(self.ramp, 1)), motion.settled)
        )

    def _counted(self, state: MemoryState, motion: Motion | None) -> Array:
        """Return (), this call's number among those in which the memory term counts, from 1; below, it does not."""
        if self.settle is None or motion is None:
            return state.step - self.warmup + 1
        return motion.settled

    def _weight(
        self, batch: Batch, in_batch: _Term, in_memory: _Term, counted: Array, ranks: Ranks, *, gradient: bool
    ) -> Any:
        """Return what the memory term is multiplied by, a constant."""
        xp, _ = backends.of(batch.z)
        weight: Any = self.weight
        if self.ramp:
            weight = weight * xp.astype(xp.clip(counted, min=0, max=self.ramp), batch.z.dtype) / self.ramp
        if self.balance is None or not gradient:
            return weight
        of_batch, of_memory = (ranks.queries.sum_own(one.gradient) for one in (in_batch, in_memory))
        if batch.keys is None:
            of_batch = of_batch + in_batch.of_keys
        squares = total(ranks.each, *(xp.sum(one**2) for one in (of_batch, of_memory)))
        both = (squares[0] > 0) & (squares[1] > 0) & xp.isfinite(squares[0] + squares[1])
        norm_of_batch, norm_of_memory = (xp.sqrt(xp.where(both, one, 1.0)) for one in squares)
        return weight * xp.where(both, self.balance * norm_of_batch / norm_of_memory, 1.0)

    def _memory_term(
        self, state: MemoryState, batch: Batch, own: Array | None, counted: Array, ranks: Ranks, *, gradient: bool
    ) -> _Term:
        """Compare the batch with the memory; zeros while that warms up. Memory rows are constants."""
        xp, ops = backends.of(batch.z)
        nth, count = ops.known(counted), ops.known(state.count)
        nothing = self.weight == 0 or batch.z.shape[0] == 0 or count == 0
        if nothing or (nth is not None and nth < 1):
            return _Term.zero(batch.z)
        B, M = batch.z.shape[0], state.labels.shape[0]
        width = (B or TYPICAL_BATCH) * self.criterion.width
        block_rows = max(LEAST_ROWS, rows_at_a_time(batch.z, M, width=width, host=CACHE))

        ids = None if self.copies == "keep" else batch.ids
        pairs = MemoryPairs.of(
            batch.labels,
            own=own,
            ids=ids,
            count=state.count,
            step=state.step,
            dtype=batch.z.dtype,
            relation=self.relation,
            ageing=Ageing(self.max_age, self.half_life),
        )
        with ops.full_precision(batch.z):
            found = scan(
                self.criterion,
                batch.z,
                state.embeddings,
                (state.labels, state.ids, state.stored_at),
                pairs,
                block_rows=self.block_rows or block_rows,
                limit=count,
                gradient=gradient,
                ranks=ranks,
            )
        # Selected, never multiplied by 0: an infinite loss must not reach the warm-up as NaN.
        warm = counted > 0
        value, dz, pairs_in_use = (None if one is None else xp.where(warm, one, xp.zeros_like(one)) for one in found)
        return _Term(value, dz, pairs=pairs_in_use)


def _first(rows: Array) -> Array:
    return rows[:1, ...]


class _Term(NamedTuple):
    """One term of the loss before its weight, for B anchors; gradients None where not asked for.

    Of several ranks each has the whole value, and of sums over rows those over its own part of them.
    """

    value: Array  # (B,) L_i
    gradient: Array = None  # (B, D) sum_i dL_i/dz
    of_keys: Array = None  # (K, D) sum_i dL_i/dk, of this rank's rows
    pairs: Array = None  # () pairs with a non-zero weight

    @classmethod
    def zero(cls, z: Array, k: Array | None = None) -> Self:
        xp, _ = backends.of(z)
        pairs = xp.zeros((), dtype=z.dtype, device=device_of(z))
        return cls(xp.zeros_like(z[:, 0]), xp.zeros_like(z), None if k is None else xp.zeros_like(k), pairs)
