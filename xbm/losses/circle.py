"""Circle loss."""

from dataclasses import dataclass

from xbm import checks
from xbm.backends import Array
from xbm.losses.base import Block, PairLoss
from xbm.losses.functions import hinge, share, sigmoid, softplus
from xbm.reductions import LogSumExp, Results, Summaries


@dataclass(frozen=True)
class Circle(PairLoss):
    r"""Circle loss: each pair is pulled or pushed by how far it is from its own optimum.

    L_i = log(1 + sum_N exp(g a_n (S - m)) sum_P exp(-g a_p (S - 1 + m))), with a_n = [S + m]+ and a_p = [1 + m - S]+;
    0 without both sides. As in the paper, a_n and a_p are constants for the gradient.

    Parameters
    ----------
    margin : float
        m, relaxation (cosine, in [0, 1]): positives above 1 - m and negatives below m are good enough.
    gamma : float
        g, scale, above 0: the higher, the more the hardest pairs weigh.

    Raises
    ------
    TypeError, ValueError
        If one is no finite number, or gamma not above 0.

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
    the defaults are those of its fine-grained retrieval.
    """

    margin: float = 0.4
    gamma: float = 80.0
    needs_cosines = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "margin", checks.number("margin", self.margin))
        object.__setattr__(self, "gamma", checks.positive("gamma", self.gamma))

    def summarise(self, block: Block, r: Results) -> Summaries:
        """Return the logarithms of the two sums."""
        a_p, a_n = self._factors(block.S)
        pull, push = self._exponents(block.S, a_p, a_n)
        return {"positive": LogSumExp.of(pull, block.P), "negative": LogSumExp.of(push, block.N)}

    def value(self, r: Results) -> Array:
        """Return L_i."""
        return softplus(r["positive"] + r["negative"])

    def weights(self, block: Block, r: Results) -> Array:
        """Return g Z q_N a_n - g Z q_P a_p, with q the softmax over either side and Z the slope of L_i."""
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
