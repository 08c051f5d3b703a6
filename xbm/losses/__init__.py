"""Pair losses: each a few small functions over blocks of similarities, in a file of its own.

In formulas: S the cosine similarities, P and N the positive and negative pairs of an anchor with n_P and n_N of them,
[x]+ = max(x, 0).
"""

from typing import Literal, TypeAlias

from xbm.losses.base import Block, PairLoss, RowLoss, Side, SidedPairLoss, Staged
from xbm.losses.contrastive import Contrastive
from xbm.losses.custom import Differentiated, Function
from xbm.losses.multi_similarity import MultiSimilarity
from xbm.losses.supcon import SupCon
from xbm.losses.triplet import BatchHardTriplet

__all__ = [
    "LOSSES",
    "BatchHardTriplet",
    "Block",
    "Contrastive",
    "Differentiated",
    "Function",
    "LossLike",
    "MultiSimilarity",
    "PairLoss",
    "RowLoss",
    "Side",
    "SidedPairLoss",
    "Staged",
    "SupCon",
    "get",
]

LossLike: TypeAlias = str | RowLoss | Function
"""What `get` takes for a loss: a name among `LOSSES`, an object or a function."""

LOSSES: dict[str, type[RowLoss]] = {
    "contrastive": Contrastive,
    "multi-similarity": MultiSimilarity,
    "batch-hard-triplet": BatchHardTriplet,
    "supcon": SupCon,
}


def get(loss: LossLike, reduction: Literal["mean", "sum"] | None = None) -> RowLoss:
    """Return a loss from a name, a loss or a callable.

    Parameters
    ----------
    loss : str, RowLoss or callable
        One of `LOSSES`, with its defaults; a loss as it is; or a function, see `Differentiated`.
    reduction : {"mean", "sum"}, optional
        For "contrastive", the one loss here that has a choice ("mean" if None). An object brings its own.

    Raises
    ------
    TypeError, ValueError
        If `loss` is none of the three, listing what is accepted, or has no choice of reduction.
    """
    if isinstance(loss, str):
        if loss not in LOSSES:
            raise ValueError(f"loss must be {_accepted()}, got {loss!r}")
        if reduction is None:
            return LOSSES[loss]()
        if loss == "contrastive":
            return Contrastive(reduction=reduction)
    elif isinstance(loss, type) or not (isinstance(loss, RowLoss) or callable(loss)):
        raise TypeError(f"loss must be {_accepted()}, got {loss!r} of type {type(loss).__name__}")
    if isinstance(loss, str) or reduction is not None:
        raise ValueError(f'reduction={reduction!r} is for loss="contrastive" by its name; {loss!r} brings its own')
    return loss if isinstance(loss, RowLoss) else Differentiated(loss)


def _accepted() -> str:
    return f"one of the names {', '.join(map(repr, LOSSES))}, an xbm.RowLoss such as a PairLoss, or a callable"
