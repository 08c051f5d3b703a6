"""Generalised lifted structure loss."""

from dataclasses import dataclass

from xbm import checks
from xbm.backends import Array, array_namespace
from xbm.losses.base import Block, PairLoss
from xbm.losses.functions import hinge, share
from xbm.reductions import LogSumExp, Results, Summaries


@dataclass(frozen=True)
class LiftedStructure(PairLoss):
    r"""Lifted structure loss, generalised to all positives: a soft batch-hard triplet.

    L_i = (1/g) [log sum_P exp(g (m_P - S)) + log sum_N exp(g (S - m_N))]+; 0 without both sides. It grows with the
    logarithm of the number of pairs. Only m_P - m_N, the margin, matters.

    Parameters
    ----------
    pos_margin : float
        m_P, similarity that positives are pulled up to (cosine, in [-1, 1]).
    neg_margin : float
        m_N, similarity that negatives are pushed down to (cosine, in [-1, 1]).
    gamma : float
        g, above 0: the higher, the more the hardest pairs weigh; the papers have 1.

    Raises
    ------
    TypeError, ValueError
        If one is no finite number, or gamma not above 0.

    Examples
    --------
    >>> import numpy as np, xbm
    >>> anchors = np.asarray([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]])
    >>> objective = xbm.Objective(loss=xbm.LiftedStructure(), warmup=0)
    >>> result = objective.evaluate(objective.init(capacity=8, dim=2), anchors, np.asarray([0, 0, 1]))
    >>> round(float(result.loss), 4)  # 1 + 0 - 0.6 and 1 + 0.8 - 0.6
    0.5333

    References
    ----------
    Song, Xiang, Jegelka, Savarese, "Deep Metric Learning via Lifted Structured Feature Embedding", CVPR 2016, arXiv
    1511.06452 (margin 1); for all positives of an anchor as in Hermans, Beyer, Leibe, arXiv 1703.07737;
    on similarities instead of distances.
    """

    pos_margin: float = 1.0
    neg_margin: float = 0.0
    gamma: float = 1.0

    def __post_init__(self) -> None:
        for name in ("pos_margin", "neg_margin"):
            object.__setattr__(self, name, checks.number(name, getattr(self, name)))
        object.__setattr__(self, "gamma", checks.positive("gamma", self.gamma))

    def summarise(self, block: Block, r: Results) -> Summaries:
        """Return log sum_P exp(g (m_P - S)) and log sum_N exp(g (S - m_N))."""
        pull, push = self._exponents(block.S)
        return {"positive": LogSumExp.of(pull, block.P), "negative": LogSumExp.of(push, block.N)}

    def value(self, r: Results) -> Array:
        """Return L_i."""
        return hinge(r["positive"] + r["negative"]) / self.gamma

    def weights(self, block: Block, r: Results) -> Array:
        """Return the softmax over negatives minus that over positives, where L_i > 0."""
        xp = array_namespace(block.S)
        pull, push = self._exponents(block.S)
        W = share(push, block.N, r["negative"]) - share(pull, block.P, r["positive"])
        return xp.where((r["positive"] + r["negative"])[:, None] > 0, W, 0.0)

    def _exponents(self, S: Array) -> tuple[Array, Array]:
        return self.gamma * (self.pos_margin - S), self.gamma * (S - self.neg_margin)
