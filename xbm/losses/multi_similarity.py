"""Multi-similarity loss."""

from __future__ import annotations

from dataclasses import dataclass

from xbm import checks
from xbm.backends import Array
from xbm.losses.base import Block, PairLoss
from xbm.losses.functions import share, softplus
from xbm.reductions import LogSumExp, Results, Summaries


@dataclass(frozen=True)
class MultiSimilarity(PairLoss):
    r"""Multi-similarity loss: the harder a pair, the more it weighs beside the others of its row.

    L_i = (1/a) log(1 + sum_P exp(-a (S - l))) + (1/b) log(1 + sum_N exp(b (S - l))). It grows with the logarithm of
    the number of pairs. The paper mines the pairs first, with `MultiSimilarityMiner`.

    Parameters
    ----------
    alpha : float
        a, how sharply the least similar positives stand out, above 0.
    beta : float
        b, how sharply the most similar negatives stand out, above 0.
    base : float
        l, similarity that either side is measured from (cosine, in [-1, 1]; the paper has 1).

    Raises
    ------
    TypeError, ValueError
        If one is no finite number, or alpha or beta not above 0.

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

    alpha: float = 2.0
    beta: float = 50.0
    base: float = 0.5

    def __post_init__(self) -> None:
        for name in ("alpha", "beta"):
            object.__setattr__(self, name, checks.positive(name, getattr(self, name)))
        object.__setattr__(self, "base", checks.number("base", self.base))

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
        """Return each pair's share of its side's 1 + sum, negative for positives."""
        above = block.S - self.base
        push = share(self.beta * above, block.N, softplus(r["negative"]))
        return push - share(-self.alpha * above, block.P, softplus(r["positive"]))
