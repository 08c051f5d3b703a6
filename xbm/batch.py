"""One call's input: checked, widened, normalised, and the way back for the gradient."""

from __future__ import annotations

from typing import NamedTuple, Self

from xbm import backends, checks
from xbm.backends import Array, device_of
from xbm.memory import MemoryState, class_of_slot
from xbm.normalization import normalize, through_normalize
from xbm.ranks import Ranks, Spread


class Side(NamedTuple):
    """Input rows x, queries or keys, as they are compared."""

    x: Array  # (B, D) as given, with whatever differentiates through it
    z: Array  # (B, D) a constant, in the dtype of all arithmetic
    length: Array | None  # (B, 1) what x was divided by

    def to_input(self, dz: Array) -> Array:
        """Return dL/dx, in z's dtype, from dL/dz."""
        return dz if self.length is None else through_normalize(dz, self.z, self.length)


class Batch(NamedTuple):
    """Anchors, and what is compared with them and stored: themselves, or keys. Of this rank, or `gathered` from all."""

    queries: Side  # of this rank
    keys: Side | None  # of this rank
    z: Array  # (B, D) the anchors
    stored: Array  # (K, D) the rows that are compared and stored: the anchors, or the keys
    labels: Array | None  # (B,) int64; None until each sample is a class of its own
    stored_labels: Array | None  # (K,) int64
    ids: Array | None  # (B,) int64, -1 = none
    enqueue: Array | None  # (K,) bool, which rows to store; None = all

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
        """Return the batch with labels: those given, or a class of its own for each sample.

        The class is the sample's id, or a number that no other row of the memory or the batch has: `class_of_slot` of
        the slot (B,) that its row is stored in, or of one beyond the memory where there is none.
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
    """Return the `Batch` of a call, or refuse what the memory `state` cannot take."""
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
            "labels are missing: leave them out only beside ids, equal ones of which are a class, or beside keys, of "
            "which key i is query i's"
        )
    stored, stored_labels = x, labels
    if keys is not None:
        checks.embeddings("keys", keys, like)
        if key_labels is None and keys.shape[0] != x.shape[0]:
            raise ValueError(
                f"{'labels and ' if labels is None else ''}key_labels are needed where key i is not of query i's "
                f"class: there are {x.shape[0]} queries and {keys.shape[0]} keys"
            )
        stored, stored_labels = keys, labels if key_labels is None else key_labels
        if stored_labels is not None:
            checks.integers("key_labels", stored_labels, keys, like, of="keys")
        if ids is not None and keys.shape[0] != x.shape[0]:
            raise ValueError(
                f"ids name both query i and key i, but there are {x.shape[0]} queries and {keys.shape[0]} keys"
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
