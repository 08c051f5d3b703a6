"""Multi-similarity loss."""

from __future__ import annotations

from dataclasses import dataclass

from xbm import checks
from xbm.backends import Array
from xbm.losses.base import LOSSES, Block, PairLoss
from xbm.losses.functions import share, softplus
from xbm.options import number, option
from xbm.reductions import LogSumExp, Results, Summaries


@LOSSES.register("multi-similarity")
@dataclass(frozen=True)
class MultiSimilarity(PairLoss):
    r"""Multi-similarity loss: pairs are weighted by their hardness relative to the other pairs of the anchor.

    L_i = (1/a) log(1 + sum_P exp(-a (S - l))) + (1/b) log(1 + sum_N exp(b (S - l))). It grows with the logarithm of
    the number of pairs. The paper mines the pairs first, with `MultiSimilarityMiner`.

    Parameters
    ----------
    alpha : float
        a, scale for positives, above 0. A larger scale gives more weight to the least similar positives.
    beta : float
        b, scale for negatives, above 0. A larger scale gives more weight to the most similar negatives.
    base : float
        l, similarity threshold between positives and negatives (cosine, in [-1, 1]; the paper uses 1).

    Raises
    ------
    TypeError, ValueError
        If a parameter is not a finite number, or alpha or beta is not above 0.

    Examples
    --------
    >>> import numpy as np, xbm
    >>> anchors = np.asarray([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]])
    >>> objective = xbm.Objective(loss=xbm.MultiSimilarity(), warmup=0)
    >>> result = objective.evaluate(objective.init(capacity=8, dim=2), anchors, np.asarray([0, 0, 1]))
    >>> round(float(result.loss), 4)
    0.3994

    References
    ----------
    Wang, Han, Huang, Dong, Scott, "Multi-Similarity Loss with General Pair Weighting for Deep Metric Learning",
    CVPR 2019, arXiv 1904.06627, equation 15.
    """

    alpha: float = option(2.0, checks.positive)
    beta: float = option(50.0, checks.positive)
    base: float = option(0.5, number())

    def summarise(self, block: Block, r: Results) -> Summaries:
        """Return log sum_P exp(-a (S - l)) and log sum_N exp(b (S - l))."""
        above = block.S - self.base
        return {
            "positive": LogSumExp.of(-self.alpha * above, block.P),
            "negative": LogSumExp.of(self.beta * above, block.N),
        }

    def value(self, r: Results) -> Array:
        """Return L_i."""
        return softplus(r["positive"]) / self.alpha + softplus(r["negative"]) / self.beta

    def weights(self, block: Block, r: Results) -> Array:
        """Return each pair's share of 1 + the sum over its side, negated for positives."""
        above = block.S - self.base
        push = share(self.beta * above, block.N, softplus(r["negative"]))
        return push - share(-self.alpha * above, block.P, softplus(r["positive"]))
