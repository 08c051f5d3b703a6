"""Which pairs of a row are positive, which negative, and which neither.

Pairs are weights, not booleans: 1 for a pair, 0 for none. What changes them later (a miner, soft labels, an
age decay) multiplies.
"""

from typing import Any, NamedTuple

from xbm.backends import array_namespace

Array = Any


def batch_pairs(labels, key_labels=None, *, dtype):
    """Return `(P, N)` of a batch, each (B, B), or (B, K) against K keys.

    Within a batch i = j is no pair, by index. Against keys nothing is excluded: key i is query i's candidate.
    """
    xp = array_namespace(labels)
    within = key_labels is None
    same = labels[:, None] == (labels if within else key_labels)[None, :]
    usable = xp.ones_like(same)
    if within:
        order = xp.arange(labels.shape[0], device=labels.device)
        usable = order[:, None] != order[None, :]
    return xp.astype(same & usable, dtype), xp.astype(~same & usable, dtype)


class Keys(NamedTuple):
    """Integers of B >= 1 anchors, ready to be compared with those of many rows."""

    ordered: Array  # (B,) integer
    places: Array  # (B,) floating point, place of each anchor's integer among the ordered ones

    @classmethod
    def of(cls, integers, dtype):
        """Sort the anchors' integers (B,) once."""
        xp = array_namespace(integers)
        ordered = xp.sort(integers)
        return cls(ordered, xp.astype(xp.searchsorted(ordered, integers), dtype))

    def places_of(self, integers):
        """Return the place of each row's integer (m,) among the anchors', -1 where it is none of theirs."""
        xp = array_namespace(integers)
        place = xp.searchsorted(self.ordered, integers)
        met = xp.take(self.ordered, xp.where(place < self.ordered.shape[0], place, 0)) == integers
        return xp.astype(xp.where(met, place, -1), self.places.dtype)

    def equal(self, integers):
        """Return 1 where an anchor's and a row's integer (m,) are equal, else 0, as (B, m) floating point.

        By arithmetic on places, whole numbers up to B: on a CPU, to compare long integers and to cast the outcome
        takes four times as long.
        """
        xp = array_namespace(integers)
        apart = xp.abs(self.places[:, None] - self.places_of(integers)[None, :])
        return xp.clip(1.0 - apart, min=0.0)


class MemoryPairs(NamedTuple):
    """The pairs of B >= 1 anchors with the rows of a memory, block by block (m rows of its labels, ids and steps).

    An empty slot and the anchor's own slot are no pair. With ids, neither is an older copy of the anchor: a row of
    the anchor's id that was stored before `step`. Two views of one id in the same call stay positives.
    """

    labels: Keys  # class of each anchor
    own: Keys | None  # slot of each anchor, -1 = none; left out where no anchor has one
    ids: Keys | None  # sample of each anchor, -1 = none; left out to keep copies
    count: Array  # () filled slots; they are slots 0 .. count - 1
    step: Array  # () index of the call

    @classmethod
    def of(cls, labels, *, own, ids, count, step, dtype):
        """Return the pairs of anchors with labels, own slots and ids, each (B,) or None, as weights of a dtype."""
        own, ids = (None if one is None else Keys.of(one, dtype) for one in (own, ids))
        return cls(Keys.of(labels, dtype), own, ids, count, step)

    def between(self, slots, labels, ids, stored_at):
        """Return `(P, N)`, each (B, m), of the anchors and the rows in slots (m,)."""
        xp = array_namespace(labels)
        pairs = xp.astype(slots < self.count, self.labels.places.dtype)[None, :]
        if self.own is not None:
            pairs = pairs * (1.0 - self.own.equal(slots))
        if self.ids is not None:
            older = (ids >= 0) & (stored_at < self.step)
            pairs = pairs * (1.0 - self.ids.equal(xp.where(older, ids, -2)))
        P = pairs * self.labels.equal(labels)
        return P, pairs - P

    def some_positive(self, labels, ids, stored_at):
        """Tell of each row (m,) whether some anchor is of its class, whatever else may part them."""
        return self.labels.places_of(labels) >= 0
