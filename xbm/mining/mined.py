"""A loss over the pairs that miners select: itself a loss."""

from __future__ import annotations

from xbm.backends import Array
from xbm.losses import Block, PairLoss, RowLoss
from xbm.losses.base import Stage, summarised
from xbm.mining.base import Miner
from xbm.reductions import Results, Summaries


def mined(loss: RowLoss, *miners: Miner) -> RowLoss:
    """Return the loss over the pairs that are left after all miners, in their order."""
    for miner in reversed(miners):
        loss = Mined(loss, miner) if isinstance(loss, PairLoss) and not miner.whole_rows else MinedRows(loss, miner)
    return loss


class MinedRows(RowLoss):
    """A loss that needs whole rows, over the pairs that a miner selects."""

    def __init__(self, loss: RowLoss, miner: Miner) -> None:
        self.loss, self.miner = loss, miner
        self.needs_cosines = loss.needs_cosines or miner.needs_cosines

    def __repr__(self) -> str:
        return f"MinedRows({self.loss!r}, {self.miner!r})"

    def whole(self, block: Block) -> tuple[Array, Array]:
        """Return `(L_i (B,), dL_i/dS_ij (B, m))`, 0 for pairs that were not selected."""
        return self.loss.whole(_selected(self.miner, block, summarised(self.miner.stages, block)))


class Mined(PairLoss):
    """A loss over the pairs that a miner selects: a loss whose first stages are the miner's."""

    def __init__(self, loss: PairLoss, miner: Miner) -> None:
        self.loss, self.miner = loss, miner
        self.needs_cosines = loss.needs_cosines or miner.needs_cosines

    def __repr__(self) -> str:
        return f"Mined({self.loss!r}, {self.miner!r})"

    @property
    def width(self) -> int:
        """The larger of the two."""
        return max(self.loss.width, self.miner.width)

    @property
    def stages(self) -> tuple[Stage, ...]:
        """Return the miner's stages, then the loss's, each over the pairs selected so far."""

        def of_miner(stage: Stage) -> Stage:
            return lambda block, r: _prefixed("miner", stage(block, _part("miner", r)))

        def of_loss(stage: Stage) -> Stage:
            return lambda block, r: _prefixed("loss", stage(self._select(block, r), _part("loss", r)))

        return (*map(of_miner, self.miner.stages), *map(of_loss, self.loss.stages))

    def value(self, r: Results) -> Array:
        """Return L_i over the selected pairs."""
        return self.loss.value(_part("loss", r))

    def weights(self, block: Block, r: Results) -> Array:
        """Return dL_i/dS_ij, 0 for pairs that were not selected."""
        return self.loss.weights(self._select(block, r), _part("loss", r))

    def _select(self, block: Block, r: Results) -> Block:
        return _selected(self.miner, block, _part("miner", r))


def _selected(miner: Miner, block: Block, r: Results) -> Block:
    """Return the block that a miner selects, or raise if its result is not one."""
    chosen = miner.select(block, r)
    if not isinstance(chosen, Block):
        raise TypeError(f"{miner!r}.select must return the block with other P and N, got {type(chosen).__name__}")
    if not chosen.P.shape == chosen.N.shape == block.S.shape:
        raise ValueError(
            f"{miner!r}.select must return P and N of shape {tuple(block.S.shape)}, got {tuple(chosen.P.shape)} and "
            f"{tuple(chosen.N.shape)}"
        )
    return chosen


def _prefixed(owner: str, summaries: Summaries) -> Summaries:
    return {f"{owner}.{name}": summary for name, summary in summaries.items()}


def _part(owner: str, r: Results) -> Results:
    start = f"{owner}."
    return {name.removeprefix(start): result for name, result in r.items() if name.startswith(start)}
