"""Pair losses, one per module. Each consists of a few small functions over blocks of similarities.

Notation: S are the cosine similarities; P and N are the positive and negative pairs of an anchor, n_P and n_N their
numbers; [x]+ = max(x, 0).
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
from xbm.registry import import_all

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
"""A loss as accepted by `get`: a name in `LOSSES`, a loss object, or a function."""

import_all(__name__, __path__)  # a file beside these registers its losses by being there

REDUCED = [name for name, loss in LOSSES.items() if "reduction" in signature(loss).parameters]
"""Names of the losses with a `reduction` option."""


def get(loss: LossLike, reduction: PairReduction | None = None) -> RowLoss:
    """Return a loss object for a name, a loss object or a callable.

    Parameters
    ----------
    loss : str, RowLoss or callable
        A name in `LOSSES`, for that loss with its defaults; a loss object, which is returned unchanged; or a function,
        see `Differentiated`.
    reduction : {"mean", "mean-nonzero", "sum"}, optional
        Reduction of a loss given by name: "contrastive", "margin", "triplet" or "semi-hard-triplet" (default "mean").
        A loss object has its own reduction.

    Raises
    ------
    TypeError, ValueError
        If `loss` is not one of the three, or `reduction` is given for a loss that has none or for an object.
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
            f"reduction is an option of losses by name ({names}), got reduction={reduction!r} with loss {loss!r}: "
            "omit it, or set it on the loss object"
        )
    return loss if isinstance(loss, RowLoss) else Differentiated(loss)


def _accepted() -> str:
    return (
        f"one of the names {', '.join(map(repr, LOSSES))}, an xbm.RowLoss such as a PairLoss, "
        f"a callable, or for PyTorch's XBM one of pytorch-metric-learning's losses"
    )
