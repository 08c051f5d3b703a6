"""Associative reductions over a row of similarities, used by pair losses and miners.

A reduction is built from a block with `of`, combined with that of another block by `merge`, and read by `result`.
Merging works alike for blocks of a memory, shards and ranks, so a whole row is never needed at once.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol, Self, TypeAlias

from xbm import backends
from xbm.backends import Array, array_namespace, device_of
from xbm.rowwise import take_in_rows


class Reduction(Protocol):
    """Interface of a reduction: merging with the reduction of a later block, and reading the final result."""

    def merge(self, other: Self) -> Self:
        """Combine with the reduction of a later block."""

    def result(self) -> Any:
        """Return the result over the whole row."""


Summaries: TypeAlias = dict[str, Reduction]
"""Reductions of a block, by name."""

Results: TypeAlias = dict[str, Any]
"""Results of the reductions over whole rows, by name."""


class Sum(NamedTuple):
    """Sum over a row: (B,), or (B, K) for K sums at once."""

    total: Array

    @classmethod
    def of(cls, x: Array) -> Self:
        """Reduce a block x (B, m) or (B, m, K), already multiplied by the pair weights."""
        return cls(array_namespace(x).sum(x, axis=1))

    def merge(self, other: Sum) -> Sum:
        """Combine with the reduction of a later block."""
        return Sum(self.total + other.total)

    def result(self) -> Array:
        """Return the sums, 0 for rows without pairs."""
        return self.total


class LogSumExp(NamedTuple):
    """log sum_j w_j exp(x_j) over a row, (B,). The sum is scaled by exp(-max x) to prevent overflow."""

    peak: Array  #: (B,) largest x with w > 0; -inf without pairs
    total: Array  #: (B,) sum of w exp(x - peak)

    @classmethod
    def of(cls, x: Array, weight: Array) -> Self:
        """Reduce a block of exponents x (B, m) with pair weights (B, m); weight 0 excludes a pair."""
        xp = array_namespace(x)
        x = xp.where(weight > 0, x, -xp.inf)
        peak = xp.max(x, axis=1)
        return cls(peak, xp.sum(weight * xp.exp(x - _finite(peak)[:, None]), axis=1))

    def merge(self, other: LogSumExp) -> LogSumExp:
        """Combine with the reduction of a later block."""
        xp = array_namespace(self.peak)
        peak = xp.maximum(self.peak, other.peak)
        shift = _finite(peak)
        total = self.total * xp.exp(self.peak - shift) + other.total * xp.exp(other.peak - shift)
        return LogSumExp(peak, total)

    def result(self) -> Array:
        """Return the logarithms, -inf for rows without pairs."""
        xp = array_namespace(self.peak)
        any_pair = self.peak != -xp.inf  # True for NaN, which must propagate
        return xp.where(any_pair, self.peak + xp.log(xp.where(any_pair, self.total, 1.0)), -xp.inf)


class TopK(NamedTuple):
    """The k pairs of a row with the largest scores, in descending order; ties are ordered by slot."""

    score: Array  #: (B, k), -inf beyond the last pair
    slot: Array  #: (B, k), -1 beyond the last pair
    similarity: Array  #: (B, k)

    @classmethod
    def of(cls, score: Array, weight: Array, block: Any, k: int = 1) -> TopK:
        """Select the pairs of a block by score (B, m), among the pairs with weight (B, m) > 0."""
        xp, ops = backends.of(score)
        score = xp.where(weight > 0, score, -xp.inf)
        slot = xp.where(weight > 0, block.slots[None, :], -1)
        similarity = block.S
        if (
            k > 1 or not score.shape[1]
        ):  # always pad to at least k columns: in a graph the number of rows may be unknown
            padding = (ops.length(score), k)
            like = {"dtype": score.dtype, "device": device_of(score)}
            none = xp.full(padding, -1, dtype=slot.dtype, device=device_of(slot))
            score = xp.concat([score, xp.full(padding, -xp.inf, **like)], axis=1)
            slot = xp.concat([slot, none], axis=1)
            similarity = xp.concat([similarity, xp.zeros(padding, **like)], axis=1)
        return cls(score, slot, similarity)._largest(k)

    def merge(self, other: TopK) -> TopK:
        """Combine with the reduction of a later block."""
        xp = array_namespace(self.score)
        joined = (xp.concat([mine, theirs], axis=1) for mine, theirs in zip(self, other, strict=True))
        return TopK(*joined)._largest(self.score.shape[1])

    def result(self) -> TopK:
        """Return the k pairs themselves."""
        return self

    def holds(self, slots: Array) -> Array:
        """Return (B, m) booleans: whether a block's rows, in slots (m,), are among the k pairs."""
        xp = array_namespace(slots)
        return xp.any(slots[None, :, None] == self.slot[:, None, :], axis=2)

    def _largest(self, k: int) -> TopK:
        xp, ops = backends.of(self.score)
        order = xp.argmax(self.score, axis=1, keepdims=True) if k == 1 else ops.top_k(self.score, k)[1]
        return TopK(*(take_in_rows(column, order) for column in self))


def _finite(peak: Array) -> Array:
    xp = array_namespace(peak)
    return xp.where(peak == -xp.inf, 0.0, peak)
