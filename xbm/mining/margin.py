"""Pairs beyond a margin."""

from __future__ import annotations

from dataclasses import dataclass

from xbm.backends import array_namespace
from xbm.losses import Block
from xbm.mining.base import MINERS, Miner
from xbm.options import number, option
from xbm.reductions import Results


@MINERS.register("margin")
@dataclass(frozen=True)
class MarginMiner(Miner):
    r"""The pairs that are active in a contrastive loss: positives below one margin, negatives above another.

    Parameters
    ----------
    pos_margin : float
        Similarity below which a positive counts (cosine, in [-1, 1]).
    neg_margin : float
        Similarity above which a negative counts (cosine, in [-1, 1]).

    Raises
    ------
    TypeError, ValueError
        If one is no finite number.

    Examples
    --------
    >>> import numpy as np, xbm
    >>> anchors = np.asarray([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]])
    >>> objective = xbm.Objective(loss="nca", miner=xbm.MarginMiner(), warmup=0)
    >>> result = objective.evaluate(objective.init(capacity=8, dim=2), anchors, np.asarray([0, 0, 1]))
    >>> round(float(result.loss), 4)  # log(1 + exp((0.8 - 0.6) / 0.1)) of the second anchor
    0.709
    """

    pos_margin: float = option(0.9, number())
    neg_margin: float = option(0.5, number())

    def select(self, block: Block, r: Results) -> Block:
        """Return the block with its active pairs."""
        xp = array_namespace(block.S)
        return block._replace(
            P=xp.where(block.S >= self.pos_margin, 0.0, block.P),  # keeps a NaN, so that the loss shows it
            N=xp.where(block.S <= self.neg_margin, 0.0, block.N),
        )
