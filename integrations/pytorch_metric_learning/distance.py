"""Distances of pytorch-metric-learning, computed from similarities instead of embeddings."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from pytorch_metric_learning.distances import BaseDistance, CosineSimilarity, DotProductSimilarity, LpDistance
from torch import Tensor


class Given(BaseDistance):
    """A distance of the same kind as `kind` that returns values for given similarities S (B, m), ignoring embeddings.

    The value is S for a similarity and sqrt(2 - 2 S) for a Euclidean distance, raised to the distance's power. The
    gradient is 0 where the distance is 0.
    """

    def __init__(self, kind: BaseDistance, S: Tensor) -> None:
        options = {name: getattr(kind, name) for name in ("normalize_embeddings", "p", "power", "is_inverted")}
        super().__init__(**options, collect_stats=False)
        self.S = S

    def forward(self, query_emb: Tensor, ref_emb: Tensor | None = None) -> Tensor:
        """Return the distances (B, m). The caller may modify them."""
        asked = len(query_emb), len(query_emb if ref_emb is None else ref_emb)
        if asked != tuple(self.S.shape):
            raise ValueError(f"distances have shape {tuple(self.S.shape)}, but shape {asked} was requested")
        if self.is_inverted:
            return self.S**self.power
        squares = 2 - 2 * self.S
        apart = squares > 0
        return torch.where(apart, torch.where(apart, squares, 1.0) ** (self.power / 2), 0.0)


@contextmanager
def seeing(module: Any, S: Tensor) -> Iterator[Any]:
    """Within the context, replace the distance of a loss or miner by one computed from similarities S (B, m)."""
    own = module.distance
    module.distance = Given(own, S)
    try:
        yield module
    finally:
        module.distance = own


def check(module: Any) -> None:
    """Raise a TypeError if the distances of a loss or miner cannot be computed from similarities."""
    distance = module.distance
    follows = type(distance) in (CosineSimilarity, DotProductSimilarity, LpDistance) and distance.p == 2
    if not follows or (isinstance(distance, LpDistance) and not distance.normalize_embeddings):
        raise TypeError(
            f"{type(module).__name__} must have a CosineSimilarity(), DotProductSimilarity(), or LpDistance(p=2) with "
            f"normalize_embeddings=True as its distance, got {type(distance).__name__} with p={distance.p}, "
            f"normalize_embeddings={distance.normalize_embeddings}"
        )
