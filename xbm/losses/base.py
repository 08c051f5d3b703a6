"""What a pair loss is: what it needs to know of a row of similarities, its value, and its pair weights.

General pair weighting (Wang et al., "Multi-Similarity Loss with General Pair Weighting for Deep Metric
Learning", CVPR 2019): a pair loss L_i over a row S_i is known by its value and by the weights
W_ij = dL_i/dS_ij, and so is its gradient, sum_j W_ij v_j. No autodiff framework is needed.

In formulas: S the cosine similarities, P and N the positive and negative pairs of an anchor with n_P and n_N
of them, [x]+ = max(x, 0).
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import NamedTuple, TypeAlias

from xbm.backends import Array
from xbm.options import Options
from xbm.ranks import HERE
from xbm.reductions import Results, Summaries
from xbm.registry import Registry


class Block(NamedTuple):
    """B anchors against m rows of the memory (or of the batch)."""

    S: Array  # (B, m) similarities, cosines in [-1, 1] where embeddings are normalised
    P: Array  # (B, m) weight of each pair as a positive, 0 = none
    N: Array  # (B, m) weight of each pair as a negative, 0 = none
    slots: Array  # (m,) slot of each row
    anchors: Array  # (B,) index of each anchor
    step: Array | int = 0  # () index of the call


Stage: TypeAlias = Callable[[Block, Results], Summaries]
"""A function that reduces a block, knowing the results of the stages before it."""


Merge: TypeAlias = Callable[[Summaries], Summaries]
"""A function that joins the summaries of a part of the rows with those of the other parts."""


class Staged:
    """What losses and miners have in common: functions that reduce blocks, walked one after the other."""

    @property
    def stages(self) -> tuple[Stage, ...]:
        """Return the reducing functions `(block, r) -> {name: reduction}`, each seeing the earlier ones' results."""
        return (self.summarise,)

    def summarise(self, block: Block, r: Results) -> Summaries:
        """Return {name: reduction over the block's pairs}; nothing unless overridden."""
        return {}


class RowLoss(Options, ABC):
    """A loss that needs whole rows, (B, M) numbers at once, because summaries are not enough."""

    needs_cosines: bool = False  # True: refuses `normalize=False`

    @property
    def width(self) -> int:
        """Numbers that it holds for each pair of a block: more make blocks smaller."""
        return 1

    @abstractmethod
    def whole(self, block: Block) -> tuple[Array, Array]:
        """Return `(L_i (B,), dL_i/dS_ij (B, m))` of rows that are whole in one block."""


class PairLoss(Staged, RowLoss):
    """A pair loss as three small functions, walked over a memory in blocks.

    `summarise` reduces a block, `value` reads the merged reductions of the whole row, `weights` gives dL_i/dS_ij for a
    block. A loss that must know something of the whole row before it can reduce overrides `stages`.
    """

    @abstractmethod
    def value(self, r: Results) -> Array:
        """Return L_i, (B,), from the results {name: result} of the whole rows."""

    @abstractmethod
    def weights(self, block: Block, r: Results) -> Array:
        """Return dL_i/dS_ij, (B, m), for one block."""

    def whole(self, block: Block, merge: Merge = HERE.merge) -> tuple[Array, Array]:
        """Return `(L_i (B,), dL_i/dS_ij (B, m))` of rows that are whole in one block, or whose parts `merge` joins."""
        r = summarised(self.stages, block, merge)
        value, W = self.value(r), self.weights(block, r)
        if value.shape != block.anchors.shape or W.shape != block.S.shape:
            raise ValueError(
                f"{self!r} must give a value of shape {tuple(block.anchors.shape)} and weights of shape "
                f"{tuple(block.S.shape)}, got {tuple(value.shape)} and {tuple(W.shape)}"
            )
        return value, W


LOSSES: Registry[RowLoss] = Registry()
"""Losses by name; each registers itself."""


class Side(NamedTuple):
    """What a loss says of the positive or the negative pairs of a block."""

    weights: Array  # (B, m) before the side's factor
    summaries: Summaries  # {name: reduction over the side's pairs}


class SidedPairLoss(PairLoss):
    """A pair loss whose weights know the rest of the row only by one factor per anchor and side.

    W = f_P W_P + f_N W_N with `factors(r) = (f_P, f_N)`, so the gradient is gathered while the row is still being
    summarised, and the memory is walked once. Either side is asked alone, and of the rows that can matter to it, in
    any order.
    """

    @property
    def negative_floor(self) -> float | None:
        """Similarity up to which a negative is as good as none; None if there is no such similarity."""
        return None

    @abstractmethod
    def positive(self, S: Array, P: Array) -> Side:
        """Return the positive `Side` of similarities and pair weights, each (B, m)."""

    @abstractmethod
    def negative(self, S: Array, N: Array) -> Side:
        """Return the negative `Side` of similarities and pair weights, each (B, m)."""

    @abstractmethod
    def factors(self, r: Results) -> tuple[Array, Array]:
        """Return `(f_P, f_N)`, each (B,)."""

    def summarise(self, block: Block, r: Results) -> Summaries:
        """Return {name: reduction over the block's pairs}."""
        return self.positive(block.S, block.P).summaries | self.negative(block.S, block.N).summaries

    def weights(self, block: Block, r: Results) -> Array:
        """Return dL_i/dS_ij, (B, m), for one block."""
        f_positive, f_negative = self.factors(r)
        W_P, W_N = self.positive(block.S, block.P).weights, self.negative(block.S, block.N).weights
        return f_positive[:, None] * W_P + f_negative[:, None] * W_N


def summarised(stages: Iterable[Stage], block: Block, merge: Merge = HERE.merge) -> Results:
    """Return {name: result} of stages over rows that are whole in one block, or whose parts `merge` joins."""
    r: Results = {}
    for stage in stages:
        r = r | results(merge(stage(block, r)))
    return r


def results(summaries: Summaries) -> Results:
    """Return {name: result} of {name: reduction}."""
    return {name: summary.result() for name, summary in summaries.items()}
