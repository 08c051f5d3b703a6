"""Binomial deviance loss."""

from dataclasses import dataclass

from xbm import checks
from xbm.backends import Array, array_namespace
from xbm.losses.base import LOSSES, Side, SidedPairLoss
from xbm.losses.functions import inverse, softplus
from xbm.options import number, option
from xbm.reductions import Results, Sum


@LOSSES.register("binomial-deviance")
@dataclass(frozen=True)
class BinomialDeviance(SidedPairLoss):
    r"""Binomial deviance: a softplus of each pair's similarity, averaged over positives and over negatives.

    L_i = (1/n_P) sum_P log(1 + exp(-a (S - l))) + (1/n_N) sum_N log(1 + exp(b (S - l))). The second mean is over all
    negatives, so the many easy negatives of a memory reduce the weight of the hard ones. A steep b or a miner helps.

    Parameters
    ----------
    alpha : float
        a, scale for positives, above 0.
    beta : float
        b, scale for negatives, above 0.
    base : float
        l, similarity threshold between positives and negatives (cosine, in [-1, 1]).

    Raises
    ------
    TypeError, ValueError
        If a parameter is not a finite number, or alpha or beta is not above 0.

    Examples
    --------
    >>> import numpy as np, xbm
    >>> anchors = np.asarray([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]])
    >>> objective = xbm.Objective(loss=xbm.BinomialDeviance(), warmup=0)
    >>> result = objective.evaluate(objective.init(capacity=8, dim=2), anchors, np.asarray([0, 0, 1]))
    >>> round(float(result.loss), 4)
    7.8988

    References
    ----------
    Yi, Lei, Liao, Li, "Deep Metric Learning for Person Re-Identification", ICPR 2014 (a = 2, l = 0.5);
    with separate scales for positives and negatives as in Wang et al., CVPR 2019, arXiv 1904.06627.
    """

    alpha: float = option(2.0, checks.positive)
    beta: float = option(50.0, checks.positive)
    base: float = option(0.5, number())

    def positive(self, S: Array, P: Array) -> Side:
        """Return the weights a sigmoid(-a (S - l)), the sums of log(1 + exp(-a (S - l))), and n_P."""
        return _side(-self.alpha * (S - self.base), self.alpha, P, "positive")

    def negative(self, S: Array, N: Array) -> Side:
        """Return the weights b sigmoid(b (S - l)), the sums of log(1 + exp(b (S - l))), and n_N."""
        return _side(self.beta * (S - self.base), self.beta, N, "negative")

    def value(self, r: Results) -> Array:
        """Return L_i."""
        f_positive, f_negative = self.factors(r)
        return f_negative * r["negative"] - f_positive * r["positive"]

    def factors(self, r: Results) -> tuple[Array, Array]:
        """Return -1/n_P and 1/n_N."""
        return -inverse(r["n_positive"]), inverse(r["n_negative"])


def _side(x: Array, steepness: float, pairs: Array, name: str) -> Side:
    cost = softplus(x)
    slope = array_namespace(x).exp(x - cost)
    return Side(steepness * pairs * slope, {name: Sum.of(pairs * cost), f"n_{name}": Sum.of(pairs)})
