"""Contrastive loss on similarities."""

from dataclasses import dataclass

from xbm.backends import Array
from xbm.losses.base import LOSSES
from xbm.losses.hinge import PAIR_REDUCTIONS, HingeLoss, PairReduction
from xbm.options import choice, number, option


@LOSSES.register("contrastive")
@dataclass(frozen=True)
class Contrastive(HingeLoss):
    r"""Contrastive loss on similarities, with one margin for positives and one for negatives.

    ``"mean"``: L_i = (1/n_P) sum_P [m_P - S]+ + (1/n_A) sum_N [S - m_N]+, where A are the negatives above m_N;
    ``"mean-nonzero"``: mean over all active positives of the batch plus mean over all its active negatives;
    ``"sum"``: L_i = sum_P [m_P - S]+ + sum_N [S - m_N]+, whose gradient grows with the capacity of the memory.

    Parameters
    ----------
    pos_margin : float
        m_P, target similarity of positives (cosine, in [-1, 1]); more similar positives have zero loss.
    neg_margin : float
        m_N, target similarity of negatives (cosine, in [-1, 1]); less similar negatives have zero loss.
    reduction : {"mean", "mean-nonzero", "sum"}
        Mean over each anchor's positives and its active negatives; mean over all active pairs of the batch, as in
        pytorch-metric-learning; or sum over both, as in the XBM paper.

    Raises
    ------
    TypeError, ValueError
        If a margin is not a finite number or the reduction is not one of the three.

    Examples
    --------
    >>> import numpy as np, xbm
    >>> anchors = np.asarray([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]])
    >>> objective = xbm.Objective(loss=xbm.Contrastive(), warmup=0)
    >>> result = objective.evaluate(objective.init(capacity=8, dim=2), anchors, np.asarray([0, 0, 1]))
    >>> round(float(result.loss), 4)  # 1 - 0.6 for two positive pairs, 0.8 - 0.5 for two negative pairs
    0.4667

    References
    ----------
    Hadsell, Chopra, LeCun, "Dimensionality Reduction by Learning an Invariant Mapping", CVPR 2006; on similarities
    instead of distances, as in Wang et al., "Cross-Batch Memory for Embedding Learning", CVPR 2020, section 3.
    """

    pos_margin: float = option(1.0, number())
    neg_margin: float = option(0.5, number())
    reduction: PairReduction = option("mean", choice(*PAIR_REDUCTIONS))

    @property
    def negative_floor(self) -> float:
        """m_N: less similar negatives contribute nothing."""
        return self.neg_margin

    def positive_gap(self, S: Array) -> tuple[Array, None]:
        """Return m_P - S."""
        return self.pos_margin - S, None

    def negative_gap(self, S: Array) -> tuple[Array, None]:
        """Return S - m_N."""
        return S - self.neg_margin, None
