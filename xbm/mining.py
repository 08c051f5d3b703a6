"""Miners: which pairs of a row count. A miner sees what a loss sees, blocks and summaries, and no more."""

from abc import ABC, abstractmethod

from xbm.losses import PairLoss, Staged


class Miner(Staged, ABC):
    """A choice of pairs, constant for the gradient.

    `summarise` reduces a block as a loss does, `select` returns the block with other pair weights P and N.
    """

    @abstractmethod
    def select(self, block, r):
        """Return the block with the pairs that count, from the results of the whole rows."""


class Mined(PairLoss):
    """A loss over the pairs that a miner selects: itself a loss, whose first stages are the miner's."""

    def __init__(self, loss, miner):
        if not isinstance(miner, Miner):
            raise TypeError(f"miner must be an xbm.Miner, got {miner!r} of type {type(miner).__name__}")
        self.loss, self.miner = loss, miner
        self.needs_cosines = loss.needs_cosines

    def __repr__(self):
        return f"Mined({self.loss!r}, {self.miner!r})"

    @property
    def stages(self):
        """Return the miner's stages, then the loss's, each over the pairs selected by then."""

        def mining(stage):
            return lambda block, r: _prefixed("miner", stage(block, _part("miner", r)))

        def mined(stage):
            return lambda block, r: _prefixed("loss", stage(self._select(block, r), _part("loss", r)))

        return (*map(mining, self.miner.stages), *map(mined, self.loss.stages))

    def value(self, r):
        """Return L_i over the selected pairs."""
        return self.loss.value(_part("loss", r))

    def weights(self, block, r):
        """Return dL_i/dS_ij, 0 for pairs that were not selected."""
        return self.loss.weights(self._select(block, r), _part("loss", r))

    def _select(self, block, r):
        return self.miner.select(block, _part("miner", r))


def _prefixed(owner, summaries):
    return {f"{owner}.{name}": summary for name, summary in summaries.items()}


def _part(owner, r):
    start = f"{owner}."
    return {name.removeprefix(start): result for name, result in r.items() if name.startswith(start)}
