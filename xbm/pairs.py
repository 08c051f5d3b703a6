"""Positive, negative and excluded pairs of anchors and rows.

A pair is a weight, not a boolean: 1 for a pair, 0 for none. Soft weights and miners multiply it.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Self

from xbm import backends
from xbm.backends import Array, array_namespace, device_of
from xbm.lookup import Keys
from xbm.relation import EQUALITY, Relation


def batch_pairs(
    labels: Array, row_labels: Array, *, own: Array | None, dtype: Any, relation: Relation = EQUALITY
) -> tuple[Array, Array]:
    """Return `(P, N)` of anchors (B,) and the rows of a batch (K,), each (B, K).

    Row j and anchor `own[j]` are no pair: within a batch, `own[j]` is j itself. Against keys no pair is excluded
    (`own` is None), since key i is a candidate of query i.
    """
    xp, ops = backends.of(labels)
    same = relation.positive(labels, row_labels)
    usable = xp.ones_like(same)
    if own is not None:
        usable = xp.arange(ops.length(labels), dtype=own.dtype, device=device_of(labels))[:, None] != own[None, :]
    pairs = relation.weighted(xp.astype(usable, dtype), labels, row_labels)
    P = pairs * xp.astype(same, dtype)
    return P, pairs - P


class Candidates(NamedTuple):
    """m rows of a memory, looked up among the anchors: places among the anchors' keys, -1 if no anchor has it."""

    filled: Array  #: (m,) floating point, 1 for a row, 0 for an empty slot
    class_: Array  #: (m,) integer, the row's class
    label: Array | None  #: (m,) place of its class; None if a function of the classes decides
    own: Array | None  #: (m,) place of its slot
    id: Array | None  #: (m,) place of its sample, if the row was stored before this call

    def related(self) -> Array:
        """Return (m,) booleans, whether a row shares its class, slot or sample with an anchor.

        Any other row is a negative of all anchors.
        """
        if self.label is None:
            return self.filled >= 0
        known = [places >= 0 for places in (self.label, self.own, self.id) if places is not None]
        related = known[0]
        for one in known[1:]:
            related = related | one
        return related

    def take(self, indices: Array) -> Candidates:
        """Return the rows at some indices."""
        xp = array_namespace(self.filled)
        return Candidates(*(None if column is None else xp.take(column, indices) for column in self))


class MemoryPairs(NamedTuple):
    """The pairs of B >= 1 anchors with the rows of a memory, block by block.

    An empty slot and the anchor's own slot are no pair. With ids, neither is an older copy of the anchor: a row with
    the anchor's id that was stored before `step`. Two views of one id in the same call stay positives.
    """

    classes: Array  #: (B,) class of each anchor
    labels: Keys | None  #: the same, for look-ups; None if a function of the classes decides
    own: Keys | None  #: slot of each anchor, -1 = none; None if no anchor has one
    ids: Keys | None  #: sample of each anchor, -1 = none; None to keep copies
    count: Array  #: () filled slots; they are slots 0 .. count - 1
    step: Array  #: () index of the call
    dtype: Any  #: of the weights
    relation: Relation

    @classmethod
    def of(
        cls,
        labels: Array,
        *,
        own: Array | None,
        ids: Array | None,
        count: Array,
        step: Array,
        dtype: Any,
        relation: Relation = EQUALITY,
    ) -> Self:
        """Return the pairs of anchors with labels, own slots and ids, each (B,) or None, as weights of a dtype."""
        equal = labels if relation.is_equality else None
        sought, own, ids = (None if one is None else Keys.of(one, dtype) for one in (equal, own, ids))
        return cls(labels, sought, own, ids, count, step, dtype, relation)

    def candidates(self, slots: Array, labels: Array, ids: Array, stored_at: Array) -> Candidates:
        """Look up the rows in slots (m,), by their columns of the memory, each (m,)."""
        xp = array_namespace(labels)
        older = (ids >= 0) & (stored_at < self.step)
        return Candidates(
            filled=xp.astype(slots < self.count, self.dtype),
            class_=labels,
            label=self._places_of_classes(labels),
            own=None if self.own is None else self.own.places_of(slots),
            id=None if self.ids is None else self.ids.places_of(xp.where(older, ids, -2)),
        )

    def between(self, rows: Candidates) -> tuple[Array, Array]:
        """Return `(P, N)`, each (B, m), of the anchors and some rows."""
        xp, ops = backends.of(rows.filled)
        pairs = rows.filled[None, :]
        for keys, places in ((self.own, rows.own), (self.ids, rows.id)):
            if keys is not None and ops.known(xp.max(places)) != -1:  # most blocks hold none
                pairs = pairs * (1.0 - keys.equal(places))
        if self.labels is None:
            same = xp.astype(self.relation.positive(self.classes, rows.class_), self.dtype)
            pairs = self.relation.weighted(pairs, self.classes, rows.class_)
        else:
            same = self.labels.equal(rows.label)
        P = pairs * same
        return P, pairs - P

    def _places_of_classes(self, classes: Array) -> Array | None:
        """Return the place of each row's class (m,) among the anchors', -1 if no anchor has it or it is ignored."""
        if self.labels is None:
            return None
        places = self.labels.places_of(classes)
        if self.relation.ignore_label is None:
            return places
        return array_namespace(places).where(classes == self.relation.ignore_label, -1.0, places)
