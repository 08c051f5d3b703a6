"""The two terms of the loss: the batch against itself, and the batch against the memory."""

from __future__ import annotations

from typing import NamedTuple, Self

from xbm import backends
from xbm.backends import Array, device_of
from xbm.batch import Batch
from xbm.blocks import rows_at_a_time
from xbm.losses import Block, PairLoss, RowLoss
from xbm.memory_state import MemoryState
from xbm.pairs import MemoryPairs, batch_pairs
from xbm.ranks import Ranks
from xbm.relation import Relation
from xbm.scan import scan

LEAST_ROWS = 256  # memory rows in a block, at least
CACHE = 2**19  # similarities in a block on a CPU: more leave its cache, fewer take more calls
TYPICAL_BATCH = 64  # anchors, if a graph does not know the number


class Term(NamedTuple):
    """One term of the loss for B anchors, before its weight; a gradient is None if it was not asked for.

    With several ranks, `value` is complete on each, and the gradients are sums over the rank's own part of the rows.
    """

    value: Array  #: (B,) L_i
    gradient: Array = None  #: (B, D) sum_i dL_i/dz
    of_keys: Array = None  #: (K, D) sum_i dL_i/dk, of this rank's rows
    pairs: Array = None  #: () pairs with a non-zero weight

    @classmethod
    def zero(cls, z: Array, k: Array | None = None) -> Self:
        """Return a term that is 0, for anchors z (B, D) and rows k (K, D)."""
        xp, _ = backends.of(z)
        pairs = xp.zeros((), dtype=z.dtype, device=device_of(z))
        return cls(xp.zeros_like(z[:, 0]), xp.zeros_like(z), None if k is None else xp.zeros_like(k), pairs)


def batch_term(
    criterion: RowLoss,
    relation: Relation,
    batch: Batch,
    step: Array,
    ranks: Ranks,
    *,
    counts: bool,
    gradient: bool,
) -> Term:
    """Compare the batch with itself or with its keys; each rank compares all anchors with its own rows.

    The gradient is two-sided: into the anchors and into the rows. If the term does not count, functions of labels are
    called all the same, since they must raise before anything changes.
    """
    xp, ops = backends.of(batch.z)
    Z, V, mine = batch.z, batch.stored, ranks.keys.own
    if 0 in (Z.shape[0], V.shape[0]) or (not counts and relation.is_equality):
        return Term.zero(Z, mine(V))
    labels, columns, none = batch.stored_labels, xp.arange(ops.length(V), device=device_of(Z)), False
    if isinstance(criterion, PairLoss):
        none = mine(columns).shape[0] == 0
        some = _first if none else mine  # a reduction needs a row: the first one, in no pair
        V, labels, columns = some(V), some(labels), some(columns)
    own = columns if batch.keys is None else None
    P, N = batch_pairs(batch.labels, labels, own=own, dtype=Z.dtype, relation=relation)
    if none:
        P, N = xp.zeros_like(P), xp.zeros_like(N)
    if not counts:
        return Term.zero(Z, mine(batch.stored))
    anchors = xp.arange(ops.length(Z), device=device_of(Z))
    with ops.full_precision(Z):
        block = Block(Z @ xp.matrix_transpose(V), P, N, columns, anchors, step)
        if isinstance(criterion, PairLoss):
            value, W = criterion.whole(block, ranks.queries.merge)
        else:
            value, W = criterion.whole(block)
            V, W = mine(V), xp.matrix_transpose(mine(xp.matrix_transpose(W)))
        if none or not gradient:
            return Term.zero(Z, mine(batch.stored))._replace(value=value)
        return Term(value, W @ V, xp.matrix_transpose(W) @ Z)


def memory_term(
    criterion: RowLoss,
    relation: Relation,
    memory: MemoryState,
    batch: Batch,
    counted: Array,
    ranks: Ranks,
    *,
    own: Array | None,
    keep_copies: bool,
    block_rows: int | None,
    gradient: bool,
) -> Term:
    """Compare the batch with the rows of the memory, which are constants; 0 while `counted` is below 1.

    Parameters
    ----------
    criterion : RowLoss
    relation : Relation
    memory : MemoryState
    batch : Batch
    counted : () integer
        How many calls the memory term has counted in, this one included: see `Schedule.calls_counted`.
    ranks : Ranks
    own : (B,) integer, optional
        Slot of each anchor's own row, -1 = none; None if no anchor has one.
    keep_copies : bool
        Whether older rows of an anchor's own sample are pairs.
    block_rows : int, optional
        Rows in a block.
    gradient : bool
        Whether to return the gradient.
    """
    xp, ops = backends.of(batch.z)
    nth, count = ops.known(counted), ops.known(memory.count)
    if batch.z.shape[0] == 0 or count == 0 or (nth is not None and nth < 1):
        return Term.zero(batch.z)
    B, M = batch.z.shape[0], memory.labels.shape[0]
    width = (B or TYPICAL_BATCH) * criterion.width
    pairs = MemoryPairs.of(
        batch.labels,
        own=own,
        ids=None if keep_copies else batch.ids,
        count=memory.count,
        step=memory.step,
        dtype=batch.z.dtype,
        relation=relation,
    )
    with ops.full_precision(batch.z):
        found = scan(
            criterion,
            batch.z,
            memory.embeddings,
            (memory.labels, memory.ids, memory.stored_at),
            pairs,
            block_rows=block_rows or max(LEAST_ROWS, rows_at_a_time(batch.z, M, width=width, host=CACHE)),
            limit=count,
            gradient=gradient,
            ranks=ranks,
        )
    # Selected by `where`, never multiplied by 0: an infinite loss must not become NaN during the warm-up.
    warm = counted > 0
    value, dz, in_use = (None if one is None else xp.where(warm, one, xp.zeros_like(one)) for one in found)
    return Term(value, dz, pairs=in_use)


def _first(rows: Array) -> Array:
    return rows[:1, ...]
