"""The memory, compared with a deque over drawn histories of every transition."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

import xbm
from tests import oracle
from tests.strategies import SIZES, batches, capacities, dims, histories, lengths, other_capacities
from xbm import memory, placing
from xbm.memory_state import inconsistency
from xbm.state import named


def as_arrays(backend, batch):
    """Return a drawn batch as positional and keyword arguments of `enqueue`, in a library."""
    given_ones = {"ids": batch.ids, "mask": batch.mask}
    keywords = {name: backend.array(value) for name, value in given_ones.items() if value is not None}
    return (backend.array(batch.x), backend.array(batch.labels)), keywords


def arrays_of(state):
    """Return {name: array} of a memory, or of a run's state."""
    return named(state) if isinstance(state, xbm.State) else state._asdict()


def snapshot(backend, state):
    """Return all arrays of a memory, or of a run's state, as NumPy arrays."""
    return [backend.numpy(array) for array in arrays_of(state).values()]


def assert_same_state(backend, state, expected):
    """Assert equality to the last bit with a snapshot."""
    for (name, array), before in zip(arrays_of(state).items(), expected, strict=True):
        np.testing.assert_array_equal(backend.numpy(array), before, err_msg=name)


def assert_holds(backend, state, model):
    """Assert that a state holds exactly the rows of the deque, in order."""
    found = xbm.rows(state)
    rows = list(model.rows)
    assert int(state.count) == len(rows)
    np.testing.assert_array_equal(backend.numpy(found.labels), [row.label for row in rows])
    np.testing.assert_array_equal(backend.numpy(found.ids), [row.id for row in rows])
    np.testing.assert_array_equal(backend.numpy(found.stored_at), [row.stored_at for row in rows])
    stored = np.asarray([row.z for row in rows]).reshape(len(rows), state.embeddings.shape[1])
    np.testing.assert_array_equal(backend.numpy(found.embeddings), stored)
    assert int(state.step) == model.step
    assert int(state.skipped) == model.skipped


class MemoryMachine(RuleBasedStateMachine):
    """Every transition in any order, compared with a deque."""

    backend = None
    copies = "keep"
    slow = oracle.Memory

    @initialize(capacity=capacities, dim=dims, data=st.data())
    def start(self, capacity, dim, data):
        self.dim = dim
        dtype = getattr(self.backend.xp, data.draw(st.sampled_from(self.backend.storable)))
        self.state = xbm.init(capacity=capacity, dim=dim, dtype=dtype, xp=self.backend.xp)
        self.model = self.slow(capacity)

    @rule(data=st.data(), age=st.integers(0, 1))
    def enqueue(self, data, age):
        batch = data.draw(batches(self.dim, finite=False))
        arrays, keywords = as_arrays(self.backend, batch)
        keep, _ = memory.storable(self.state, arrays[0], mask=keywords.get("mask"))
        replace = keywords["ids"] if self.copies == "replace" and "ids" in keywords else None
        replace = None if replace is None else self.backend.xp.clip(replace, min=-1)
        own = placing.own_slots(self.state, keep, placing.place(self.state, keep, replace=replace))
        own = self.backend.numpy(own)
        self.model.enqueue(batch.x, batch.labels, batch.ids, batch.mask, age=age, mark=True)
        self.state = xbm.enqueue(self.state, *arrays, **keywords, copies=self.copies, age=age)
        stayed = {row.anchor for row in self.model.rows} - {None}
        assert {i for i, slot in enumerate(own) if slot >= 0} == stayed
        stored = self.backend.numpy(self.state.embeddings)
        for i in stayed:
            np.testing.assert_array_equal(stored[own[i]], batch.x[i])
        self.model.rows = type(self.model.rows)(
            (row._replace(anchor=None) for row in self.model.rows), maxlen=self.model.rows.maxlen
        )

    @rule()
    def advance(self):
        self.state = xbm.advance(self.state)
        self.model.end_call()

    @rule()
    def clear(self):
        self.state = xbm.clear(self.state)
        self.model.rows.clear()

    @rule(capacity=other_capacities)
    def resize(self, capacity):
        self.state = xbm.resize(self.state, capacity)
        self.model.rows = type(self.model.rows)(self.model.rows, maxlen=capacity)

    @rule(data=st.data(), fault=st.sampled_from(["labels", "dim", "length", "mask", "ids", "nonfinite"]))
    def refuse(self, data, fault):
        batch = data.draw(batches(self.dim, sizes=lengths(1, 3, SIZES)))
        x, labels, ids, mask = batch.x, batch.labels, np.zeros(len(batch.x), np.int64), np.ones(len(batch.x), bool)
        options = {}
        if fault == "labels":
            labels = labels.astype(np.float32)
        elif fault == "dim":
            x = np.concatenate([x, x], axis=1)
        elif fault == "length":
            labels = labels[:-1]
        elif fault == "mask":
            mask = mask.astype(np.int64)
        elif fault == "ids":
            ids = np.zeros((len(x), 2), np.int64)
        else:
            x[-1, -1], options = np.nan, {"on_nonfinite": "raise"}
        before = snapshot(self.backend, self.state)
        x, labels, ids, mask = (self.backend.array(one) for one in (x, labels, ids, mask))
        with pytest.raises((TypeError, ValueError)):
            xbm.enqueue(self.state, x, labels, ids=ids, mask=mask, **options)
        assert_same_state(self.backend, self.state, before)

    @invariant()
    def holds_what_the_deque_holds(self):
        if hasattr(self, "state"):
            assert_holds(self.backend, self.state, self.model)
            assert inconsistency(self.state) is None
            assert np.all(self.backend.numpy(self.state.ids)[int(self.state.count) :] == -1)


def test_fifo(backend):
    machine = type("Machine", (MemoryMachine,), {"backend": backend})
    run_state_machine_as_test(machine)


@given(history=histories(), data=st.data(), capacity=capacities)
def test_split_batches_store_what_whole_ones_do(backend, history, data, capacity):
    dim = history[0].x.shape[1]
    whole, split = (xbm.init(capacity=capacity, dim=dim, xp=backend.xp) for _ in range(2))
    for batch in history:
        arrays, keywords = as_arrays(backend, batch)
        whole = xbm.enqueue(whole, *arrays, **keywords)
        at = data.draw(lengths(0, len(batch.x), [0, 3]))
        for part in (slice(None, at), slice(at, None)):
            piece = type(batch)(*(None if one is None else one[part] for one in batch))
            arrays, keywords = as_arrays(backend, piece)
            split = xbm.enqueue(split, *arrays, **keywords)
    assert [backend.numpy(one).tolist() for one in xbm.rows(whole)] == [
        backend.numpy(one).tolist() for one in xbm.rows(split)
    ]


@given(value=st.sampled_from([2**24 + 1, 2**31 + 7, 2**40 + 5, 2**63 - 1]))
def test_labels_and_ids_are_exact(backend, value):
    state = xbm.init(capacity=2, dim=1, xp=backend.xp)
    ones = backend.array(np.asarray([value, value - 1]))
    state = xbm.enqueue(state, backend.array(np.ones((2, 1), np.float32)), ones, ids=ones)
    assert backend.numpy(state.labels).tolist() == backend.numpy(state.ids).tolist() == [value, value - 1]


@pytest.mark.not_on("strict", reason="the standard has no float16")
def test_values_too_large_for_the_memory_are_not_finite_there(backend):
    state = xbm.init(capacity=2, dim=1, dtype=backend.xp.float16, xp=backend.xp)
    state = xbm.enqueue(state, backend.array(np.asarray([[1e6], [1.0]])), backend.array(np.asarray([0, 1])))
    assert int(state.count) == 1
    assert int(state.skipped) == 1
    assert int(state.labels[0]) == 1


@pytest.mark.parametrize("narrow", ["int8", "uint8", "int16", "int32", "uint32"])
def test_narrower_integers_are_taken(backend, narrow):
    state = xbm.init(capacity=2, dim=1, xp=backend.xp)
    state = xbm.enqueue(state, backend.array(np.ones((1, 1), np.float32)), backend.array(np.asarray([7]), narrow))
    assert int(state.labels[0]) == 7


@pytest.mark.parametrize(
    ("options", "error", "sentence"),
    [
        ({"capacity": 0}, ValueError, "capacity must be at least 1, got 0"),
        ({"capacity": 2.5}, TypeError, "capacity must be an int, got 2.5"),
        ({"capacity": True}, TypeError, "capacity must be an int, got True"),
        ({"dim": -1}, ValueError, "dim must be at least 1, got -1"),
        ({"dtype": "float32"}, TypeError, r"dtype must be one of .*float32"),
    ],
)
def test_init_refuses(backend, options, error, sentence):
    with pytest.raises(error, match=sentence):
        xbm.init(**{"capacity": 4, "dim": 2} | options, xp=backend.xp)


def test_sizes_may_be_numpys(backend):
    assert xbm.init(capacity=np.int64(4), dim=np.int32(2), xp=backend.xp).embeddings.shape == (4, 2)


def test_ages_are_not_negative(backend):
    state = xbm.init(capacity=4, dim=1, xp=backend.xp)
    with pytest.raises(ValueError, match="age must be at least 0"):
        xbm.enqueue(state, backend.array(np.ones((1, 1))), backend.array(np.asarray([0])), age=-1)


def test_init_refuses_integer_rows(backend):
    with pytest.raises(TypeError, match="dtype must be one of"):
        xbm.init(capacity=4, dim=2, dtype=backend.xp.int64, xp=backend.xp)


@pytest.mark.parametrize(
    ("change", "error", "sentence"),
    [
        ({"labels": np.zeros(2, np.float32)}, TypeError, r"labels must be integers, got .*float32 of shape \(2,\)"),
        ({"labels": np.zeros(2, bool)}, TypeError, "labels must be integers, got .*bool"),
        ({"labels": np.zeros(2, np.uint64)}, TypeError, "labels must fit int64, got uint64"),
        ({"labels": np.zeros(3, np.int64)}, ValueError, r"labels must have shape \(2,\).*embeddings \(2, 3\).*\(3,\)"),
        ({"labels": np.zeros((2, 5), np.int64)}, ValueError, "one-hot"),
        ({"labels": np.zeros((2, 5), np.float32)}, ValueError, "one-hot"),
        ({"embeddings": np.zeros((2, 4), np.float32)}, ValueError, r"shape \(B, 3\).*got \(2, 4\)"),
        ({"embeddings": np.zeros((3,), np.float32)}, ValueError, r"shape \(B, 3\).*got \(3,\)"),
        (
            {"embeddings": np.zeros((2, 3), np.int64)},
            TypeError,
            "embeddings must be float32, bfloat16, float16 or float64",
        ),
        ({"ids": np.zeros(2, np.float64)}, TypeError, "ids must be integers"),
        ({"ids": np.zeros(1, np.int64)}, ValueError, r"ids must have shape \(2,\)"),
        ({"mask": np.zeros(2, np.int64)}, TypeError, "mask must be boolean"),
        ({"mask": np.zeros(1, bool)}, ValueError, r"mask must have shape \(2,\)"),
    ],
)
def test_enqueue_refuses(backend, change, error, sentence):
    state = xbm.init(capacity=4, dim=3, xp=backend.xp)
    good = {"embeddings": np.ones((2, 3), np.float32), "labels": np.zeros(2, np.int64)}
    before = snapshot(backend, state)
    with pytest.raises(error, match=sentence):
        xbm.enqueue(state, **{name: backend.array(one) for name, one in (good | change).items()})
    assert_same_state(backend, state, before)


def test_enqueue_refuses_lists(backend):
    state = xbm.init(capacity=4, dim=3, xp=backend.xp)
    with pytest.raises(TypeError, match=r"labels must be an array of .*, got list"):
        xbm.enqueue(state, backend.array(np.ones((2, 3), np.float32)), [0, 1])


@pytest.mark.parametrize(
    ("change", "clause"),
    [
        ({"labels": np.zeros(3, np.int64)}, "labels must have shape"),
        ({"count": np.asarray([1])}, "count must have shape ()"),
        ({"cursor": np.asarray(9)}, "cursor 9 and count 0"),
        ({"cursor": np.asarray(2), "count": np.asarray(1)}, "cursor 2 and count 1"),
        ({"embeddings": np.zeros(4, np.float32)}, "embeddings must have shape"),
    ],
)
def test_unsound_states_are_told(backend, change, clause):
    state = xbm.init(capacity=4, dim=2, xp=backend.xp)
    assert clause in inconsistency(state._replace(**{name: backend.array(x) for name, x in change.items()}))
