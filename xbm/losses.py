"""Pair losses: what each needs to know of a row of similarities, its value, and its pair weights.

General pair weighting (Wang et al., "Multi-Similarity Loss with General Pair Weighting for Deep Metric
Learning", CVPR 2019): a pair loss L_i over a row S_i is known by its value and by the weights
W_ij = dL_i/dS_ij, and so is its gradient, sum_j W_ij v_j. No autodiff framework is needed.

In formulas: S the cosine similarities, P and N the positive and negative pairs of an anchor with n_P and n_N
of them, [x]+ = max(x, 0).
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from array_api_compat import array_namespace

from xbm import checks
from xbm.reductions import Sum

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


class PairLoss(Staged, ABC):
    """A pair loss as three small functions, walked over a memory in blocks.

    `summarise` reduces a block, `value` reads the merged reductions of the whole row, `weights` gives dL_i/dS_ij for a
    block. A loss that must know something of the whole row before it can reduce overrides `stages`.
    """

    needs_cosines: ClassVar[bool] = False  # True: refuses `normalize=False`

    @abstractmethod
    def value(self, r):
        """Return L_i, (B,), from the results {name: result} of the whole rows."""

    @abstractmethod
    def weights(self, block, r):
        """Return dL_i/dS_ij, (B, m), for one block."""


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


@dataclass(frozen=True)
class Contrastive(SidedPairLoss):
    r"""Contrastive loss on similarities, with a margin for either side.

    ``"mean"``: L_i = (1/n_P) sum_P [m_P - S]+ + (1/n_A) sum_N [S - m_N]+ with A the negatives above m_N;
    ``"sum"``: L_i = sum_P [m_P - S]+ + sum_N [S - m_N]+, whose gradient grows with the memory.

    Parameters
    ----------
    pos_margin : float
        m_P, similarity that positives are pulled up to (cosine, in [-1, 1]).
    neg_margin : float
        m_N, similarity that negatives are pushed down to (cosine, in [-1, 1]).
    reduction : {"mean", "sum"}
        Mean over each anchor's positives and its active negatives, or sum over both as in the XBM paper.

    Raises
    ------
    TypeError, ValueError
        If a margin is no finite number or the reduction none of the two.

    Examples
    --------
    >>> import numpy as np, xbm
    >>> anchors = np.asarray([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]])
    >>> objective = xbm.Objective(loss=xbm.Contrastive(), warmup=0)
    >>> result = objective.evaluate(xbm.init(capacity=8, dim=2), anchors, np.asarray([0, 0, 1]))
    >>> round(float(result.loss), 4)  # two anchors 1 - 0.6 apart, two pushed by 0.8 - 0.5
    0.4667

    References
    ----------
    Hadsell, Chopra, LeCun, "Dimensionality Reduction by Learning an Invariant Mapping", CVPR 2006; on similarities
    as in Wang et al., "Cross-Batch Memory for Embedding Learning", CVPR 2020, section 3.
    """

    pos_margin: float = 1.0
    neg_margin: float = 0.5
    reduction: str = "mean"

    def __post_init__(self):
        checks.number("pos_margin", self.pos_margin)
        checks.number("neg_margin", self.neg_margin)
        checks.choice("reduction", self.reduction, ("mean", "sum"))
        object.__setattr__(self, "pos_margin", float(self.pos_margin))
        object.__setattr__(self, "neg_margin", float(self.neg_margin))

    def sides(self, block):
        """Return 1 for positives below m_P, and 1 for negatives above m_N."""
        xp = array_namespace(block.S)
        S, P, N = block.S, block.P, block.N
        return xp.where(S < self.pos_margin, P, 0.0), xp.where(S > self.neg_margin, N, 0.0)

    def tally(self, block, positive, negative):
        """Return the hinges' sums, and the counts that the mean divides by."""
        sums = {
            "positive": Sum.of(positive * (self.pos_margin - block.S)),
            "negative": Sum.of(negative * (block.S - self.neg_margin)),
        }
        if self.reduction == "mean":
            sums |= {"n_positive": Sum.of(block.P), "n_active": Sum.of(negative)}
        return sums

    def value(self, r):
        """Return L_i."""
        f_positive, f_negative = self.factors(r)
        return f_negative * r["negative"] - f_positive * r["positive"]

    def factors(self, r):
        """Return -1/n_P and 1/n_A for means, -1 and 1 for sums."""
        if self.reduction == "mean":
            return -_inverse(r["n_positive"]), _inverse(r["n_active"])
        one = array_namespace(r["positive"]).ones_like(r["positive"])
        return -one, one


LOSSES = {"contrastive": Contrastive}


def get(loss, reduction=None):
    """Return a PairLoss from a name or a PairLoss.

    `reduction` goes to a loss given by name ("mean" if None); an object brings its own.

    Raises
    ------
    TypeError, ValueError
        If `loss` is neither, listing what is accepted.
    """
    if isinstance(loss, PairLoss):
        if reduction is not None:
            raise ValueError(
                f"reduction={reduction!r} is for a loss given by name; {type(loss).__name__} was given as an object, "
                f"which brings its own"
            )
        return loss
    accepted = f"one of the names {', '.join(map(repr, LOSSES))} or an xbm.PairLoss"
    if not isinstance(loss, str):
        raise TypeError(f"loss must be {accepted}, got {loss!r} of type {type(loss).__name__}")
    if loss not in LOSSES:
        raise ValueError(f"loss must be {accepted}, got {loss!r}")
    return LOSSES[loss](reduction="mean" if reduction is None else reduction)


def _inverse(count):
    """Return 1 / count, finite where the count is 0 (what it multiplies is 0 there)."""
    xp = array_namespace(count)
    return 1.0 / (count + xp.finfo(count.dtype).smallest_normal)
