"""Losses that are hinges: each pair costs what it lacks to a margin, summed or averaged."""

from abc import abstractmethod
from typing import Literal, TypeAlias

from xbm import backends
from xbm.backends import Array, array_namespace
from xbm.losses.base import Side, SidedPairLoss
from xbm.losses.functions import inverse
from xbm.reductions import Results, Sum, Summaries

PairReduction: TypeAlias = Literal["mean", "mean-nonzero", "sum"]
"""How the pairs of an anchor are put together: the mean over its positives plus the mean over its active negatives;
the same with active positives, both counted over all anchors together; or the sum."""

PAIR_REDUCTIONS = ("mean", "mean-nonzero", "sum")


class HingeLoss(SidedPairLoss):
    """A sum of [gap_P(S)]+ over positives and [gap_N(S)]+ over negatives, reduced by `reduction`.

    A pair is active where its gap is above 0. With the pairs' weights p and n,

    - ``"mean"``: L_i = sum_P p [gap]+ / sum_P p + sum_N n [gap]+ / sum_A n, A the active negatives;
    - ``"mean-nonzero"``: either sum over the mean, over the anchors, of its active pairs' weights, so that the loss is
      the mean over all active positives of the batch plus that over all active negatives;
    - ``"sum"``: L_i = sum_P p [gap]+ + sum_N n [gap]+, whose gradient grows with the memory.
    """

    reduction: PairReduction

    @abstractmethod
    def positive_gap(self, S: Array) -> tuple[Array, Array | None]:
        """Return what positives of similarity S lack, and -d gap / dS, None for 1, each (B, m)."""

    @abstractmethod
    def negative_gap(self, S: Array) -> tuple[Array, Array | None]:
        """Return what negatives of similarity S lack, and d gap / dS, None for 1, each (B, m)."""

    def positive(self, S: Array, P: Array) -> Side:
        """Return the active positives, what they lack, and how many positives count."""
        return self._active(*self.positive_gap(S), P, "positive", P if self.reduction == "mean" else None)

    def negative(self, S: Array, N: Array) -> Side:
        """Return the active negatives, what they lack, and how many there are."""
        return self._active(*self.negative_gap(S), N, "negative", None)

    def _active(self, gap: Array, slope: Array | None, pairs: Array, name: str, counted: Array | None) -> Side:
        """Return the `Side` of pairs by their gaps; `counted` are those to average over, the active ones if None."""
        _, ops = backends.of(gap)
        active = pairs * ops.is_positive(gap)
        summaries: Summaries = {name: Sum.of(active * gap), f"n_{name}": Sum.of(active if counted is None else counted)}
        return Side(active if slope is None else active * slope, summaries)

    def value(self, r: Results) -> Array:
        """Return L_i."""
        f_positive, f_negative = self.factors(r)
        return f_negative * r["negative"] - f_positive * r["positive"]

    def factors(self, r: Results) -> tuple[Array, Array]:
        """Return what the reduction multiplies either side by, negative for positives."""
        return -over(r["n_positive"], self.reduction), over(r["n_negative"], self.reduction)


def over(count: Array, reduction: PairReduction) -> Array:
    """Return what the sum over an anchor's pairs, `count` (B,) of them, is multiplied by to be reduced, (B,)."""
    xp = array_namespace(count)
    if reduction == "sum":
        return xp.ones_like(count)
    return inverse(count if reduction == "mean" else xp.zeros_like(count) + xp.mean(count))
