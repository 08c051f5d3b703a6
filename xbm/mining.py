"""Miners: which pairs of a row count. A miner sees what a loss sees, blocks and summaries, and no more."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, TypeAlias

from xbm import checks
from xbm.backends import Array, array_namespace
from xbm.losses import Block, PairLoss, RowLoss, Staged
from xbm.losses.base import Stage, summarised
from xbm.noise import gumbel
from xbm.reductions import Results, Summaries, TopK


class Miner(Staged, ABC):
    """A choice of pairs, constant for the gradient.

    `summarise` reduces a block as a loss does, `select` returns the block with other pair weights P and N.
    """

    needs_cosines: bool = False  # True: refuses `normalize=False`
    whole_rows: bool = False  # True: `select` wants blocks of whole rows, (B, M) numbers at once

    @property
    def width(self) -> int:
        """Numbers that it holds for each pair of a block: more make blocks smaller."""
        return 1

    @abstractmethod
    def select(self, block: Block, r: Results) -> Block:
        """Return the block with the pairs that count, from the results of the whole rows."""

    def refuse(self, dim: int) -> None:
        """Raise a ValueError if it is not made for embeddings of size `dim`; none is refused unless overridden."""


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
    >>> result = objective.evaluate(objective.init(capacity=8, dim=2), anchors, np.asarray([0, 0, 1]))
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


@dataclass(frozen=True)
class MarginMiner(Miner):
    r"""The pairs that are active in a contrastive loss: positives below one margin, negatives above another.

    Parameters
    ----------
    pos_margin : float
        Similarity below which a positive counts (cosine, in [-1, 1]).
    neg_margin : float
        Similarity above which a negative counts (cosine, in [-1, 1]).

    Raises
    ------
    TypeError, ValueError
        If one is no finite number.

    Examples
    --------
    >>> import numpy as np, xbm
    >>> anchors = np.asarray([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]])
    >>> objective = xbm.Objective(loss="nca", miner=xbm.MarginMiner(), warmup=0)
    >>> result = objective.evaluate(objective.init(capacity=8, dim=2), anchors, np.asarray([0, 0, 1]))
    >>> round(float(result.loss), 4)  # log(1 + exp((0.8 - 0.6) / 0.1)) of the second anchor
    0.709
    """

    pos_margin: float = 0.9
    neg_margin: float = 0.5

    def __post_init__(self) -> None:
        for name in ("pos_margin", "neg_margin"):
            object.__setattr__(self, name, checks.number(name, getattr(self, name)))

    def select(self, block: Block, r: Results) -> Block:
        """Return the block with its active pairs."""
        xp = array_namespace(block.S)
        return block._replace(
            P=xp.where(block.S >= self.pos_margin, 0.0, block.P),  # a NaN is kept, to be seen in the loss
            N=xp.where(block.S <= self.neg_margin, 0.0, block.N),
        )


class _TopMiner(Miner):
    """The k pairs of one side with the largest scores, their similarities unless overridden, and all of the other."""

    k: int
    side: ClassVar[Literal["P", "N"]]

    def __post_init__(self) -> None:
        checks.whole_number("k", self.k, at_least=1)

    @property
    def width(self) -> int:
        """A comparison for each of the k."""
        return self.k

    def summarise(self, block: Block, r: Results) -> Summaries:
        """Return the k pairs of the side."""
        return {"top": TopK.of(block.S, getattr(block, self.side), block, k=self.k)}

    def select(self, block: Block, r: Results) -> Block:
        """Return the block with these alone on the side."""
        pairs = getattr(block, self.side)
        return block._replace(**{self.side: array_namespace(pairs).where(r["top"].holds(block.slots), pairs, 0.0)})


@dataclass(frozen=True)
class HardNegativeMiner(_TopMiner):
    r"""The k most similar negatives of each anchor, and all positives.

    Parameters
    ----------
    k : int
        Negatives that count, at least 1; of equally similar ones those in the lowest slots.

    Raises
    ------
    TypeError, ValueError
        If k is no int of at least 1.

    Examples
    --------
    >>> import numpy as np, xbm
    >>> anchors = np.asarray([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]])
    >>> objective = xbm.Objective(loss="nt-xent", miner=xbm.HardNegativeMiner(k=1), warmup=0)
    >>> result = objective.evaluate(objective.init(capacity=8, dim=2), anchors, np.asarray([0, 0, 1]))
    >>> round(float(result.loss), 4)
    0.9711
    """

    k: int = 10
    side = "N"


@dataclass(frozen=True)
class EasyPositiveMiner(_TopMiner):
    r"""The k most similar positives of each anchor, and all negatives.

    Classes with several looks need not become one point. The anchor's own row is never among them, nor, with ids, an
    older copy of it.

    Parameters
    ----------
    k : int
        Positives that count, at least 1; of equally similar ones those in the lowest slots.

    Raises
    ------
    TypeError, ValueError
        If k is no int of at least 1.

    Examples
    --------
    >>> import numpy as np, xbm
    >>> anchors = np.asarray([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]])
    >>> objective = xbm.Objective(miner=xbm.EasyPositiveMiner(), warmup=0)
    >>> result = objective.evaluate(objective.init(capacity=8, dim=2), anchors, np.asarray([0, 0, 0]))
    >>> round(float(result.loss), 4)  # 1 - 0.6, 1 - 0.8 and 1 - 0.8
    0.2667

    References
    ----------
    Xuan, Stylianou, Pless, "Improved Embeddings with Easy Positive Triplet Mining", WACV 2020, arXiv 1904.04370; with
    `SemiHardMiner` it is their easy positive semi-hard negative mining.
    """

    k: int = 1
    side = "P"


@dataclass(frozen=True)
class SemiHardMiner(Miner):
    r"""Negatives a little less similar than the anchor's most similar positive: max_P S - m < S < max_P S.

    What is nearer than the nearest positive may be a wrong label. An anchor without positives has no pairs, and all
    positives count.

    Parameters
    ----------
    margin : float
        m, how far below the positive a negative still counts (cosine), above 0.

    Raises
    ------
    TypeError, ValueError
        If it is no finite number above 0.

    Examples
    --------
    >>> import numpy as np, xbm
    >>> anchors = np.asarray([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0]])
    >>> objective = xbm.Objective(miner=xbm.SemiHardMiner(margin=0.3), warmup=0)
    >>> result = objective.evaluate(objective.init(capacity=8, dim=2), anchors, np.asarray([0, 0, 1]))
    >>> round(float(result.loss), 4)  # 1 - 0.8 of both positives, and 0.6 - 0.5 of the second anchor
    0.1667

    References
    ----------
    Schroff, Kalenichenko, Philbin, "FaceNet", CVPR 2015, arXiv 1503.03832; of an anchor's nearest positive as in Xuan,
    Stylianou, Pless, WACV 2020, arXiv 1904.04370. `SemiHardTriplet` compares with each positive.
    """

    margin: float = 0.2

    def __post_init__(self) -> None:
        object.__setattr__(self, "margin", checks.positive("margin", self.margin))

    def summarise(self, block: Block, r: Results) -> Summaries:
        """Return the most similar positive."""
        return {"positive": TopK.of(block.S, block.P, block)}

    def select(self, block: Block, r: Results) -> Block:
        """Return the block with its semi-hard negatives."""
        xp = array_namespace(block.S)
        nearest = r["positive"].score  # -inf without a positive
        outside = (block.S >= nearest) | (block.S <= nearest - self.margin)  # a NaN is kept, to be seen in the loss
        return block._replace(N=xp.where(outside, 0.0, block.N))


@dataclass(frozen=True)
class DistanceWeightedMiner(_TopMiner):
    r"""Negatives drawn so that all distances are met alike, and all positives.

    Of the anchor's negatives k are drawn without replacement, with probabilities proportional to 1 / q(d), where q(d) =
    d^(D-2) (1 - d^2/4)^((D-3)/2) is the density of the distance d = sqrt(2 - 2 S) between random points of a sphere.
    The draw is a function of the seed, the step, the anchor and the slot: the same for any block size, device or array
    library.

    Parameters
    ----------
    dim : int
        D, the embeddings' size, at least 2.
    k : int
        Negatives drawn for each anchor, at least 1.
    cutoff : float
        Distance, in (0, 2): nearer negatives are drawn as if they were at it.
    beyond : float
        Distance, in (0, 2]: farther negatives are not drawn.
    seed : int
        Of the draws, at least 0.

    Raises
    ------
    TypeError, ValueError
        If an option is out of range, and at a call with embeddings of another size.

    Examples
    --------
    >>> import numpy as np, xbm
    >>> objective = xbm.Objective(loss=xbm.Margin(), miner=xbm.DistanceWeightedMiner(dim=8), warmup=0)
    >>> rng = np.random.default_rng(0)
    >>> result = objective.step(objective.init(capacity=64, dim=8), rng.normal(size=(16, 8)), rng.integers(4, size=16))
    >>> bool(result.loss > 0)
    True

    References
    ----------
    Wu, Manmatha, Smola, Kraehenbuehl, "Sampling Matters in Deep Embedding Learning", ICCV 2017, arXiv 1706.07567.
    """

    dim: int
    k: int = 4
    cutoff: float = 0.5
    beyond: float = 1.4
    seed: int = 0
    side = "N"
    needs_cosines = True

    def __post_init__(self) -> None:
        checks.whole_number("dim", self.dim, at_least=2)
        super().__post_init__()
        checks.whole_number("seed", self.seed, at_least=0)
        for name in ("cutoff", "beyond"):
            object.__setattr__(self, name, checks.positive(name, getattr(self, name)))
        if not self.cutoff < self.beyond <= 2:
            raise ValueError(
                f"cutoff must be below beyond, and that at most 2, got cutoff={self.cutoff} and beyond={self.beyond}"
            )

    @property
    def width(self) -> int:
        """A comparison for each of the k, and the integers of the draw."""
        return max(self.k, 4)

    def refuse(self, dim: int) -> None:
        """Refuse any size but its own, whose distances have another density."""
        if dim != self.dim:
            raise ValueError(f"{self!r} is made for embeddings of size {self.dim}, got {dim}")

    def summarise(self, block: Block, r: Results) -> Summaries:
        """Return the k negatives drawn: those with the largest log(1 / q) plus Gumbel noise."""
        xp = array_namespace(block.S)
        S = xp.clip(block.S, max=1 - self.cutoff**2 / 2)
        log_weight = -(self.dim - 2) / 2 * xp.log(2.0 - 2.0 * S)
        if self.dim != 3:
            log_weight = log_weight - (self.dim - 3) / 2 * xp.log(xp.clip((1.0 + S) / 2.0, min=1e-6))
        noise = gumbel(self.seed, block.step, block.anchors, block.slots, dtype=S.dtype)
        reachable = xp.where(block.S < 1 - self.beyond**2 / 2, 0.0, block.N)  # a NaN is
        return {"top": TopK.of(log_weight + noise, reachable, block, k=self.k)}


MINERS: dict[str, type[Miner]] = {
    "margin": MarginMiner,
    "multi-similarity": MultiSimilarityMiner,
    "hard-negatives": HardNegativeMiner,
    "semi-hard": SemiHardMiner,
    "easy-positives": EasyPositiveMiner,
}


MinerLike: TypeAlias = Miner | str | Sequence[Miner | str] | None
"""What an objective takes for a miner: a name among `MINERS`, an object, several in a row, or None for all pairs."""


def each(miner: MinerLike) -> tuple[Miner, ...]:
    """Return the miners that choose one after the other, each among the pairs that the one before left.

    Raises
    ------
    TypeError, ValueError
        If one is no miner, listing what is accepted.
    """
    several = miner if isinstance(miner, list | tuple) else () if miner is None else (miner,)
    return tuple(get(one) for one in several)


def get(miner: Miner | str) -> Miner:
    """Return a miner from a name among `MINERS`, with its defaults; a miner as it is.

    Raises
    ------
    TypeError, ValueError
        If it is none of these, listing what is accepted.
    """
    if isinstance(miner, Miner):
        return miner
    accepted = f"one of the names {', '.join(map(repr, MINERS))}, an xbm.Miner, a list of them or None"
    if not isinstance(miner, str):
        raise TypeError(f"miner must be {accepted}, got {miner!r} of type {type(miner).__name__}")
    if miner not in MINERS:
        raise ValueError(f"miner must be {accepted}, got {miner!r}")
    return MINERS[miner]()


def mined(loss: RowLoss, *miners: Miner) -> RowLoss:
    """Return the loss over the pairs that are left when one miner after the other has chosen."""
    for miner in reversed(miners):
        loss = Mined(loss, miner) if isinstance(loss, PairLoss) and not miner.whole_rows else MinedRows(loss, miner)
    return loss


class MinedRows(RowLoss):
    """A loss that sees whole rows, over the pairs that a miner selects."""

    def __init__(self, loss: RowLoss, miner: Miner) -> None:
        self.loss, self.miner = loss, miner
        self.needs_cosines = loss.needs_cosines or miner.needs_cosines

    def __repr__(self) -> str:
        return f"MinedRows({self.loss!r}, {self.miner!r})"

    def whole(self, block: Block) -> tuple[Array, Array]:
        """Return `(L_i (B,), dL_i/dS_ij (B, m))`, 0 for pairs that were not selected."""
        return self.loss.whole(_selected(self.miner, block, summarised(self.miner.stages, block)))


class Mined(PairLoss):
    """A loss over the pairs that a miner selects: itself a loss, whose first stages are the miner's."""

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
        return _selected(self.miner, block, _part("miner", r))


def _selected(miner: Miner, block: Block, r: Results) -> Block:
    """Return the block that a miner selects, or refuse what is none."""
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
