"""The pair loss of both terms, over the pairs that the miners choose."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, TypedDict

from xbm import losses, mining
from xbm.losses import LossLike, PairLoss, PairReduction, RowLoss
from xbm.mining import Miner, MinerLike
from xbm.options import Options, choice, option


def _as_given(name: str, value: Any) -> Any:
    """Return the value: `losses.get` and `mining.each` check it."""
    return value


@dataclass(frozen=True, kw_only=True)
class Criterion(Options):
    """A pair loss and its miners."""

    loss: LossLike = option(
        "contrastive",
        _as_given,
        """Pair loss of both terms: a name among `xbm.losses.LOSSES` ("contrastive", "triplet", "nt-xent", ...), a loss,
        or a function `(S, positive, negative) -> (B,)`, see `xbm.losses.Differentiated`.""",
    )
    miner: MinerLike = option(
        None,
        _as_given,
        """Choice of the pairs that count, in both terms: a name among `xbm.mining.MINERS` ("hard-negatives", ...), a
        miner, or a list of them, each choosing among the pairs that the one before left.""",
    )
    reduction: PairReduction | None = option(
        None,
        choice(*losses.PAIR_REDUCTIONS),
        """Reduction over an anchor's pairs, for a loss by name that has a choice: mean over each anchor's positives and
        over its active negatives (default), mean over all active pairs of the batch, or sum. See `xbm.losses.get`.""",
    )
    miners: tuple[Miner, ...] = field(init=False, repr=False, compare=False)  # the miners, in their order
    criterion: RowLoss = field(init=False, repr=False, compare=False)  # the loss over the pairs they choose

    def __post_init__(self) -> None:
        super().__post_init__()
        loss, miners = losses.get(self.loss, self.reduction), mining.each(self.miner)
        miner = miners if len(miners) > 1 else miners[0] if miners else None
        self.derive(loss=loss, miner=miner, reduction=None)  # the loss has its reduction by now
        self.derive(miners=miners, criterion=mining.mined(loss, *miners))

    def check_mergeable(self) -> None:
        """Raise a ValueError if the loss or a miner needs whole rows, which a shard of the memory does not have."""
        if not isinstance(self.criterion, PairLoss):
            raise ValueError(
                f"{self.criterion!r} needs whole rows, and a rank with a shard of the memory has parts of them: use a "
                f"loss and miners that merge blocks (an xbm.PairLoss), or keep the whole memory on each rank "
                f"(shard=False)"
            )


class CriterionOptions(TypedDict, total=False):
    """The options of a `Criterion` but for the loss, for type checkers."""

    miner: MinerLike
    reduction: PairReduction | None
