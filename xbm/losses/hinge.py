"""Hinge losses: each pair costs the amount by which it violates its margin, summed or averaged."""

from abc import abstractmethod
from typing import Literal, TypeAlias

from xbm import backends
from xbm.backends import Array, array_namespace
from xbm.losses.base import Side, SidedPairLoss
from xbm.losses.functions import inverse
from xbm.reductions import Results, Sum, Summaries

PairReduction: TypeAlias = Literal["mean", "mean-nonzero", "sum"]
"""Reduction over the pairs of an anchor: the mean over its positives plus the mean over its active negatives; the mean
over all active positives of the batch plus the mean over all its active negatives; or the sum."""

PAIR_REDUCTIONS = ("mean", "mean-nonzero", "sum")


class HingeLoss(SidedPairLoss):
    """A sum of [gap_P(S)]+ over positives and [gap_N(S)]+ over negatives, reduced by `reduction`.

    A pair is active if its gap is above 0. With the pair weights p and n,

    - ``"mean"``: L_i = sum_P p [gap]+ / sum_P p + sum_N n [gap]+ / sum_A n, where A are the active negatives;
    - ``"mean-nonzero"``: each sum is divided by the weight of its active pairs, averaged over the anchors. The mean
      over anchors is then the mean over all active positives of the batch plus the mean over all active negatives;
    - ``"sum"``: L_i = sum_P p [gap]+ + sum_N n [gap]+, whose gradient grows with the capacity of the memory.
    """

    reduction: PairReduction

    @abstractmethod
    def positive_gap(self, S: Array) -> tuple[Array, Array | None]:
        """Return the gap of positives with similarity S, and -d gap / dS or None if that is 1, each (B, m)."""

    @abstractmethod
    def negative_gap(self, S: Array) -> tuple[Array, Array | None]:
        """Return the gap of negatives with similarity S, and d gap / dS or None if that is 1, each (B, m)."""

    def positive(self, S: Array, P: Array) -> Side:
        """Return the weights of active positives, the sum of their gaps, and the divisor of the mean."""
        return self._active(*self.positive_gap(S), P, "positive", P if self.reduction == "mean" else None)

    def negative(self, S: Array, N: Array) -> Side:
        """Return the weights of active negatives, the sum of their gaps, and their number."""
        return self._active(*self.negative_gap(S), N, "negative", None)

    def _active(self, gap: Array, slope: Array | None, pairs: Array, name: str, counted: Array | None) -> Side:
        """Return the `Side` of pairs with the given gaps; the mean is over `counted`, by default the active pairs."""
        _, ops = backends.of(gap)
        active = pairs * ops.is_positive(gap)
        summaries: Summaries = {name: Sum.of(active * gap), f"n_{name}": Sum.of(active if counted is None else counted)}
        return Side(active if slope is None else active * slope, summaries)

    def value(self, r: Results) -> Array:
        """Return L_i."""
        f_positive, f_negative = self.factors(r)
        return f_negative * r["negative"] - f_positive * r["positive"]

    def factors(self, r: Results) -> tuple[Array, Array]:
        """Return the reduction's factor for each side, negated for positives."""
        return -over(r["n_positive"], self.reduction), over(r["n_negative"], self.reduction)


def over(count: Array, reduction: PairReduction) -> Array:
    """Return the reduction's factor for the sum over an anchor's `count` (B,) pairs, (B,)."""
    xp = array_namespace(count)
    if reduction == "sum":
        return xp.ones_like(count)
    return inverse(count if reduction == "mean" else xp.zeros_like(count) + xp.mean(count))
