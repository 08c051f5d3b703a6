"""The k hardest or easiest pairs of one side."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from xbm.backends import array_namespace
from xbm.losses import Block
from xbm.mining.base import MINERS, Miner
from xbm.options import option, whole
from xbm.reductions import Results, Summaries, TopK


class TopMiner(Miner):
    """The k pairs of one side with the largest scores (similarities unless overridden), and all pairs of the other."""

    k: int
    side: ClassVar[Literal["P", "N"]]

    @property
    def width(self) -> int:
        """k: one comparison each."""
        return self.k

    def summarise(self, block: Block, r: Results) -> Summaries:
        """Return the k pairs of the side."""
        return {"top": TopK.of(block.S, getattr(block, self.side), block, k=self.k)}

    def select(self, block: Block, r: Results) -> Block:
        """Return the block with only these pairs on the side."""
        pairs = getattr(block, self.side)
        return block._replace(**{self.side: array_namespace(pairs).where(r["top"].holds(block.slots), pairs, 0.0)})


@MINERS.register("hard-negatives")
@dataclass(frozen=True)
class HardNegativeMiner(TopMiner):
    r"""The k most similar negatives of each anchor, and all positives.

    Parameters
    ----------
    k : int
        Negatives that count, at least 1; of equally similar ones those in the lowest slots.

    Raises
    ------
    TypeError, ValueError
        If k is no int of at least 1.

    Examples
    --------
    >>> import numpy as np, xbm
    >>> anchors = np.asarray([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]])
    >>> objective = xbm.Objective(loss="nt-xent", miner=xbm.HardNegativeMiner(k=1), warmup=0)
    >>> result = objective.evaluate(objective.init(capacity=8, dim=2), anchors, np.asarray([0, 0, 1]))
    >>> round(float(result.loss), 4)
    0.9711
    """

    k: int = option(10, whole(at_least=1))
    side = "N"


@MINERS.register("easy-positives")
@dataclass(frozen=True)
class EasyPositiveMiner(TopMiner):
    r"""The k most similar positives of each anchor, and all negatives.

    Classes with several looks need not become one point. The anchor's own row is never among them, nor, with ids, an
    older copy of it.

    Parameters
    ----------
    k : int
        Positives that count, at least 1; of equally similar ones those in the lowest slots.

    Raises
    ------
    TypeError, ValueError
        If k is no int of at least 1.

    Examples
    --------
    >>> import numpy as np, xbm
    >>> anchors = np.asarray([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]])
    >>> objective = xbm.Objective(miner=xbm.EasyPositiveMiner(), warmup=0)
    >>> result = objective.evaluate(objective.init(capacity=8, dim=2), anchors, np.asarray([0, 0, 0]))
    >>> round(float(result.loss), 4)  # 1 - 0.6, 1 - 0.8 and 1 - 0.8
    0.2667

    References
    ----------
    Xuan, Stylianou, Pless, "Improved Embeddings with Easy Positive Triplet Mining", WACV 2020, arXiv 1904.04370; with
    `SemiHardMiner` it is their easy positive semi-hard negative mining.
    """

    k: int = option(1, whole(at_least=1))
    side = "P"
