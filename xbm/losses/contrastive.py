"""Contrastive loss on similarities."""

from dataclasses import dataclass

from xbm import checks
from xbm.backends import Array
from xbm.losses.hinge import PAIR_REDUCTIONS, HingeLoss, PairReduction


@dataclass(frozen=True)
class Contrastive(HingeLoss):
    r"""Contrastive loss on similarities, with a margin for either side.

    ``"mean"``: L_i = (1/n_P) sum_P [m_P - S]+ + (1/n_A) sum_N [S - m_N]+ with A the negatives above m_N;
    ``"mean-nonzero"``: the same with the active positives only, both counted over the whole batch;
    ``"sum"``: L_i = sum_P [m_P - S]+ + sum_N [S - m_N]+, whose gradient grows with the memory.

    Parameters
    ----------
    pos_margin : float
        m_P, similarity that positives are pulled up to (cosine, in [-1, 1]).
    neg_margin : float
        m_N, similarity that negatives are pushed down to (cosine, in [-1, 1]).
    reduction : {"mean", "mean-nonzero", "sum"}
        Mean over each anchor's positives and its active negatives; mean over all active pairs of the batch, as in
        pytorch-metric-learning; or sum over both as in the XBM paper.

    Raises
    ------
    TypeError, ValueError
        If a margin is no finite number or the reduction none of the three.

    Examples
    --------
    >>> import numpy as np, xbm
    >>> anchors = np.asarray([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]])
    >>> objective = xbm.Objective(loss=xbm.Contrastive(), warmup=0)
    >>> result = objective.evaluate(objective.init(capacity=8, dim=2), anchors, np.asarray([0, 0, 1]))
    >>> round(float(result.loss), 4)  # two anchors 1 - 0.6 apart, two pushed by 0.8 - 0.5
    0.4667

    References
    ----------
    Hadsell, Chopra, LeCun, "Dimensionality Reduction by Learning an Invariant Mapping", CVPR 2006; on similarities
    as in Wang et al., "Cross-Batch Memory for Embedding Learning", CVPR 2020, section 3.
    """

    pos_margin: float = 1.0
    neg_margin: float = 0.5
    reduction: PairReduction = "mean"

    def __post_init__(self) -> None:
        for name in ("pos_margin", "neg_margin"):
            object.__setattr__(self, name, checks.number(name, getattr(self, name)))
        checks.choice("reduction", self.reduction, PAIR_REDUCTIONS)

    @property
    def negative_floor(self) -> float:
        """m_N: up to it a negative counts for nothing."""
        return self.neg_margin

    def positive_gap(self, S: Array) -> tuple[Array, None]:
        """Return m_P - S."""
        return self.pos_margin - S, None

    def negative_gap(self, S: Array) -> tuple[Array, None]:
        """Return S - m_N."""
        return S - self.neg_margin, None
