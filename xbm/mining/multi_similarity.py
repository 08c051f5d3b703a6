"""The miner of the multi-similarity loss."""

from __future__ import annotations

from dataclasses import dataclass

from xbm.backends import array_namespace
from xbm.losses import Block
from xbm.mining.base import MINERS, Miner
from xbm.options import number, option
from xbm.reductions import Results, Summaries, TopK


@MINERS.register("multi-similarity")
@dataclass(frozen=True)
class MultiSimilarityMiner(Miner):
    r"""The hard pairs of either side, each against the hardest of the other.

    A negative counts if S > min_P S - eps, a positive if S < max_N S + eps; an anchor without positives or without
    negatives has no pairs.

    Parameters
    ----------
    epsilon : float
        eps, a margin (cosine): the larger, the more pairs count.

    Raises
    ------
    TypeError, ValueError
        If it is no finite number.

    Examples
    --------
    >>> import numpy as np, xbm
    >>> anchors = np.asarray([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]])
    >>> objective = xbm.Objective(loss=xbm.MultiSimilarity(), miner=xbm.MultiSimilarityMiner(), warmup=0)
    >>> result = objective.evaluate(objective.init(capacity=8, dim=2), anchors, np.asarray([0, 0, 1]))
    >>> round(float(result.loss), 4)  # the second anchor's pairs
    0.1997

    References
    ----------
    Wang et al., "Multi-Similarity Loss with General Pair Weighting for Deep Metric Learning", CVPR 2019, equations 11
    and 12.
    """

    epsilon: float = option(0.1, number())

    def summarise(self, block: Block, r: Results) -> Summaries:
        """Return the hardest pair of either side."""
        return {"positive": TopK.of(-block.S, block.P, block), "negative": TopK.of(block.S, block.N, block)}

    def select(self, block: Block, r: Results) -> Block:
        """Return the block with its hard pairs."""
        xp = array_namespace(block.S)
        least_similar, most_similar = -r["positive"].score, r["negative"].score  # inf and -inf without a pair
        return block._replace(
            P=xp.where(block.S >= most_similar + self.epsilon, 0.0, block.P),  # keeps a NaN, so that the loss shows it
            N=xp.where(block.S <= least_similar - self.epsilon, 0.0, block.N),
        )
