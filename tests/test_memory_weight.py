"""The weight of the memory: of rows by age, and of the memory loss by ramp, settle and balance."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import xbm
from tests import oracle
from tests.pair_losses import LOSSES
from tests.ranks import Threads, together
from tests.strategies import lengths
from tests.test_objective import away_from_thresholds, keywords
from tests.test_pairing import COMPILERS, Call, agrees
from tests.test_pairing import LOSSES as BY_LOOPS
from tests.test_ranks import COMPILES
from xbm import RowLoss, backends, compensation
from xbm.backends import array_namespace
from xbm.compensation import Motion
from xbm.memory import MemoryState
from xbm.objective import REPORT
from xbm.pairs import Ageing


class OfBooleans(RowLoss):
    """A loss of booleans, for which a pair counts regardless of its weight."""

    def whole(self, block):
        xp = array_namespace(block.S)
        W = xp.where(block.P > 0, block.S - 1, 0.0) + xp.where(block.N > 0, block.S, 0.0)
        return xp.sum(W**2, axis=1) / 2, W


ONE_OF_EACH = list({type(loss): loss for loss in [*LOSSES, OfBooleans()]}.values())


def fresh(backend, capacity, dim=3):
    return xbm.init(capacity=capacity, dim=dim, dtype=backend.xp.float64, xp=backend.xp)


def figures(backend, result):
    return dict(zip(REPORT, backend.numpy(result.report).tolist(), strict=True))


# Weights of rows by age.


@given(
    seed=st.integers(0, 2**32 - 1),
    size=lengths(1, 5, [4]),
    capacity=lengths(5, 24, [24]),
    classes=st.sampled_from([2, 30]),  # with 30, most rows have no anchor's class
    block_rows=lengths(4, 24, [24]),
    loss=st.sampled_from(sorted(BY_LOOPS)),
    max_age=st.sampled_from([None, 1, 2]),
    half_life=st.sampled_from([None, 0.75, 3.0]),
)
def test_old_rows_count_less_or_not_at_all(
    backend, seed, size, capacity, classes, block_rows, loss, max_age, half_life
):
    """Losses and gradients of whole runs equal those of loops over rows and their ages."""
    rng, (of_library, by_loops) = np.random.default_rng(seed), BY_LOOPS[loss]
    objective = xbm.Objective(
        loss=of_library, warmup=0, in_batch=False, block_rows=block_rows, max_age=max_age, half_life=half_life
    )
    state, model = fresh(backend, capacity), oracle.Memory(capacity)

    def expected(x, keys=None):
        z, total = oracle.normalize(x), 0.0
        for i in range(size):
            similarities, P, N = [], [], []
            for row in model.rows:
                age = model.step - row.stored_at
                if row.anchor == i or (max_age is not None and age > max_age):
                    continue
                weight = 1.0 if half_life is None else 0.5 ** (age / half_life)
                similarities.append(z[i] @ row.z)
                P.append(weight * (labels[i] == row.label))
                N.append(weight * (labels[i] != row.label))
            total += by_loops(similarities, P, N)
        return total / size

    for _ in range(4):
        x, labels = rng.normal(size=(size, 3)), rng.integers(classes, size=size)
        result = objective.step(state, backend.array(x), backend.array(labels))
        state = result.state
        model.enqueue(oracle.normalize(x), labels, mark=True)
        assume(away_from_thresholds(oracle.normalize(x), np.asarray([row.z for row in model.rows])))
        agrees(backend, result, Call(x, labels, None, None, None, None), expected)
        model.end_call()


@pytest.mark.parametrize("loss", ONE_OF_EACH, ids=lambda loss: type(loss).__name__)
def test_to_every_loss_a_row_that_is_too_old_is_not_there(backend, loss):
    """A full memory with a few young rows behaves like one that never held the old rows, in the same slots."""
    rng = np.random.default_rng(0)
    old, young, anchors = (rng.normal(size=(n, 16)) for n in (8, 5, 4))
    several, few = (fresh(backend, 8, 16) for _ in range(2))
    several = xbm.enqueue(several, backend.array(old), backend.array(np.arange(8) % 3))
    for _ in range(3):
        several, few = xbm.advance(several), xbm.advance(few)
    several, few = (
        xbm.advance(xbm.enqueue(state, backend.array(young), backend.array(np.arange(5) % 3)))
        for state in (several, few)
    )
    labels = backend.array(np.asarray([0, 1, 1, 2]))
    of_few, of_several, of_all = (
        xbm.Objective(loss=loss, warmup=0, in_batch=False, max_age=max_age).evaluate(
            state, backend.array(anchors), labels, gradient=True
        )
        for state, max_age in ((few, None), (several, 1), (several, 4))
    )
    assert float(of_several.loss) == pytest.approx(float(of_few.loss), rel=1e-12)
    np.testing.assert_allclose(backend.numpy(of_several.gradient), backend.numpy(of_few.gradient), atol=1e-12)
    assert figures(backend, of_several)["pairs"] == figures(backend, of_few)["pairs"]
    assert not np.allclose(backend.numpy(of_all.gradient), backend.numpy(of_few.gradient))


def test_a_row_of_any_age_still_counts(backend):
    """Also if it is the only positive: 2^-10000 underflows in float32, and the mean is over the remaining pairs."""
    ones, ages = backend.array(np.ones(4, np.float32)), backend.array(np.asarray([0, 1, 3, 30_000]))
    weights = backend.numpy(Ageing(half_life=3.0).weighted(ones, ages))
    np.testing.assert_allclose(weights, [1.0, 0.5 ** (1 / 3), 0.5, 2.0**-60], rtol=1e-6)
    assert np.isfinite(1 / weights**2).all()


# Weight of the memory loss.


def turned(angle):
    """Return (4, 3) rotated rows, so that samples drift by 2 - 2 cos(angle)."""
    base = np.arange(4) * 0.7 + angle
    return np.stack([np.cos(base), np.sin(base), np.zeros(4)], axis=1)


def terms(backend, state, x, labels, ids, **options):
    """Return the losses and gradients of a step: in batch only, memory only, and both."""
    found = []
    for alone in ({"weight": 0.0}, {"in_batch": False}):
        twin = MemoryState(*(backend.array(backend.numpy(one)) for one in state))
        result = xbm.Objective(warmup=0, **options, **alone).step(twin, x, labels, ids=ids)
        found.append((float(result.loss), backend.numpy(result.gradient)))
    return found


@pytest.mark.parametrize("settles", [False, True])
def test_the_weight_rises_from_when_the_memory_counts(backend, settles):
    """The weight grows by 1 / ramp per call, from the first call after `warmup` whose drift is small enough.

    Small drift before that call, or large drift after it, has no effect.
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
    state, factors = fresh(backend, 12), []
    motion = compensation.init(state) if settles else None
    for call, angle in enumerate(angles):
        x = backend.array(turned(angle))
        (loss, gradient), (more, of_memory) = terms(backend, state, x, labels, ids, copies="keep")
        result = objective.step(state, x, labels, ids=ids, motion=motion)
        # As after a resumed run: all state is in the memory state and the motion.
        state = MemoryState(*(backend.array(backend.numpy(one)) for one in result.state))
        factor = 0.5 * min(max(call - first + 1, 0), 3) / 3
        factors.append(factor)
        assert float(result.loss) == pytest.approx(loss + factor * more, rel=1e-9)
        np.testing.assert_allclose(backend.numpy(result.gradient), gradient + factor * of_memory, atol=1e-12)
        assert figures(backend, result)["memory_loss"] == pytest.approx(factor * more, rel=1e-5)
        if settles:
            motion = Motion(*(backend.array(backend.numpy(one)) for one in result.motion))
            assert float(motion.drift) == pytest.approx(means[call], rel=1e-5, nan_ok=True)
            assert int(motion.settled) == min(max(call - first + 1, 0), 3)
            evaluated = objective.evaluate(state, x, labels, ids=ids, motion=motion)
            assert (figures(backend, evaluated)["memory_loss"] > 0) == (call >= first)
    assert factors[first - 1] == 0 < factors[first] < factors[-1] == 0.5


def test_calls_without_samples_that_come_back_say_nothing_of_the_drift(backend):
    objective = xbm.Objective(warmup=0, settle=1e-3)
    state, labels = fresh(backend, 12), backend.array(np.asarray([0, 0, 1, 1]))
    motion, drifts = compensation.init(state), []
    for first, angle in ((0, 0.0), (4, 0.0), (0, 0.5), (9, 0.0)):
        ids = backend.array(np.arange(first, first + 4))
        result = objective.step(state, backend.array(turned(angle)), labels, ids=ids, motion=motion)
        state, motion = result.state, result.motion
        drifts.append(float(motion.drift))
    assert drifts == pytest.approx([np.nan, np.nan, *[2 - 2 * np.cos(0.5)] * 2], rel=1e-6, nan_ok=True)
    assert int(motion.settled) == 0


def test_a_cleared_memory_is_still_and_has_settled(backend):
    objective = xbm.Objective(warmup=0, settle=4.0, compensate=xbm.Compensation())
    state, labels, ids = fresh(backend, 12), backend.array(np.asarray([0, 0, 1, 1])), backend.array(np.arange(4))
    motion = compensation.init(state)
    for angle in (0.0, 0.2, 0.4):
        result = objective.step(state, backend.array(turned(angle)), labels, ids=ids, motion=motion)
        state, motion = result.state, result.motion
    assert np.any(backend.numpy(motion.shift))
    assert int(motion.settled) > 0
    state = xbm.clear(state)
    cleared, still = compensation.clear(state, motion), compensation.init(state)
    assert int(cleared.settled) > 0
    for name in set(Motion._fields) - {"settled"}:
        np.testing.assert_array_equal(*(backend.numpy(getattr(one, name)) for one in (cleared, still)))


@given(
    seed=st.integers(0, 2**32 - 1),
    size=lengths(2, 6, [4]),
    balance=st.sampled_from([0.25, 1.0, 3.0]),
    weight=st.sampled_from([0.5, 1.0]),
    normalize=st.booleans(),
    keys=st.booleans(),
)
def test_the_terms_gradients_are_balanced(backend, seed, size, balance, weight, normalize, keys):
    """A balanced step equals one whose weight makes the memory's |dL/dz| `balance` times that of the batch."""
    rng = np.random.default_rng(seed)
    old, x, k = (rng.normal(size=(n, 3)) for n in (6, size, size))
    z, unit_k, rows = (oracle.normalize(one) if normalize else one for one in (x, k, old))
    classes = backend.array(rng.integers(2, size=size))

    def step(x, k, **options):
        state = xbm.enqueue(fresh(backend, 12), backend.array(rows), backend.array(np.arange(6) % 2))
        more = {"keys": backend.array(k)} if keys else {}
        objective = xbm.Objective(loss="supcon", warmup=0, **options)
        return objective.step(xbm.advance(state), backend.array(x), classes, **more)

    in_batch, in_memory = (
        np.linalg.norm(backend.numpy(step(z, unit_k, normalize=False, **alone).gradient))
        for alone in ({"weight": 0.0}, {"in_batch": False})
    )
    factor = balance * in_batch / in_memory if in_batch > 0 and in_memory > 0 else 1.0
    balanced = step(x, k, balance=balance, weight=weight, normalize=normalize)
    plain = step(x, k, weight=weight * factor, normalize=normalize)
    assert float(balanced.loss) == pytest.approx(float(plain.loss), rel=1e-9)
    for name in ("gradient", *(["key_gradient"] if keys else [])):
        one, other = (backend.numpy(getattr(result, name)) for result in (balanced, plain))
        np.testing.assert_allclose(one, other, rtol=1e-9, atol=1e-12)


def _torch(function, x):
    x = x.detach().requires_grad_()
    function(x).backward()
    return x.grad


def _jax(function, x):
    import jax

    return jax.grad(function)(x)


def _tensorflow(function, x):
    import tensorflow as tf

    with tf.GradientTape() as tape:
        tape.watch(x)
        loss = function(x)
    return tape.gradient(loss, x)


DIFFERENTIATED = {"torch": _torch, "jax": _jax, "tensorflow": _tensorflow}


def test_the_balance_is_a_constant_for_the_gradient(backend):
    """The autodiff gradient equals the returned one; the gradient of learned parameters includes the balance.

    Evaluation without gradients applies no balance.
    """
    x, labels = backend.array(turned(0.3) + 0.1), backend.array(np.asarray([0, 0, 1, 1]))
    state = xbm.advance(xbm.enqueue(fresh(backend, 12), backend.array(turned(0.0)), labels))
    balanced, plain = (xbm.Objective(loss="supcon", warmup=0, balance=one) for one in (2.0, None))
    with_gradient, without = balanced.evaluate(state, x, labels, gradient=True), balanced.evaluate(state, x, labels)
    assert float(without.loss) == pytest.approx(float(plain.evaluate(state, x, labels).loss), rel=1e-12)
    assert float(without.loss) != pytest.approx(float(with_gradient.loss), rel=1e-3)
    if backend.name in DIFFERENTIATED:
        differentiated = DIFFERENTIATED[backend.name]
        found = differentiated(lambda x: balanced.evaluate(state, x, labels, gradient=True).loss, x)
        np.testing.assert_allclose(backend.numpy(found), backend.numpy(with_gradient.gradient), rtol=1e-9, atol=1e-12)

        def learning(t, **options):
            def loss(S, positive, negative):
                xp = backend.xp
                return xp.sum(t * xp.where(positive, 1 - S, 0.0) + xp.where(negative, S**2, 0.0), axis=1)

            return xbm.Objective(loss=loss, warmup=0, **options).evaluate(state, x, labels, gradient=True).loss

        t, (_, ops) = backend.array(np.asarray(0.7)), backends.of(x)
        alone, both, balanced_both = (
            float(ops.stop_gradient(learning(t, **one))) for one in ({"weight": 0.0}, {}, {"balance": 2.0})
        )
        factor = (balanced_both - alone) / (both - alone)
        of_balanced, of_plain = (
            float(differentiated(lambda t, options=options: learning(t, **options), t))
            for options in ({"balance": 2.0}, {"weight": factor})
        )
        assert of_balanced == pytest.approx(of_plain, rel=1e-9)


def test_an_infinite_memory_term_reaches_no_warmup(backend):
    """A non-finite memory loss is masked before it is multiplied by any weight."""
    options = {"loss": xbm.Contrastive(pos_margin=1e308), "half_life": 2.0}
    labels, x = (
        backend.array(np.arange(4)),
        backend.array(turned(0.0)),
    )  # one class per sample: no positives in the batch
    state = fresh(backend, 12)
    for _ in range(2):
        state = xbm.enqueue(state, x, labels * 0)
    plain = xbm.Objective(**options, weight=0.0).evaluate(state, x, labels, gradient=True)
    motion, objective = compensation.init(state), xbm.Objective(**options, warmup=1, settle=1e-9, ramp=2, balance=1.0)
    with np.errstate(over="ignore"):
        for call in range(2):
            result = objective.step(state, x, labels, ids=labels + 4 * call, motion=motion)
            state, motion = result.state, result.motion
            assert float(result.loss) == float(plain.loss)
            np.testing.assert_array_equal(backend.numpy(result.gradient), backend.numpy(plain.gradient))
        assert float(xbm.Objective(**options, warmup=2, ramp=2, balance=1.0).step(state, x, labels).loss) == np.inf


# Everything compiled, and over ranks.

EVERYTHING = {"max_age": 2, "half_life": 1.5, "ramp": 2, "balance": 0.7, "settle": 3.0}


def test_compiled_is_eager(backend):
    objective = xbm.Objective(warmup=1, **EVERYTHING)
    compiled = COMPILERS.get(backend.name, lambda function: function)(objective.step)
    rng, both = np.random.default_rng(0), [fresh(backend, 12) for _ in range(2)]
    motions, losses = [compensation.init(state) for state in both], []
    for _ in range(4):
        x, labels, ids = rng.normal(size=(4, 3)), rng.integers(3, size=4), rng.integers(9, size=4)
        arrays = keywords(backend, x=x, labels=labels, ids=ids)
        found = [
            step(state, **arrays, motion=motion)
            for step, state, motion in zip((compiled, objective.step), both, motions, strict=True)
        ]
        both, motions = [one.state for one in found], [one.motion for one in found]
        for one, other in zip(
            (found[0].loss, found[0].gradient, *motions[0]),
            (found[1].loss, found[1].gradient, *motions[1]),
            strict=True,
        ):
            np.testing.assert_allclose(backend.numpy(one), backend.numpy(other), rtol=1e-6, atol=1e-9)
        losses.append(figures(backend, found[0])["memory_loss"])
    assert losses[-1] > 0 == losses[0]


@pytest.mark.parametrize("sharded", [False, True])
@settings(max_examples=1 if COMPILES else 5)
@given(seed=st.integers(0, 2**32 - 1))
def test_ranks_are_one_process(backend, sharded, seed):
    rng, ranks = np.random.default_rng(seed), 2
    objective = xbm.Objective(warmup=1, copies="replace", **EVERYTHING)
    states = [fresh(backend, capacity) for capacity in (12, *[6 if sharded else 12] * ranks)]
    motions = [compensation.init(state) for state in states]
    for _ in range(4):
        x, labels, ids = rng.normal(size=(8, 3)), rng.integers(3, size=8), rng.integers(9, size=8)
        parts = [slice(8), slice(4), slice(4, 8)]
        arrays = [keywords(backend, x=x[part], labels=labels[part], ids=ids[part]) for part in parts]

        def work(rank, meeting, states=states, motions=motions, arrays=arrays):
            with backend.context():
                group, n = Threads(meeting, rank, ranks, sharded=sharded), 1 + rank
                return objective.step(states[n], **arrays[n], motion=motions[n], group=group)

        found = [objective.step(states[0], **arrays[0], motion=motions[0]), *together(ranks, work)]
        states, motions = [result.state for result in found], [result.motion for result in found]
        for result in found[1:]:
            np.testing.assert_allclose(backend.numpy(result.loss), backend.numpy(found[0].loss), rtol=1e-9)
            for name in ("drift", "settled"):
                one, other = (backend.numpy(getattr(each.motion, name)) for each in (result, found[0]))
                np.testing.assert_allclose(one, other, rtol=1e-6)
        expected, *gradients = (backend.numpy(result.gradient) for result in found)
        np.testing.assert_allclose(np.concatenate(gradients), expected, rtol=1e-7, atol=1e-12)
    assert int(motions[0].settled) > 0


# Errors.


@pytest.mark.parametrize(
    ("options", "error", "sentence"),
    [
        ({"max_age": 0}, ValueError, "max_age must be at least 1, got 0"),
        ({"max_age": 2.0}, TypeError, "max_age must be an int, got 2.0"),
        ({"half_life": 0}, ValueError, "half_life must be above 0, got 0"),
        ({"half_life": float("inf")}, ValueError, "half_life must be a finite number"),
        ({"half_life": 3.0, "loss": max}, ValueError, "max is a function of booleans, which tell no half_life"),
        ({"ramp": -1}, ValueError, "ramp must be at least 0, got -1"),
        ({"settle": 0.0}, ValueError, "settle must be above 0"),
        ({"settle": "soon"}, TypeError, "settle must be a number, got 'soon'"),
        ({"balance": -1.0}, ValueError, "balance must be above 0"),
        ({"balance": 1.0, "in_batch": False}, ValueError, "balance goes by the gradient of the in-batch term"),
    ],
)
def test_objective_refuses(options, error, sentence):
    with pytest.raises(error, match=sentence):
        xbm.Objective(**options)


def test_settling_wants_a_motion_and_ids(backend):
    objective, state = xbm.Objective(settle=0.1), fresh(backend, 12)
    x, labels = backend.array(turned(0.0)), backend.array(np.asarray([0, 0, 1, 1]))
    motion = compensation.init(state)
    assert objective.needs_motion
    assert xbm.Objective(compensate=xbm.Compensation()).needs_motion
    assert not xbm.Objective().needs_motion
    with pytest.raises(ValueError, match="where the objective compensates or settles, and there alone"):
        objective.step(state, x, labels, ids=labels)
    with pytest.raises(ValueError, match="step wants their ids"):
        objective.step(state, x, labels, motion=motion)
    with pytest.raises(ValueError, match="to tell whether it has settled"):
        objective.evaluate(state, x, labels)
    with pytest.raises(ValueError, match="and there alone"):
        xbm.Objective().step(state, x, labels, motion=motion)
    assert int(state.step) == int(state.count) == 0
