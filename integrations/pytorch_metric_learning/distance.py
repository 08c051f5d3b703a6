"""Their distances, made from similarities instead of embeddings."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from pytorch_metric_learning.distances import BaseDistance, CosineSimilarity, DotProductSimilarity, LpDistance
from torch import Tensor


class Given(BaseDistance):
    """The distances of a kind that belong to given similarities S (B, m), whatever the embeddings.

    A similarity as it is; a Euclidean distance as sqrt(2 - 2 S), with the gradient 0 where that is 0; either to its
    power.
    """

    def __init__(self, kind: BaseDistance, S: Tensor) -> None:
        options = {name: getattr(kind, name) for name in ("normalize_embeddings", "p", "power", "is_inverted")}
        super().__init__(**options, collect_stats=False)
        self.S = S

    def forward(self, query_emb: Tensor, ref_emb: Tensor | None = None) -> Tensor:
        """Return the distances (B, m), for the caller to write into."""
        asked = len(query_emb), len(query_emb if ref_emb is None else ref_emb)
        if asked != tuple(self.S.shape):
            raise ValueError(f"it wants distances of shape {asked}, there are {tuple(self.S.shape)}")
        if self.is_inverted:
            return self.S**self.power
        squares = 2 - 2 * self.S
        apart = squares > 0
        return torch.where(apart, torch.where(apart, squares, 1.0) ** (self.power / 2), 0.0)


@contextmanager
def seeing(module: Any, S: Tensor) -> Iterator[Any]:
    """Let a loss or a miner of theirs see similarities S (B, m) in the place of its embeddings, for a while."""
    own = module.distance
    module.distance = Given(own, S)
    try:
        yield module
    finally:
        module.distance = own


def check(module: Any) -> None:
    """Refuse a loss or a miner whose distances do not follow from similarities, with a TypeError."""
    distance = module.distance
    follows = type(distance) in (CosineSimilarity, DotProductSimilarity, LpDistance) and distance.p == 2
    if not follows or (isinstance(distance, LpDistance) and not distance.normalize_embeddings):
        raise TypeError(
            f"{type(module).__name__} must have a CosineSimilarity(), DotProductSimilarity() or LpDistance(), p=2, of "
            f"normalised embeddings in the last case, got a {type(distance).__name__} with p={distance.p}, "
            f"normalize_embeddings={distance.normalize_embeddings}"
        )
