"""Whether a loss or a miner of theirs needs nothing but pairs and their distances: by trying."""

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Generator, Tensor

Run: TypeAlias = Callable[[Tensor, Tensor, Tensor, Generator], tuple[Tensor, ...]]
"""From similarities, positive and negative pairs, each (B, m), and a source of embeddings, to what comes out."""


def stand_ins(S: Tensor, dim: int, generator: Generator | None = None) -> tuple[Tensor, ...]:
    """Return embeddings (B, D) and (m, D) that nobody is to look at: zeros, or random ones to see who does."""
    if generator is None:
        return tuple(S.new_zeros(1, 1).expand(rows, dim) for rows in S.shape)
    return tuple(torch.randn(rows, dim, generator=generator).to(S) for rows in S.shape)


def require(name: str, run: Run, *, instead: str) -> None:
    """Raise a TypeError if nothing comes out, or what depends on embeddings, or on rows that are no pairs."""
    B, m = 3, 9  # rows of other numbers than anchors
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
        except Exception as problem:  # whatever it raises where it misses something
            raise TypeError(_refusal(name, f"it raises {problem!r}", instead)) from problem
    if not all(one.shape == other.shape and torch.allclose(one, other) for one, other in zip(*found, strict=True)):
        raise TypeError(_refusal(name, "it looks at embeddings, at other rows, or at the order of rows", instead))


def _refusal(name: str, why: str, instead: str) -> str:
    return f"{name} cannot work on pairs and their distances alone, without labels and embeddings: {why}; {instead}"
