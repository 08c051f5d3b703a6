"""Margin loss."""

from dataclasses import dataclass

from xbm import backends
from xbm.backends import Array
from xbm.losses.base import LOSSES
from xbm.losses.hinge import PAIR_REDUCTIONS, HingeLoss, PairReduction
from xbm.options import choice, number, option

NEAREST = 1e-3  # Euclidean distance below which the direction between two rows is dominated by rounding


@LOSSES.register("margin")
@dataclass(frozen=True)
class Margin(HingeLoss):
    r"""Margin loss: a boundary on the distance between positives and negatives, with a margin on both sides.

    With d = sqrt(2 - 2 S), L_i = sum_P [a + d - b]+ + sum_N [a - d + b]+, reduced as in `Contrastive`. The paper
    averages over the active pairs, ``"mean-nonzero"``.

    Parameters
    ----------
    alpha : float
        a, half the width of the gap between positives and negatives (distance, in [0, 2]).
    beta : float
        b, the boundary (distance, in [0, 2]); the paper also learns it.
    reduction : {"mean", "mean-nonzero", "sum"}
        Mean over each anchor's positives and its active negatives; mean over all active pairs of the batch; or sum.

    Raises
    ------
    TypeError, ValueError
        If a parameter is not a finite number or the reduction is not one of the three.

    Examples
    --------
    >>> import numpy as np, xbm
    >>> anchors = np.asarray([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]])
    >>> objective = xbm.Objective(loss=xbm.Margin(), warmup=0)
    >>> result = objective.evaluate(objective.init(capacity=8, dim=2), anchors, np.asarray([0, 0, 1]))
    >>> round(float(result.loss), 4)  # two negatives at distance 0.63; the positives are close enough
    0.5117

    References
    ----------
    Wu, Manmatha, Smola, Kraehenbuehl, "Sampling Matters in Deep Embedding Learning", ICCV 2017, arXiv 1706.07567;
    `DistanceWeightedMiner` implements the paper's sampling of negatives.
    """

    alpha: float = option(0.2, number())
    beta: float = option(1.2, number())
    reduction: PairReduction = option("mean", choice(*PAIR_REDUCTIONS))
    needs_cosines = True

    @property
    def negative_floor(self) -> float:
        """Similarity at distance a + b, rounded down: less similar negatives contribute nothing."""
        reach = max(self.alpha + self.beta, 0.0)
        return 1 - (reach + NEAREST) ** 2 / 2

    def positive_gap(self, S: Array) -> tuple[Array, Array]:
        """Return a + d - b and -d d/dS = 1/d."""
        d, slope = _distance(S)
        return self.alpha + d - self.beta, slope

    def negative_gap(self, S: Array) -> tuple[Array, Array]:
        """Return a - d + b and 1/d."""
        d, slope = _distance(S)
        return self.alpha - d + self.beta, slope


def _distance(S: Array) -> tuple[Array, Array]:
    """Return d = sqrt(2 - 2 S), at least `NEAREST`, and its slope -d d/dS, which is 0 at that minimum."""
    xp, ops = backends.of(S)
    squared = 2.0 - 2.0 * S
    d = xp.sqrt(xp.clip(squared, min=NEAREST**2))
    return d, ops.is_positive(squared - NEAREST**2) / d
