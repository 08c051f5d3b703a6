"""Trial runs that check whether a loss or miner of pytorch-metric-learning uses only pairs and their distances."""

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Generator, Tensor

Run: TypeAlias = Callable[[Tensor, Tensor, Tensor, Generator], tuple[Tensor, ...]]
"""A function of similarities, positive and negative pairs, each (B, m), and a random generator; returns tensors."""


def stand_ins(S: Tensor, dim: int, generator: Generator | None = None) -> tuple[Tensor, ...]:
    """Return placeholder embeddings (B, D) and (m, D): zeros, or random values to detect their use."""
    if generator is None:
        return tuple(S.new_zeros(1, 1).expand(rows, dim) for rows in S.shape)
    return tuple(torch.randn(rows, dim, generator=generator).to(S) for rows in S.shape)


def require(name: str, run: Run, *, instead: str) -> None:
    """Raise a TypeError if `run` fails, or if its result depends on embeddings or on rows that are not pairs."""
    B, m = 3, 9  # different numbers of anchors and rows
    generator = Generator().manual_seed(0)
    S, chance = (torch.rand(B, m, generator=generator) for _ in range(2))
    positive, negative = chance < 0.4, chance > 0.6
    positive[:, -2], negative[:, -2], positive[:, -1], negative[:, -1] = True, False, False, True
    found = []
    for _ in range(2):
        elsewhere = torch.rand(B, m, generator=generator)
        try:
            with torch.random.fork_rng(devices=[]):
                found.append(run(torch.where(positive | negative, S, elsewhere), positive, negative, generator))
        except Exception as problem:  # any error, such as for missing labels
            raise TypeError(_refusal(name, f"it raised {problem!r}", instead)) from problem
    if not all(one.shape == other.shape and torch.allclose(one, other) for one, other in zip(*found, strict=True)):
        raise TypeError(_refusal(name, "it depends on embeddings, other rows, or the order of rows", instead))


def _refusal(name: str, why: str, instead: str) -> str:
    return f"{name} must work with pairs and their distances alone, without labels and embeddings: {why}; {instead}"
