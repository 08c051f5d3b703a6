"""One call's batch: its inputs checked, cast and normalised, on one process or gathered from all ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol, Self

from xbm import backends, checks
from xbm.backends import Array, device_of
from xbm.memory_state import MemoryState, class_of_slot
from xbm.normalization import normalize, through_normalize
from xbm.ranks import ONE, Ranks, Spread


class Side(NamedTuple):
    """Input rows, queries or keys: as given, and as they are compared."""

    x: Array  #: (B, D) as given; differentiable
    z: Array  #: (B, D) as compared: a constant, in the dtype of all arithmetic
    length: Array | None  #: (B, 1) the divisor of x; None if x was not normalised

    def to_input(self, dz: Array) -> Array:
        """Return dL/dx, in z's dtype, from dL/dz."""
        return dz if self.length is None else through_normalize(dz, self.z, self.length)


class Batch(NamedTuple):
    """Anchors, and the rows that are compared with them and stored: the anchors themselves, or keys."""

    queries: Side  #: of this rank
    keys: Side | None  #: of this rank
    z: Array  #: (B, D) anchors, of this rank or `gathered` from all
    stored: Array  #: (K, D) rows to compare and store: the anchors, or the keys
    labels: Array | None  #: (B,) int64; None until `labelled`
    stored_labels: Array | None  #: (K,) int64
    ids: Array | None  #: (B,) int64, -1 = none
    enqueue: Array | None  #: (K,) bool, rows to store; None = all

    def gathered(self, ranks: Ranks) -> Self:
        """Return the batch of all ranks."""
        z, labels = ranks.queries.gather(self.z), self._of_all(ranks.queries, self.labels)
        if self.keys is None:
            stored, stored_labels = z, labels
        else:
            stored, stored_labels = ranks.keys.gather(self.stored), self._of_all(ranks.keys, self.stored_labels)
        return self._replace(
            z=z,
            stored=stored,
            labels=labels,
            stored_labels=stored_labels,
            ids=self._of_all(ranks.queries, self.ids),
            enqueue=self._of_all(ranks.keys, self.enqueue),
        )

    @staticmethod
    def _of_all(spread: Spread, rows: Array | None) -> Array | None:
        return None if rows is None else spread.gather(rows)

    def labelled(self, slots: Array | None, capacity: int) -> Self:
        """Return the batch with labels: the given ones, or a class of its own for each sample.

        The class is the sample's id. Without an id it is `class_of_slot` of the slot (B,) that stores the row, or of a
        slot beyond the memory if the row is not stored: no other row of the memory or the batch has it.
        """
        if self.labels is not None:
            return self
        xp, ops = backends.of(self.z)
        integer = ops.integer_dtype(xp)
        beyond = capacity + xp.arange(ops.length(self.z), dtype=integer, device=device_of(self.z))
        if slots is None:
            slots = beyond
        slots = xp.astype(slots, integer, copy=False)
        classes = class_of_slot(xp.where(slots >= 0, slots, beyond))
        if self.ids is not None:
            classes = xp.where(self.ids >= 0, self.ids, classes)
        return self._replace(labels=classes, stored_labels=classes)


def read(
    state: MemoryState,
    x: Array,
    labels: Array | None,
    *,
    ids: Array | None = None,
    keys: Array | None = None,
    key_labels: Array | None = None,
    enqueue: Array | None = None,
    unit: bool,
) -> Batch:
    """Return the `Batch` of a call, or raise if it does not fit the memory `state`."""
    like = state.embeddings
    checks.embeddings("embeddings", x, like)
    if labels is not None:
        checks.integers("labels", labels, x, like)
    if ids is not None:
        checks.integers("ids", ids, x, like)
    if key_labels is not None and (keys is None or labels is None):
        raise ValueError(f"key_labels were given without {'keys' if keys is None else 'labels'}")
    if labels is None and ids is None and keys is None:
        raise ValueError(
            "labels are missing: they are optional only with ids, where equal ids are one class, or with keys, where "
            "query i and key i are one class"
        )
    stored, stored_labels = x, labels
    if keys is not None:
        checks.embeddings("keys", keys, like)
        if key_labels is None and keys.shape[0] != x.shape[0]:
            raise ValueError(
                f"{'labels and ' if labels is None else ''}key_labels are needed unless key i has query i's class: "
                f"there are {x.shape[0]} queries and {keys.shape[0]} keys"
            )
        stored, stored_labels = keys, labels if key_labels is None else key_labels
        if stored_labels is not None:
            checks.integers("key_labels", stored_labels, keys, like, of="keys")
        if ids is not None and keys.shape[0] != x.shape[0]:
            raise ValueError(
                f"ids are the samples of both query i and key i, but there are {x.shape[0]} queries and "
                f"{keys.shape[0]} keys"
            )
    if enqueue is not None:
        checks.mask("enqueue", enqueue, stored, like, of="embeddings" if keys is None else "keys")

    xp, ops = backends.of(x)
    wide = xp.float64 in (x.dtype, stored.dtype, like.dtype)

    def side(rows: Array) -> Side:
        z = xp.astype(ops.stop_gradient(rows), xp.float64 if wide else xp.float32, copy=False)
        return Side(rows, *normalize(z)) if unit else Side(rows, z, None)

    def exact(integers: Array | None) -> Array | None:
        return None if integers is None else xp.astype(integers, ops.integer_dtype(xp), copy=False)

    queries, keys_side = side(x), None if keys is None else side(keys)
    compared = queries if keys_side is None else keys_side
    return Batch(
        queries=queries,
        keys=keys_side,
        z=queries.z,
        stored=compared.z,
        labels=exact(labels),
        stored_labels=exact(stored_labels),
        ids=None if ids is None else xp.clip(exact(ids), min=-1),
        enqueue=enqueue,
    )


class Group(Protocol):
    """The processes that train together."""

    def meet(self, read: Callable[[], Batch]) -> tuple[Batch, Ranks]:
        """Return this rank's batch, from `read`, and the ranks of the call; if `read` raises on a rank, all raise."""

    def share(self, number: int) -> list[int]:
        """Return the numbers of all ranks, in rank order."""


class Alone:
    """A group of one process."""

    def __repr__(self) -> str:
        return "ALONE"

    def meet(self, read: Callable[[], Batch]) -> tuple[Batch, Ranks]:
        """Return the batch and the only rank."""
        return read(), ONE

    def share(self, number: int) -> list[int]:
        """Return the only rank's number."""
        return [number]


ALONE = Alone()
