"""Generalised lifted structure loss."""

from dataclasses import dataclass

from xbm import checks
from xbm.backends import Array, array_namespace
from xbm.losses.base import LOSSES, Block, PairLoss
from xbm.losses.functions import hinge, share
from xbm.options import number, option
from xbm.reductions import LogSumExp, Results, Summaries


@LOSSES.register("lifted-structure")
@dataclass(frozen=True)
class LiftedStructure(PairLoss):
    r"""Lifted structure loss, generalised to all positives: a soft version of the batch-hard triplet loss.

    L_i = (1/g) [log sum_P exp(g (m_P - S)) + log sum_N exp(g (S - m_N))]+; 0 without a positive or a negative. It grows
    with the logarithm of the number of pairs. It depends on the margins only through m_P - m_N.

    Parameters
    ----------
    pos_margin : float
        m_P, target similarity of positives (cosine, in [-1, 1]).
    neg_margin : float
        m_N, target similarity of negatives (cosine, in [-1, 1]).
    gamma : float
        g, above 0. A larger value gives more weight to the hardest pairs; the papers use 1.

    Raises
    ------
    TypeError, ValueError
        If a parameter is not a finite number, or gamma is not above 0.

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
    1511.06452 (margin 1); with all positives of an anchor as in Hermans, Beyer, Leibe, arXiv 1703.07737;
    on similarities instead of distances.
    """

    pos_margin: float = option(1.0, number())
    neg_margin: float = option(0.0, number())
    gamma: float = option(1.0, checks.positive)

    def summarise(self, block: Block, r: Results) -> Summaries:
        """Return log sum_P exp(g (m_P - S)) and log sum_N exp(g (S - m_N))."""
        pull, push = self._exponents(block.S)
        return {"positive": LogSumExp.of(pull, block.P), "negative": LogSumExp.of(push, block.N)}

    def value(self, r: Results) -> Array:
        """Return L_i."""
        return hinge(r["positive"] + r["negative"]) / self.gamma

    def weights(self, block: Block, r: Results) -> Array:
        """Return the softmax over negatives minus the softmax over positives where L_i > 0, else 0."""
        xp = array_namespace(block.S)
        pull, push = self._exponents(block.S)
        W = share(push, block.N, r["negative"]) - share(pull, block.P, r["positive"])
        return xp.where((r["positive"] + r["negative"])[:, None] > 0, W, 0.0)

    def _exponents(self, S: Array) -> tuple[Array, Array]:
        return self.gamma * (self.pos_margin - S), self.gamma * (S - self.neg_margin)
