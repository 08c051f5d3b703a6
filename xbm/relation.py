"""The relation between an anchor and a row that their labels state: positive or negative, and with which weight."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias, TypedDict

from xbm import backends, checks
from xbm.backends import Array, array_namespace
from xbm.options import Options, function, option

OfLabels: TypeAlias = Callable[[Array, Array], Array]
"""A function of the labels of anchors (B,) and of rows (m,), with a result for each pair."""

LABELS = function("labels, row_labels")


def _int64(name: str, value: object) -> int:
    number = checks.whole_number(name, value, at_least=-(2**63))
    if number >= 2**63:
        raise ValueError(f"{name} must fit int64, got {number}")
    return number


@dataclass(frozen=True, kw_only=True)
class Relation(Options):
    """Which pairs are positive and which negative, from the labels of an anchor and a row."""

    match: OfLabels | None = option(
        None,
        LABELS,
        """Which pairs are positive: a function `(labels (B,), row_labels (m,)) -> (B, m)` booleans, in place of equal
        labels. Every other pair is negative. It gets the labels of the batch, and those of a block of the memory.""",
    )
    pair_weights: OfLabels | None = option(
        None,
        LABELS,
        """Weight of each pair: a function `(labels (B,), row_labels (m,)) -> (B, m), (1, m) or (B, 1)` floats, at least
        0; 0 = no pair. A constant for the gradient. See `xbm.LogQ`.""",
    )
    ignore_label: int | None = option(
        None,
        _int64,
        """The class "other": its rows are positive to no row, not even to each other, and negative to all.""",
    )

    @property
    def is_equality(self) -> bool:
        """Whether a pair is positive if its labels are equal, with weight 1: then sorting finds the positives."""
        return self.match is None and self.pair_weights is None

    def positive(self, labels: Array, row_labels: Array) -> Array:
        """Return (B, m) booleans, whether each pair is positive."""
        if self.match is None:
            same = labels[:, None] == row_labels[None, :]
        else:
            same = _answer("match", self.match, labels, row_labels, "bool")
        if self.ignore_label is None:
            return same
        return same & (labels != self.ignore_label)[:, None] & (row_labels != self.ignore_label)[None, :]

    def weighted(self, pairs: Array, labels: Array, row_labels: Array) -> Array:
        """Return pairs, (B, m) or (1, m), times their weights. Excluded pairs stay excluded, whatever their weight."""
        if self.pair_weights is None:
            return pairs
        xp, ops = backends.of(pairs)
        weights = ops.stop_gradient(_answer("pair_weights", self.pair_weights, labels, row_labels, "real floating"))
        return pairs * xp.where(pairs > 0, xp.astype(weights, pairs.dtype, copy=False), 0.0)


class RelationOptions(TypedDict, total=False):
    """The options of a `Relation`, for type checkers."""

    match: OfLabels | None
    pair_weights: OfLabels | None
    ignore_label: int | None


EQUALITY = Relation()


def _answer(name: str, function: OfLabels, labels: Array, row_labels: Array, kind: str) -> Array:
    """Return the result of a user's function of labels, or raise if it does not fit the pairs."""
    found = function(labels, row_labels)
    checks.same_library(f"what {name} returns", found, labels)
    shape, wanted = tuple(found.shape), (labels.shape[0], row_labels.shape[0])
    may_repeat = kind != "bool"
    if len(shape) != 2 or not all(map(_alike, shape, wanted, (may_repeat, may_repeat))):
        one = ", or one row or column," if may_repeat else ""
        raise ValueError(
            f"{name} must return shape {wanted}{one} for labels {tuple(labels.shape)} and row_labels "
            f"{tuple(row_labels.shape)}, got {shape}"
        )
    if not array_namespace(labels).isdtype(found.dtype, kind):
        what = "booleans" if kind == "bool" else "floating point"
        raise TypeError(f"{name} must return {what}, got {checks.dtype_name(found.dtype)} of shape {shape}")
    return found


def _alike(size: int | None, wanted: int | None, may_repeat: bool) -> bool:
    """Tell whether two sizes agree, as far as a graph knows them."""
    return size is None or wanted is None or size == wanted or (may_repeat and size == 1)


LEAST_LOG_Q = -80.0  # whose inverse is finite in float32


@dataclass(frozen=True, eq=False, repr=False)
class LogQ:
    r"""Pair weights that correct for how often each item is sampled: 1 / q of the row's item.

    Use it as `Objective(loss="supcon", pair_weights=LogQ(log_q))`, with item numbers as labels. Popular items are
    negatives more often than others. In a sum of exponentials, the weight equals the term log q that sampled softmax
    subtracts from the logit: log sum_j exp(S_j / t) / q_j = log sum_j exp(S_j / t - log q_j).

    Parameters
    ----------
    log_q : (items,) float32 or float64
        Logarithm of the probability that a row is of the item, on the embeddings' device; the label of each row is its
        index. At least -80.

    Raises
    ------
    TypeError, ValueError
        If `log_q` is not such an array.

    Examples
    --------
    >>> import numpy as np, xbm
    >>> weights = xbm.LogQ(np.log(np.asarray([0.5, 0.25, 0.25])))
    >>> weights(np.asarray([0]), np.asarray([0, 1, 2])).round(6)
    array([[2., 4., 4.]])

    References
    ----------
    Bengio and Senecal, "Adaptive Importance Sampling to Accelerate Training of a Neural Probabilistic Language Model",
    2008; Yi et al., "Sampling-Bias-Corrected Neural Modeling for Large Corpus Item Recommendations", RecSys 2019; Wang,
    Zhu, He, "Cross-Batch Negative Sampling for Training Two-Tower Recommenders", SIGIR 2021.
    """

    log_q: Array

    def __post_init__(self) -> None:
        try:
            xp, ops = backends.of(self.log_q)
        except TypeError:
            raise TypeError(f"log_q must be an array (items,), got {type(self.log_q).__name__}") from None
        shape = tuple(self.log_q.shape)
        if self.log_q.dtype not in (xp.float32, xp.float64):
            raise TypeError(
                f"log_q must be float32 or float64, got {checks.dtype_name(self.log_q.dtype)} of shape {shape}"
            )
        if len(shape) != 1:
            raise ValueError(f"log_q must have shape (items,), one for each item, got {shape}")
        if not ops.is_compiling(self.log_q) and not xp.all((self.log_q >= LEAST_LOG_Q) & (self.log_q < xp.inf)):
            raise ValueError(
                f"log_q of shape {shape} must be finite and at least {LEAST_LOG_Q}. An item that was never seen has "
                f"no logarithm: add 1 to each count"
            )

    def __repr__(self) -> str:
        return f"LogQ({self.log_q.shape[0]} items)"

    def __call__(self, labels: Array, row_labels: Array) -> Array:
        """Return (1, m), the weight of the rows of items `row_labels` (m,) to any anchor."""
        checks.same_library("log_q", self.log_q, row_labels)
        xp = array_namespace(self.log_q)
        return xp.exp(-xp.take(self.log_q, row_labels))[None, :]
