"""Circle loss."""

from dataclasses import dataclass

from xbm import checks
from xbm.backends import Array
from xbm.losses.base import LOSSES, Block, PairLoss
from xbm.losses.functions import hinge, share, sigmoid, softplus
from xbm.options import number, option
from xbm.reductions import LogSumExp, Results, Summaries


@LOSSES.register("circle")
@dataclass(frozen=True)
class Circle(PairLoss):
    r"""Circle loss: each pair is weighted by the distance of its similarity from its optimum.

    L_i = log(1 + sum_N exp(g a_n (S - m)) sum_P exp(-g a_p (S - 1 + m))), with a_n = [S + m]+ and a_p = [1 + m - S]+;
    0 without a positive or a negative. As in the paper, a_n and a_p are treated as constants in the gradient.

    Parameters
    ----------
    margin : float
        m, relaxation (cosine, in [0, 1]): the targets are S >= 1 - m for positives and S <= m for negatives.
    gamma : float
        g, scale, above 0. A larger scale gives more weight to the hardest pairs.

    Raises
    ------
    TypeError, ValueError
        If a parameter is not a finite number, or gamma is not above 0.

    Examples
    --------
    >>> import numpy as np, xbm
    >>> anchors = np.asarray([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]])
    >>> objective = xbm.Objective(loss=xbm.Circle(gamma=1.0), warmup=0)
    >>> result = objective.evaluate(objective.init(capacity=8, dim=2), anchors, np.asarray([0, 0, 1]))
    >>> round(float(result.loss), 4)
    0.526

    References
    ----------
    Sun et al., "Circle Loss: A Unified Perspective of Pair Similarity Optimization", CVPR 2020, arXiv 2002.10857;
    the defaults are the paper's for fine-grained image retrieval.
    """

    margin: float = option(0.4, number())
    gamma: float = option(80.0, checks.positive)
    needs_cosines = True

    def summarise(self, block: Block, r: Results) -> Summaries:
        """Return the logarithms of the two sums."""
        a_p, a_n = self._factors(block.S)
        pull, push = self._exponents(block.S, a_p, a_n)
        return {"positive": LogSumExp.of(pull, block.P), "negative": LogSumExp.of(push, block.N)}

    def value(self, r: Results) -> Array:
        """Return L_i."""
        return softplus(r["positive"] + r["negative"])

    def weights(self, block: Block, r: Results) -> Array:
        """Return g Z q_N a_n - g Z q_P a_p; q_N and q_P are softmaxes over either side, Z is the slope of L_i."""
        a_p, a_n = self._factors(block.S)
        pull, push = self._exponents(block.S, a_p, a_n)
        Z = sigmoid(r["positive"] + r["negative"])
        W = a_n * share(push, block.N, r["negative"]) - a_p * share(pull, block.P, r["positive"])
        return (self.gamma * Z)[:, None] * W

    def _factors(self, S: Array) -> tuple[Array, Array]:
        """Return a_p and a_n."""
        return hinge(1.0 + self.margin - S), hinge(S + self.margin)

    def _exponents(self, S: Array, a_p: Array, a_n: Array) -> tuple[Array, Array]:
        return -self.gamma * a_p * (S - 1.0 + self.margin), self.gamma * a_n * (S - self.margin)
