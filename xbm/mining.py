"""Miners: which pairs of a row count. A miner sees what a loss sees, blocks and summaries, and no more."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from xbm import checks
from xbm.backends import Array, array_namespace
from xbm.losses import Block, PairLoss, RowLoss, Staged
from xbm.losses.base import Stage, summarised
from xbm.reductions import Results, Summaries, TopK


class Miner(Staged, ABC):
    """A choice of pairs, constant for the gradient.

    `summarise` reduces a block as a loss does, `select` returns the block with other pair weights P and N.
    """

    @abstractmethod
    def select(self, block: Block, r: Results) -> Block:
        """Return the block with the pairs that count, from the results of the whole rows."""


@dataclass(frozen=True)
class MultiSimilarityMiner(Miner):
    r"""The hard pairs of either side, each against the hardest of the other.

    A negative counts if S > min_P S - eps, a positive if S < max_N S + eps; an anchor without positives or without
    negatives has no pairs.

    Parameters
    ----------
    epsilon : float
        eps, a margin (cosine): the larger, the more pairs count.

    Raises
    ------
    TypeError, ValueError
        If it is no finite number.

    Examples
    --------
    >>> import numpy as np, xbm
    >>> anchors = np.asarray([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]])
    >>> objective = xbm.Objective(loss=xbm.MultiSimilarity(), miner=xbm.MultiSimilarityMiner(), warmup=0)
    >>> result = objective.evaluate(xbm.init(capacity=8, dim=2), anchors, np.asarray([0, 0, 1]))
    >>> round(float(result.loss), 4)  # the second anchor's pairs
    0.1997

    References
    ----------
    Wang et al., "Multi-Similarity Loss with General Pair Weighting for Deep Metric Learning", CVPR 2019, equations 11
    and 12.
    """

    epsilon: float = 0.1

    def __post_init__(self) -> None:
        object.__setattr__(self, "epsilon", checks.number("epsilon", self.epsilon))

    def summarise(self, block: Block, r: Results) -> Summaries:
        """Return the hardest pair of either side."""
        return {"positive": TopK.of(-block.S, block.P, block), "negative": TopK.of(block.S, block.N, block)}

    def select(self, block: Block, r: Results) -> Block:
        """Return the block with its hard pairs."""
        xp = array_namespace(block.S)
        least_similar, most_similar = -r["positive"].score, r["negative"].score  # inf and -inf without a pair
        return block._replace(
            P=xp.where(block.S >= most_similar + self.epsilon, 0.0, block.P),  # a NaN is kept, to be seen in the loss
            N=xp.where(block.S <= least_similar - self.epsilon, 0.0, block.N),
        )


MINERS: dict[str, type[Miner]] = {"multi-similarity": MultiSimilarityMiner}


def get(miner: Miner | str | None) -> Miner | None:
    """Return a miner from a name among `MINERS`, with its defaults; a miner, or None, as it is.

    Raises
    ------
    TypeError, ValueError
        If it is none of these, listing what is accepted.
    """
    if miner is None or isinstance(miner, Miner):
        return miner
    accepted = f"one of the names {', '.join(map(repr, MINERS))}, an xbm.Miner or None"
    if not isinstance(miner, str):
        raise TypeError(f"miner must be {accepted}, got {miner!r} of type {type(miner).__name__}")
    if miner not in MINERS:
        raise ValueError(f"miner must be {accepted}, got {miner!r}")
    return MINERS[miner]()


def mined(loss: RowLoss, miner: Miner | None) -> RowLoss:
    """Return the loss over the pairs that a miner selects, or the loss itself without one."""
    if miner is None:
        return loss
    return Mined(loss, miner) if isinstance(loss, PairLoss) else MinedRows(loss, miner)


class MinedRows(RowLoss):
    """A loss that sees whole rows, over the pairs that a miner selects."""

    def __init__(self, loss: RowLoss, miner: Miner) -> None:
        self.loss, self.miner = loss, miner
        self.needs_cosines = loss.needs_cosines

    def __repr__(self) -> str:
        return f"MinedRows({self.loss!r}, {self.miner!r})"

    def whole(self, block: Block) -> tuple[Array, Array]:
        """Return `(L_i (B,), dL_i/dS_ij (B, m))`, 0 for pairs that were not selected."""
        return self.loss.whole(self.miner.select(block, summarised(self.miner.stages, block)))


class Mined(PairLoss):
    """A loss over the pairs that a miner selects: itself a loss, whose first stages are the miner's."""

    def __init__(self, loss: PairLoss, miner: Miner) -> None:
        self.loss, self.miner = loss, miner
        self.needs_cosines = loss.needs_cosines

    def __repr__(self) -> str:
        return f"Mined({self.loss!r}, {self.miner!r})"

    @property
    def stages(self) -> tuple[Stage, ...]:
        """Return the miner's stages, then the loss's, each over the pairs selected by then."""

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
        return self.miner.select(block, _part("miner", r))


def _prefixed(owner: str, summaries: Summaries) -> Summaries:
    return {f"{owner}.{name}": summary for name, summary in summaries.items()}


def _part(owner: str, r: Results) -> Results:
    start = f"{owner}."
    return {name.removeprefix(start): result for name, result in r.items() if name.startswith(start)}
