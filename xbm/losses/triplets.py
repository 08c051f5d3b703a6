"""Losses over all triplets of an anchor, computed by sorting, without enumerating the triplets.

An active hinge is linear, so the sum over triplets follows from the number of active triplets of each pair:
sum_P sum_N [S_n - S_p + m]+ = sum_n c_n S_n - sum_p c_p (S_p - m), with c_p = #{n: S_n > S_p - m} and
c_n = #{p: S_n > S_p - m}. Sorting a row once, with positives at S_p - m, gives all counts in O(m log m) time and O(m)
memory.
"""

from abc import abstractmethod
from dataclasses import dataclass
from typing import NamedTuple

from xbm import backends, checks
from xbm.backends import Array, array_namespace
from xbm.losses.base import LOSSES, Block, RowLoss
from xbm.losses.hinge import PAIR_REDUCTIONS, PairReduction, over
from xbm.options import choice, number, option
from xbm.rowwise import take_in_rows


class Counts(NamedTuple):
    """Number of triplets of each pair, weighted by the other pair of the triplet."""

    of_positives: Array  #: (B, m) for each positive, sum of the weights of the negatives
    of_negatives: Array  #: (B, m) for each negative, sum of the weights of the positives

    def __sub__(self, other: "Counts") -> "Counts":
        """Return the counts without those of a subset of the triplets."""
        return Counts(self.of_positives - other.of_positives, self.of_negatives - other.of_negatives)


class TripletLoss(RowLoss):
    """L_i = sum of S_n - S_p + m over selected triplets, divided according to `reduction`.

    ``"mean"`` divides by the anchor's number of selected triplets, ``"mean-nonzero"`` by the batch's mean number.
    """

    margin: float
    reduction: PairReduction

    @abstractmethod
    def counts(self, block: Block) -> Counts:
        """Return the number of selected triplets of each pair."""

    def whole(self, block: Block) -> tuple[Array, Array]:
        """Return `(L_i (B,), dL_i/dS_ij (B, m))` for a block with whole rows."""
        xp = array_namespace(block.S)
        counts = self.counts(block)
        pull, push = block.P * counts.of_positives, block.N * counts.of_negatives
        n = xp.sum(pull, axis=1)
        f = over(n, self.reduction)
        # Use S - 1, because most similarities in triplets are close to 1: differences of large sums lose precision.
        apart = xp.where(block.P + block.N > 0, block.S - 1.0, 0.0)
        value = xp.sum((push - pull) * apart, axis=1) + self.margin * n
        return f * value, f[:, None] * (push - pull)


@LOSSES.register("triplet")
@dataclass(frozen=True)
class Triplet(TripletLoss):
    r"""Triplet loss of every triplet of an anchor.

    L_i = sum_P sum_N [S_n - S_p + m]+, divided by the number of active triplets unless the reduction is ``"sum"``. The
    sum is exact, by sorting, for any number of triplets. The loss needs whole rows, (B, M) numbers at once.

    Parameters
    ----------
    margin : float
        m, the required difference between the similarities of a positive and a negative (cosine).
    reduction : {"mean", "mean-nonzero", "sum"}
        Mean over each anchor's active triplets; mean over all active triplets of the batch, as in
        pytorch-metric-learning; or sum, whose gradient grows with the square of the capacity.

    Raises
    ------
    TypeError, ValueError
        If the margin is not a finite number or the reduction is not one of the three.

    Examples
    --------
    >>> import numpy as np, xbm
    >>> anchors = np.asarray([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]])
    >>> objective = xbm.Objective(loss=xbm.Triplet(), warmup=0)
    >>> result = objective.evaluate(objective.init(capacity=8, dim=2), anchors, np.asarray([0, 0, 1]))
    >>> round(float(result.loss), 4)  # only the second anchor is closer to the other class: 0.8 - 0.6 + 0.2
    0.1333

    References
    ----------
    Schroff, Kalenichenko, Philbin, "FaceNet: A Unified Embedding for Face Recognition and Clustering", CVPR 2015, arXiv
    1503.03832; all triplets as in Hermans, Beyer, Leibe, arXiv 1703.07737; on similarities.
    """

    margin: float = option(0.2, number())
    reduction: PairReduction = option("mean", choice(*PAIR_REDUCTIONS))

    def counts(self, block: Block) -> Counts:
        """Return the counts of triplets with S_n > S_p - m."""
        return _counts(_sorted(block, self.margin, strictly=True), block.P, block.N)


@LOSSES.register("semi-hard-triplet")
@dataclass(frozen=True)
class SemiHardTriplet(TripletLoss):
    r"""Triplet loss of semi-hard triplets: the negative is less similar than the positive, by less than the margin.

    L_i = sum_P sum_{N: S_p - m < S_n < S_p} (S_n - S_p + m), divided by their number unless the reduction is ``"sum"``.
    Harder negatives, which may have wrong labels, are ignored. The loss needs whole rows, (B, M) numbers at once.

    Parameters
    ----------
    margin : float
        m, the required difference between the similarities of a positive and a negative (cosine), above 0.
    reduction : {"mean", "mean-nonzero", "sum"}
        Mean over each anchor's semi-hard triplets; mean over all semi-hard triplets of the batch; or sum.

    Raises
    ------
    TypeError, ValueError
        If the margin is not a finite number above 0 or the reduction is not one of the three.

    Examples
    --------
    >>> import numpy as np, xbm
    >>> anchors = np.asarray([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0]])
    >>> objective = xbm.Objective(loss=xbm.SemiHardTriplet(margin=0.3), warmup=0)
    >>> result = objective.evaluate(objective.init(capacity=8, dim=2), anchors, np.asarray([0, 0, 1]))
    >>> round(float(result.loss), 4)  # the second anchor: 0.6 - 0.8 + 0.3
    0.0333

    References
    ----------
    Schroff, Kalenichenko, Philbin, "FaceNet: A Unified Embedding for Face Recognition and Clustering", CVPR 2015, arXiv
    1503.03832; on similarities.
    """

    margin: float = option(0.2, checks.positive)
    reduction: PairReduction = option("mean", choice(*PAIR_REDUCTIONS))

    def counts(self, block: Block) -> Counts:
        """Return the counts of triplets with S_p - m < S_n < S_p."""
        xp, ops = backends.of(block.S)
        active, too_hard = (
            _sorted(block, margin, strictly=strictly) for margin, strictly in ((self.margin, True), (0.0, False))
        )
        weights, ones = (block.P, block.N), (ops.is_positive(block.P), ops.is_positive(block.N))
        weighted, there = (_counts(active, *pairs) - _counts(too_hard, *pairs) for pairs in (weights, ones))
        # Integer counts show exactly where there are no triplets; differences of weights have rounding errors.
        return Counts(*(xp.where(n > 0, w, 0.0) for w, n in zip(weighted, there, strict=True)))


def _sorted(block: Block, margin: float, *, strictly: bool) -> Array:
    """Return the order (B, m) that places the negatives with S_n > S_p - m (or >=) after each positive p."""
    xp = array_namespace(block.S)
    # Move the boundary by the smallest step, so that ties fall on the correct side.
    boundary = xp.nextafter(block.S - margin, xp.full_like(block.S, xp.inf if strictly else -xp.inf))
    return xp.argsort(xp.where(block.P > 0, boundary, block.S), axis=1)


def _counts(order: Array, P: Array, N: Array) -> Counts:
    """Return the total weight of the negatives after each positive, and of the positives before each negative."""
    xp, ops = backends.of(P)
    P, N = take_in_rows(P, order), take_in_rows(N, order)
    # Sum from both ends: total minus prefix sum would leave rounding errors where the result should be 0.
    before, after = ops.running_sum(P), xp.flip(ops.running_sum(xp.flip(N, axis=1)), axis=1)
    return Counts(ops.restore_order(after, order), ops.restore_order(before, order))
