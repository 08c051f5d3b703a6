"""Pair losses: each a few small functions over blocks of similarities, in a file of its own.

In formulas: S the cosine similarities, P and N the positive and negative pairs of an anchor with n_P and n_N of them,
[x]+ = max(x, 0).
"""

from inspect import signature
from typing import TypeAlias

from xbm.losses.base import LOSSES, Block, PairLoss, RowLoss, Side, SidedPairLoss, Staged
from xbm.losses.batch_hard_triplet import BatchHardTriplet
from xbm.losses.binomial_deviance import BinomialDeviance
from xbm.losses.circle import Circle
from xbm.losses.contrastive import Contrastive
from xbm.losses.custom import Differentiated, Function
from xbm.losses.hinge import PAIR_REDUCTIONS, HingeLoss, PairReduction
from xbm.losses.lifted_structure import LiftedStructure
from xbm.losses.margin import Margin
from xbm.losses.multi_similarity import MultiSimilarity
from xbm.losses.nca import NCA
from xbm.losses.ranking import RankingLoss, RecallAtK, SmoothAP
from xbm.losses.supcon import SupCon
from xbm.losses.triplets import SemiHardTriplet, Triplet, TripletLoss
from xbm.losses.tuplet import NTXent, TupletLoss, TupletMargin

__all__ = [
    "LOSSES",
    "NCA",
    "PAIR_REDUCTIONS",
    "REDUCED",
    "BatchHardTriplet",
    "BinomialDeviance",
    "Block",
    "Circle",
    "Contrastive",
    "Differentiated",
    "Function",
    "HingeLoss",
    "LiftedStructure",
    "LossLike",
    "Margin",
    "MultiSimilarity",
    "NTXent",
    "PairLoss",
    "PairReduction",
    "RankingLoss",
    "RecallAtK",
    "RowLoss",
    "SemiHardTriplet",
    "Side",
    "SidedPairLoss",
    "SmoothAP",
    "Staged",
    "SupCon",
    "Triplet",
    "TripletLoss",
    "TupletLoss",
    "TupletMargin",
    "get",
]

LossLike: TypeAlias = str | RowLoss | Function
"""What `get` takes for a loss: a name among `LOSSES`, an object or a function."""

REDUCED = [name for name, loss in LOSSES.items() if "reduction" in signature(loss).parameters]
"""Names of the losses that have a choice of reduction."""


def get(loss: LossLike, reduction: PairReduction | None = None) -> RowLoss:
    """Return a loss from a name, a loss or a callable.

    Parameters
    ----------
    loss : str, RowLoss or callable
        One of `LOSSES`, with its defaults; a loss as it is; or a function, see `Differentiated`.
    reduction : {"mean", "mean-nonzero", "sum"}, optional
        For the losses by name that have a choice: "contrastive", "margin", "triplet" and "semi-hard-triplet" ("mean" if
        None). An object brings its own.

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
        if loss in REDUCED:
            return LOSSES[loss](reduction=reduction)
    elif isinstance(loss, type) or not (isinstance(loss, RowLoss) or callable(loss)):
        raise TypeError(f"loss must be {_accepted()}, got {loss!r} of type {type(loss).__name__}")
    if isinstance(loss, str) or reduction is not None:
        names = ", ".join(map(repr, REDUCED))
        raise ValueError(
            f"reduction={reduction!r} is for a loss by name that has a choice ({names}); {loss!r} brings its own"
        )
    return loss if isinstance(loss, RowLoss) else Differentiated(loss)


def _accepted() -> str:
    return (
        f"one of the names {', '.join(map(repr, LOSSES))}, an xbm.RowLoss such as a PairLoss, "
        f"a callable, or for PyTorch's XBM one of pytorch-metric-learning's losses"
    )
