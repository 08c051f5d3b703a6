"""Which pairs of a row are positive, which negative, and which neither.

Pairs are weights, not booleans: 1 for a pair, 0 for none. What changes them later (a miner, soft labels, an
age decay) multiplies.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Self

from xbm import backends
from xbm.backends import Array, array_namespace, device_of


def batch_pairs(labels: Array, key_labels: Array | None = None, *, dtype: Any) -> tuple[Array, Array]:
    """Return `(P, N)` of a batch, each (B, B), or (B, K) against K keys.

    Within a batch i = j is no pair, by index. Against keys nothing is excluded: key i is query i's candidate.
    """
    xp, ops = backends.of(labels)
    others = labels if key_labels is None else key_labels
    same = labels[:, None] == others[None, :]
    usable = xp.ones_like(same)
    if key_labels is None:
        order = xp.arange(ops.length(labels), device=device_of(labels))
        usable = order[:, None] != order[None, :]
    return xp.astype(same & usable, dtype), xp.astype(~same & usable, dtype)


def bounded(ordered: Array) -> Array:
    """Return rising integers (B,), maybe none, with the largest there is behind them: (B + 1,), for `look_up`."""
    xp = array_namespace(ordered)
    most = xp.full((1,), xp.iinfo(ordered.dtype).max, dtype=ordered.dtype, device=device_of(ordered))
    return xp.concat([ordered, most])


def look_up(ordered: Array, integers: Array) -> tuple[Array, Array]:
    """Return the place of each integer (m,) among `bounded` ones, and whether it is there."""
    xp, ops = backends.of(integers)
    place = xp.searchsorted(ordered, integers)
    return place, (xp.take(ordered, place) == integers) & (place < ops.length(ordered) - 1)


class Keys(NamedTuple):
    """Integers of B >= 1 anchors, ready to be looked up by those of many rows."""

    ordered: Array  # (B + 1,) integer, the last one bounds what is found
    places: Array  # (B,) floating point, place of each anchor's integer among the ordered ones

    @classmethod
    def of(cls, integers: Array, dtype: Any) -> Self:
        """Sort the anchors' integers (B,) once."""
        xp = array_namespace(integers)
        ordered = bounded(xp.sort(integers))
        return cls(ordered, xp.astype(xp.searchsorted(ordered, integers), dtype))

    def places_of(self, integers: Array) -> Array:
        """Return the place of each row's integer (m,) among the anchors', -1 where it is none of theirs."""
        xp = array_namespace(integers)
        place, met = look_up(self.ordered, integers)
        return xp.astype(xp.where(met, place, -1), self.places.dtype)

    def equal(self, places: Array) -> Array:
        """Return 1 where an anchor and a row of a place (m,) have the same integer, else 0, as (B, m) floating point.

        By arithmetic on places, whole numbers up to B: on a CPU, to compare long integers and to cast the outcome
        takes four times as long.
        """
        xp = array_namespace(places)
        return xp.clip(1.0 - xp.abs(self.places[:, None] - places[None, :]), min=0.0)


class Met(NamedTuple):
    """What m rows of a memory are to the anchors: places among the anchors' keys, -1 = none of theirs."""

    filled: Array  # (m,) 1, or 0 for an empty slot
    label: Array  # (m,) place of the row's class
    own: Array | None  # (m,) place of its slot
    id: Array | None  # (m,) place of its sample, if it was stored before this call

    def any(self) -> Array:
        """Tell of each row (m,) whether it is of some anchor's class, slot or sample; others are negatives to all."""
        known = [places >= 0 for places in (self.label, self.own, self.id) if places is not None]
        met = known[0]
        for one in known[1:]:
            met = met | one
        return met

    def take(self, indices: Array) -> Met:
        """Return some of the rows."""
        xp = array_namespace(self.label)
        return Met(*(None if column is None else xp.take(column, indices) for column in self))


class MemoryPairs(NamedTuple):
    """The pairs of B >= 1 anchors with the rows of a memory, block by block.

    An empty slot and the anchor's own slot are no pair. With ids, neither is an older copy of the anchor: a row of
    the anchor's id that was stored before `step`. Two views of one id in the same call stay positives.
    """

    labels: Keys  # class of each anchor
    own: Keys | None  # slot of each anchor, -1 = none; left out where no anchor has one
    ids: Keys | None  # sample of each anchor, -1 = none; left out to keep copies
    count: Array  # () filled slots; they are slots 0 .. count - 1
    step: Array  # () index of the call

    @classmethod
    def of(cls, labels: Array, *, own: Array | None, ids: Array | None, count: Array, step: Array, dtype: Any) -> Self:
        """Return the pairs of anchors with labels, own slots and ids, each (B,) or None, as weights of a dtype."""
        own, ids = (None if one is None else Keys.of(one, dtype) for one in (own, ids))
        return cls(Keys.of(labels, dtype), own, ids, count, step)

    def meet(self, slots: Array, labels: Array, ids: Array, stored_at: Array) -> Met:
        """Look the rows in slots (m,) up, by what the memory holds of them, each (m,)."""
        xp = array_namespace(labels)
        older = (ids >= 0) & (stored_at < self.step)
        return Met(
            filled=xp.astype(slots < self.count, self.labels.places.dtype),
            label=self.labels.places_of(labels),
            own=None if self.own is None else self.own.places_of(slots),
            id=None if self.ids is None else self.ids.places_of(xp.where(older, ids, -2)),
        )

    def between(self, met: Met) -> tuple[Array, Array]:
        """Return `(P, N)`, each (B, m), of the anchors and the rows they met."""
        xp, ops = backends.of(met.label)
        pairs = met.filled[None, :]
        for keys, places in ((self.own, met.own), (self.ids, met.id)):
            if keys is not None and ops.known(xp.max(places)) != -1:  # mostly there are none in a block
                pairs = pairs * (1.0 - keys.equal(places))
        P = pairs * self.labels.equal(met.label)
        return P, pairs - P
