"""Losses of all triplets of an anchor, counted by sorting and never listed.

A hinge is linear where it is active, so a sum over triplets needs no more than how many of them each pair is in:
sum_P sum_N [S_n - S_p + m]+ = sum_n c_n S_n - sum_p c_p (S_p - m), with c_p = #{n: S_n > S_p - m} and
c_n = #{p: S_n > S_p - m}. One sort of a row, with positives at S_p - m, tells all counts: O(m log m) time, O(m) memory.
"""

from abc import abstractmethod
from dataclasses import dataclass
from typing import NamedTuple

from xbm import backends, checks
from xbm.backends import Array, array_namespace
from xbm.losses.base import Block, RowLoss
from xbm.losses.hinge import PAIR_REDUCTIONS, PairReduction, over
from xbm.rowwise import take_in_rows


class Counts(NamedTuple):
    """In how many triplets each pair is; 0 for pairs of the other side."""

    of_positives: Array  # (B, m) sum of the weights of the negatives
    of_negatives: Array  # (B, m) sum of the weights of the positives

    def __sub__(self, other: "Counts") -> "Counts":
        """Return the counts of the triplets that are not among the others."""
        return Counts(self.of_positives - other.of_positives, self.of_negatives - other.of_negatives)


class TripletLoss(RowLoss):
    """L_i = sum of S_n - S_p + m over some triplets, over their number ("mean"), or the batch's ("mean-nonzero")."""

    margin: float
    reduction: PairReduction

    def _checked(self) -> None:
        object.__setattr__(self, "margin", checks.number("margin", self.margin))
        checks.choice("reduction", self.reduction, PAIR_REDUCTIONS)

    @abstractmethod
    def counts(self, block: Block) -> Counts:
        """Return how many of the triplets that count each pair is in."""

    def whole(self, block: Block) -> tuple[Array, Array]:
        """Return `(L_i (B,), dL_i/dS_ij (B, m))` of rows that are whole in one block."""
        xp = array_namespace(block.S)
        counts = self.counts(block)
        pull, push = block.P * counts.of_positives, block.N * counts.of_negatives
        n = xp.sum(pull, axis=1)
        f = over(n, self.reduction)
        # Measured from 1, which most similarities of triplets are near: sums of large equal parts lose digits.
        apart = xp.where(block.P + block.N > 0, block.S - 1.0, 0.0)
        value = xp.sum((push - pull) * apart, axis=1) + self.margin * n
        return f * value, f[:, None] * (push - pull)


@dataclass(frozen=True)
class Triplet(TripletLoss):
    r"""Triplet loss of every triplet of an anchor.

    L_i = sum_P sum_N [S_n - S_p + m]+, over the number of triplets above 0 unless it is a ``"sum"``. Exact, by sorting,
    however many there are; it sees whole rows, (B, M) numbers at once.

    Parameters
    ----------
    margin : float
        m, by how much a positive shall be more similar than a negative (cosine).
    reduction : {"mean", "mean-nonzero", "sum"}
        Mean over each anchor's active triplets; mean over those of the whole batch, as in pytorch-metric-learning; or
        sum, whose gradient grows with the square of the memory.

    Raises
    ------
    TypeError, ValueError
        If the margin is no finite number or the reduction none of the three.

    Examples
    --------
    >>> import numpy as np, xbm
    >>> anchors = np.asarray([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]])
    >>> objective = xbm.Objective(loss=xbm.Triplet(), warmup=0)
    >>> result = objective.evaluate(objective.init(capacity=8, dim=2), anchors, np.asarray([0, 0, 1]))
    >>> round(float(result.loss), 4)  # only the second anchor is nearer to the other class: 0.8 - 0.6 + 0.2
    0.1333

    References
    ----------
    Schroff, Kalenichenko, Philbin, "FaceNet: A Unified Embedding for Face Recognition and Clustering", CVPR 2015, arXiv
    1503.03832; all triplets as in Hermans, Beyer, Leibe, arXiv 1703.07737; on similarities.
    """

    margin: float = 0.2
    reduction: PairReduction = "mean"

    def __post_init__(self) -> None:
        self._checked()

    def counts(self, block: Block) -> Counts:
        """Return the counts of triplets with S_n > S_p - m."""
        return _counts(_sorted(block, self.margin, strictly=True), block.P, block.N)


@dataclass(frozen=True)
class SemiHardTriplet(TripletLoss):
    r"""Triplet loss of the semi-hard triplets: the negative is less similar than the positive, by less than the margin.

    L_i = sum_P sum_{N: S_p - m < S_n < S_p} (S_n - S_p + m), over their number unless it is a ``"sum"``. Harder
    negatives, which may be wrong labels, do not count. It sees whole rows, (B, M) numbers at once.

    Parameters
    ----------
    margin : float
        m, by how much a positive shall be more similar than a negative (cosine), above 0.
    reduction : {"mean", "mean-nonzero", "sum"}
        Mean over each anchor's semi-hard triplets; mean over those of the whole batch; or sum.

    Raises
    ------
    TypeError, ValueError
        If the margin is no finite number above 0 or the reduction none of the three.

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

    margin: float = 0.2
    reduction: PairReduction = "mean"

    def __post_init__(self) -> None:
        self._checked()
        checks.positive("margin", self.margin)

    def counts(self, block: Block) -> Counts:
        """Return the counts of triplets with S_p - m < S_n < S_p."""
        xp, ops = backends.of(block.S)
        active, too_hard = (
            _sorted(block, margin, strictly=strictly) for margin, strictly in ((self.margin, True), (0.0, False))
        )
        weights, ones = (block.P, block.N), (ops.is_positive(block.P), ops.is_positive(block.N))
        weighted, there = (_counts(active, *pairs) - _counts(too_hard, *pairs) for pairs in (weights, ones))
        # Whole numbers tell exactly where there are none; a difference of weights is rounded.
        return Counts(*(xp.where(n > 0, w, 0.0) for w, n in zip(weighted, there, strict=True)))


def _sorted(block: Block, margin: float, *, strictly: bool) -> Array:
    """Return (B, m) the order in which negatives with S_n > S_p - m, or S_n >= S_p - m, stand behind a positive."""
    xp = array_namespace(block.S)
    # The least step beyond the boundary, so that equal numbers fall on the side they belong to.
    boundary = xp.nextafter(block.S - margin, xp.full_like(block.S, xp.inf if strictly else -xp.inf))
    return xp.argsort(xp.where(block.P > 0, boundary, block.S), axis=1)


def _counts(order: Array, P: Array, N: Array) -> Counts:
    """Return how many negatives stand behind each positive, and positives before each negative."""
    xp, ops = backends.of(P)
    P, N = take_in_rows(P, order), take_in_rows(N, order)
    # Summed from either end: a difference of sums would leave rounding where there is none.
    before, after = ops.running_sum(P), xp.flip(ops.running_sum(xp.flip(N, axis=1)), axis=1)
    return Counts(ops.restore_order(after, order), ops.restore_order(before, order))
