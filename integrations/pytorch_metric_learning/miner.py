"""Adapter for the miners of pytorch-metric-learning."""

import torch
from pytorch_metric_learning.miners import BaseMiner, HDCMiner, UniformHistogramMiner
from pytorch_metric_learning.utils.loss_and_miner_utils import convert_to_pairs
from torch import Tensor

from xbm.backends.torch import is_compiling
from xbm.integrations.pytorch_metric_learning import distance, trial
from xbm.losses import Block
from xbm.mining import MINERS, Miner
from xbm.reductions import Results

OVER_ALL_ANCHORS = (HDCMiner, UniformHistogramMiner)  # these select from the pairs of the whole batch


class TheirMiner(Miner):
    """A miner of pytorch-metric-learning, called once per anchor with exactly the rows that form pairs with it.

    It needs whole rows, (B, M) at once, and runs eagerly only.

    Parameters
    ----------
    miner : pytorch_metric_learning.miners.BaseMiner
        Its distance must be CosineSimilarity, DotProductSimilarity or LpDistance of normalised embeddings.
    dim : int
        D, the embedding dimension.

    Raises
    ------
    TypeError
        If the miner cannot select pairs for each anchor from distances alone.
    """

    whole_rows = True

    def __init__(self, miner: BaseMiner, *, dim: int) -> None:
        name = type(miner).__name__
        if not isinstance(miner, BaseMiner):
            raise TypeError(f"miner must be an xbm.Miner or a miner of pytorch-metric-learning, got {name}")
        if isinstance(miner, OVER_ALL_ANCHORS):
            raise TypeError(
                f"{name} selects from the pairs of all anchors at once, but XBM mines each anchor separately: "
                f"use one of xbm's miners: {', '.join(map(repr, MINERS))}"
            )
        distance.check(miner)
        self.miner, self.dim = miner, dim
        self.needs_cosines = miner.distance.normalize_embeddings
        trial.require(repr(self), self.indices, instead=f"use one of xbm's miners: {', '.join(map(repr, MINERS))}")

    def __repr__(self) -> str:
        return f"{type(self.miner).__name__}(distance={type(self.miner.distance).__name__})"

    def select(self, block: Block, r: Results) -> Block:
        """Return the block with the pairs that the miner selects."""
        a1, p, a2, n = convert_to_pairs(self.indices(block.S, block.P > 0, block.N > 0), None)
        P, N = torch.zeros_like(block.P), torch.zeros_like(block.N)
        P[a1, p], N[a2, n] = block.P[a1, p], block.N[a2, n]
        return block._replace(P=P, N=N)

    def indices(
        self, S: Tensor, positive: Tensor, negative: Tensor, generator: torch.Generator | None = None
    ) -> tuple[Tensor, ...]:
        """Return the miner's selection for all anchors: triplets `(a, p, n)`, or pairs `(a1, p, a2, n)`."""
        if is_compiling():
            raise RuntimeError(
                "torch.compile does not support pytorch-metric-learning's miners: do not compile the XBM"
            )
        found = [self._of_anchor(i, S, positive, negative, generator) for i in range(len(S))]
        found = [one for one in found if one is not None]
        if not found:
            return (torch.empty(0, dtype=torch.int64, device=S.device),) * 4
        return tuple(torch.cat(parts) for parts in zip(*found, strict=True))

    def _of_anchor(
        self, i: int, S: Tensor, positive: Tensor, negative: Tensor, generator: torch.Generator | None
    ) -> list[Tensor] | None:
        (pairs,) = torch.nonzero(positive[i] | negative[i], as_tuple=True)
        if not len(pairs):
            return None
        row = S[i : i + 1, pairs]
        labels = negative[i, pairs].long()  # 0 for positives, the label given to the anchor
        x, rows = trial.stand_ins(row, self.dim, generator)
        with distance.seeing(self.miner, row) as miner:
            found = miner(x, torch.zeros_like(labels[:1]), rows, labels)
        anchors = (0,) if len(found) == 3 else (0, 2)
        return [torch.full_like(one, i) if k in anchors else pairs[one] for k, one in enumerate(found)]
