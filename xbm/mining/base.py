"""Miners: a choice of the pairs that count. A miner sees blocks and summaries, as a loss does, and nothing else."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TypeAlias

from xbm.losses import Block, Staged
from xbm.options import Options
from xbm.reductions import Results
from xbm.registry import Registry


class Miner(Options, Staged, ABC):
    """A choice of pairs, a constant for the gradient.

    `summarise` reduces a block as a loss does, `select` returns the block with other pair weights P and N.
    """

    needs_cosines: bool = False  # True: `normalize=False` raises an error
    whole_rows: bool = False  # True: `select` wants blocks of whole rows, (B, M) numbers at once

    @property
    def width(self) -> int:
        """Numbers held for each pair of a block: more make blocks smaller."""
        return 1

    @abstractmethod
    def select(self, block: Block, r: Results) -> Block:
        """Return the block with the pairs that count, from the results of the whole rows."""

    def refuse(self, dim: int) -> None:
        """Raise a ValueError if the miner does not fit embeddings of size `dim`; any size fits unless overridden."""


MINERS: Registry[Miner] = Registry()
"""Miners by name; each registers itself."""

MinerLike: TypeAlias = Miner | str | Sequence[Miner | str] | None
"""A miner as an option: a name among `MINERS`, an object, several in a row, or None for all pairs."""


def each(miner: MinerLike) -> tuple[Miner, ...]:
    """Return the miners in their order, each of which chooses among the pairs that the one before left.

    Raises
    ------
    TypeError, ValueError
        If one is not a miner, with a list of what is accepted.
    """
    several = miner if isinstance(miner, list | tuple) else () if miner is None else (miner,)
    return tuple(get(one) for one in several)


def get(miner: Miner | str) -> Miner:
    """Return the miner of a name among `MINERS`, with its defaults, or a miner as it is.

    Raises
    ------
    TypeError, ValueError
        If it is neither, with a list of what is accepted.
    """
    if isinstance(miner, Miner):
        return miner
    accepted = f"one of the names {', '.join(map(repr, MINERS))}, an xbm.Miner, a list of them or None"
    if not isinstance(miner, str):
        raise TypeError(f"miner must be {accepted}, got {miner!r} of type {type(miner).__name__}")
    if miner not in MINERS:
        raise ValueError(f"miner must be {accepted}, got {miner!r}")
    return MINERS[miner]()
