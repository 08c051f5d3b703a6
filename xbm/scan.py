"""The walk over a memory in blocks: values and gradients of a pair loss, without a (B, M) array.

`scan` walks the blocks once per stage of the loss to summarise the rows, and once more to weight the pairs. A
`SidedPairLoss` weights its pairs during the only summary, so contrastive loss takes one walk in all. A loss that needs
whole rows gets them in one block.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

from xbm import backends
from xbm.backends import Array, device_of
from xbm.losses import Block, PairLoss, RowLoss, SidedPairLoss
from xbm.losses.base import results
from xbm.pairs import Candidates, MemoryPairs
from xbm.ranks import ONE, Ranks
from xbm.reductions import Summaries


class Scanned(NamedTuple):
    """The result of a walk for B anchors. With several ranks, each has the sums over its own part of the rows j."""

    value: Array  #: (B,) L_i
    gradient: Array | None  #: (B, D) dL_i/dz_i = sum_j W_ij v_j
    pairs: Array | None  #: () pairs with W_ij != 0


def scan(
    loss: RowLoss,
    anchors: Array,
    rows: Array,
    columns: tuple[Array, ...],
    pairs: MemoryPairs,
    *,
    block_rows: int,
    limit: int | None = None,
    gradient: bool = True,
    ranks: Ranks = ONE,
) -> Scanned:
    """Evaluate a loss for anchors against the rows of a memory.

    Parameters
    ----------
    loss : RowLoss
    anchors : (B, D)
        In the dtype of all arithmetic; blocks of rows are cast to it as they are read.
    rows : (M, D)
        Constants, which get no gradient. A rank's shard of them, if the memory is sharded.
    columns : tuple of (M,) arrays
        Columns of the memory that `pairs.candidates` takes.
    pairs : MemoryPairs
        Which pairs are positive and negative.
    block_rows : int
        m, rows in a block. Extra memory is O(B m), or O(B M) for a loss that needs whole rows.
    limit : int, optional
        Slots from this one on are in no pair.
    gradient : bool
        Whether to weight the pairs. If False, `gradient` and `pairs` of the result are None.
    ranks : Ranks
        The ranks of the call: each walks over its part of the rows, for the anchors of all.

    Returns
    -------
    Scanned
    """
    xp, ops = backends.of(anchors)
    every_anchor = xp.arange(ops.length(anchors), device=device_of(anchors))
    M, part, merge = rows.shape[0], ranks.part(rows.shape[0]), ranks.queries.merge
    slot, size = ranks.shard.first(M), block_rows if isinstance(loss, PairLoss) else M
    if isinstance(loss, PairLoss) and part is not None:
        slot = slot + part.start
        if part.start == part.stop:  # more ranks than rows: a row beyond the last one, which is in no pair
            slot, part = M, slice(0, 1)
        rows, columns = rows[part, :], tuple(column[part] for column in columns)
    limit = None if limit is None else max(limit - slot, 1)  # at least one block is visited

    def walk(visit: Callable[[Array, Array, Array, Candidates], Any]) -> Any:
        def visit_block(carry: Any, start: Any, block_of_rows: Array, *block_of_columns: Array) -> Any:
            V = xp.astype(block_of_rows, anchors.dtype, copy=False)
            slots = slot + start + xp.arange(V.shape[0], device=device_of(anchors))
            found = visit(anchors @ xp.matrix_transpose(V), V, slots, pairs.candidates(slots, *block_of_columns))
            return found if carry is None else _merge(carry, found)

        return ops.fold(visit_block, (rows, *columns), size, limit=limit)

    def walk_blocks(visit: Callable[[Block, Array], Any]) -> Any:
        return walk(lambda S, V, slots, rows: visit(Block(S, *pairs.between(rows), slots, every_anchor, pairs.step), V))

    if not isinstance(loss, PairLoss):

        def whole(block: Block, V: Array) -> tuple[Array, _Weighed]:
            value, W = loss.whole(block)
            if part is not None:
                some = part.start < part.stop
                W, V = (W[:, part], V[part, :]) if some else (xp.zeros_like(W[:, :1]), V[:1, :])
            return value, (_weigh(W, V) if gradient else _Weighed(None, None))

        value, weighed = walk_blocks(whole)
        return Scanned(value, *weighed)

    if isinstance(loss, SidedPairLoss) and gradient:
        (of_positive, positive), (of_negative, negative) = walk(lambda S, V, _, rows: _sided(loss, S, V, pairs, rows))
        r = results(merge(of_positive | of_negative))
        f_positive, f_negative = loss.factors(r)
        total = f_positive[:, None] * positive.gradient + f_negative[:, None] * negative.gradient
        return Scanned(loss.value(r), total, positive.pairs + negative.pairs)

    r = {}
    for stage in loss.stages:
        r = r | results(merge(walk_blocks(lambda block, V: stage(block, r))))
    if not gradient:
        return Scanned(loss.value(r), None, None)
    return Scanned(loss.value(r), *walk_blocks(lambda block, V: _weigh(loss.weights(block, r), V)))


def _sided(loss: SidedPairLoss, S: Array, V: Array, pairs: MemoryPairs, rows: Candidates) -> tuple[_Found, _Found]:
    """Return `(summaries, weighed)` of either side of a block.

    On a CPU, each side is computed from its relevant rows alone if they are few. Most rows are related to no anchor:
    they are negatives of all, and their similarity alone decides.
    """
    xp, ops = backends.of(S)

    def pull(S: Array, P: Array, V: Array) -> _Found:
        side = loss.positive(S, P)
        return side.summaries, _weigh(side.weights, V)

    def push(S: Array, N: Array, V: Array) -> _Found:
        if loss.negative_floor is not None:
            above = ops.few(xp.max(S, axis=0) > loss.negative_floor)
            if above is not None:
                S, N, V = xp.take(S, above, axis=1), xp.take(N, above, axis=1), xp.take(V, above, axis=0)
        side = loss.negative(S, N)
        return side.summaries, _weigh(side.weights, V)

    some = rows.related() | (xp.arange(S.shape[1], device=device_of(S)) == 0)  # at least one
    few = ops.few(some)
    if few is None:
        P, N = pairs.between(rows)
        return pull(S, P, V), push(S, N, V)
    P, N = pairs.between(rows.take(few))
    others = xp.broadcast_to((rows.filled * xp.astype(~some, S.dtype))[None, :], S.shape)
    S_few, V_few = xp.take(S, few, axis=1), xp.take(V, few, axis=0)
    return pull(S_few, P, V_few), _merge(push(S_few, N, V_few), push(S, others, V))


def _weigh(W: Array, V: Array) -> _Weighed:
    """Return W V. On a CPU, only the rows with a non-zero weight are read if they are few."""
    xp, ops = backends.of(W)
    few = ops.few(xp.sum(xp.abs(W), axis=0) != 0)  # a NaN is not 0
    if few is not None:
        W, V = xp.take(W, few, axis=1), xp.take(V, few, axis=0)
    return _Weighed(W @ V, xp.count_nonzero(W))


class _Weighed(NamedTuple):
    gradient: Array  #: (B, D) sum_j W_ij v_j so far
    pairs: Array  #: () pairs with W_ij != 0 so far

    def merge(self, other: _Weighed) -> _Weighed:
        return _Weighed(self.gradient + other.gradient, self.pairs + other.pairs)


_Found: TypeAlias = tuple[Summaries, _Weighed]  # of one side of a block


def _merge(carry: Any, found: Any) -> Any:
    """Merge the results of two blocks: reductions, or dicts and tuples of them."""
    if isinstance(carry, dict):
        return {name: _merge(carry[name], found[name]) for name in carry}
    if hasattr(carry, "merge"):
        return carry.merge(found)
    return tuple(_merge(mine, theirs) for mine, theirs in zip(carry, found, strict=True))
