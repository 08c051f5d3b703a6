"""Semi-hard negatives."""

from __future__ import annotations

from dataclasses import dataclass

from xbm import checks
from xbm.backends import array_namespace
from xbm.losses import Block
from xbm.mining.base import MINERS, Miner
from xbm.options import option
from xbm.reductions import Results, Summaries, TopK


@MINERS.register("semi-hard")
@dataclass(frozen=True)
class SemiHardMiner(Miner):
    r"""Negatives a little less similar than the anchor's most similar positive: max_P S - m < S < max_P S.

    What is nearer than the nearest positive may be a wrong label. An anchor without positives has no pairs, and all
    positives count.

    Parameters
    ----------
    margin : float
        m, how far below the positive a negative still counts (cosine), above 0.

    Raises
    ------
    TypeError, ValueError
        If it is no finite number above 0.

    Examples
    --------
    >>> import numpy as np, xbm
    >>> anchors = np.asarray([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0]])
    >>> objective = xbm.Objective(miner=xbm.SemiHardMiner(margin=0.3), warmup=0)
    >>> result = objective.evaluate(objective.init(capacity=8, dim=2), anchors, np.asarray([0, 0, 1]))
    >>> round(float(result.loss), 4)  # 1 - 0.8 of both positives, and 0.6 - 0.5 of the second anchor
    0.1667

    References
    ----------
    Schroff, Kalenichenko, Philbin, "FaceNet", CVPR 2015, arXiv 1503.03832; of an anchor's nearest positive as in Xuan,
    Stylianou, Pless, WACV 2020, arXiv 1904.04370. `SemiHardTriplet` compares with each positive.
    """

    margin: float = option(0.2, checks.positive)

    def summarise(self, block: Block, r: Results) -> Summaries:
        """Return the most similar positive."""
        return {"positive": TopK.of(block.S, block.P, block)}

    def select(self, block: Block, r: Results) -> Block:
        """Return the block with its semi-hard negatives."""
        xp = array_namespace(block.S)
        nearest = r["positive"].score  # -inf without a positive
        outside = (block.S >= nearest) | (block.S <= nearest - self.margin)  # keeps a NaN, so that the loss shows it
        return block._replace(N=xp.where(outside, 0.0, block.N))
