"""The walk over a memory in blocks: values and gradients of a pair loss, never a (B, M) array.

`scan` walks the blocks to summarise the rows, once per stage of the loss, and once more to weigh the pairs. A
`SidedPairLoss` is weighed during its last summary, so contrastive loss walks once in all.
"""

from typing import Any, NamedTuple

from array_api_compat import device

from xbm import backends
from xbm.losses import Block, SidedPairLoss

Array = Any


class Scanned(NamedTuple):
    """What a walk brings home for B anchors."""

    value: Array  # (B,) L_i
    gradient: Array | None  # (B, D) dL_i/dz_i = sum_j W_ij v_j
    pairs: Array | None  # () pairs with W_ij != 0


def dense(loss, block):
    """Return `(L_i (B,), W (B, m))` of rows that are whole in one block."""
    r = {}
    for stage in loss.stages:
        r = r | _results(stage(block, r))
    value, W = loss.value(r), loss.weights(block, r)
    if value.shape != block.anchors.shape or W.shape != block.S.shape:
        raise ValueError(
            f"{loss!r} must give a value of shape {block.anchors.shape} and weights of shape {block.S.shape}, "
            f"got {value.shape} and {W.shape}"
        )
    return value, W


def scan(loss, anchors, rows, columns, pairs, *, block_rows, limit=None, gradient=True):
    """Evaluate a loss for anchors against the rows of a memory.

    Parameters
    ----------
    loss : PairLoss
    anchors : (B, D)
        In the dtype that everything is computed in; blocks of rows are cast to it as they are read.
    rows : (M, D)
        Constants: no gradient goes into them.
    columns : tuple of (M,) arrays
        What `pairs` wants to know of the rows.
    pairs : callable
        `(slots (m,), columns' blocks (m,)) -> (P, N)`, each (B, m).
    block_rows : int
        m, rows in a block; extra memory is O(B m).
    limit : int, optional
        Rows from this one on are known to be in no pair. At least 1.
    gradient : bool
        Whether to weigh the pairs; without, `gradient` and `pairs` of the result are None.

    Returns
    -------
    Scanned
    """
    xp, ops = backends.of(anchors)
    every_anchor = xp.arange(anchors.shape[0], device=device(anchors))

    def walk(visit):
        def visit_block(carry, start, block_of_rows, *block_of_columns):
            V = xp.astype(block_of_rows, anchors.dtype, copy=False)
            slots = start + xp.arange(V.shape[0], device=device(anchors))
            P, N = pairs(slots, block_of_columns)
            found = visit(Block(anchors @ V.T, P, N, slots, every_anchor), V)
            return found if carry is None else _merge(carry, found)

        return ops.fold(visit_block, (rows, *columns), block_rows, limit=limit)

    def weigh(W, V):
        return _Weighed(ops.apply_weights(W, V), xp.count_nonzero(W))

    r = {}
    *earlier, last = loss.stages
    for stage in earlier:
        r = r | _results(walk(lambda block, V, stage=stage: stage(block, r)))

    if not gradient:
        r = r | _results(walk(lambda block, V: last(block, r)))
        return Scanned(loss.value(r), None, None)

    if isinstance(loss, SidedPairLoss):

        def summarise_and_weigh(block, V):
            sides = loss.sides(block)
            return loss.tally(block, *sides), *(weigh(W, V) for W in sides)

        summaries, positive, negative = walk(summarise_and_weigh)
        r = r | _results(summaries)
        f_positive, f_negative = loss.factors(r)
        total = f_positive[:, None] * positive.gradient + f_negative[:, None] * negative.gradient
        return Scanned(loss.value(r), total, positive.pairs + negative.pairs)

    r = r | _results(walk(lambda block, V: last(block, r)))
    weighed = walk(lambda block, V: weigh(loss.weights(block, r), V))
    return Scanned(loss.value(r), weighed.gradient, weighed.pairs)


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


def _results(summaries):
    return {name: summary.result() for name, summary in summaries.items()}
