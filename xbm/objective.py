"""One training step: normalise, store, compare, and the gradient in closed form."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from xbm import backends, checks, drift, placing
from xbm import memory as memories
from xbm.backends import Array, Namespace
from xbm.batch import ALONE, Batch, Group, read
from xbm.compensation import Compensation, Probes, still
from xbm.criterion import Criterion, CriterionOptions
from xbm.losses import Differentiated, LossLike
from xbm.memory_state import MemoryState
from xbm.options import documented, instance, option, whole
from xbm.ranks import ONE, Ranks
from xbm.relation import Relation, RelationOptions
from xbm.schedule import Schedule, ScheduleOptions, WarmUp
from xbm.state import State
from xbm.step import Step, joined
from xbm.storage import Storage, StorageOptions
from xbm.terms import Term, batch_term, memory_term


@documented
@dataclass(frozen=True, kw_only=True)
class Objective(Storage, Relation, Schedule, Criterion):
    r"""In-batch loss plus memory loss over the same pair loss: L = (1/B) sum_i (L_i^batch + weight L_i^memory).

    Parameters
    ----------
    {options}

    Raises
    ------
    TypeError, ValueError
        If an option is out of range; if the loss needs cosines and `normalize` is False; if a function as a loss, which
        takes booleans, is given `pair_weights`.

    Examples
    --------
    >>> import numpy as np, xbm
    >>> rng = np.random.default_rng(0)
    >>> objective = xbm.Objective(warmup=1)
    >>> state = objective.init(capacity=64, dim=8)
    >>> for _ in range(3):
    ...     x, labels = rng.normal(size=(16, 8)), rng.integers(4, size=16)
    ...     loss, gradient, _, state, report = objective.step(state, x, labels)
    >>> gradient.shape, float(report.fill), round(float(loss), 3)
    ((16, 8), 0.75, 2.185)

    References
    ----------
    Wang, Zhang, Huang, Scott, "Cross-Batch Memory for Embedding Learning", CVPR 2020, arXiv 1912.06798.
    """

    in_batch: bool = option(True, checks.flag, """Whether the in-batch term counts.""")
    compensate: Compensation | None = option(
        None,
        instance(Compensation, "an xbm.Compensation"),
        """How the memory follows the network, see `xbm.Compensation`.""",
    )
    block_rows: int | None = option(
        None,
        whole(at_least=1),
        """Memory rows compared at a time; extra memory is proportional to it. Chosen from B if left out.""",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pair_weights is not None and isinstance(self.loss, Differentiated):
            raise ValueError(f"{self.loss!r} is a function of booleans and takes no pair_weights: use an xbm.PairLoss")
        for one in (self.loss, *self.miners):
            if getattr(one, "needs_cosines", False) and not self.normalize:
                raise ValueError(f"{one!r} is a function of cosines: it needs normalize=True")

    def init(
        self, *, capacity: int, dim: int, dtype: Any = None, device: Any = None, xp: Namespace | None = None
    ) -> State:
        """Return the state before the first call, with an empty memory: see `xbm.init` for the parameters."""
        return self.begin(memories.init(capacity=capacity, dim=dim, dtype=dtype, device=device, xp=xp))

    def begin(self, memory: MemoryState) -> State:
        """Return the state of a run that begins with the rows of a memory."""
        return State(memory, self.begin_warmup(memory), None if self.compensate is None else still(memory))

    def clear(self, state: State) -> State:
        """Return the state without the rows and their motion. A warm-up that is over stays over."""
        empty = self.begin(memories.clear(state.memory))
        if empty.warmup is not None and state.warmup is not None:
            empty = empty._replace(warmup=empty.warmup._replace(counted=state.warmup.counted))
        return empty

    def check_state(self, state: State) -> None:
        """Raise if a state lacks a part that the options need."""
        if not isinstance(state, State):
            raise TypeError(
                f"state must come from objective.init(...), objective.begin(memory) or the last step, got "
                f"{type(state).__name__}"
            )
        for name, part in (("settle", state.warmup), ("compensate", state.motion)):
            if getattr(self, name) is not None and part is None:
                raise ValueError(f"the state was made without {name}=: make it by init of an objective that has it")

    def step(
        self,
        state: State,
        x: Array,
        labels: Array | None = None,
        *,
        ids: Array | None = None,
        enqueue: Array | None = None,
        keys: Array | None = None,
        key_labels: Array | None = None,
        group: Group = ALONE,
    ) -> Step:
        """Make one training call: store the batch, then compare it with the memory.

        Parameters
        ----------
        state : State
            Consumed: use only the returned one.
        x : (B, D) floating point
            Anchors. B can change from call to call, and can be 0.
        labels : (B,) integer, optional
            Classes of the anchors. If left out, samples with equal ids are one class, query i and key i are one class,
            and any other sample is a class of its own.
        ids : (B,) integer, optional
            Samples of the anchors (and of the keys), >= 0, negative = none: identifies copies and measures drift.
            Required with `settle`.
        enqueue : (B,) bool, optional
            Rows to store (of the keys, if there are any). All rows are anchors and batch-mates.
        keys : (K, D) floating point, optional
            Rows to store and compare with instead of x: two towers, or a momentum encoder. Queries are not compared
            with queries. Key i is a candidate of query i, in the batch and in the memory; with ids, older keys with the
            query's id are not.
        key_labels : (K,) integer, optional
            Classes of the keys; the labels of the anchors if left out. Required if K is not B.
        group : Group
            The processes that train together, each with a part of the batch. Every rank stores the whole batch, or its
            shard of it. The loss is that of the whole batch; the gradient is that of this rank's part, times
            `Ranks.scale`.

        Returns
        -------
        Step

        Raises
        ------
        TypeError, ValueError
            If an input does not fit; the state is then unchanged.
        """
        self.check_state(state)
        memory, warmup, motion = state
        _, ops = backends.of(memory.embeddings)
        given: dict[str, Any] = {"ids": ids, "keys": keys, "key_labels": key_labels, "enqueue": enqueue}
        batch, ranks = group.meet(lambda: self._read(memory, x, labels, training=True, **given))
        batch = batch.gathered(ranks)
        keep, bad, placement = self.placed(memory, batch, ranks)
        needed = batch.keys is None or batch.labels is None
        slots = placing.own_slots(memory, keep, placement) if needed else None
        batch = batch.labelled(slots, placement.capacity)
        # The in-batch term comes before any change, since a user's function can raise.
        in_batch = self._batch_term(batch, memory.step, ranks, gradient=True)
        moved = returned = None
        if batch.ids is not None:
            returned = drift.returned(memory, batch.ids, ranks)
            moved = drift.measured(memory, batch.stored, returned, ranks)
            # Old rows are read before they are overwritten.
            placement = placement._replace(slots=ops.after(placement.slots, moved.distance))
            memory = memory._replace(step=ops.after(memory.step, moved.distance))
            warmup = self.observe(warmup, moved.distance, memory.step)
        if self.compensate is not None and motion is not None:
            memory, motion = self.compensate.within(
                memory, motion, batch.stored, batch.stored_labels, returned, normalize=self.normalize, ranks=ranks
            )
        memory = memories.write(memory, batch.stored, batch.stored_labels, batch.ids, keep, bad, placement)
        own = slots if batch.keys is None else None
        weight, in_memory = self._memory_term(memory, warmup, batch, own, ranks, gradient=True)
        state = State(memories.advance(memory), warmup, motion)
        return joined(state, batch, in_batch, in_memory, weight, moved, motion, ranks, gradient=True)

    def evaluate(
        self,
        state: State,
        x: Array,
        labels: Array | None = None,
        *,
        ids: Array | None = None,
        enqueue: Array | None = None,
        keys: Array | None = None,
        key_labels: Array | None = None,
        gradient: bool = False,
        group: Group = ALONE,
    ) -> Step:
        """Return the loss against the memory as it is. Nothing is stored or counted, whatever `enqueue` says.

        The parameters and the result are those of `step`; `gradient` is whether to return the gradients.
        """
        self.check_state(state)
        memory = state.memory
        _, ops = backends.of(memory.embeddings)
        given: dict[str, Any] = {"ids": ids, "keys": keys, "key_labels": key_labels, "enqueue": enqueue}
        batch, ranks = group.meet(lambda: self._read(memory, x, labels, **given))
        batch = batch.gathered(ranks).labelled(None, memory.labels.shape[0] * ranks.shard.shards)
        by_loss = any(ops.may_differentiate(one) for one in (x, keys) if one is not None)
        wanted = gradient or by_loss or ranks.size > 1  # all ranks must make the same exchanges
        in_batch = self._batch_term(batch, memory.step, ranks, gradient=wanted)
        weight, in_memory = self._memory_term(memory, state.warmup, batch, None, ranks, gradient=wanted)
        result = joined(state, batch, in_batch, in_memory, weight, None, None, ranks, gradient=wanted)
        return result if gradient else result._replace(gradient=None, key_gradient=None)

    def store(self, state: State, x: Array, labels: Array, *, ids: Array | None = None, group: Group = ALONE) -> State:
        """Return the state with a batch stored as rows older than the next call; nothing is compared or counted."""
        self.check_state(state)
        memory = state.memory
        batch, ranks = group.meet(lambda: self._read(memory, x, labels, ids=ids))
        batch = batch.gathered(ranks)
        placed = self.placed(memory, batch, ranks)
        return state._replace(memory=memories.write(memory, batch.stored, batch.labels, batch.ids, *placed, age=1))

    def move(
        self, state: State, probes: Probes, fresh: Array, valid: Array | None = None, *, ranks: Ranks = ONE
    ) -> State:
        """Return the state after a round of drift compensation: see `Compensation.move`.

        Parameters
        ----------
        state : State
            Consumed: use only the returned one.
        probes : Probes
            From `Compensation.probe` of the memory.
        fresh : (p, D) floating point
            Embeddings of the samples `probes.ids` by the current network.
        valid : (p,) bool, optional
            Probes that count; those with an id if left out.
        ranks : Ranks
            The ranks that hold the memory's shards.
        """
        self.check_state(state)
        if self.compensate is None or state.motion is None:
            raise ValueError("move is for an objective with compensate=")
        valid = probes.ids >= 0 if valid is None else valid
        memory, motion = self.compensate.move(
            state.memory, state.motion, probes.slots, fresh, valid, normalize=self.normalize, ranks=ranks
        )
        return state._replace(memory=memory, motion=motion)

    def _read(
        self, memory: MemoryState, x: Array, labels: Array | None, *, training: bool = False, **given: Array | None
    ) -> Batch:
        """Return the batch of a call, or raise if it does not fit."""
        if training and self.settle is not None and given["ids"] is None:
            raise ValueError("settle= uses the drift of returning samples: pass their ids to each training call")
        batch = read(memory, x, labels, unit=self.normalize, **given)
        for miner in self.miners:
            miner.refuse(x.shape[1])
        return batch

    def _batch_term(self, batch: Batch, step: Array, ranks: Ranks, *, gradient: bool) -> Term:
        return batch_term(self.criterion, self, batch, step, ranks, counts=self.in_batch, gradient=gradient)

    def _memory_term(
        self,
        memory: MemoryState,
        warmup: WarmUp | None,
        batch: Batch,
        own: Array | None,
        ranks: Ranks,
        *,
        gradient: bool,
    ) -> tuple[Any, Term]:
        """Return the weight of the memory term, and the term before the weight."""
        if self.weight == 0:
            return self.weight, Term.zero(batch.z)
        counted = self.calls_counted(warmup, memory.step)
        term = memory_term(
            self.criterion,
            self,
            memory,
            batch,
            counted,
            ranks,
            own=own,
            keep_copies=self.copies == "keep",
            block_rows=self.block_rows,
            gradient=gradient,
        )
        return self.weight_after(counted, batch.z.dtype), term


class Options(CriterionOptions, ScheduleOptions, RelationOptions, StorageOptions, total=False):
    """The options of an `Objective` but for the loss, for type checkers: `**options: Unpack[Options]`."""

    in_batch: bool
    compensate: Compensation | None
    block_rows: int | None


def objective_of(objective: Objective | None, loss: LossLike | None, options: Options) -> Objective:
    """Return the objective that an adapter was given, or one made of the loss and the options that it was given."""
    if objective is None:
        return Objective(**options) if loss is None else Objective(loss=loss, **options)
    if not isinstance(objective, Objective):
        raise TypeError(f"objective must be an xbm.Objective, got {objective!r:.80}")
    given = [*(["loss"] if loss is not None else []), *options]
    if given:
        names = ", ".join(f"{name}=" for name in given)
        raise ValueError(f"pass the objective or its options, not both: got objective= and {names}")
    return objective
