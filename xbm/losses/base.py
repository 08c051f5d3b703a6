"""What a pair loss is: what it needs to know of a row of similarities, its value, and its pair weights.

General pair weighting (Wang et al., "Multi-Similarity Loss with General Pair Weighting for Deep Metric
Learning", CVPR 2019): a pair loss L_i over a row S_i is known by its value and by the weights
W_ij = dL_i/dS_ij, and so is its gradient, sum_j W_ij v_j. No autodiff framework is needed.

In formulas: S the cosine similarities, P and N the positive and negative pairs of an anchor with n_P and n_N
of them, [x]+ = max(x, 0).
"""

from abc import ABC, abstractmethod
from typing import Any, ClassVar, NamedTuple

Array = Any


class Block(NamedTuple):
    """B anchors against m rows of the memory (or of the batch)."""

    S: Array  # (B, m) similarities, cosines in [-1, 1] where embeddings are normalised
    P: Array  # (B, m) weight of each pair as a positive, 0 = none
    N: Array  # (B, m) weight of each pair as a negative, 0 = none
    slots: Array  # (m,) slot of each row
    anchors: Array  # (B,) index of each anchor


class Staged:
    """What losses and miners have in common: functions that reduce blocks, walked one after the other."""

    @property
    def stages(self):
        """Return the reducing functions `(block, r) -> {name: reduction}`, each seeing the earlier ones' results."""
        return (self.summarise,)

    def summarise(self, block, r):
        """Return {name: reduction over the block's pairs}; nothing unless overridden."""
        return {}


class RowLoss(ABC):
    """A loss that sees whole rows: (B, M) numbers at once, for what no summaries can tell."""

    needs_cosines: ClassVar[bool] = False  # True: refuses `normalize=False`

    @abstractmethod
    def whole(self, block):
        """Return `(L_i (B,), dL_i/dS_ij (B, m))` of rows that are whole in one block."""


class PairLoss(Staged, RowLoss):
    """A pair loss as three small functions, walked over a memory in blocks.

    `summarise` reduces a block, `value` reads the merged reductions of the whole row, `weights` gives dL_i/dS_ij for a
    block. A loss that must know something of the whole row before it can reduce overrides `stages`.
    """

    negative_floor: float | None = (
        None  # similarity up to which a negative is as good as none, so that it may be left out
    )

    @abstractmethod
    def value(self, r):
        """Return L_i, (B,), from the results {name: result} of the whole rows."""

    @abstractmethod
    def weights(self, block, r):
        """Return dL_i/dS_ij, (B, m), for one block."""

    def whole(self, block):
        """Return `(L_i (B,), dL_i/dS_ij (B, m))` of rows that are whole in one block."""
        r = summarised(self.stages, block)
        value, W = self.value(r), self.weights(block, r)
        if value.shape != block.anchors.shape or W.shape != block.S.shape:
            raise ValueError(
                f"{self!r} must give a value of shape {tuple(block.anchors.shape)} and weights of shape "
                f"{tuple(block.S.shape)}, got {tuple(value.shape)} and {tuple(W.shape)}"
            )
        return value, W


class SidedPairLoss(PairLoss):
    """A pair loss whose weights know the rest of the row only by one factor per anchor and side.

    W = f_P W_P + f_N W_N with `sides(block) = (W_P, W_N)` and `factors(r) = (f_P, f_N)`, so the gradient is
    gathered while the row is still being summarised, and the memory is walked once.
    """

    @abstractmethod
    def sides(self, block):
        """Return `(W_P, W_N)`, each (B, m), before the factors."""

    @abstractmethod
    def tally(self, block, positive, negative):
        """Return {name: reduction over the block's pairs}, with the block's sides at hand."""

    @abstractmethod
    def factors(self, r):
        """Return `(f_P, f_N)`, each (B,)."""

    def summarise(self, block, r):
        """Return {name: reduction over the block's pairs}."""
        return self.tally(block, *self.sides(block))

    def weights(self, block, r):
        """Return dL_i/dS_ij, (B, m), for one block."""
        (positive, negative), (f_positive, f_negative) = self.sides(block), self.factors(r)
        return f_positive[:, None] * positive + f_negative[:, None] * negative


def summarised(stages, block):
    """Return {name: result} of stages over rows that are whole in one block."""
    r = {}
    for stage in stages:
        r = r | results(stage(block, r))
    return r


def results(summaries):
    """Return {name: result} of {name: reduction}."""
    return {name: summary.result() for name, summary in summaries.items()}
