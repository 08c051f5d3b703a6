"""The walk over a memory in blocks: values and gradients of a pair loss, never a (B, M) array.

`scan` walks the blocks to summarise the rows, once per stage of the loss, and once more to weigh the pairs. A
`SidedPairLoss` is weighed during its last summary, so contrastive loss walks once in all. A loss that sees whole rows
gets them in one block.
"""

from typing import Any, NamedTuple

from xbm import backends
from xbm.losses import Block, PairLoss, SidedPairLoss
from xbm.losses.base import results

Array = Any


class Scanned(NamedTuple):
    """What a walk brings home for B anchors."""

    value: Array  # (B,) L_i
    gradient: Array | None  # (B, D) dL_i/dz_i = sum_j W_ij v_j
    pairs: Array | None  # () pairs with W_ij != 0


def scan(loss, anchors, rows, columns, pairs, *, block_rows, limit=None, gradient=True):
    """Evaluate a loss for anchors against the rows of a memory.

    Parameters
    ----------
    loss : RowLoss
    anchors : (B, D)
        In the dtype that everything is computed in; blocks of rows are cast to it as they are read.
    rows : (M, D)
        Constants: no gradient goes into them.
    columns : tuple of (M,) arrays
        What `pairs` wants to know of the rows.
    pairs : Pairs
        Which pairs are positive and negative.
    block_rows : int
        m, rows in a block; extra memory is O(B m), or O(B M) for a loss that sees whole rows.
    limit : int, optional
        Rows from this one on are known to be in no pair. At least 1.
    gradient : bool
        Whether to weigh the pairs; without, `gradient` and `pairs` of the result are None.

    Returns
    -------
    Scanned
    """
    xp, ops = backends.of(anchors)
    every_anchor = xp.arange(anchors.shape[0], device=anchors.device)
    walked = isinstance(loss, PairLoss)
    floor = loss.negative_floor if walked else None

    def walk(visit):
        def visit_block(carry, start, block_of_rows, *block_of_columns):
            V = xp.astype(block_of_rows, anchors.dtype, copy=False)
            slots = start + xp.arange(V.shape[0], device=anchors.device)
            S = anchors @ V.T
            if floor is not None:
                some_pair = (xp.max(S, axis=0) > floor) | pairs.some_positive(*block_of_columns)
                few = ops.few(some_pair)
                if few is not None:
                    S = xp.take(S, few, axis=1)
                    V, slots, *block_of_columns = (xp.take(one, few, axis=0) for one in (V, slots, *block_of_columns))
            P, N = pairs.between(slots, *block_of_columns)
            found = visit(Block(S, P, N, slots, every_anchor), V)
            return found if carry is None else _merge(carry, found)

        return ops.fold(visit_block, (rows, *columns), block_rows if walked else rows.shape[0], limit=limit)

    def weigh(W, V):
        few = ops.few(xp.sum(xp.abs(W), axis=0) != 0)  # a NaN is not 0
        if few is not None:
            W, V = xp.take(W, few, axis=1), xp.take(V, few, axis=0)
        return _Weighed(W @ V, xp.count_nonzero(W))

    if not walked:

        def whole(block, V):
            value, W = loss.whole(block)
            return value, (weigh(W, V) if gradient else _Weighed(None, None))

        value, weighed = walk(whole)
        return Scanned(value, *weighed)

    r = {}
    *earlier, last = loss.stages
    for stage in earlier:
        r = r | results(walk(lambda block, V, stage=stage: stage(block, r)))

    if not gradient:
        r = r | results(walk(lambda block, V: last(block, r)))
        return Scanned(loss.value(r), None, None)

    if isinstance(loss, SidedPairLoss):

        def summarise_and_weigh(block, V):
            sides = loss.sides(block)
            return loss.tally(block, *sides), *(weigh(W, V) for W in sides)

        summaries, positive, negative = walk(summarise_and_weigh)
        r = r | results(summaries)
        f_positive, f_negative = loss.factors(r)
        total = f_positive[:, None] * positive.gradient + f_negative[:, None] * negative.gradient
        return Scanned(loss.value(r), total, positive.pairs + negative.pairs)

    r = r | results(walk(lambda block, V: last(block, r)))
    weighed = walk(lambda block, V: weigh(loss.weights(block, r), V))
    return Scanned(loss.value(r), *weighed)


class _Weighed(NamedTuple):
    gradient: Array  # (B, D) sum_j W_ij v_j so far
    pairs: Array  # () pairs with W_ij != 0 so far

    def merge(self, other):
        return _Weighed(self.gradient + other.gradient, self.pairs + other.pairs)


def _merge(carry, found):
    """Join two blocks' findings: reductions, or dicts and tuples of them."""
    if isinstance(carry, dict):
        return {name: _merge(carry[name], found[name]) for name in carry}
    if hasattr(carry, "merge"):
        return carry.merge(found)
    return tuple(_merge(mine, theirs) for mine, theirs in zip(carry, found, strict=True))
