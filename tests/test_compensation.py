"""Drift compensation, compared with leave-one-out refits and a NumPy simulation; and cases in which it must not act."""

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import xbm
from tests.oracle import normalize
from tests.test_memory import assert_same_state, snapshot
from xbm.compensation import Motion, Rounds, still
from xbm.compensation.fitting import LEAST_PAIRS, RIDGES, Map, fit
from xbm.compensation.following import TRUST_DECAY
from xbm.compensation.moving import moved
from xbm.compensation.rounds import check_known
from xbm.memory_state import MemoryState

M, D, P, EVERY = 40, 8, 16, 4  # shared by most tests, because JAX compiles for each shape
SEEDS = st.integers(0, 2**32 - 1)


def memory(backend, rows, ages=None, *, dtype="float64", capacity=M, step=100):
    """Return a memory with rows (n, D) of samples 0, 1, ... in its first slots, stored `ages` or 1 calls ago."""
    n, dim = rows.shape
    state = xbm.init(capacity=capacity, dim=dim, dtype=getattr(backend.xp, dtype), xp=backend.xp)
    embeddings, stored_at, ids = np.zeros((capacity, dim)), np.full(capacity, -1), np.full(capacity, -1)
    embeddings[:n], stored_at[:n], ids[:n] = rows, step - (1 if ages is None else ages), np.arange(n)
    counters = {"cursor": n % capacity, "count": n, "step": step}
    return state._replace(
        embeddings=backend.xp.astype(backend.array(embeddings), state.embeddings.dtype),
        **{name: backend.array(np.asarray(one)) for name, one in counters.items()},
        **{name: backend.array(one) for name, one in {"ids": ids, "stored_at": stored_at}.items()},
    )


def rotation(rng, size=1.0, dim=D):
    """Return a rotation (D, D); smaller values are closer to the identity."""
    skew = rng.normal(size=(dim, dim), scale=size / 2)
    skew, one = (skew - skew.T) / 2, np.eye(dim)
    return np.linalg.solve(one - skew, one + skew)


def squared(rows, others):
    return np.mean(np.sum((rows - others) ** 2, axis=1))


def round_of(backend, compensate, state, slots, fresh, valid=None, *, unit=True):
    """Return the memory after a round, as NumPy arrays, and the motion."""
    valid = None if valid is None else backend.array(valid)
    arrays = backend.array(slots), backend.array(fresh), valid
    state, motion = compensate.move(state, still(state), *arrays, normalize=unit)
    return MemoryState(*snapshot(backend, state)), Motion(*map(backend.numpy, motion))


# A round


def moved_by(a, old, new, ridge, rows, exposure):
    """Return rows moved by the (b, A) that minimise |new - old - a (b + old A)|^2 + ridge |A|^2 over pairs."""
    X, penalty = (a, [0.0]) if ridge is None else (np.hstack([a, a * old]), [0.0] + [ridge] * old.shape[1])
    found = np.linalg.lstsq(X.T @ X + np.diag(penalty), X.T @ (new - old), rcond=None)[0]
    return rows + exposure[:, None] * (found[0] + (rows @ found[1:] if len(found) > 1 else 0.0))


def definition(rows, ages, slots, fresh, valid, *, every, form, ridge, unit):
    """Return the rows after a round, and the pairs' mean squared distance before and after, with leave-one-out fits."""
    exposure = np.clip(ages, 0, every) / every
    slots, new = slots[valid & (exposure[slots] > 0)], fresh[valid & (exposure[slots] > 0)]
    new = normalize(new) if unit else new
    old, a, shaped = rows[slots], exposure[slots][:, None], normalize if unit else np.asarray
    best, unmoved = None, np.sum((old - new) ** 2, axis=1)
    before = after = np.mean(unmoved)
    for one in (None, ridge) if form == "affine" else (None,):
        scaled = one
        if one is not None:
            U = a * (old - np.sum(a**2 * old, axis=0) / np.sum(a**2))
            scaled = one * np.sum(U**2) / D
        left_out = []
        for i in range(len(slots)):
            others = np.arange(len(slots)) != i
            left_out += [moved_by(a[others], old[others], new[others], scaled, old[i : i + 1], a[i])]
        errors = np.sum((shaped(np.concatenate(left_out)) - new) ** 2, axis=1)
        if best is None or np.mean(errors) < after:
            best, after = (scaled,), np.mean(errors)
            won = unmoved - errors
    if len(slots) >= LEAST_PAIRS and np.mean(won) > np.std(won, ddof=1) / len(won) ** 0.5:  # a standard error
        rows = np.where(exposure[:, None] > 0, shaped(moved_by(a, old, new, *best, rows, exposure)), rows)
    else:
        after = before
    rows = rows.copy()
    rows[slots] = new
    return rows, before, after


@settings(max_examples=max(8, settings.default.max_examples // 2))
@given(
    seed=SEEDS,
    form=st.sampled_from(["affine", "shift"]),
    ridge=st.sampled_from([0.0, 0.1, 3.0]),
    unit=st.booleans(),
    noise=st.sampled_from([0.0, 0.3, 1.0, 3.0]),
    some=st.sampled_from([1.0, 0.9]),
)
def test_a_round_is_its_definition(backend, seed, form, ridge, unit, noise, some):
    """The closed-form leave-one-out error equals that of refits; a map that does not help the pairs is not applied."""
    rng = np.random.default_rng(seed)
    rows, ages = rng.normal(size=(M, D)), rng.integers(0, 2 * EVERY, size=M)
    rows = normalize(rows) if unit else rows
    slots, valid = rng.permutation(M)[:P], rng.random(P) < some
    fresh = rows[slots] @ rotation(rng, 0.8) + 0.2 + noise * rng.normal(size=(P, D))
    assume(np.sum(valid & (ages[slots] > 0)) > D + 2)
    options = {"every": EVERY, "form": form, "ridge": ridge}
    expected, before, after = definition(rows, ages, slots, fresh, valid, **options, unit=unit)
    compensate = xbm.Compensation(probes=P, **options)
    state, motion = round_of(backend, compensate, memory(backend, rows, ages), slots, fresh, valid, unit=unit)
    # A pair of age 0 is not used in the fit, but its row is written.
    expected[slots[valid]] = normalize(fresh[valid]) if unit else fresh[valid]
    np.testing.assert_allclose(state.embeddings, expected, rtol=1e-8, atol=1e-9)
    np.testing.assert_allclose([motion.before, motion.after], [before, after], rtol=1e-6, atol=1e-12)
    assert motion.rejected == (before == after)


def unlike(slots):
    """Return the slots without a pair."""
    return np.setdiff1d(np.arange(M), slots)


@pytest.mark.parametrize(("form", "unit"), [("affine", True), ("shift", False)])
def test_rows_that_have_not_moved_move_nothing(backend, form, unit):
    rng = np.random.default_rng(0)
    for dtype in backend.storable[:2]:  # including half precision if supported
        state = memory(backend, normalize(rng.normal(size=(M, D))), rng.integers(0, 9, size=M), dtype=dtype)
        before, slots = snapshot(backend, state), rng.permutation(M)[:P]
        compensate = xbm.Compensation(probes=P, every=EVERY, form=form)
        found, motion = round_of(backend, compensate, state, slots, before[0][slots], unit=unit)
        np.testing.assert_array_equal(found.embeddings[unlike(slots)], before[0][unlike(slots)])
        np.testing.assert_allclose(found.embeddings[slots], before[0][slots], rtol=2e-2 if "16" in dtype else 1e-6)
        assert (motion.before, motion.after, motion.rejected) == (0, 0, 1)


def maps(kind, rng):
    """Return the change of an encoder, as a function of rows."""
    A, b = rotation(rng), rng.normal(size=D)
    stretched = A * rng.uniform(0.5, 2.0, size=D)
    return {"turned": lambda x: x @ A, "mapped": lambda x: x @ stretched + b, "shifted": lambda x: x + b}[kind]


@pytest.mark.parametrize("kind", ["turned", "mapped", "shifted"])
def test_a_map_is_recovered_for_every_row_whatever_its_age(backend, kind):
    """Test after several calls, each with its own change and batch."""
    rng = np.random.default_rng(1)
    compensate = xbm.Compensation(probes=P, every=1, ridge=0.0, form="shift" if kind == "shifted" else "affine")
    unit = kind == "turned"
    samples = normalize(rng.normal(size=(M + 4 * 8, D)))
    state = memory(backend, samples[: M - 8], capacity=M)
    motion, slow = still(state), xbm.Compensation(probes=P, every=1)
    now = samples
    for call in range(4):
        now = maps(kind, rng)(now)
        ids = backend.numpy(state.ids)
        if call == 2:  # the chosen ridge undoes most of the motion
            old = backend.numpy(state.embeddings)
            kept = MemoryState(*map(backend.array, snapshot(backend, state)))
            slots = backend.numpy(slow.probe(kept).slots)
            nearer, _ = round_of(backend, slow, kept, slots, now[ids[slots]], unit=unit)
            assert squared(nearer.embeddings, now[ids]) < 0.1 * squared(old, now[ids])
        probes = compensate.probe(state)
        assert np.all(backend.numpy(probes.filled))
        fresh = backend.array(now[backend.numpy(probes.ids)])
        state, motion = compensate.move(state, motion, probes.slots, fresh, normalize=unit)
        count = int(state.count)
        np.testing.assert_allclose(backend.numpy(state.embeddings)[:count], now[ids[:count]], rtol=1e-8, atol=1e-8)
        new = np.arange(M - 8 + 8 * call, M + 8 * call)
        batch = (backend.array(one) for one in (now[new], new))
        state = xbm.advance(xbm.enqueue(state, *batch, ids=backend.array(new)))
    assert int(motion.rejected) == 0
    assert float(motion.after) < 1e-12 < float(motion.before)


def test_young_rows_move_the_part_that_they_have_missed(backend):
    """With ages, young rows end up closer to fresh rows than in a memory that treats all rows as old; slow rotation."""
    rng = np.random.default_rng(2)
    step, turn = rotation(rng, 0.05), np.eye(D)
    samples = normalize(rng.normal(size=(M, D)))
    ages = np.arange(M) % (2 * EVERY)
    fresh, rows, now = [], [], 2 * EVERY
    network = [np.linalg.matrix_power(step, call) for call in range(now + 1)]
    turn = network[now]
    # Rows older than a round were moved in the last round.
    rows = np.stack([x @ network[max(now - age, now - EVERY)] for x, age in zip(samples, ages, strict=True)])
    fresh = samples @ turn
    compensate, slots = xbm.Compensation(probes=P, every=EVERY, ridge=0.0), np.flatnonzero(ages >= EVERY)[:P]
    found, _ = round_of(backend, compensate, memory(backend, rows, ages), slots, fresh[slots])
    alike, _ = round_of(backend, compensate, memory(backend, rows, np.full(M, EVERY)), slots, fresh[slots])
    young, old = (ages < EVERY), np.setdiff1d(np.flatnonzero(ages >= EVERY), slots)
    assert squared(found.embeddings[young], fresh[young]) < 0.01 * squared(alike.embeddings[young], fresh[young])
    np.testing.assert_allclose(found.embeddings[old], fresh[old], atol=1e-12)
    none = ages == 0
    np.testing.assert_array_equal(found.embeddings[none], rows[none])


@settings(max_examples=max(5, settings.default.max_examples // 5))
@given(seed=SEEDS, size=st.sampled_from([0.1, 2.0, 1e3]))
def test_rows_keep_their_length_whatever_the_map(backend, seed, size):
    rng = np.random.default_rng(seed)
    rows, ages = normalize(rng.normal(size=(M - 8, D))), rng.integers(0, 2 * EVERY, size=M - 8)
    for dtype in backend.storable:
        state = memory(backend, rows, ages, dtype=dtype)
        wide = "float64" if dtype == "float64" else "float32"
        parts = (size * one for one in (rng.normal(size=D), rng.normal(size=D), rng.normal(size=(D, D))))
        nothing, good = backend.array(np.asarray(0.0), wide), backend.array(np.asarray(True))
        by = Map(*(backend.array(one, wide) for one in parts), nothing, nothing, good)
        before = backend.numpy(state.embeddings)
        found = backend.numpy(moved(state, by, interval=EVERY, normalize=True).embeddings)
        eps = {"float16": 1e-3, "bfloat16": 8e-3}.get(dtype, 1e-6)
        np.testing.assert_allclose(np.linalg.norm(found[: M - 8].astype(float), axis=1), 1.0, atol=eps)
        assert np.mean(np.any(found[: M - 8] != before[: M - 8], axis=1)[ages > 0]) > 0.9
        np.testing.assert_array_equal(found[: M - 8][ages == 0], before[: M - 8][ages == 0])
        np.testing.assert_array_equal(found[M - 8 :], 0)


def test_a_row_that_would_have_no_direction_or_be_no_number_stays(backend):
    rows = np.asarray([[1.0, 0.0, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0]])
    for unit, shift in ((True, -2 * rows[0]), (False, [np.inf, 0.0, 0.0, 0.0])):
        state = memory(backend, rows, np.asarray([EVERY // 2, 0]))
        nothing, good = backend.array(np.asarray(0.0)), backend.array(np.asarray(True))
        by = Map(backend.array(np.zeros(D)), backend.array(np.asarray(shift)), None, nothing, nothing, good)
        with np.errstate(invalid="ignore"):
            found = moved(state, by, interval=EVERY, normalize=unit)
        np.testing.assert_array_equal(backend.numpy(found.embeddings)[:2], rows)


@pytest.mark.parametrize("unit", [True, False])
def test_a_map_that_is_not_good_changes_nothing_whatever_it_holds(backend, unit):
    state = memory(backend, normalize(np.random.default_rng(0).normal(size=(M, D))))
    before = snapshot(backend, state)
    parts = [backend.array(np.full(shape, np.nan)) for shape in ((D,), (D,), (D, D), (), ())]
    by = Map(*parts, backend.array(np.asarray(False)))
    assert_same_state(backend, moved(state, by, interval=EVERY, normalize=unit), before)


def too_few(rng, rows, slots):
    return rows, rows[slots] @ rotation(rng), np.arange(P) < LEAST_PAIRS - 1


def unexplained(rng, rows, slots):
    """Noise orthogonal to all maps: the best map is none, and leave-one-out fits are worse than none."""
    X, noise = np.hstack([np.ones((P, 1)), rows[slots]]), 0.2 * rng.normal(size=(P, D))
    return rows, rows[slots] + noise - X @ np.linalg.lstsq(X, noise, rcond=None)[0], None


def not_finite(rng, rows, slots):
    fresh = rows[slots] @ rotation(rng)
    fresh[: P // 2, 0], fresh[P // 2 : P - LEAST_PAIRS + 1, 1] = np.nan, np.inf
    return rows, fresh, None


def all_equal(rng, rows, slots):
    rows[slots] = rows[slots[:1]]
    return rows, rows[slots] @ rotation(rng), None


def too_large(rng, rows, slots):
    rows[slots[:3]] *= 1e200
    return rows, rows[slots] @ rotation(rng), None


def empty(rng, rows, slots):
    return rows[:0], rng.normal(size=(P, D)), None


@pytest.mark.parametrize("unit", [True, False])
@pytest.mark.parametrize("make", [too_few, unexplained, not_finite, all_equal, too_large, empty])
def test_it_cannot_hurt(backend, make, unit):
    """Only the pairs' own rows change; all others stay bit-identical."""
    if make is too_large and unit:
        return
    rng = np.random.default_rng(3)
    slots = rng.permutation(M)[:P]
    rows, fresh, valid = make(rng, normalize(rng.normal(size=(M, D))), slots)
    for ridge in (None, 0.0):
        state = memory(backend, rows)
        before = snapshot(backend, state)
        with np.errstate(over="ignore", invalid="ignore"):
            compensate = xbm.Compensation(probes=P, every=EVERY, ridge=ridge)
            found, motion = round_of(backend, compensate, state, slots, fresh, valid, unit=unit)
        others = unlike(slots) if len(rows) else slice(None)
        np.testing.assert_array_equal(found.embeddings[others], before[0][others])
        assert np.all(np.isfinite(found.embeddings))
        for one, other in zip(found[1:], before[1:], strict=True):
            np.testing.assert_array_equal(one, other)
        np.testing.assert_array_equal(motion.before, motion.after)
        assert np.isnan(motion.before) == (make in (empty, too_large))  # unchanged: there is no measurement
        assert motion.rejected == 1


def test_pairs_that_are_fitted_exactly_tell_nothing(backend):
    """With as many parameters as numbers, a linear map fits every pair exactly, and its effect on others is unknown."""
    rng, valid = np.random.default_rng(4), np.arange(P) < D + 1
    rows, fresh = normalize(rng.normal(size=(M, D))), rng.normal(size=(P, D))
    for dtype in ("float32", "float64"):
        for towards in (0.0, 0.5):
            options = [{"form": "shift"}, {"ridge": 0.0}]
            states = [memory(backend, rows, dtype=dtype) for _ in options]
            pairs = np.arange(P), (fresh + towards).astype(dtype), valid
            each = [xbm.Compensation(probes=P, every=EVERY, **one) for one in options]
            found = [round_of(backend, one, state, *pairs) for one, state in zip(each, states, strict=True)]
            np.testing.assert_allclose(found[0][0].embeddings, found[1][0].embeddings, atol=1e-6)
            assert float(found[1][1].after) == pytest.approx(float(found[0][1].after), rel=1e-4)


# Selection of the rows to re-embed


@given(count=st.integers(0, M), step=st.integers(0, 2**31 - 1), n=st.sampled_from([8, 16, M, 2 * M]))
def test_slots_are_spread_over_the_ring(backend, count, step, n):
    state = memory(backend, np.ones((M, 1)), step=step)._replace(count=backend.array(np.asarray(count)))
    found = [xbm.Compensation(probes=n).probe(one) for one in (state, state._replace(embeddings=-state.embeddings))]
    slots, filled, ids = map(backend.numpy, found[0])
    np.testing.assert_array_equal(slots, backend.numpy(found[1].slots))  # the rows say nothing
    p = min(n, M)
    assert len(set(slots.tolist())) == len(slots) == p
    np.testing.assert_array_equal(filled, slots < count)
    np.testing.assert_array_equal(ids, np.where(filled, slots, -1))  # sample n is in slot n
    if count >= p:
        assert np.all(filled)
        apart = np.diff(np.sort(slots), append=np.min(slots) + count)
        assert set(apart.tolist()) <= {count // p, -(-count // p)}
    else:
        assert np.sum(filled) == count


def test_every_row_is_asked_for(backend):
    for every in (1, 8, 10):
        compensate, seen = xbm.Compensation(probes=8), set()
        for nth in range(6 * M // 8):
            probes = compensate.probe(memory(backend, np.ones((M, 1)), step=every * nth))
            seen |= set(backend.numpy(probes.slots).tolist())
        assert seen == set(range(M))


def test_a_round_is_due_every_so_many_calls():
    assert [step for step in range(9) if xbm.Compensation(probes=8, every=3).due(step)] == [3, 6]
    assert not any(xbm.Compensation(every=3).due(step) for step in range(9))


def test_rounds_read_the_step_once_and_count_from_there():
    reads = []

    def read(step):
        return lambda: reads.append(step) or step

    rounds, found = Rounds(xbm.Compensation(probes=8, every=3).due), []
    for step in range(4, 13):  # a run that was resumed after four calls
        found.append(rounds.due(read(step)))
        assert rounds.due(read(step)) == found[-1]  # asking counts nothing
        rounds.count()
    assert found == [step % 3 == 0 for step in range(4, 13)]
    assert reads == [4]
    rounds.forget()
    assert rounds.due(read(21))  # of a state that was loaded
    rounds.count()
    assert not rounds.due(read(0))
    assert reads == [4, 21]


def test_rounds_count_no_call_before_the_step_is_known():
    """Such as those between a load and the next question: the step that is read has counted them."""
    rounds = Rounds(lambda calls: calls == 5)
    rounds.count()
    rounds.count()
    assert rounds.due(lambda: 5)


def test_probes_of_rows_without_ids_are_refused():
    with pytest.raises(ValueError, match="the memory rows have none: pass the ids of each batch"):
        check_known(filled=True, known=False)
    for filled, known in ((False, False), (True, True)):
        check_known(filled=filled, known=known)


# A batch alone


class Followed:
    """Reference in NumPy: a memory whose rows are shifted by the motion of the batch mean."""

    def __init__(self, window, *, unit):
        self.rows, self.shift, self.trust, self.window = np.zeros((0, D)), np.zeros(D), 0.0, window
        self.shaped = normalize if unit else np.asarray

    def call(self, x):
        z = self.shaped(x[np.all(np.isfinite(x), axis=1)])
        if len(z):
            apart = z.mean(axis=0) - self.rows.mean(axis=0) if len(self.rows) else np.zeros(D)
            without = apart + self.shift * (self.trust > 0)  # without the last shift
            won = np.sum(without**2) - np.sum((without - self.shift) ** 2)
            self.trust = TRUST_DECAY * self.trust + (1 - TRUST_DECAY) * won
            self.shift = apart * len(z) / (len(z) + self.window)
            if self.trust > 0:
                self.rows = self.shaped(self.rows + self.shift)
        self.rows = np.concatenate([self.rows, z])[-M:]


@pytest.mark.parametrize("unit", [True, False])
def test_a_memory_that_follows_is_numpys(backend, unit):
    rng, drift = np.random.default_rng(5), np.linspace(-0.3, 0.2, D)
    compensate = xbm.Compensation(window=16)
    objective = xbm.Objective(weight=0.0, in_batch=False, normalize=unit, compensate=compensate)
    state = objective.begin(memory(backend, np.zeros((0, D)), dtype="float32", step=0))
    model, made = Followed(16, unit=unit), []
    for call, size in enumerate([P, P, 0, P, P, P, P, P, P, P, P]):
        x = np.float32(0.5 * rng.normal(size=(size, D)) + call * drift * (1 if call < 7 else -1))
        if call == 5:
            x[0, 1], x[3, 2] = np.nan, np.inf
        if call == 6:
            x[:] = np.nan
        before = snapshot(backend, state)
        with np.errstate(invalid="ignore"):
            state = objective.step(state, backend.array(x), backend.array(np.zeros(size, np.int64))).state
            model.call(x)
        rows, motion = state.memory, state.motion
        made.append(model.trust > 0)
        order = np.r_[int(rows.cursor) : M, : int(rows.cursor)][-int(rows.count) :]
        np.testing.assert_allclose(backend.numpy(rows.embeddings)[order], model.rows, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(backend.numpy(motion.shift), model.shift, rtol=1e-4, atol=1e-5)
        assert float(motion.trust) == pytest.approx(model.trust, rel=1e-4, abs=1e-5)
        if size == 0 or call == 6:
            np.testing.assert_array_equal(backend.numpy(rows.embeddings), before[0])
    assert True in made
    assert False in made


def following(drift, calls=150, capacity=160):
    """Return statistics of a memory with `follow` and of one without, over noisy batches with constant drift per call.

    The statistics are the mean and the largest squared distance from fresh rows, and the share of calls with a shift.
    """
    rng, samples, made, errors = np.random.default_rng(6), np.zeros((0, D)), 0, []
    compensate, state = xbm.Compensation(), xbm.init(capacity=capacity, dim=D, dtype=np.dtype("float64"))
    motion = still(state)
    for call in range(calls):
        x = rng.normal(size=(16, D))
        samples = np.concatenate([samples, x])[-capacity:]
        state, motion = compensate.within(state, motion, x + call * drift, np.zeros(16, np.int64), normalize=False)
        state = xbm.advance(xbm.enqueue(state, x + call * drift, np.zeros(16, np.int64)))
        made += motion.trust > 0
        ages = np.arange(len(x) * (call + 1))[::-1][-capacity:] // len(x)
        stays = np.mean(ages**2) * (drift @ drift)
        errors.append([squared(xbm.rows(state).embeddings, samples + call * drift), stays])
    return np.mean(errors, axis=0), np.max(errors, axis=0), made / calls


def test_a_drifting_memory_is_followed_and_one_that_stays_is_left_alone():
    """The rows have mean squared length D = 8."""
    for size in (0.4, 0.1):
        (follows, stays), _, made = following(size * np.eye(D)[0])
        assert follows < 0.5 * stays
        assert made > 0.8
    (follows, _), (worst, _), made = following(np.zeros(D))
    assert follows < 0.01
    assert worst < 0.1
    assert made < 0.3


@settings(max_examples=max(5, settings.default.max_examples // 5))
@given(seed=SEEDS)
def test_rows_that_come_back_move_the_others(backend, seed):
    """Loss and gradient equal those without compensation, against the compensated memory."""
    rng = np.random.default_rng(seed)
    samples = normalize(rng.normal(size=(M, D)))
    now = samples @ rotation(rng, 0.6)
    compensate = xbm.Compensation(follow=False, returning=True, ridge=0.0)
    labels, again = np.arange(M), rng.permutation(M)[:P]
    batch = [backend.array(one) for one in (now[again], labels[again], again)]
    results = []
    for one in (compensate, None):
        rows = samples if one is compensate else now
        objective = xbm.Objective(warmup=0, compensate=one)
        state = objective.begin(memory(backend, rows)._replace(labels=backend.array(labels)))
        results.append(objective.step(state, *batch[:2], ids=batch[2]))
    found, expected = results
    np.testing.assert_allclose(
        backend.numpy(found.state.memory.embeddings), backend.numpy(expected.state.memory.embeddings), atol=1e-9
    )
    np.testing.assert_allclose(backend.numpy(found.loss), backend.numpy(expected.loss), rtol=1e-8)
    np.testing.assert_allclose(backend.numpy(found.gradient), backend.numpy(expected.gradient), rtol=1e-7, atol=1e-9)
    report = found.report
    assert float(report.drift) == pytest.approx(float(report.drift_before))
    assert float(report.drift_after) < 1e-12
    assert float(report.rejected) == 0


def test_of_a_class_that_comes_back_one_row_counts(backend):
    """Samples of one class are not independent: seven classes are too few for a fit, eight are enough."""
    rng = np.random.default_rng(0)
    samples = normalize(rng.normal(size=(M, D)))
    now, again = samples + 0.5, rng.permutation(M)[:P]
    for classes in (7, 8):
        labels = np.arange(P) % classes
        objective = xbm.Objective(compensate=xbm.Compensation(follow=False, returning=True, form="shift"))
        arrays = [backend.array(one) for one in (now[again], labels, again)]
        state = objective.begin(memory(backend, samples))
        motion = objective.step(state, *arrays[:2], ids=arrays[2]).state.motion
        assert int(motion.rejected) == (classes < 8)
        assert (float(motion.after) < float(motion.before)) == (classes == 8)


@pytest.mark.parametrize("ridges", [(0.0,), RIDGES], ids=["exact", "ridges"])
def test_a_fit_of_whatever_pairs_ends(backend, ridges):
    """Degenerate pairs in float32, for which a decomposition may not converge or a matrix may be singular."""
    rng = np.random.default_rng(0)
    for some in [*rng.random(5 if backend.compiles else 300), 0.0]:
        old, fresh = (normalize(rng.normal(size=(32, 64))).astype(np.float32) for _ in range(2))
        exposure = (rng.random(32) < some).astype(np.float32)
        found = fit(*map(backend.array, (old, fresh, exposure)), ridges=ridges, normalize=True)
        assert np.isfinite(backend.numpy(found.matrix)).all()


# Errors


@pytest.mark.parametrize(
    ("options", "error", "sentence"),
    [
        ({"follow": 1}, TypeError, "follow must be True or False, got 1"),
        ({"returning": None}, TypeError, "returning must be True or False"),
        ({"probes": -1}, ValueError, "probes must be at least 0, got -1"),
        ({"probes": 7}, ValueError, "probes must be 0, or at least 8 to fit a map, got 7"),
        ({"probes": 8.0}, TypeError, "probes must be an int"),
        ({"every": 0}, ValueError, "every must be at least 1, got 0"),
        ({"every": True}, TypeError, "every must be an int"),
        ({"form": "linear"}, ValueError, "form must be 'affine' or 'shift', got 'linear'"),
        ({"ridge": -0.1}, ValueError, "ridge must be at least 0, got -0.1"),
        ({"ridge": np.nan}, ValueError, "ridge must be a finite number"),
        ({"ridge": "1"}, TypeError, "ridge must be a number, got '1'"),
        ({"window": -1}, ValueError, "window must be at least 0, got -1"),
        ({"window": 0.5}, TypeError, "window must be an int"),
        ({"follow": False}, ValueError, "nothing is compensated: set follow, returning or probes"),
    ],
)
def test_options_are_refused(options, error, sentence):
    with pytest.raises(error, match=sentence):
        xbm.Compensation(**options)


@pytest.mark.parametrize(
    ("change", "error", "sentence"),
    [
        ({"fresh": np.ones((P, D + 1))}, ValueError, rf"fresh must have shape \(B, {D}\), as the memory's rows .* got"),
        ({"fresh": np.ones((P, D), np.int64)}, TypeError, "fresh must be float32, .* got .*int64"),
        ({"fresh": [[1.0] * D] * P}, TypeError, "fresh must be an array of .*, got list"),
        ({"fresh": np.ones((P + 1, D))}, ValueError, rf"slots must have shape \({P + 1},\), one for each of the fresh"),
        ({"slots": np.zeros(P)}, TypeError, "slots must be integers, got .*float64"),
        (
            {"slots": np.zeros(3, np.int64)},
            ValueError,
            rf"slots must have shape .* fresh rows \({P}, {D}\), got \(3,\)",
        ),
        ({"valid": np.ones(P, np.int64)}, TypeError, "valid must be boolean"),
        ({"valid": np.ones(3, bool)}, ValueError, r"valid must have shape .* got \(3,\)"),
        ({"normalize": 1}, TypeError, "normalize must be True or False"),
    ],
)
def test_a_round_refuses_and_loses_nothing(backend, change, error, sentence):
    rows = normalize(np.random.default_rng(0).normal(size=(M, D)))
    state = memory(backend, rows)
    before = snapshot(backend, state)
    given_ones = {"slots": np.arange(P), "fresh": rows[:P]} | change
    given_ones = {name: backend.array(x) if isinstance(x, np.ndarray) else x for name, x in given_ones.items()}
    with pytest.raises(error, match=sentence):
        xbm.Compensation(probes=P).move(state, still(state), **given_ones)
    assert_same_state(backend, state, before)


def test_a_step_that_compensates_needs_the_motion(backend):
    state = xbm.Objective().begin(memory(backend, np.ones((M, D))))
    batch = backend.array(np.ones((2, D))), backend.array(np.asarray([0, 1]))
    before = snapshot(backend, state)
    objective = xbm.Objective(compensate=xbm.Compensation())
    for call in (objective.step, objective.evaluate):
        with pytest.raises(ValueError, match="the state was made without compensate="):
            call(state, *batch)
    assert_same_state(backend, state, before)


@pytest.mark.parametrize("unit", [True, False])
def test_a_state_moves_as_its_memory_and_motion_do(backend, unit):
    """Rows are normalised as the objective says, and a probe without an id does not count unless it is said to."""
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(M, D))
    rows, turn = normalize(rows) if unit else rows, rotation(rng, 0.5)
    objective = xbm.Objective(compensate=xbm.Compensation(probes=P), normalize=unit)
    for valid in (None, np.arange(P) < P - 3):
        states = []
        for _ in range(2):
            ids = np.where(np.arange(M) % 5, np.arange(M), -1)
            states.append(objective.begin(memory(backend, rows)._replace(ids=backend.array(ids))))
        probes = objective.compensate.probe(states[0].memory)
        slots, known = backend.numpy(probes.slots), backend.numpy(probes.ids) >= 0
        assert not np.all(known)
        fresh = 2 * rows[slots] @ turn
        given_one = {} if valid is None else {"valid": backend.array(valid)}
        found = objective.move(states[0], probes, backend.array(fresh), **given_one)
        moved_memory, motion = objective.compensate.move(
            states[1].memory,
            states[1].motion,
            probes.slots,
            backend.array(fresh),
            backend.array(known if valid is None else valid),
            normalize=unit,
        )
        for one, other in zip((*found.memory, *found.motion), (*moved_memory, *motion), strict=True):
            np.testing.assert_array_equal(backend.numpy(one), backend.numpy(other))
        assert float(found.motion.after) < float(found.motion.before)


def test_only_an_objective_that_compensates_moves_a_state(backend):
    compensating, plain = xbm.Objective(compensate=xbm.Compensation(probes=P)), xbm.Objective()
    rows = memory(backend, normalize(np.ones((M, D))))
    probes, x = compensating.compensate.probe(rows), backend.array(np.ones((P, D)))
    state = compensating.begin(rows)
    before = snapshot(backend, state)
    with pytest.raises(ValueError, match="move is for an objective with compensate="):
        plain.move(state, probes, x)
    with pytest.raises(ValueError, match="the state was made without compensate="):
        compensating.move(plain.begin(rows), probes, x)
    assert_same_state(backend, state, before)


def test_options_of_numpys_widen_nothing(backend):
    compensate = xbm.Compensation(probes=np.int64(P), every=np.int64(2), window=np.int64(4), ridge=np.float64(1))
    objective = xbm.Objective(warmup=0, compensate=compensate)
    state = objective.begin(memory(backend, normalize(np.ones((M, D))), dtype="float32"))
    x, labels = backend.array(np.ones((P, D), np.float32)), backend.array(np.arange(P))
    state = objective.move(state, compensate.probe(state.memory), x)
    result = objective.step(state, x, labels)
    assert (result.state.memory.embeddings.dtype, result.loss.dtype) == (backend.xp.float32, backend.xp.float32)
    assert [one.dtype for one in result.state.motion] == [one.dtype for one in still(state.memory)]


@pytest.mark.not_on("numpy", reason="NumPy has one device")
@pytest.mark.not_on("torch", reason="only the meta device is a second device, and is tested separately")
@pytest.mark.not_on("tensorflow", reason="TensorFlow computes on the device of its scope, not of its inputs")
def test_everything_stays_on_its_device(backend):
    xp, device = backend.xp, backend.second_device
    x = xp.asarray(np.ones((P, D)).tolist(), dtype=xp.float32, device=device)
    state = xbm.init(capacity=M, dim=D, xp=xp, device=device)
    compensate, motion = xbm.Compensation(probes=P), still(state)
    probes = compensate.probe(state)
    state, motion = compensate.move(*compensate.within(state, motion, x, probes.slots), probes.slots, x)
    assert {array.device for array in (*state, *motion, *probes)} == {device}
