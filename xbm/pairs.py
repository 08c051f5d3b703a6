"""Which pairs of a row are positive, which negative, and which neither.

Pairs are weights, not booleans: 1 for a pair, 0 for none. What changes them (soft weights, a miner, an age decay)
multiplies.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Self, TypeAlias

from xbm import backends, checks
from xbm.backends import Array, array_namespace, device_of

OfLabels: TypeAlias = Callable[[Array, Array], Array]
"""A function of the labels of anchors (B,) and of rows (m,): something of each pair."""


class Relation(NamedTuple):
    """What the labels of an anchor and a row say of the pair: positive or negative, and of which weight."""

    match: OfLabels | None = None  # (B, m) booleans, whether a pair is positive; equal labels if left out
    weights: OfLabels | None = None  # (B, m), (1, m) or (B, 1) floats >= 0; 1 if left out
    ignored: int | None = None  # class that is positive to none, itself included

    @property
    def is_equality(self) -> bool:
        """Whether equal labels are all it asks for, which are found by sorting."""
        return self.match is None and self.weights is None

    def positive(self, labels: Array, row_labels: Array) -> Array:
        """Tell of each pair (B, m) whether it is positive, if it is a pair."""
        if self.match is None:
            same = labels[:, None] == row_labels[None, :]
        else:
            same = _answer("match", self.match, labels, row_labels, "bool")
        if self.ignored is None:
            return same
        return same & (labels != self.ignored)[:, None] & (row_labels != self.ignored)[None, :]

    def weighted(self, pairs: Array, labels: Array, row_labels: Array) -> Array:
        """Return pairs, (B, m) or (1, m), times their weights; what is no pair stays none, whatever its weight."""
        if self.weights is None:
            return pairs
        xp, ops = backends.of(pairs)
        weights = ops.stop_gradient(_answer("pair_weights", self.weights, labels, row_labels, "real floating"))
        return pairs * xp.where(pairs > 0, xp.astype(weights, pairs.dtype, copy=False), 0.0)


EQUALITY = Relation()

MOST_HALVINGS = 60.0  # of a row's weight, whose inverse and square are then still numbers in float32


class Ageing(NamedTuple):
    """What the age of a row of the memory says of its pairs."""

    most: int | None = None  # calls: of an older row there are none
    half_life: float | None = None  # calls after which they count half

    def weighted(self, pairs: Array, age: Array) -> Array:
        """Return the weights (m,) of rows' pairs, times those of their ages (m,) in calls."""
        xp = array_namespace(pairs)
        if self.most is not None:
            pairs = pairs * xp.astype(age <= self.most, pairs.dtype)
        if self.half_life is not None:
            pairs = pairs * 2.0 ** -xp.clip(xp.astype(age, pairs.dtype) / self.half_life, max=MOST_HALVINGS)
        return pairs


AGELESS = Ageing()


def _answer(name: str, function: OfLabels, labels: Array, row_labels: Array, kind: str) -> Array:
    """Return what a user's function says of pairs, or refuse it."""
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
    """Tell whether a size is the wanted one, as far as either is known in a graph."""
    return size is None or wanted is None or size == wanted or (may_repeat and size == 1)


LEAST_LOG_Q = -80.0  # whose inverse is finite in float32


@dataclass(frozen=True, eq=False, repr=False)
class LogQ:
    r"""Pair weights that correct for how often each item is sampled: 1 / q of the row's item.

    For `Objective(loss="supcon", pair_weights=LogQ(log_q))`, with item numbers as labels. Popular items are negatives
    more often than others. In a sum of exponentials the weight is what sampled softmax subtracts from the logit:
    log sum_j exp(S_j / t) / q_j = log sum_j exp(S_j / t - log q_j).

    Parameters
    ----------
    log_q : (items,) float32 or float64
        Logarithm of the probability that a row is of the item, on the embeddings' device; the label of each row is its
        index. At least -80.

    Raises
    ------
    TypeError, ValueError
        If it is no such array.

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
                f"log_q of shape {shape} must be finite and at least {LEAST_LOG_Q}: an item never seen has no "
                f"logarithm, so count each once more"
            )

    def __repr__(self) -> str:
        return f"LogQ({self.log_q.shape[0]} items)"

    def __call__(self, labels: Array, row_labels: Array) -> Array:
        """Return (1, m), the weight of the rows of items `row_labels` (m,) to any anchor."""
        checks.same_library("log_q", self.log_q, row_labels)
        xp = array_namespace(self.log_q)
        return xp.exp(-xp.take(self.log_q, row_labels))[None, :]


def batch_pairs(
    labels: Array, row_labels: Array, *, own: Array | None, dtype: Any, relation: Relation = EQUALITY
) -> tuple[Array, Array]:
    """Return `(P, N)` of anchors (B,) and the rows of a batch (K,), each (B, K).

    Row j is no pair of anchor `own[j]`, by index: within a batch that is itself. Against keys nothing is excluded
    (None): key i is query i's candidate.
    """
    xp, ops = backends.of(labels)
    same = relation.positive(labels, row_labels)
    usable = xp.ones_like(same)
    if own is not None:
        usable = xp.arange(ops.length(labels), dtype=own.dtype, device=device_of(labels))[:, None] != own[None, :]
    pairs = relation.weighted(xp.astype(usable, dtype), labels, row_labels)
    P = pairs * xp.astype(same, dtype)
    return P, pairs - P


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

    filled: Array  # (m,) what the row's pairs count at its age, 1 or less; 0 for an empty slot
    class_: Array  # (m,) the row's class itself
    label: Array | None  # (m,) place of its class; None where a function of the classes decides
    own: Array | None  # (m,) place of its slot
    id: Array | None  # (m,) place of its sample, if it was stored before this call

    def any(self) -> Array:
        """Tell of each row (m,) whether it is of some anchor's class, slot or sample; others are negatives to all."""
        if self.label is None:
            return self.filled >= 0
        known = [places >= 0 for places in (self.label, self.own, self.id) if places is not None]
        met = known[0]
        for one in known[1:]:
            met = met | one
        return met

    def take(self, indices: Array) -> Met:
        """Return some of the rows."""
        xp = array_namespace(self.filled)
        return Met(*(None if column is None else xp.take(column, indices) for column in self))


class MemoryPairs(NamedTuple):
    """The pairs of B >= 1 anchors with the rows of a memory, block by block.

    An empty slot, a row that is too old and the anchor's own slot are no pair. With ids, neither is an older copy of
    the anchor: a row of the anchor's id that was stored before `step`. Two views of one id in the same call stay
    positives.
    """

    classes: Array  # (B,) class of each anchor
    labels: Keys | None  # the same, ready to be looked up; left out where a function of the classes decides
    own: Keys | None  # slot of each anchor, -1 = none; left out where no anchor has one
    ids: Keys | None  # sample of each anchor, -1 = none; left out to keep copies
    count: Array  # () filled slots; they are slots 0 .. count - 1
    step: Array  # () index of the call
    dtype: Any  # of the weights
    relation: Relation
    ageing: Ageing

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
        ageing: Ageing = AGELESS,
    ) -> Self:
        """Return the pairs of anchors with labels, own slots and ids, each (B,) or None, as weights of a dtype."""
        equal = labels if relation.is_equality else None
        sought, own, ids = (None if one is None else Keys.of(one, dtype) for one in (equal, own, ids))
        return cls(labels, sought, own, ids, count, step, dtype, relation, ageing)

    def meet(self, slots: Array, labels: Array, ids: Array, stored_at: Array) -> Met:
        """Look the rows in slots (m,) up, by what the memory holds of them, each (m,)."""
        xp = array_namespace(labels)
        age = self.step - stored_at
        older = (ids >= 0) & (age > 0)
        return Met(
            filled=self.ageing.weighted(xp.astype(slots < self.count, self.dtype), age),
            class_=labels,
            label=self._places_of_classes(labels),
            own=None if self.own is None else self.own.places_of(slots),
            id=None if self.ids is None else self.ids.places_of(xp.where(older, ids, -2)),
        )

    def between(self, met: Met) -> tuple[Array, Array]:
        """Return `(P, N)`, each (B, m), of the anchors and the rows they met."""
        xp, ops = backends.of(met.filled)
        pairs = met.filled[None, :]
        for keys, places in ((self.own, met.own), (self.ids, met.id)):
            if keys is not None and ops.known(xp.max(places)) != -1:  # mostly there are none in a block
                pairs = pairs * (1.0 - keys.equal(places))
        if self.labels is None:
            same = xp.astype(self.relation.positive(self.classes, met.class_), self.dtype)
            pairs = self.relation.weighted(pairs, self.classes, met.class_)
        else:
            same = self.labels.equal(met.label)
        P = pairs * same
        return P, pairs - P

    def _places_of_classes(self, classes: Array) -> Array | None:
        """Return the place of each row's class (m,) among the anchors', -1 where it is none of theirs or ignored."""
        if self.labels is None:
            return None
        places = self.labels.places_of(classes)
        if self.relation.ignored is None:
            return places
        return array_namespace(places).where(classes == self.relation.ignored, -1.0, places)
