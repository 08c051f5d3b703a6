"""The state of a run: its parts, its arrays by name, and which objectives take it."""

import numpy as np
import pytest

import xbm
from tests.test_memory import assert_same_state, snapshot
from xbm.compensation import Motion, still
from xbm.memory_state import MemoryState
from xbm.schedule import WarmUp
from xbm.state import from_named, named

SETTLE = {"settle": 5.0, "ramp": 4}
COMPENSATE = {"compensate": xbm.Compensation(window=4)}
PARTS = [{}, SETTLE, COMPENSATE, SETTLE | COMPENSATE]
both = pytest.mark.parametrize("options", PARTS, ids=lambda options: " and ".join(options) or "memory")


def batch(backend, seed=0):
    """Return `(x, labels, ids)`, of samples that return."""
    rng = np.random.default_rng(seed)
    return tuple(backend.array(one) for one in (rng.normal(size=(4, 3)), np.asarray([0, 0, 1, 1]), np.arange(4)))


def begun(backend, options, calls=3):
    """Return an objective, and its state after some calls."""
    objective = xbm.Objective(warmup=0, **options)
    state = objective.init(capacity=6, dim=3, dtype=backend.xp.float64, xp=backend.xp)
    for call in range(calls):
        x, labels, ids = batch(backend, call)
        state = objective.step(state, x, labels, ids=ids).state
    return objective, state


@both
def test_names_and_arrays_are_a_state_and_back(backend, options):
    _, state = begun(backend, options)
    arrays = named(state)
    names = [*MemoryState._fields]
    names += [f"warmup_{name}" for name in WarmUp._fields] if "settle" in options else []
    names += [f"motion_{name}" for name in Motion._fields] if "compensate" in options else []
    assert [*arrays] == names
    again = from_named(arrays)
    assert isinstance(again, xbm.State)
    for part, other in zip(again, state, strict=True):
        assert type(part) is type(other)
        assert part is None or all(one is two for one, two in zip(part, other, strict=True))
    assert from_named(dict(reversed(arrays.items()))) == again
    assert named(again) == arrays


def test_a_part_with_an_array_missing_is_none(backend):
    _, state = begun(backend, SETTLE | COMPENSATE)
    arrays = named(state)
    del arrays["motion_trust"]
    assert from_named(arrays) == state._replace(motion=None)
    del arrays["labels"]
    assert from_named(arrays).memory is None


@pytest.mark.parametrize("name", ["step", "evaluate"])
def test_what_is_no_state_is_refused(backend, name):
    objective, state = begun(backend, {})
    x, labels, ids = batch(backend)
    before = snapshot(backend, state)
    for wrong in (state.memory, tuple(state), tuple(state.memory)):
        with pytest.raises(TypeError, match=rf"state must come from objective.init.*, got {type(wrong).__name__}$"):
            getattr(objective, name)(wrong, x, labels, ids=ids)
    assert_same_state(backend, state, before)


@pytest.mark.parametrize("name", ["step", "evaluate"])
@pytest.mark.parametrize(("part", "option"), [("warmup", "settle"), ("motion", "compensate")])
def test_a_state_without_a_part_that_is_needed_is_refused(backend, name, part, option):
    objective, state = begun(backend, SETTLE | COMPENSATE)
    state = state._replace(**{part: None})
    x, labels, ids = batch(backend)
    before = snapshot(backend, state)
    with pytest.raises(ValueError, match=f"the state was made without {option}="):
        getattr(objective, name)(state, x, labels, ids=ids)
    assert_same_state(backend, state, before)


@both
def test_a_cleared_state_has_no_rows_but_knows_that_it_has_warmed_up(backend, options):
    objective, state = begun(backend, options)
    cleared = objective.clear(state)
    fresh = objective.begin(xbm.clear(state.memory))
    assert int(cleared.memory.count) == 0
    assert int(cleared.memory.step) == 3
    if "settle" in options:
        assert int(state.warmup.counted) == int(cleared.warmup.counted) == 2
        assert np.isnan(float(cleared.warmup.drift))
        fresh = fresh._replace(warmup=fresh.warmup._replace(counted=cleared.warmup.counted))
    if "compensate" in options:
        assert np.any(backend.numpy(state.motion.shift))
    assert_same_state(backend, cleared, snapshot(backend, fresh))
    x, labels, ids = batch(backend)
    after = objective.step(cleared, x, labels, ids=ids)
    assert float(after.report.memory_loss) > 0  # at once: the warm-up is over


@both
def test_a_state_begins_with_the_rows_of_a_memory(backend, options):
    objective = xbm.Objective(**options)
    empty = {"capacity": 6, "dim": 3, "dtype": backend.xp.float64, "xp": backend.xp}
    assert_same_state(backend, objective.init(**empty), snapshot(backend, objective.begin(xbm.init(**empty))))
    x, labels, ids = batch(backend)
    memory = xbm.enqueue(xbm.init(**empty), x, labels, ids=ids)
    state = objective.begin(memory)
    assert state.memory is memory
    assert (state.warmup is None) == ("settle" not in options)
    assert (state.motion is None) == ("compensate" not in options)
    if state.warmup is not None:
        assert np.isnan(float(state.warmup.drift))
        assert int(state.warmup.counted) == 0
        assert state.warmup.counted.dtype == memory.count.dtype
    if state.motion is not None:
        for one, other in zip(state.motion, still(memory), strict=True):
            np.testing.assert_array_equal(backend.numpy(one), backend.numpy(other))


@pytest.mark.parametrize("needed", PARTS[:3], ids=lambda options: " and ".join(options) or "memory")
def test_parts_that_an_objective_does_not_need_stay_as_they_are(backend, needed):
    """And the result is that of a state without them, after warm-ups of every kind."""
    _, state = begun(backend, SETTLE | COMPENSATE, calls=2)
    x, labels, ids = batch(backend, 9)
    for warmup in (0, 2, 3):
        objective = xbm.Objective(**{"warmup": warmup, "ramp": 3} | needed)
        full, bare = (
            from_named({name: backend.array(backend.numpy(one)) for name, one in named(state).items()})
            for _ in range(2)
        )
        bare = bare._replace(
            warmup=bare.warmup if "settle" in needed else None, motion=bare.motion if "compensate" in needed else None
        )
        before = {name: backend.numpy(one) for name, one in named(full).items()}
        evaluated = [objective.evaluate(one, x, labels, ids=ids) for one in (full, bare)]
        found, expected = (objective.step(one, x, labels, ids=ids) for one in (full, bare))
        assert float(evaluated[0].loss) == float(evaluated[1].loss)
        assert float(found.loss) == float(expected.loss)
        if "settle" not in needed:
            assert (float(found.report.memory_loss) > 0) == (warmup <= 2)
        for name, array in named(found.state).items():
            like = named(expected.state).get(name)
            wanted = before[name] if like is None else backend.numpy(like)
            np.testing.assert_array_equal(backend.numpy(array), wanted, err_msg=name)
        stored = objective.store(found.state, x, labels, ids=ids)
        for part, other in zip(stored[1:], found.state[1:], strict=True):
            assert part is other
        unneeded = {"warmup", "motion"} - {"warmup" if "settle" in needed else "", "motion" if needed else ""}
        for part in unneeded:
            assert getattr(found.state, part) is getattr(full, part)
