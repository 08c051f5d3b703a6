"""Processes that train together: the exchanges of a step, written once for any library that can exchange arrays.

Every rank compares the anchors of all ranks with its own part of the rows: its own batch, and its part of the memory.
The same `merge` that joins blocks joins an anchor's summaries over the parts. So ranks exchange only batches, summaries
and gradients, whatever the size of the memory.
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
    """N rows in rank order, some from each rank: how they are gathered, and how results return to their rank."""

    @abstractmethod
    def gather(self, x: Array) -> Array:
        """Return all ranks' rows (N, ...), in rank order, from this rank's (n, ...)."""

    @abstractmethod
    def own(self, x: Array) -> Array:
        """Return this rank's rows (n, ...) of all (N, ...)."""

    @abstractmethod
    def exchange(self, x: Array) -> Array:
        """Return (ranks, n, ...), each rank's values for this rank's rows, from this rank's values for all (N, ...)."""

    def sum_own(self, x: Array) -> Array:
        """Return this rank's rows (n, ...) of the sum of x (N, ...) over the ranks."""
        values = self.exchange(x)
        return backends.array_namespace(values).sum(values, axis=0)

    def largest(self, x: Array) -> Array:
        """Return the maximum of x (N,) over the ranks, entry by entry."""
        values = self.exchange(x)
        return self.gather(backends.array_namespace(values).max(values, axis=0))

    def merge(self, summaries: Summaries) -> Summaries:
        """Return the reductions of the N anchors over all ranks' parts, from those over this rank's part.

        Each rank merges the reductions of its own anchors: 2 N numbers per reduction are sent and received, for any
        number of ranks.

        Raises
        ------
        TypeError
            If a reduction is not a NamedTuple of arrays (N, ...).
        """
        for name, one in summaries.items():
            if not hasattr(one, "_fields") or not all(getattr(leaf, "shape", ()) for leaf in _leaves({name: one})):
                raise TypeError(
                    f"the reduction {name!r} must be a NamedTuple of arrays (B, ...) to be joined over ranks, got "
                    f"{one!r:.80}"
                )
        if not summaries:
            return summaries
        parts = _together(self.exchange, _leaves(summaries))
        joined = reduce(
            _merged, (_like(summaries, [leaf[rank, ...] for leaf in parts]) for rank in range(parts[0].shape[0]))
        )
        return _like(summaries, _together(self.gather, _leaves(joined)))


class Here(Spread):
    """All rows are on this rank."""

    def __repr__(self) -> str:
        return "HERE"

    def gather(self, x: Array) -> Array:
        """Return x."""
        return x

    def own(self, x: Array) -> Array:
        """Return x."""
        return x

    def exchange(self, x: Array) -> Array:
        """Return x as the only rank's values, (1, N, ...)."""
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

    queries: Spread = HERE  #: how the anchors are spread
    keys: Spread = HERE  #: how the stored rows are spread
    each: Spread = HERE  #: one row of each rank
    rank: Any = 0  #: rank of this process, an int or a traced integer
    size: int = 1  #: number of ranks
    sharded: bool = False  #: whether each rank holds a part of the memory, or all of it
    scale: float = 1.0  #: of gradients: the number of ranks if they are averaged afterwards

    @property
    def shard(self) -> Shard:
        """The part of the memory that this rank's state holds."""
        return Shard(self.rank, self.size) if self.sharded else WHOLE

    def part(self, rows: int) -> slice | None:
        """Return the rows of this rank's state that it compares, of so many; None for all."""
        if self.sharded or self.size == 1:
            return None
        return slice(self.rank * rows // self.size, (self.rank + 1) * rows // self.size)


class Shard(NamedTuple):
    """The slots that a state holds: the `index`-th of `shards` equal runs of a ring."""

    index: Any = 0
    shards: int = 1

    def first(self, rows: int) -> Any:
        """Return the first slot of a run of `rows` slots."""
        return self.index * rows

    def local(self, slots: Array, rows: int) -> Array:
        """Return the place of each slot (n,) in a run of `rows` slots, -1 if it is in another run."""
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
    """Return the arrays of reductions in a list."""
    tuples: dict[str, Any] = summaries
    return [leaf for one in tuples.values() for leaf in one]


def _like(summaries: Summaries, leaves: list[Array]) -> Summaries:
    """Return reductions of the same types and names with other arrays."""
    some, tuples = iter(leaves), dict[str, Any](summaries)
    return {name: type(one)(*(next(some) for _ in one)) for name, one in tuples.items()}


def _together(send: Callable[[Array], Array], leaves: list[Array]) -> list[Array]:
    """Return `send` of each array (N, ...), with one call per dtype; `send` can prepend axes."""
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
