"""The associative reductions through which a pair loss or a miner sees a row of similarities.

Each is built from a block with `of`, joined with another block's by `merge`, and read by `result`. Joining is
the same for blocks of one memory, shards of it, or ranks, so none ever needs a whole row at once.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol, Self, TypeAlias

from xbm import backends
from xbm.backends import Array, array_namespace, device_of
from xbm.rowwise import take_in_rows


class Reduction(Protocol):
    """What a walk asks of a reduction: to be joined with that of a later block, and to be read in the end."""

    def merge(self, other: Self) -> Self:
        """Join with a later block."""

    def result(self) -> Any:
        """Return what it has found in the whole row."""


Summaries: TypeAlias = dict[str, Reduction]
"""Reductions of a block by name."""

Results: TypeAlias = dict[str, Any]
"""Their results for the whole rows."""


class Sum(NamedTuple):
    """Sum over a row: (B,), or (B, K) for K sums at once."""

    total: Array

    @classmethod
    def of(cls, x: Array) -> Self:
        """Reduce a block x (B, m) or (B, m, K), already multiplied by its pairs' weights."""
        return cls(array_namespace(x).sum(x, axis=1))

    def merge(self, other: Sum) -> Sum:
        """Join with a later block."""
        return Sum(self.total + other.total)

    def result(self) -> Array:
        """Return the sums, 0 where there was no pair."""
        return self.total


class LogSumExp(NamedTuple):
    """log sum_j w_j exp(x_j) over a row, (B,), without overflow: sums relative to the largest x."""

    peak: Array  # (B,) largest x with w > 0, -inf if none
    total: Array  # (B,) sum of w exp(x - peak)

    @classmethod
    def of(cls, x: Array, weight: Array) -> Self:
        """Reduce a block of exponents x (B, m) with pair weights (B, m), 0 = no pair."""
        xp = array_namespace(x)
        x = xp.where(weight > 0, x, -xp.inf)
        peak = xp.max(x, axis=1)
        return cls(peak, xp.sum(weight * xp.exp(x - _finite(peak)[:, None]), axis=1))

    def merge(self, other: LogSumExp) -> LogSumExp:
        """Join with a later block."""
        xp = array_namespace(self.peak)
        peak = xp.maximum(self.peak, other.peak)
        shift = _finite(peak)
        total = self.total * xp.exp(self.peak - shift) + other.total * xp.exp(other.peak - shift)
        return LogSumExp(peak, total)

    def result(self) -> Array:
        """Return the logarithms, -inf where there was no pair."""
        xp = array_namespace(self.peak)
        any_pair = self.peak != -xp.inf  # a NaN stays one
        return xp.where(any_pair, self.peak + xp.log(xp.where(any_pair, self.total, 1.0)), -xp.inf)


class TopK(NamedTuple):
    """The k pairs of a row with the largest scores, in falling order; of equal scores the lowest slot first."""

    score: Array  # (B, k), -inf beyond the last pair
    slot: Array  # (B, k), -1 beyond the last pair
    similarity: Array  # (B, k)

    @classmethod
    def of(cls, score: Array, weight: Array, block: Any, k: int = 1) -> TopK:
        """Reduce a block by score (B, m) among the pairs of weight (B, m) > 0."""
        xp, ops = backends.of(score)
        score = xp.where(weight > 0, score, -xp.inf)
        slot = xp.where(weight > 0, block.slots[None, :], -1)
        similarity = block.S
        if k > 1 or not score.shape[1]:  # a block may have fewer rows: no branch on a number that a graph leaves open
            padding = (ops.length(score), k)
            like = {"dtype": score.dtype, "device": device_of(score)}
            none = xp.full(padding, -1, dtype=slot.dtype, device=device_of(slot))
            score = xp.concat([score, xp.full(padding, -xp.inf, **like)], axis=1)
            slot = xp.concat([slot, none], axis=1)
            similarity = xp.concat([similarity, xp.zeros(padding, **like)], axis=1)
        return cls(score, slot, similarity)._largest(k)

    def merge(self, other: TopK) -> TopK:
        """Join with a later block."""
        xp = array_namespace(self.score)
        joined = (xp.concat([mine, theirs], axis=1) for mine, theirs in zip(self, other, strict=True))
        return TopK(*joined)._largest(self.score.shape[1])

    def result(self) -> TopK:
        """Return the k pairs themselves."""
        return self

    def holds(self, slots: Array) -> Array:
        """Return (B, m) booleans: which of a block's rows, in slots (m,), are among the k pairs."""
        xp = array_namespace(slots)
        return xp.any(slots[None, :, None] == self.slot[:, None, :], axis=2)

    def _largest(self, k: int) -> TopK:
        xp, ops = backends.of(self.score)
        order = xp.argmax(self.score, axis=1, keepdims=True) if k == 1 else ops.top_k(self.score, k)[1]
        return TopK(*(take_in_rows(column, order) for column in self))


def _finite(peak: Array) -> Array:
    xp = array_namespace(peak)
    return xp.where(peak == -xp.inf, 0.0, peak)
