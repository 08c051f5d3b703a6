"""Adapter for the losses of pytorch-metric-learning."""

import copy
from typing import Any, TypeAlias

import torch
from pytorch_metric_learning.losses import BaseMetricLossFunction
from torch import Generator, Tensor

from xbm.integrations.pytorch_metric_learning import distance, trial
from xbm.integrations.pytorch_metric_learning.miner import TheirMiner
from xbm.losses import LOSSES, Differentiated

Pairs: TypeAlias = tuple[Tensor, ...]
"""Indices of triplets `(a, p, n)`, or of pairs `(a1, p, a2, n)`."""

OURS = {
    "ContrastiveLoss": "contrastive",
    "FastAPLoss": "smooth-ap",
    "LiftedStructureLoss": "lifted-structure",
    "MarginLoss": "margin",
    "NCALoss": "nca",
    "NPairsLoss": "n-pair",
    "PNPLoss": "smooth-ap",
    "SignalToNoiseRatioContrastiveLoss": "contrastive",
    "SmoothAPLoss": "smooth-ap",
    "TripletMarginLoss": "triplet",
}
"""Equivalent or similar losses of xbm, for the error if a loss of pytorch-metric-learning cannot be used."""


def joined(loss: Any, miner: Any, *, dim: int) -> tuple[Any, Any]:
    """Return the adapted loss and the remaining miner: None if `miner` is a `TheirMiner`, which joins the loss."""
    if isinstance(miner, TheirMiner):
        return TheirLoss(loss, miner, dim=dim), None
    return TheirLoss(loss, dim=dim), miner


class TheirLoss(Differentiated):
    """A loss of pytorch-metric-learning, evaluated on given pairs and differentiated by autograd.

    The reducers of pytorch-metric-learning return one number per batch. This number is divided among the anchors that
    have pairs, such that the mean over all anchors equals it. The loss needs whole rows, (B, M) at once, and runs
    eagerly only.

    Parameters
    ----------
    loss : pytorch_metric_learning.losses.BaseMetricLossFunction
        Its distance must be CosineSimilarity, DotProductSimilarity or LpDistance of normalised embeddings.
    miner : TheirMiner, optional
        Selects the pairs or triplets for the loss; by default, the loss gets all pairs.
    dim : int
        D, the embedding dimension.

    Raises
    ------
    TypeError
        If the loss needs more than pairs and their distances.
    """

    def __init__(self, loss: BaseMetricLossFunction, miner: TheirMiner | None = None, *, dim: int) -> None:
        if not isinstance(loss, BaseMetricLossFunction):
            raise TypeError(
                f"loss must be an xbm loss or a pair loss of pytorch-metric-learning, such as ContrastiveLoss(), "
                f"without a wrapper such as CrossBatchMemory, got {type(loss).__name__}"
            )
        distance.check(loss)
        self.loss, self.miner, self.dim = loss, miner, dim
        self.needs_cosines = loss.distance.normalize_embeddings or (miner is not None and miner.needs_cosines)
        super().__init__(self._shares)
        self._try()

    def __repr__(self) -> str:
        pairs = "" if self.miner is None else f", miner={self.miner!r}"
        return f"{type(self.loss).__name__}(distance={type(self.loss.distance).__name__}{pairs})"

    def _shares(self, S: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
        """Return L_i, (B,), whose mean equals the value of the wrapped loss."""
        find = _every if self.miner is None else self.miner.indices
        total = self._total(self.loss, S, find(S.detach(), positive, negative))
        some = (positive | negative).any(dim=1)
        return torch.where(some, total * len(S) / some.sum().clamp(min=1), 0.0)

    def _total(self, loss: Any, S: Tensor, pairs: Pairs, generator: Generator | None = None) -> Tensor:
        """Evaluate a loss of pytorch-metric-learning, the wrapped one or a copy."""
        x, rows = trial.stand_ins(S, self.dim, generator)
        with distance.seeing(loss, S):
            return loss(x, indices_tuple=pairs, ref_emb=rows).reshape(())

    def _try(self) -> None:
        """Raise an error if the loss depends on anything but the pairs and their distances."""
        twin = copy.deepcopy(self.loss)  # a copy, because the loss may have state, such as a count of calls
        device = next((one.device for one in twin.parameters()), torch.device("cpu"))

        def run(S: Tensor, positive: Tensor, negative: Tensor, generator: Generator) -> tuple[Tensor, ...]:
            order = torch.randperm(S.shape[1], generator=generator)
            S, positive, negative = (one[:, order].to(device) for one in (S, positive, negative))
            return (self._total(twin, S, _every(S, positive, negative), generator),)

        ours = OURS.get(type(self.loss).__name__)
        instead = f"use xbm's loss={ours!r}" if ours else f"use one of xbm's losses: {', '.join(map(repr, LOSSES))}"
        trial.require(repr(self), run, instead=instead)


def _every(S: Tensor, positive: Tensor, negative: Tensor) -> Pairs:
    """Return all pairs as `(a1, p, a2, n)`."""
    return (*torch.nonzero(positive, as_tuple=True), *torch.nonzero(negative, as_tuple=True))
