"""`copies="replace"`: one row per sample, compared with lists and double loops over drawn histories."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import invariant, run_state_machine_as_test

import xbm
from tests import oracle
from tests.strategies import SIZES, batches, capacities, histories, lengths
from tests.test_memory import MemoryMachine, as_arrays, assert_holds, assert_same_state, snapshot
from xbm import backends


class KeyedMachine(MemoryMachine):
    """Every transition in any order, compared with a list."""

    copies = "replace"
    slow = oracle.KeyedMemory

    @invariant()
    def holds_no_sample_twice(self):
        if hasattr(self, "state"):
            ids = [sample for sample in self.backend.numpy(self.state.ids).tolist() if sample >= 0]
            assert len(ids) == len(set(ids))


def test_one_row_for_each_sample(backend):
    machine = type("Machine", (KeyedMachine,), {"backend": backend})
    run_state_machine_as_test(machine)


def rows_of(backend, samples, value=1.0):
    """Return `(x (B, 1), labels (B,), ids (B,))` of samples, each in its own class."""
    x = np.full((len(samples), 1), value, np.float32)
    return backend.array(x), *(backend.array(np.asarray(samples, np.int64)) for _ in range(2))


def replacing(backend, capacity, *calls):
    """Return a memory after calls given as `(samples, value of their rows)`."""
    state = xbm.init(capacity=capacity, dim=1, xp=backend.xp)
    for samples, value in calls:
        x, labels, ids = rows_of(backend, samples, value)
        state = xbm.advance(xbm.enqueue(state, x, labels, ids=ids, copies="replace"))
    return state


def shown(backend, state):
    """Return the filled slots as `(id, row)`."""
    ids, embeddings = backend.numpy(state.ids), backend.numpy(state.embeddings)
    return [(int(ids[slot]), float(embeddings[slot, 0])) for slot in range(int(state.count))]


@pytest.mark.parametrize(
    ("calls", "slots", "cursor"),
    [
        ([([5, 6], 1), ([6], 2)], [(5, 1), (6, 2)], 2),  # updated in its slot
        ([([5, 6], 1), ([7, 5], 2)], [(5, 2), (6, 1), (7, 2)], 0),  # one updated, one appended
        ([([5, 6, 7], 1), ([8, 5], 2)], [(8, 2), (6, 1), (7, 1)], 1),  # updated, then evicted by the other
        ([([5, 6, 7], 1), ([8, 6], 2)], [(8, 2), (6, 2), (7, 1)], 1),
        ([([5, 6, 7], 1), ([1, 2, 3, 4, 6], 2)], [(4, 2), (2, 2), (3, 2)], 1),  # more rows than the capacity
        ([([-1, 5, -1, 5], 1)], [(-1, 1), (-1, 1), (5, 1)], 0),  # negative ids mean no id: they equal nothing
    ],
)
def test_where_rows_go(backend, calls, slots, cursor):
    state = replacing(backend, 3, *calls)
    assert shown(backend, state) == slots
    assert int(state.cursor) == cursor


@given(epochs=st.integers(1, 3), samples=lengths(1, 12, [12]), spare=lengths(0, 2, [0, 2]), data=st.data())
def test_a_memory_as_large_as_the_data_set_holds_its_newest_rows(backend, epochs, samples, spare, data):
    """One row per sample, in the slot that the first epoch assigned."""
    state, first = xbm.init(capacity=samples + spare, dim=1, xp=backend.xp), []
    size = data.draw(lengths(1, samples, [5]))
    for epoch in range(epochs):
        order = data.draw(st.permutations(range(samples)))
        first = first or order
        for start in range(0, samples, size):
            x, labels, ids = rows_of(backend, order[start : start + size], epoch)
            state = xbm.enqueue(state, x, labels, ids=ids, copies="replace")
    assert shown(backend, state) == [(sample, epochs - 1) for sample in first]


@given(history=histories(with_ids=False), capacity=capacities)
def test_without_ids_nothing_is_replaced(backend, history, capacity):
    states = {}
    for copies in ("keep", "replace"):
        state = xbm.init(capacity=capacity, dim=history[0].x.shape[1], xp=backend.xp)
        state = xbm.enqueue(state, *as_arrays(backend, history[0]._replace(mask=None))[0])
        for batch in history:
            arrays, options = as_arrays(backend, batch)
            state = xbm.enqueue(state, *arrays, **options, copies=copies)
        states[copies] = snapshot(backend, state)
    for one, other in zip(*states.values(), strict=True):
        np.testing.assert_array_equal(one, other)


@given(
    history=histories(),
    capacity=capacities,
    warmup=st.integers(0, 1),
    in_batch=st.booleans(),
    block_rows=lengths(1, 10, [3]),
    evaluated=st.booleans(),
)
def test_step_is_its_definition(backend, history, capacity, warmup, in_batch, block_rows, evaluated):
    """Losses and memory of whole runs equal those of loops over a list, also in evaluation."""
    objective = xbm.Objective(copies="replace", warmup=warmup, in_batch=in_batch, block_rows=block_rows)
    state = objective.init(capacity=capacity, dim=history[0].x.shape[1], dtype=backend.xp.float64, xp=backend.xp)
    model = oracle.KeyedMemory(capacity)

    def expected(batch, z):
        in_memory = oracle.memory_term(model, z, batch.labels, batch.ids) if model.step >= warmup else 0.0
        return in_memory + (oracle.batch_term(z, batch.labels) if in_batch else 0.0)

    for batch in history:
        x = batch.x.astype(np.float64)
        z = oracle.normalize(x)
        arrays, options = as_arrays(backend, batch._replace(x=x))
        options = {"ids": options.get("ids"), "enqueue": options.get("mask")}
        if evaluated:
            before = snapshot(backend, state)
            loss = objective.evaluate(state, *arrays, **options).loss
            assert float(loss) == pytest.approx(expected(batch, z), rel=1e-9, abs=1e-12)
            assert_same_state(backend, state, before)
        result = objective.step(state, *arrays, **options)
        model.enqueue(z, batch.labels, batch.ids, batch.mask, mark=True)
        assert float(result.loss) == pytest.approx(expected(batch, z), rel=1e-9, abs=1e-12)
        model.end_call()
        state = result.state
        found = xbm.rows(state.memory)
        stored = np.asarray([row.z for row in model.rows]).reshape(-1, x.shape[1])
        np.testing.assert_allclose(backend.numpy(found.embeddings), stored, rtol=1e-12)
        for name, column in (("labels", "label"), ("ids", "id"), ("stored_at", "stored_at")):
            np.testing.assert_array_equal(
                backend.numpy(getattr(found, name)), [getattr(row, column) for row in model.rows]
            )


@given(before=histories(dim=2), after=histories(dim=2), capacity=capacities)
def test_a_run_goes_on_from_a_saved_memory(backend, before, after, capacity):
    objective = xbm.Objective(copies="replace", warmup=1)

    def run(state, history):
        losses = []
        for batch in history:
            arrays, options = as_arrays(backend, batch)
            result = objective.step(state, *arrays, ids=options.get("ids"), enqueue=options.get("mask"))
            state, losses = result.state, [*losses, float(result.loss)]
        return state, losses

    state, _ = run(objective.init(capacity=capacity, dim=2, xp=backend.xp), before)
    loaded = objective.begin(xbm.MemoryState(*(backend.array(one) for one in snapshot(backend, state.memory))))
    (state, losses), (again, repeated) = run(state, after), run(loaded, after)
    assert losses == repeated
    assert_same_state(backend, again, snapshot(backend, state))


@pytest.mark.parametrize("fault", ["mask", "nonfinite"])
def test_a_row_that_is_not_stored_replaces_nothing_and_meets_no_copy(backend, fault):
    """The stored copy has another class, so without exclusion it would be a negative of its anchor."""
    objective = xbm.Objective(copies="replace", warmup=0, in_batch=False)
    x, label, ids = rows_of(backend, [7])
    state = objective.step(objective.init(capacity=2, dim=1, xp=backend.xp), x, label, ids=ids).state
    before = snapshot(backend, state._replace(memory=xbm.advance(state.memory)))
    if fault == "mask":
        result = objective.step(state, x, label + 1, ids=ids, enqueue=backend.array(np.asarray([False])))
        assert float(result.loss) == 0.0
    else:
        result = objective.step(state, x * float("nan"), label + 1, ids=ids)
        before[-1] += 1
    assert_same_state(backend, result.state, before)


def test_of_two_views_in_one_call_the_last_is_stored_and_is_a_positive_of_the_other(backend):
    objective = xbm.Objective(copies="replace", warmup=0, in_batch=False)
    same = backend.array(np.asarray([3, 3]))
    state = objective.init(capacity=8, dim=2, dtype=backend.xp.float64, xp=backend.xp)
    result = objective.step(state, backend.array(np.asarray([[1.0, 0.0], [0.6, 0.8]])), same, ids=same)
    np.testing.assert_allclose(backend.numpy(xbm.rows(result.state.memory).embeddings), [[0.6, 0.8]], rtol=1e-12)
    assert float(result.loss) == pytest.approx(0.4 / 2)  # 1 - 0.6, and nothing for the view that is stored


def test_the_drift_is_that_of_the_row_replaced(backend):
    objective = xbm.Objective(copies="replace", warmup=0)
    x, label, ids = rows_of(backend, [7])
    state = objective.init(capacity=4, dim=1, xp=backend.xp)
    for sign in (1.0, -1.0, 1.0):
        result = objective.step(state, sign * x, label, ids=ids)
        state = result.state
    report = {name: float(one) for name, one in result.report._asdict().items()}
    assert (report["drift"], report["drift_age"]) == (4.0, 1.0)  # not 0 and 2, of the row before
    assert int(state.memory.count) == 1


def test_keys_are_replaced(backend):
    """Key i is a candidate of query i, not a copy of it; an older key with its id is replaced."""
    objective = xbm.Objective(copies="replace", warmup=0, in_batch=False)
    state = objective.init(capacity=4, dim=2, dtype=backend.xp.float64, xp=backend.xp)
    one, x = backend.array(np.asarray([7])), backend.array(np.asarray([[1.0, 0.0]]))
    for key in ([[-1.0, 0.0]], [[0.6, 0.8]]):
        result = objective.step(state, x, one, ids=one, keys=backend.array(np.asarray(key)))
        state = result.state
    assert float(result.loss) == pytest.approx(0.4)
    np.testing.assert_allclose(backend.numpy(xbm.rows(state.memory).embeddings), [[0.6, 0.8]], rtol=1e-12)


def test_filling_replaces(backend):
    objective = xbm.Objective(copies="replace")
    state = objective.init(capacity=4, dim=1, xp=backend.xp)
    for samples in ([5, 6], [6, 7]):
        x, labels, ids = rows_of(backend, samples)
        state = objective.store(state, x, labels, ids=ids)
    assert backend.numpy(xbm.rows(state.memory).ids).tolist() == [5, 6, 7]


@given(data=st.data(), capacity=capacities)
def test_a_call_that_was_interrupted_loses_no_row_when_repeated(backend, data, capacity):
    """Ids may stand in slots that are not filled yet; they are no samples of the memory."""
    batch = data.draw(batches(1, with_ids=True, sizes=lengths(0, capacity, SIZES)))
    arrays, options = as_arrays(backend, batch)
    state = xbm.init(capacity=capacity, dim=1, xp=backend.xp)
    written = xbm.enqueue(state, *arrays, **options, copies="replace")
    interrupted = written._replace(cursor=0 * written.cursor, count=0 * written.count)
    model = oracle.KeyedMemory(capacity)
    model.enqueue(batch.x, batch.labels, batch.ids, batch.mask)
    assert_holds(backend, xbm.enqueue(interrupted, *arrays, **options, copies="replace"), model)


@given(size=lengths(1, 6, [6]), data=st.data())
def test_rows_are_written_into_any_slots(backend, size, data):
    slots = data.draw(st.permutations(range(size)))[: data.draw(st.integers(0, size))]
    ring, rows = np.arange(2.0 * size).reshape(size, 2), -1 - np.arange(2.0 * len(slots)).reshape(-1, 2)
    array = backend.array(ring)
    _, ops = backends.of(array)
    found = ops.write_rows(array, backend.array(np.asarray(slots, np.int64)), backend.array(rows))
    ring[slots] = rows
    np.testing.assert_array_equal(backend.numpy(found), ring)


def test_what_copies_may_be(backend):
    state = xbm.init(capacity=4, dim=1, xp=backend.xp)
    x, labels, ids = rows_of(backend, [1])
    before = snapshot(backend, state)
    with pytest.raises(ValueError, match="copies must be 'keep' or 'replace', got 'exclude'"):
        xbm.enqueue(state, x, labels, ids=ids, copies="exclude")
    assert_same_state(backend, state, before)
