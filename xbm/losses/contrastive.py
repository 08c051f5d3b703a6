"""Contrastive loss on similarities."""

from dataclasses import dataclass
from typing import Literal

from xbm import backends, checks
from xbm.backends import Array, array_namespace
from xbm.losses.base import Side, SidedPairLoss
from xbm.losses.functions import inverse
from xbm.reductions import Results, Sum, Summaries


@dataclass(frozen=True)
class Contrastive(SidedPairLoss):
    r"""Contrastive loss on similarities, with a margin for either side.

    ``"mean"``: L_i = (1/n_P) sum_P [m_P - S]+ + (1/n_A) sum_N [S - m_N]+ with A the negatives above m_N;
    ``"sum"``: L_i = sum_P [m_P - S]+ + sum_N [S - m_N]+, whose gradient grows with the memory.

    Parameters
    ----------
    pos_margin : float
        m_P, similarity that positives are pulled up to (cosine, in [-1, 1]).
    neg_margin : float
        m_N, similarity that negatives are pushed down to (cosine, in [-1, 1]).
    reduction : {"mean", "sum"}
        Mean over each anchor's positives and its active negatives, or sum over both as in the XBM paper.

    Raises
    ------
    TypeError, ValueError
        If a margin is no finite number or the reduction none of the two.

    Examples
    --------
    >>> import numpy as np, xbm
    >>> anchors = np.asarray([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]])
    >>> objective = xbm.Objective(loss=xbm.Contrastive(), warmup=0)
    >>> result = objective.evaluate(xbm.init(capacity=8, dim=2), anchors, np.asarray([0, 0, 1]))
    >>> round(float(result.loss), 4)  # two anchors 1 - 0.6 apart, two pushed by 0.8 - 0.5
    0.4667

    References
    ----------
    Hadsell, Chopra, LeCun, "Dimensionality Reduction by Learning an Invariant Mapping", CVPR 2006; on similarities
    as in Wang et al., "Cross-Batch Memory for Embedding Learning", CVPR 2020, section 3.
    """

    pos_margin: float = 1.0
    neg_margin: float = 0.5
    reduction: Literal["mean", "sum"] = "mean"

    def __post_init__(self) -> None:
        for name in ("pos_margin", "neg_margin"):
            object.__setattr__(self, name, checks.number(name, getattr(self, name)))
        checks.choice("reduction", self.reduction, ("mean", "sum"))

    @property
    def negative_floor(self) -> float:
        """m_N: up to it a negative counts for nothing."""
        return self.neg_margin

    def positive(self, S: Array, P: Array) -> Side:
        """Return the positives below m_P, by how much they are, and n_P."""
        W, summaries = self._beyond(self.pos_margin - S, P, "positive")
        return Side(W, summaries | ({"n_positive": Sum.of(P)} if self.reduction == "mean" else {}))

    def negative(self, S: Array, N: Array) -> Side:
        """Return the negatives above m_N, by how much they are, and n_A."""
        W, summaries = self._beyond(S - self.neg_margin, N, "negative")
        return Side(W, summaries | ({"n_active": Sum.of(W)} if self.reduction == "mean" else {}))

    def _beyond(self, gap: Array, pairs: Array, name: str) -> tuple[Array, Summaries]:
        """Return the pairs whose gap is above 0, and the sum of their gaps."""
        _, ops = backends.of(gap)
        W = pairs * ops.is_positive(gap)
        return W, {name: Sum.of(W * gap)}

    def value(self, r: Results) -> Array:
        """Return L_i."""
        f_positive, f_negative = self.factors(r)
        return f_negative * r["negative"] - f_positive * r["positive"]

    def factors(self, r: Results) -> tuple[Array, Array]:
        """Return -1/n_P and 1/n_A for means, -1 and 1 for sums."""
        if self.reduction == "mean":
            return -inverse(r["n_positive"]), inverse(r["n_active"])
        one = array_namespace(r["positive"]).ones_like(r["positive"])
        return -one, one
