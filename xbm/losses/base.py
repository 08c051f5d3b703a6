"""Base classes of the losses. A pair loss is defined by reductions of a row of similarities, its value and its weights.

General pair weighting (Wang et al., "Multi-Similarity Loss with General Pair Weighting for Deep Metric
Learning", CVPR 2019): a pair loss L_i over a row S_i is defined by its value and its weights W_ij = dL_i/dS_ij. They
determine its gradient, sum_j W_ij v_j, so no autodiff framework is needed.

Notation: S are the cosine similarities; P and N are the positive and negative pairs of an anchor, n_P and n_N their
numbers; [x]+ = max(x, 0).
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
    """The pairs of B anchors with m rows of the memory (or of the batch)."""

    S: Array  #: (B, m) similarities; cosines in [-1, 1] if embeddings are normalised
    P: Array  #: (B, m) weight of each pair as a positive, 0 = not a positive
    N: Array  #: (B, m) weight of each pair as a negative, 0 = not a negative
    slots: Array  #: (m,) slot of each row
    anchors: Array  #: (B,) index of each anchor
    step: Array | int = 0  #: () index of the call


Stage: TypeAlias = Callable[[Block, Results], Summaries]
"""A function that reduces a block, given the results of the previous stages."""


Merge: TypeAlias = Callable[[Summaries], Summaries]
"""A function that merges the summaries of some rows with those of all other rows, such as across ranks."""


class Staged:
    """Common base of losses and miners: stages that reduce blocks, one walk over the memory per stage."""

    @property
    def stages(self) -> tuple[Stage, ...]:
        """Return the stages `(block, r) -> {name: reduction}`; r holds the results of the earlier stages."""
        return (self.summarise,)

    def summarise(self, block: Block, r: Results) -> Summaries:
        """Return {name: reduction over the block's pairs}; empty by default."""
        return {}


class RowLoss(Options, ABC):
    """A loss that needs whole rows, (B, M) numbers at once, because summaries are not enough."""

    needs_cosines: bool = False  # True: `normalize=False` raises an error

    @property
    def width(self) -> int:
        """Number of values the loss computes per pair; a larger number makes blocks smaller."""
        return 1

    @abstractmethod
    def whole(self, block: Block) -> tuple[Array, Array]:
        """Return `(L_i (B,), dL_i/dS_ij (B, m))` for a block with whole rows."""


class PairLoss(Staged, RowLoss):
    """A pair loss defined by three small functions, evaluated over the memory in blocks.

    `summarise` reduces a block, `value` computes the loss from the merged reductions of the whole row, and `weights`
    computes dL_i/dS_ij for a block. A loss whose reductions depend on other reductions of the whole row overrides
    `stages`.
    """

    @abstractmethod
    def value(self, r: Results) -> Array:
        """Return L_i, (B,), from the results {name: result} over whole rows."""

    @abstractmethod
    def weights(self, block: Block, r: Results) -> Array:
        """Return dL_i/dS_ij, (B, m), for one block."""

    def whole(self, block: Block, merge: Merge = HERE.merge) -> tuple[Array, Array]:
        """Return `(L_i (B,), dL_i/dS_ij (B, m))` for a block with whole rows, or with parts that `merge` combines."""
        r = summarised(self.stages, block, merge)
        value, W = self.value(r), self.weights(block, r)
        if value.shape != block.anchors.shape or W.shape != block.S.shape:
            raise ValueError(
                f"{self!r} must return a value of shape {tuple(block.anchors.shape)} and weights of shape "
                f"{tuple(block.S.shape)}, got {tuple(value.shape)} and {tuple(W.shape)}"
            )
        return value, W


LOSSES: Registry[RowLoss] = Registry()
"""Losses by name; each registers itself."""


class Side(NamedTuple):
    """Weights and reductions of the positive or the negative pairs of a block."""

    weights: Array  #: (B, m) without the side's factor
    summaries: Summaries  #: {name: reduction over the side's pairs}


class SidedPairLoss(PairLoss):
    """A pair loss whose weights depend on the rest of the row only through one factor per anchor and side.

    W = f_P W_P + f_N W_N with `factors(r) = (f_P, f_N)`. The gradient is accumulated while the row is being reduced, so
    one walk over the memory is enough. `positive` and `negative` are called separately, only with rows that can
    contribute to that side, in any order.
    """

    @property
    def negative_floor(self) -> float | None:
        """Similarity up to which a negative contributes nothing; None if there is no such bound."""
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
    """Return {name: result} of the stages over a block with whole rows, or parts of rows that `merge` combines."""
    r: Results = {}
    for stage in stages:
        r = r | results(merge(stage(block, r)))
    return r


def results(summaries: Summaries) -> Results:
    """Return {name: result} for {name: reduction}."""
    return {name: summary.result() for name, summary in summaries.items()}
