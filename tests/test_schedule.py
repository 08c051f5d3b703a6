"""When the memory term counts, and how much: its warm-up, by calls or by drift, and its ramp."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import xbm
from tests.ranks import Threads, together
from tests.test_memory import assert_same_state, snapshot
from tests.test_objective import keywords
from tests.test_pairing import COMPILERS
from tests.test_ranks import FEW
from xbm.compensation import still
from xbm.state import from_named, named


def fresh(backend, objective, capacity):
    return objective.init(capacity=capacity, dim=3, dtype=backend.xp.float64, xp=backend.xp)


def copied(backend, state):
    """Return a state with its arrays copied, as a checkpoint would."""
    return from_named({name: backend.array(backend.numpy(one)) for name, one in named(state).items()})


# The term's weight.


def turned(angle):
    """Return (4, 3) rows that turn on, so that samples drift by 2 - 2 cos(angle)."""
    base = np.arange(4) * 0.7 + angle
    return np.stack([np.cos(base), np.sin(base), np.zeros(4)], axis=1)


def terms(backend, state, x, labels, ids, **options):
    """Return the losses and gradients (in batch, against the memory), each alone and in full, of a step."""
    found = []
    for alone in ({"weight": 0.0}, {"in_batch": False}):
        twin = copied(backend, state)
        result = xbm.Objective(warmup=0, **options, **alone).step(twin, x, labels, ids=ids)
        found.append((float(result.loss), backend.numpy(result.gradient)))
    return found


@pytest.mark.parametrize("settles", [False, True])
def test_the_weight_rises_from_when_the_memory_counts(backend, settles):
    """By 1 / ramp a call, beginning with the first that counts: after `warmup` calls, or when the drift is small then.

    Drift that was small before, or is large afterwards, changes nothing.
    """
    angles = [0.0, 0.1, 1.1, 1.1, 1.1, 2.7, 2.8, 2.8]
    distances = [2 - 2 * np.cos(b - a) for a, b in pairwise(angles)]
    mean, means = np.nan, [np.nan]
    for distance in distances:
        mean = distance if np.isnan(mean) else 0.9 * mean + 0.1 * distance
        means.append(mean)
    threshold, first = (float(np.mean(means[3:5])), 4) if settles else (None, 2)
    assert means[1] < np.mean(means[3:5]) < min(means[5:])
    labels, ids = backend.array(np.asarray([0, 0, 1, 1])), backend.array(np.arange(4))
    objective = xbm.Objective(warmup=2, ramp=3, weight=0.5, settle=threshold, copies="keep")
    state, factors = fresh(backend, objective, 12), []
    for call, angle in enumerate(angles):
        x = backend.array(turned(angle))
        (loss, gradient), (more, of_memory) = terms(backend, state, x, labels, ids, copies="keep")
        result = objective.step(state, x, labels, ids=ids)
        state = copied(backend, result.state)  # as after a pause: the state holds all that is remembered
        factor = 0.5 * min(max(call - first + 1, 0), 3) / 3
        factors.append(factor)
        assert float(result.loss) == pytest.approx(loss + factor * more, rel=1e-9)
        np.testing.assert_allclose(backend.numpy(result.gradient), gradient + factor * of_memory, atol=1e-12)
        assert float(result.report.memory_loss) == pytest.approx(factor * more, rel=1e-5)
        if settles:
            assert float(state.warmup.drift) == pytest.approx(means[call], rel=1e-5, nan_ok=True)
            assert int(state.warmup.counted) == min(max(call - first + 1, 0), 3)
            evaluated = objective.evaluate(state, x, labels, ids=ids)
            assert (float(evaluated.report.memory_loss) > 0) == (call >= first)
    assert factors[first - 1] == 0 < factors[first] < factors[-1] == 0.5


def test_calls_without_samples_that_come_back_say_nothing_of_the_drift(backend):
    objective = xbm.Objective(warmup=0, settle=1e-3)
    state, labels = fresh(backend, objective, 12), backend.array(np.asarray([0, 0, 1, 1]))
    drifts = []
    for first, angle in ((0, 0.0), (4, 0.0), (0, 0.5), (9, 0.0)):
        ids = backend.array(np.arange(first, first + 4))
        state = objective.step(state, backend.array(turned(angle)), labels, ids=ids).state
        drifts.append(float(state.warmup.drift))
    assert drifts == pytest.approx([np.nan, np.nan, *[2 - 2 * np.cos(0.5)] * 2], rel=1e-6, nan_ok=True)
    assert int(state.warmup.counted) == 0


def test_a_cleared_memory_is_still_and_has_settled(backend):
    objective = xbm.Objective(warmup=0, settle=4.0, compensate=xbm.Compensation())
    state, labels = fresh(backend, objective, 12), backend.array(np.asarray([0, 0, 1, 1]))
    ids = backend.array(np.arange(4))
    for angle in (0.0, 0.2, 0.4):
        state = objective.step(state, backend.array(turned(angle)), labels, ids=ids).state
    assert np.any(backend.numpy(state.motion.shift))
    assert float(state.warmup.drift) > 0
    assert int(state.warmup.counted) > 0
    cleared = objective.clear(state)
    assert int(cleared.warmup.counted) > 0
    assert np.isnan(float(cleared.warmup.drift))
    assert int(cleared.memory.count) == 0 < int(cleared.memory.step)
    for one, other in zip(cleared.motion, still(cleared.memory), strict=True):
        np.testing.assert_array_equal(backend.numpy(one), backend.numpy(other))


def test_an_infinite_memory_term_reaches_no_warmup(backend):
    """Whatever the term is multiplied by, it is selected away first."""
    options = {"loss": xbm.Contrastive(pos_margin=1e308)}
    labels, x = backend.array(np.arange(4)), backend.array(turned(0.0))  # a class each: no positives in the batch
    objective = xbm.Objective(**options, warmup=1, settle=1e-9, ramp=2)
    memory = fresh(backend, objective, 12).memory
    for _ in range(2):
        memory = xbm.enqueue(memory, x, labels * 0)
    state = objective.begin(memory)
    plain = xbm.Objective(**options, weight=0.0).evaluate(state, x, labels, gradient=True)
    with np.errstate(over="ignore"):
        for call in range(2):
            result = objective.step(state, x, labels, ids=labels + 4 * call)
            state = result.state
            assert float(result.loss) == float(plain.loss)
            np.testing.assert_array_equal(backend.numpy(result.gradient), backend.numpy(plain.gradient))
        assert float(xbm.Objective(**options, warmup=2, ramp=2).step(state, x, labels).loss) == np.inf


# All of it: compiled, and over ranks.

EVERYTHING = {"ramp": 2, "settle": 3.0}


def test_compiled_is_eager(backend):
    objective = xbm.Objective(warmup=1, **EVERYTHING)
    compiled = COMPILERS.get(backend.name, lambda function: function)(objective.step)
    rng, both = np.random.default_rng(0), [fresh(backend, objective, 12) for _ in range(2)]
    losses = []
    for _ in range(4):
        x, labels, ids = rng.normal(size=(4, 3)), rng.integers(3, size=4), rng.integers(9, size=4)
        arrays = keywords(backend, x=x, labels=labels, ids=ids)
        found = [step(state, **arrays) for step, state in zip((compiled, objective.step), both, strict=True)]
        both = [one.state for one in found]
        for one, other in zip(*((one.loss, one.gradient, *one.state.warmup) for one in found), strict=True):
            np.testing.assert_allclose(backend.numpy(one), backend.numpy(other), rtol=1e-6, atol=1e-9)
        losses.append(float(found[0].report.memory_loss))
    assert losses[-1] > 0 == losses[0]


@pytest.mark.parametrize("sharded", [False, True])
@settings(max_examples=FEW)
@given(seed=st.integers(0, 2**32 - 1))
@example(seed=0)  # which settles
@example(seed=3511753)  # whose drift stays too large
def test_ranks_are_one_process(backend, sharded, seed):
    rng, ranks = np.random.default_rng(seed), 2
    objective = xbm.Objective(warmup=1, copies="replace", **EVERYTHING)
    states, drifts = [fresh(backend, objective, capacity) for capacity in (12, *[6 if sharded else 12] * ranks)], []
    for _ in range(4):
        x, labels, ids = rng.normal(size=(8, 3)), rng.integers(3, size=8), rng.integers(9, size=8)
        parts = [slice(8), slice(4), slice(4, 8)]
        arrays = [keywords(backend, x=x[part], labels=labels[part], ids=ids[part]) for part in parts]

        def work(rank, meeting, states=states, arrays=arrays):
            with backend.context():
                group, n = Threads(meeting, rank, ranks, sharded=sharded), 1 + rank
                return objective.step(states[n], **arrays[n], group=group)

        found = [objective.step(states[0], **arrays[0]), *together(ranks, work)]
        states = [result.state for result in found]
        drifts.append(float(states[0].warmup.drift))
        for result in found[1:]:
            np.testing.assert_allclose(backend.numpy(result.loss), backend.numpy(found[0].loss), rtol=1e-9)
            for one, other in zip(result.state.warmup, states[0].warmup, strict=True):
                np.testing.assert_allclose(backend.numpy(one), backend.numpy(other), rtol=1e-6)
        expected, *gradients = (backend.numpy(result.gradient) for result in found)
        np.testing.assert_allclose(np.concatenate(gradients), expected, rtol=1e-7, atol=1e-12)
    assert (int(states[0].warmup.counted) > 0) == any(drift <= EVERYTHING["settle"] for drift in drifts[1:])


# Refusals.


@pytest.mark.parametrize(
    ("options", "error", "sentence"),
    [
        ({"ramp": -1}, ValueError, "ramp must be at least 0, got -1"),
        ({"settle": 0.0}, ValueError, "settle must be above 0"),
        ({"settle": "soon"}, TypeError, "settle must be a number, got 'soon'"),
    ],
)
def test_objective_refuses(options, error, sentence):
    with pytest.raises(error, match=sentence):
        xbm.Objective(**options)


def test_settling_needs_its_state_and_ids(backend):
    objective, x = xbm.Objective(settle=0.1), backend.array(turned(0.0))
    labels, state = backend.array(np.asarray([0, 0, 1, 1])), fresh(backend, objective, 12)
    before = snapshot(backend, state)
    with pytest.raises(ValueError, match="pass their ids to each training call"):
        objective.step(state, x, labels)
    without = state._replace(warmup=None)
    for call in (objective.step, objective.evaluate):
        with pytest.raises(ValueError, match="the state was made without settle="):
            call(without, x, labels, ids=labels)
    assert_same_state(backend, state, before)
    assert np.isfinite(float(objective.evaluate(state, x, labels).loss))  # no ids: nothing is measured
