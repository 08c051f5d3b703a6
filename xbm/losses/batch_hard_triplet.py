"""Batch-hard triplet loss."""

from dataclasses import dataclass

from xbm import checks
from xbm.backends import Array, array_namespace
from xbm.losses.base import LOSSES, Block, PairLoss
from xbm.losses.functions import hinge, softplus
from xbm.options import number, option
from xbm.reductions import Results, Summaries, TopK


@LOSSES.register("batch-hard-triplet")
@dataclass(frozen=True)
class BatchHardTriplet(PairLoss):
    r"""Triplet loss of an anchor's hardest pairs: the least similar positive against the most similar negative.

    L_i = [max_N S - min_P S + m]+, or log(1 + exp(max_N S - min_P S + m)) if `soft`; 0 without a positive or a
    negative. Among equally hard rows, the row in the lowest slot is used.

    Parameters
    ----------
    margin : float
        m, the required difference between the similarities of the positive and the negative (cosine).
    soft : bool
        Whether to use the soft margin, with which satisfied triplets still have a small gradient.

    Raises
    ------
    TypeError, ValueError
        If the margin is not a finite number or `soft` is not a bool.

    Examples
    --------
    >>> import numpy as np, xbm
    >>> anchors = np.asarray([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]])
    >>> objective = xbm.Objective(loss=xbm.BatchHardTriplet(), warmup=0)
    >>> result = objective.evaluate(objective.init(capacity=8, dim=2), anchors, np.asarray([0, 0, 1]))
    >>> round(float(result.loss), 4)  # only the second anchor is closer to the other class: 0.8 - 0.6 + 0.2
    0.1333

    References
    ----------
    Hermans, Beyer, Leibe, "In Defense of the Triplet Loss for Person Re-Identification", arXiv 1703.07737, equation 5;
    on similarities instead of distances.
    """

    margin: float = option(0.2, number())
    soft: bool = option(False, checks.flag)

    def summarise(self, block: Block, r: Results) -> Summaries:
        """Return the hardest positive and the hardest negative."""
        return {"positive": TopK.of(-block.S, block.P, block), "negative": TopK.of(block.S, block.N, block)}

    def value(self, r: Results) -> Array:
        """Return L_i."""
        gap = self._gap(r)[:, 0]
        return softplus(gap) if self.soft else hinge(gap)

    def weights(self, block: Block, r: Results) -> Array:
        """Return the slope of L_i for the hardest negative, and its negation for the hardest positive."""
        gap = self._gap(r)
        xp = array_namespace(gap)
        slope = xp.exp(gap - softplus(gap)) if self.soft else xp.astype(gap > 0, gap.dtype)
        pull, push = (r[side].holds(block.slots) for side in ("positive", "negative"))
        return xp.where(push, slope, 0.0) - xp.where(pull, slope, 0.0)

    def _gap(self, r: Results) -> Array:
        """Return max_N S - min_P S + m, (B, 1); -inf without a positive or a negative."""
        positive, negative = r["positive"], r["negative"]
        xp = array_namespace(positive.score)
        both = (positive.slot >= 0) & (negative.slot >= 0)
        return xp.where(both, negative.similarity - positive.similarity + self.margin, -xp.inf)
