"""Pairs and their weights: label relations, no labels, two towers; compared with double loops."""

from itertools import count
from math import exp, log
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

import xbm
from tests import oracle
from tests.strategies import capacities, lengths
from tests.test_memory import assert_same_state, snapshot
from tests.test_objective import away_from_thresholds, keywords
from xbm.backends import array_namespace

TEMPERATURE = 0.5


# Reference definitions: losses over lists of similarities and weights, pairs from double loops.


def contrastive(similarities, P, N):
    pull, push, n_positive, n_active = 0.0, 0.0, 0.0, 0.0
    for s, p, n in zip(similarities, P, N, strict=True):
        pull, n_positive = pull + p * max(1.0 - s, 0.0), n_positive + p
        if s > 0.5:
            push, n_active = push + n * (s - 0.5), n_active + n
    return (pull / n_positive if n_positive else 0.0) + (push / n_active if n_active else 0.0)


def supcon(similarities, P, N):
    if not any(P):
        return 0.0
    rows = list(zip(similarities, P, N, strict=True))
    everything = sum((p + n) * exp(s / TEMPERATURE) for s, p, n in rows)
    return log(everything) - sum(p * s for s, p, _ in rows) / TEMPERATURE / sum(P)


LOSSES = {"contrastive": (xbm.Contrastive(), contrastive), "supcon": (xbm.SupCon(TEMPERATURE), supcon)}


class Function(NamedTuple):
    """A relation of labels, as a function of arrays and of two integers."""

    of_arrays: object
    of_two: object


def floats(x, like):
    xp = array_namespace(like)
    return xp.astype(x, xp.float64)


MATCHES = {
    "equal": Function(None, lambda a, b: a == b),
    "equal, said": Function(lambda a, b: a[:, None] == b[None, :], lambda a, b: a == b),
    "a common bit": Function(lambda a, b: (a[:, None] & b[None, :]) != 0, lambda a, b: a & b != 0),
    "at most": Function(lambda a, b: a[:, None] <= b[None, :], lambda a, b: a <= b),
}
WEIGHTS = {
    "one": Function(None, lambda a, b: 1.0),
    "of pairs": Function(
        lambda a, b: floats((a[:, None] + 3 * b[None, :]) % 4, a) / 2, lambda a, b: ((a + 3 * b) % 4) / 2
    ),
    "of rows": Function(lambda a, b: floats(b % 3, b)[None, :], lambda a, b: float(b % 3)),
    "of anchors": Function(lambda a, b: floats(1 + a % 3, a)[:, None], lambda a, b: 1.0 + a % 3),
}


class Pairing(NamedTuple):
    """The options of a run, and its reference definition."""

    loss: object
    match: object
    weight: object
    ignored: int | None

    def row(self, anchor, similarities, labels):
        """Return L_i of one anchor with a class, against rows with classes."""
        P, N = [], []
        for label in labels:
            positive = self.match(anchor, label) and self.ignored not in (anchor, label)
            weight = self.weight(anchor, label)
            P.append(weight if positive else 0.0)
            N.append(0.0 if positive else weight)
        return self.loss(similarities, P, N)

    def batch_term(self, z, labels, k=None, key_labels=None):
        within = k is None
        k, key_labels = (z, labels) if within else (k, key_labels)
        total = 0.0
        for i in range(len(z)):
            others = [j for j in range(len(k)) if not (within and i == j)]
            total += self.row(labels[i], [z[i] @ k[j] for j in others], [key_labels[j] for j in others])
        return total / len(z)

    def memory_term(self, memory, z, labels, ids, *, own):
        """Reference loss; `own` says whether an anchor's own row is a candidate."""
        total = 0.0
        for i in range(len(z)):
            rows = [row for row in memory.rows if own or row.anchor != i]
            if ids is not None and ids[i] >= 0:
                rows = [row for row in rows if row.id != ids[i] or row.stored_at == memory.step]
            total += self.row(labels[i], [z[i] @ row.z for row in rows], [row.label for row in rows])
        return total / len(z)


class Call(NamedTuple):
    """One call's input, as NumPy arrays."""

    x: np.ndarray
    labels: np.ndarray
    ids: np.ndarray | None
    keys: np.ndarray | None
    key_labels: np.ndarray | None
    enqueue: np.ndarray | None

    @classmethod
    def drawn(cls, rng, size, *, ids, keys):
        labels, more = rng.integers(5, size=size), None
        if keys:
            more = rng.normal(size=(size, 3)), rng.integers(5, size=size)
        return cls(
            rng.normal(size=(size, 3)),
            labels,
            rng.integers(-1, 6, size=size) if ids else None,
            *(more or (None, None)),
            rng.random(size) < 0.8,
        )

    def arguments(self, backend, *, labelled=True):
        """Return positional and keyword arguments of a step, in a library."""
        given_ones = self._asdict() if labelled else self._asdict() | {"labels": None, "key_labels": None}
        return keywords(backend, **given_ones)


def fresh(backend, objective, capacity):
    return objective.init(capacity=capacity, dim=3, dtype=backend.xp.float64, xp=backend.xp)


def agrees(backend, result, call, expected):
    """Assert a step's loss and gradients: `expected(x, keys)` and its finite differences."""
    assert float(result.loss) == pytest.approx(expected(call.x, call.keys), rel=1e-9, abs=1e-12)
    slope = oracle.gradient(lambda x: expected(x, call.keys), call.x)
    np.testing.assert_allclose(backend.numpy(result.gradient), slope, rtol=1e-5, atol=1e-7)


def run(backend, pairing, objective, history, capacity, *, labelled):
    """Assert that a history of steps, and an evaluation after each, are what the loops say."""
    state, model, numbers = fresh(backend, objective, capacity), oracle.Memory(capacity), count(1000)
    for call in history:
        labels, key_labels = call.labels, call.key_labels
        if not labelled:
            labels = np.asarray([-next(numbers) for _ in call.x])
            labels = key_labels = labels if call.ids is None else np.where(call.ids >= 0, call.ids, labels)
        stored, stored_labels = (call.x, labels) if call.keys is None else (call.keys, key_labels)

        def expected(x, keys, *, own=call.keys is not None, call=call, labels=labels, key_labels=key_labels):
            z, k = oracle.normalize(x), None if keys is None else oracle.normalize(keys)
            in_batch = pairing.batch_term(z, labels, k, key_labels)
            # Stored rows are constants in the finite differences.
            return in_batch + pairing.memory_term(model, z, labels, call.ids, own=own)

        rows = np.asarray([row.z for row in model.rows]).reshape(-1, 3)
        candidates = np.vstack([oracle.normalize(call.x), oracle.normalize(stored), rows])
        assume(away_from_thresholds(oracle.normalize(call.x), candidates))
        result = objective.evaluate(state, **call.arguments(backend, labelled=labelled), gradient=True)
        agrees(backend, result, call, expected)

        result = objective.step(state, **call.arguments(backend, labelled=labelled))
        model.enqueue(oracle.normalize(stored), stored_labels, call.ids, call.enqueue, mark=True)
        agrees(backend, result, call, expected)
        if call.keys is not None:
            z = oracle.normalize(call.x)
            of_keys = oracle.gradient(
                lambda k, z=z, labels=labels, key_labels=key_labels: pairing.batch_term(
                    z, labels, oracle.normalize(k), key_labels
                ),
                call.keys,
            )
            np.testing.assert_allclose(backend.numpy(result.key_gradient), of_keys, rtol=1e-5, atol=1e-7)
        model.end_call()
        state = result.state


runs = {
    "seed": st.integers(0, 2**32 - 1),
    "calls": st.integers(1, 3),
    "size": lengths(1, 5, [3]),
    "capacity": capacities,
    "block_rows": lengths(1, 10, [3]),
    "loss": st.sampled_from(sorted(LOSSES)),
    "ids": st.booleans(),
    "keys": st.booleans(),
}


@given(
    **runs,
    match=st.sampled_from(sorted(MATCHES)),
    weights=st.sampled_from(sorted(WEIGHTS)),
    ignored=st.sampled_from([None, 1]),
)
def test_relations_are_their_definition(
    backend, seed, calls, size, capacity, block_rows, loss, ids, keys, match, weights, ignored
):
    rng = np.random.default_rng(seed)
    of_library, by_loops = LOSSES[loss]
    pairing = Pairing(by_loops, MATCHES[match].of_two, WEIGHTS[weights].of_two, ignored)
    objective = xbm.Objective(
        loss=of_library,
        match=MATCHES[match].of_arrays,
        pair_weights=WEIGHTS[weights].of_arrays,
        ignore_label=ignored,
        warmup=0,
        block_rows=block_rows,
    )
    history = [Call.drawn(rng, size, ids=ids, keys=keys) for _ in range(calls)]
    run(backend, pairing, objective, history, capacity, labelled=True)


@given(**runs)
def test_without_labels_each_sample_is_a_class(backend, seed, calls, size, capacity, block_rows, loss, ids, keys):
    rng = np.random.default_rng(seed)
    of_library, by_loops = LOSSES[loss]
    pairing = Pairing(by_loops, MATCHES["equal"].of_two, WEIGHTS["one"].of_two, None)
    history = [Call.drawn(rng, size, ids=ids or not keys, keys=keys) for _ in range(calls)]
    run(
        backend,
        pairing,
        xbm.Objective(loss=of_library, warmup=0, block_rows=block_rows),
        history,
        capacity,
        labelled=False,
    )


# Options that must not change results.


def figures(backend, objectives, histories, *, labelled=True, capacity=16):
    """Return the losses and gradients of runs, one per objective and history."""
    found = []
    for objective, history in zip(objectives, histories, strict=True):
        state, seen = fresh(backend, objective, capacity), []
        for call in history:
            result = objective.step(state, **call.arguments(backend, labelled=labelled))
            state = result.state
            seen.append([backend.numpy(one) for one in result[:3] if one is not None])
        found.append(seen)
    return found


def assert_alike(one, other, of_rows=lambda x: x):
    for (loss, *gradients), (same_loss, *same_gradients) in zip(one, other, strict=True):
        np.testing.assert_allclose(same_loss, loss, rtol=1e-11, atol=1e-14)
        for gradient, same in zip(gradients, same_gradients, strict=True):
            np.testing.assert_allclose(same, of_rows(gradient), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    "options",
    [
        {"match": MATCHES["equal, said"].of_arrays},
        {"pair_weights": lambda a, b: floats(a[:, None] == a[:, None], a)},
        {"pair_weights": lambda a, b: floats(b == b, b)[None, :] * 2},
        {"pair_weights": lambda a, b: floats(a == a, a)[:, None] * 2},
        {"ignore_label": 77},
    ],
    ids=["match", "ones", "twos of rows", "twos of anchors", "no such label"],
)
@pytest.mark.parametrize("keys", [False, True], ids=["one tower", "two towers"])
def test_saying_what_holds_anyway_changes_nothing(backend, options, keys):
    history = [Call.drawn(np.random.default_rng(3 + i), 4, ids=True, keys=keys) for i in range(4)]
    plain, said = (xbm.Objective(warmup=1, **given_ones) for given_ones in ({}, options))
    assert_alike(*figures(backend, (plain, said), (history, history), capacity=10))


@pytest.mark.parametrize("labelled", [True, False], ids=["labels", "no labels"])
@given(seed=st.integers(0, 2**32 - 1), keys=st.booleans())
def test_order_and_names_of_samples_change_nothing(backend, seed, keys, labelled):
    rng = np.random.default_rng(seed)
    history = [Call.drawn(rng, 4, ids=True, keys=keys) for _ in range(3)]
    order, names = rng.permutation(4), rng.permutation(np.arange(100, 107))
    shuffled = [Call(*(None if one is None else one[order] for one in call)) for call in history]
    renamed = [call._replace(ids=np.where(call.ids < 0, -1, names[call.ids])) for call in history]
    objective = xbm.Objective(loss="supcon", warmup=0)
    same, of_shuffled, of_renamed = figures(backend, [objective] * 3, [history, shuffled, renamed], labelled=labelled)
    assert_alike(same, of_shuffled, lambda gradient: gradient[order])
    assert_alike(same, of_renamed)


# Semantics.


def unit(*angles):
    return np.asarray([[np.cos(a), np.sin(a), 0.0] for a in angles])


def test_a_query_finds_its_key_and_nobody_else_does(backend):
    """MoCo: in the memory, the positive is the slot of the key, regardless of similar keys."""
    objective = xbm.Objective(loss=xbm.SupCon(TEMPERATURE), warmup=0, in_batch=False)
    state, same = fresh(backend, objective, 6), unit(0.0, 0.0)
    for _ in range(5):  # wraps
        result = objective.step(state, backend.array(same), keys=backend.array(same))
        state = result.state
        assert float(result.loss) == pytest.approx(log(int(state.memory.count)))  # one positive among equals
        assert len(set(backend.numpy(xbm.rows(state.memory).labels).tolist())) == int(state.memory.count)


@pytest.mark.parametrize(("before", "after"), [(4, 8), (8, 3)])
def test_rows_without_labels_stay_apart_when_the_capacity_changes(backend, before, after):
    rng, objective = np.random.default_rng(0), xbm.Objective(loss="supcon", warmup=0)
    state, other = objective.init(capacity=before, dim=4, xp=backend.xp), backend.array(np.asarray([-7]))
    for _ in range(3):
        x = backend.array(rng.normal(size=(3, 4)).astype(np.float32))
        state = objective.step(state, x, keys=x).state
    x = backend.array(rng.normal(size=(1, 4)).astype(np.float32))
    state = objective.begin(xbm.resize(objective.step(state, x, other).state.memory, after))
    for _ in range(4):
        x = backend.array(rng.normal(size=(2, 4)).astype(np.float32))
        state = objective.step(state, x, keys=x).state
        labels = backend.numpy(xbm.rows(state.memory).labels).tolist()
        theirs = [label for label in labels if label != -7]
        assert len(set(theirs)) == len(theirs)


def test_two_views_and_a_memory_without_labels(backend):
    """SimCLR: the other view is positive, in the batch and in the memory; older rows of the sample are excluded."""
    ids = np.asarray([5, 6, 5, 6])
    x = unit(0.0, 1.0, 0.1, 1.2)
    objective = xbm.Objective(loss=xbm.Contrastive(neg_margin=2.0), warmup=0)  # positives only
    state = fresh(backend, objective, 16)
    expected = 2 * ((1 - np.cos(0.1)) + (1 - np.cos(0.2))) / 2  # each of two views, batch and memory
    for _ in range(3):
        result = objective.step(state, backend.array(x), ids=backend.array(ids))
        state = result.state
        assert float(result.loss) == pytest.approx(expected)


def test_accidental_hits_are_removed_by_id(backend):
    """Two towers of users and items: older keys of the query's item are neither positive nor negative."""
    objective = xbm.Objective(loss=xbm.SupCon(TEMPERATURE), warmup=0, in_batch=False)
    item, other = (backend.array(np.asarray([one])) for one in (3, 4))
    q, k = backend.array(unit(0.0)), backend.array(unit(0.2))
    state = objective.step(fresh(backend, objective, 8), q, ids=other, keys=k).state
    first = objective.step(state, q, ids=item, keys=k)
    assert float(first.loss) == pytest.approx(log(2))
    again = objective.step(first.state, q, ids=item, keys=k)
    assert float(again.loss) == pytest.approx(log(2))  # its own new key and that of the other item


def test_an_ignored_class_is_negative_to_all_and_to_itself(backend):
    x, other = unit(0.0, 0.1, 0.2), -1
    labels = np.asarray([other, other, 4])
    objective = xbm.Objective(loss=xbm.Contrastive(reduction="sum"), ignore_label=other, warmup=0)
    result = objective.step(fresh(backend, objective, 8), backend.array(x), backend.array(labels))
    push = 2 * sum(np.cos(a) - 0.5 for a in (0.1, 0.2, 0.1)) / 3
    assert float(result.loss) == pytest.approx(2 * push)  # once in the batch and once in the memory
    result = objective.evaluate(result.state, backend.array(x), backend.array(labels))
    themselves = 2 * 0.5 / 3  # from the ignored rows themselves; the third row's self-pair is its positive
    assert float(result.loss) == pytest.approx(2 * push + themselves)


@pytest.mark.parametrize("in_memory", [False, True], ids=["batch", "memory"])
def test_log_q_is_sampled_softmaxs_correction(backend, in_memory):
    """The gradient equals that of a softmax over s / t - log q; the value omits the positive's log q."""
    rng = np.random.default_rng(5)
    items, log_q = np.asarray([4, 0, 2, 1]), np.log(np.asarray([0.5, 0.2, 0.15, 0.1, 0.05]))
    q, k = rng.normal(size=(4, 3)), rng.normal(size=(4, 3))
    objective = xbm.Objective(
        loss=xbm.SupCon(TEMPERATURE),
        pair_weights=xbm.LogQ(backend.array(log_q)),
        in_batch=not in_memory,
        weight=float(in_memory),
        warmup=0,
    )
    result = objective.step(fresh(backend, objective, 4), backend.array(q), backend.array(items), keys=backend.array(k))

    def softmax(q, sign=-1):
        logits = oracle.normalize(q) @ oracle.normalize(k).T / TEMPERATURE + sign * log_q[items]
        return np.mean([np.log(np.sum(np.exp(row))) - row[i] for i, row in enumerate(logits)])

    assert float(result.loss) == pytest.approx(softmax(q) - np.mean(log_q[items]))
    np.testing.assert_allclose(backend.numpy(result.gradient), oracle.gradient(softmax, q), rtol=1e-5, atol=1e-8)
    wrong = oracle.gradient(lambda q: softmax(q, sign=1), q)
    assert not np.allclose(backend.numpy(result.gradient), wrong, atol=1e-3)


def test_a_popular_items_negative_weighs_less(backend):
    log_q = backend.array(np.log(np.asarray([0.9, 0.05, 0.05])))
    weigh = xbm.LogQ(log_q)
    popular, rare, positive = backend.numpy(weigh(backend.array(np.asarray([2])), backend.array(np.arange(3))))[0]
    assert popular < rare == positive
    objective = xbm.Objective(loss="supcon", pair_weights=weigh, warmup=5)
    losses = []
    for negative in (0, 1):
        labels = backend.array(np.asarray([2, negative]))
        x = backend.array(unit(0.0, 0.5))
        losses.append(float(objective.step(fresh(backend, objective, 4), x, labels, keys=x).loss))
    assert losses[0] != losses[1]


def test_what_is_no_pair_stays_none_whatever_it_weighs(backend):
    """Infinite weights for empty slots, whose label is 0, and for an anchor's own slot have no effect."""
    infinite = backend.array(np.asarray([np.inf, np.e]))

    def weigh(labels, row_labels):
        return backend.xp.take(infinite, row_labels)[None, :]

    objective = xbm.Objective(loss="supcon", pair_weights=weigh, warmup=0)
    result = objective.step(fresh(backend, objective, 8), backend.array(unit(0.0)), backend.array(np.asarray([1])))
    assert float(result.loss) == 0
    assert float(result.report.pairs) == 0


def test_recipes_for_several_labels(backend):
    """Bit masks and a table of each sample's labels give the same pairs."""
    xp = backend.xp
    table = np.asarray([[1, 0, 0], [1, 1, 0], [0, 1, 1], [0, 0, 1]], np.float64)
    masks = (table @ [1, 2, 4]).astype(np.int64)
    whole, samples = backend.array(table), np.asarray([0, 1, 2, 3])

    def share(a, b):
        return xp.take(whole, a, axis=0) @ xp.matrix_transpose(xp.take(whole, b, axis=0)) > 0

    x = backend.array(np.random.default_rng(1).normal(size=(4, 3)))
    by_bits = xbm.Objective(loss="supcon", warmup=0, match=lambda a, b: (a[:, None] & b[None, :]) != 0)
    by_table = xbm.Objective(loss="supcon", warmup=0, match=share)
    losses = [
        float(objective.step(fresh(backend, objective, 6), x, backend.array(labels)).loss)
        for objective, labels in ((by_bits, masks), (by_table, samples))
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-12)
    assert losses[0] > 0


# Compilers.


def _torch(function):
    import torch

    return torch.compile(function, backend="aot_eager", fullgraph=True)


def _jax(function):
    import jax

    return jax.jit(function)


def _tensorflow(function):
    import tensorflow as tf

    return tf.function(function)


COMPILERS = {"torch": _torch, "jax": _jax, "tensorflow": _tensorflow}


@pytest.mark.parametrize("how", ["match and weights", "no labels", "no labels but ids", "one tower of ids"])
def test_compiled_is_eager(backend, how):
    xp = backend.xp
    options = {}
    if how == "match and weights":
        log_q = backend.array(np.log(np.arange(1, 6) / 15))
        options = {
            "match": lambda a, b: xp.abs(a[:, None] - b[None, :]) <= 1,
            "pair_weights": xbm.LogQ(log_q),
            "ignore_label": 2,
        }
    objective = xbm.Objective(loss="supcon", warmup=1, block_rows=3, **options)
    compiled = COMPILERS.get(backend.name, lambda function: function)(objective.step)
    states = [fresh(backend, objective, 10) for _ in range(2)]
    for i in range(4):
        call = Call.drawn(np.random.default_rng(i), 4, ids="ids" in how, keys=not how.startswith("one tower"))
        given_ones = call.arguments(backend, labelled=how == "match and weights")
        found = [step(state, **given_ones) for step, state in zip((compiled, objective.step), states, strict=True)]
        states = [result.state for result in found]
        for name in ("loss", "gradient"):
            one, other = (backend.numpy(getattr(result, name)) for result in found)
            np.testing.assert_allclose(one, other, rtol=1e-9, atol=1e-12)
        for one, other in zip(*(state.memory for state in states), strict=True):
            np.testing.assert_allclose(backend.numpy(one), backend.numpy(other), rtol=1e-12)


# Errors.


@pytest.mark.parametrize(
    ("options", "error", "sentence"),
    [
        ({"match": 3}, TypeError, r"match must be callable as match\(labels, row_labels\), got 3"),
        ({"pair_weights": "log_q"}, TypeError, "pair_weights must be callable"),
        ({"ignore_label": 0.5}, TypeError, "ignore_label must be an int"),
        ({"ignore_label": 2**63}, ValueError, "ignore_label must fit int64"),
        ({"pair_weights": xbm.LogQ(np.zeros(2)), "loss": lambda S, P, N: S[:, 0]}, ValueError, "takes no pair_weights"),
    ],
)
def test_objective_refuses(options, error, sentence):
    with pytest.raises(error, match=sentence):
        xbm.Objective(**options)


@pytest.mark.parametrize(
    ("log_q", "error", "sentence"),
    [
        (np.zeros((2, 1)), ValueError, r"log_q must have shape \(items,\), one for each item, got \(2, 1\)"),
        (np.zeros(2, np.int64), TypeError, r"log_q must be float32 or float64, got .*int64 of shape \(2,\)"),
        (np.asarray([-1.0, -np.inf]), ValueError, r"log_q of shape \(2,\) must be finite and at least -80"),
        (np.asarray([-1.0, np.nan]), ValueError, "must be finite"),
    ],
)
def test_log_q_refuses(backend, log_q, error, sentence):
    with pytest.raises(error, match=sentence):
        xbm.LogQ(backend.array(log_q))


def test_log_q_refuses_what_is_no_array():
    with pytest.raises(TypeError, match=r"log_q must be an array \(items,\), got list"):
        xbm.LogQ([0.5, 0.5])


@pytest.mark.parametrize(
    ("options", "error", "sentence"),
    [
        ({"match": lambda a, b: a == b}, ValueError, r"match must return shape \(2, 2\) .*\(2,\), got \(2,\)"),
        ({"match": lambda a, b: (a == a)[None, :]}, ValueError, r"match must return shape \(2, 2\) .*got \(1, 2\)"),
        (
            {"match": lambda a, b: a[:, None] - b[None, :]},
            TypeError,
            r"match must return booleans, got .*int64 of shape",
        ),
        ({"match": lambda a, b: [True]}, TypeError, "what match returns must be an array of .*, got list"),
        ({"pair_weights": lambda a, b: floats(a, a)}, ValueError, r"pair_weights must return shape \(2, 2\), or one"),
        ({"pair_weights": lambda a, b: a[:, None]}, TypeError, "pair_weights must return floating point, got .*int64"),
    ],
)
@pytest.mark.parametrize("usual", [{}, {"in_batch": False, "warmup": 9}], ids=["in batch", "in a memory that warms up"])
def test_what_functions_of_labels_return_is_checked(backend, options, error, sentence, usual):
    """At the first call, before anything is stored, whatever is compared in it."""
    objective = xbm.Objective(**{"warmup": 0} | usual | options)
    state = fresh(backend, objective, 4)
    before = snapshot(backend, state)
    x, labels = backend.array(np.ones((2, 3))), backend.array(np.asarray([0, 1]))
    with pytest.raises(error, match=sentence):
        objective.step(state, x, labels)
    assert_same_state(backend, state, before)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"key_labels": np.zeros(2, np.int64)}, "key_labels were given without labels"),
        ({"keys": np.ones((3, 3))}, "labels and key_labels are needed unless .* 2 queries and 3 keys"),
        ({"keys": None}, "labels are missing: they are optional only with ids, .* or with keys"),
    ],
)
def test_a_step_without_labels_refuses(backend, change, sentence):
    objective = xbm.Objective()
    state = fresh(backend, objective, 4)
    before = snapshot(backend, state)
    given_ones = {"x": np.ones((2, 3)), "keys": np.ones((2, 3))} | change
    with pytest.raises(ValueError, match=sentence):
        objective.step(state, **keywords(backend, **given_ones))
    assert_same_state(backend, state, before)
