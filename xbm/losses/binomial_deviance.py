"""Binomial deviance loss."""

from dataclasses import dataclass

from xbm import checks
from xbm.backends import Array, array_namespace
from xbm.losses.base import Side, SidedPairLoss
from xbm.losses.functions import inverse, softplus
from xbm.reductions import Results, Sum


@dataclass(frozen=True)
class BinomialDeviance(SidedPairLoss):
    r"""Binomial deviance: each pair by itself, softly, positives and negatives averaged apart.

    L_i = (1/n_P) sum_P log(1 + exp(-a (S - l))) + (1/n_N) sum_N log(1 + exp(b (S - l))). A mean over all negatives: the
    many easy ones of a memory count, by their number, so a steep b or a miner serves it well.

    Parameters
    ----------
    alpha : float
        a, how steeply positives are pulled, above 0.
    beta : float
        b, how steeply negatives are pushed, above 0.
    base : float
        l, similarity that either side is measured from (cosine, in [-1, 1]).

    Raises
    ------
    TypeError, ValueError
        If one is no finite number, or alpha or beta not above 0.

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
    with a slope for either side as in Wang et al., CVPR 2019, arXiv 1904.06627.
    """

    alpha: float = 2.0
    beta: float = 50.0
    base: float = 0.5

    def __post_init__(self) -> None:
        for name in ("alpha", "beta"):
            object.__setattr__(self, name, checks.positive(name, getattr(self, name)))
        object.__setattr__(self, "base", checks.number("base", self.base))

    def positive(self, S: Array, P: Array) -> Side:
        """Return a sigmoid(-a (S - l)), and sums of log(1 + exp(-a (S - l))) with n_P."""
        return _side(-self.alpha * (S - self.base), self.alpha, P, "positive")

    def negative(self, S: Array, N: Array) -> Side:
        """Return b sigmoid(b (S - l)), and sums of log(1 + exp(b (S - l))) with n_N."""
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
