"""Processes that train together: what a step asks of them, written once for any library that can exchange arrays.

All ranks' anchors are compared on every rank, each with its own part of the rows: its own batch, and its part of the
memory. What the parts say of an anchor is joined by the same `merge` that joins blocks, so whatever the memory holds, a
rank sends and receives only batches, their summaries and their gradients.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import reduce
from math import prod
from typing import Any, NamedTuple

from xbm import backends
from xbm.backends import Array
from xbm.reductions import Summaries


class Spread(ABC):
    """N rows in rank order, of which each rank brings some: how they come together, and go home."""

    @abstractmethod
    def gather(self, x: Array) -> Array:
        """Return all ranks' rows (N, ...), in rank order, from this rank's (n, ...)."""

    @abstractmethod
    def own(self, x: Array) -> Array:
        """Return this rank's rows (n, ...) of all (N, ...)."""

    @abstractmethod
    def exchange(self, x: Array) -> Array:
        """Return (ranks, n, ...), what each rank says of this rank's rows, from what this one says of all (N, ...)."""

    def sum_own(self, x: Array) -> Array:
        """Return this rank's rows (n, ...) of the sum over the ranks of x (N, ...)."""
        said = self.exchange(x)
        return backends.array_namespace(said).sum(said, axis=0)

    def largest(self, x: Array) -> Array:
        """Return the largest over the ranks of each entry of x (N,)."""
        said = self.exchange(x)
        return self.gather(backends.array_namespace(said).max(said, axis=0))

    def merge(self, summaries: Summaries) -> Summaries:
        """Return the reductions of the N anchors over all ranks' parts, from those over this rank's part.

        Each rank joins what is said of its own anchors: 2 N numbers a reduction come and go, however many ranks there
        are.

        Raises
        ------
        TypeError
            If a reduction is no NamedTuple of arrays (N, ...).
        """
        for name, one in summaries.items():
            if not hasattr(one, "_fields") or not all(getattr(leaf, "shape", ()) for leaf in _leaves({name: one})):
                raise TypeError(
                    f"the reduction {name!r} must be a NamedTuple of arrays (B, ...) to be joined over ranks, got "
                    f"{one!r:.80}"
                )
        if not summaries:
            return summaries
        said = _together(self.exchange, _leaves(summaries))
        joined = reduce(
            _merged, (_like(summaries, [leaf[rank, ...] for leaf in said]) for rank in range(said[0].shape[0]))
        )
        return _like(summaries, _together(self.gather, _leaves(joined)))


class Here(Spread):
    """All rows are here."""

    def gather(self, x: Array) -> Array:
        """Return x."""
        return x

    def own(self, x: Array) -> Array:
        """Return x."""
        return x

    def exchange(self, x: Array) -> Array:
        """Return x as what the only rank says, (1, N, ...)."""
        return x[None, ...]

    def sum_own(self, x: Array) -> Array:
        """Return x."""
        return x

    def largest(self, x: Array) -> Array:
        """Return x."""
        return x

    def merge(self, summaries: Summaries) -> Summaries:
        """Return the summaries."""
        return summaries


HERE = Here()


class Ranks(NamedTuple):
    """The ranks of one call."""

    queries: Spread = HERE  # how its anchors are spread
    keys: Spread = HERE  # how the rows that it stores are spread
    each: Spread = HERE  # one row of each rank
    rank: Any = 0  # of this process, an int or a traced one
    size: int = 1  # how many there are
    sharded: bool = False  # whether each holds its part of the memory only, or all of it
    scale: float = 1.0  # of gradients: the number of ranks where they are averaged afterwards

    @property
    def shard(self) -> Shard:
        """Which part of the memory the state on this rank is."""
        return Shard(self.rank, self.size) if self.sharded else WHOLE

    def part(self, rows: int) -> slice | None:
        """Return which of the rows, of those of the state on this rank, it compares; None for all."""
        if self.sharded or self.size == 1:
            return None
        return slice(self.rank * rows // self.size, (self.rank + 1) * rows // self.size)


class Shard(NamedTuple):
    """The slots that a state holds: the `index`-th of so many equal runs of a ring."""

    index: Any = 0
    shards: int = 1

    def first(self, rows: int) -> Any:
        """Return the first slot of a run of so many."""
        return self.index * rows

    def local(self, slots: Array, rows: int) -> Array:
        """Return which of a run of so many each slot (n,) is, -1 = none of them."""
        xp = backends.array_namespace(slots)
        place = slots - self.first(rows)
        return xp.where((place >= 0) & (place < rows), place, -1)


WHOLE, ONE = Shard(), Ranks()


def total(each: Spread, *scalars: Array) -> tuple[Array, ...]:
    """Return the sums over the ranks of scalars of one dtype."""
    xp, _ = backends.of(scalars[0])
    sums = xp.sum(each.gather(xp.stack(scalars)[None, :]), axis=0)
    return tuple(sums[i] for i in range(len(scalars)))


def _merged(some: Summaries, others: Summaries) -> Summaries:
    return {name: one.merge(others[name]) for name, one in some.items()}


def _leaves(summaries: Summaries) -> list[Array]:
    """Return the arrays of reductions, one after the other."""
    tuples: dict[str, Any] = summaries
    return [leaf for one in tuples.values() for leaf in one]


def _like(summaries: Summaries, leaves: list[Array]) -> Summaries:
    """Return reductions of the same kinds and names with other arrays."""
    some, tuples = iter(leaves), dict[str, Any](summaries)
    return {name: type(one)(*(next(some) for _ in one)) for name, one in tuples.items()}


def _together(send: Callable[[Array], Array], leaves: list[Array]) -> list[Array]:
    """Return `send` of each array (N, ...), which may put axes before, in one go for each dtype."""
    xp, _ = backends.of(leaves[0])
    found: dict[int, Array] = {}
    for dtype in {leaf.dtype: None for leaf in leaves}:
        places = [i for i, leaf in enumerate(leaves) if leaf.dtype == dtype]
        flat = [xp.reshape(leaves[i], (leaves[i].shape[0], prod(leaves[i].shape[1:]))) for i in places]
        sent, start = send(xp.concat(flat, axis=1)), 0
        for i, one in zip(places, flat, strict=True):
            part = sent[..., start : start + one.shape[1]]
            found[i] = xp.reshape(part, (*sent.shape[:-1], *leaves[i].shape[1:]))
            start += one.shape[1]
    return [found[i] for i in range(len(leaves))]
