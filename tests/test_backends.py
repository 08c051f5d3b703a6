"""The backends' operations beyond the standard, compared with plain NumPy."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import xbm
from tests.strategies import lengths
from xbm import backends, metrics
from xbm.state import named

matrices = hnp.arrays(np.float64, st.tuples(lengths(1, 7, [1, 5]), lengths(1, 7, [4])), elements=st.integers(-2, 2))


def test_every_operation_is_there(backend):
    _, ops = backends.of(backend.array(np.zeros(1)))
    assert all(callable(getattr(ops, name)) for name in backends.OPERATIONS)


def test_arrays_of_no_library_are_refused():
    with pytest.raises(TypeError):
        backends.of([1.0])


@given(x=matrices, data=st.data())
def test_top_k_is_a_stable_sort(backend, x, data):
    k = data.draw(st.integers(1, x.shape[1]))
    array = backend.array(x)
    _, ops = backends.of(array)
    values, indices = ops.top_k(array, k)
    expected = np.argsort(-x, axis=1, stable=True)[:, :k]
    np.testing.assert_array_equal(backend.numpy(indices), expected)
    np.testing.assert_array_equal(backend.numpy(values), np.take_along_axis(x, expected, axis=1))


@given(ring=matrices, start=st.integers(0, 6), data=st.data())
def test_rows_are_written_round_the_ring(backend, ring, start, data):
    size, dim = ring.shape
    written = data.draw(st.integers(0, size))
    slots = (start + np.arange(written)) % size
    rows = np.arange(written * dim, dtype=float).reshape(written, dim) + 10
    array = backend.array(ring)
    _, ops = backends.of(array)
    found = ops.write_rows(array, backend.array(slots), backend.array(rows))
    expected = ring.copy()
    expected[slots] = rows
    np.testing.assert_array_equal(backend.numpy(found), expected)


@given(rows=matrices, size=lengths(1, 8, [2, 8]))
def test_rewritten_rows_are_what_each_block_becomes(backend, rows, size):
    array, column, blocks = backend.array(rows), backend.array(np.arange(len(rows), dtype=float)), []
    xp, ops = backends.of(array)

    def visit(block, some):
        blocks.append(block.shape)
        return xp.flip(block * 2, axis=0) + some[:, None]

    found = backend.numpy(ops.rewrite(array, visit, column, size))
    expected = [rows[i : i + size][::-1] * 2 for i in range(0, len(rows), size)]
    np.testing.assert_array_equal(found, np.concatenate(expected) + np.arange(len(rows))[:, None])
    assert len(blocks) == len(expected)
    assert max(n for n, _ in blocks) <= size


@given(rows=matrices, size=lengths(1, 8, [2, 8]), limit=st.none() | st.integers(1, 8))
def test_fold_visits_every_row_once(backend, rows, size, limit):
    array = backend.array(rows)
    _, ops = backends.of(array)
    seen = ops.fold(
        lambda carry, start, block, again: [*(carry or []), (start, backend.numpy(block), backend.numpy(again))],
        (array, array),
        size,
        limit=limit,
    )
    starts = list(range(0, len(rows) if limit is None else min(limit, len(rows)), size))
    assert [start for start, _, _ in seen] == starts
    for start, block, again in seen:
        np.testing.assert_array_equal(block, rows[start : start + size])
        np.testing.assert_array_equal(again, block)


@given(mask=hnp.arrays(np.bool_, lengths(1, 40, [1, 8, 40])))
def test_few_are_all_of_them_or_not_told(backend, mask):
    array = backend.array(mask)
    _, ops = backends.of(array)
    found = ops.few(array)
    if found is not None:
        found = backend.numpy(found).tolist()
        assert found == (np.flatnonzero(mask).tolist() or [0])
        assert len(found) <= max(1, len(mask) / 4)


@given(x=matrices)
def test_what_is_positive(backend, x):
    x = np.concatenate([x, np.zeros_like(x[:1]), -x])
    array = backend.array(x)
    _, ops = backends.of(array)
    np.testing.assert_array_equal(backend.numpy(ops.is_positive(array)), (x > 0).astype(x.dtype))


def test_lengths(backend):
    x = backend.array(np.zeros((3, 5)))
    _, ops = backends.of(x)
    assert [int(n) for n in (ops.length(x), ops.length(x, 1), ops.length(x, most=2), ops.length(x, most=9))] == [
        3,
        5,
        2,
        3,
    ]


def test_what_waits_is_unchanged(backend):
    x = backend.array(np.asarray(7))
    _, ops = backends.of(x)
    for value in (0.0, 2.0, np.nan):
        assert int(ops.after(x, backend.array(np.asarray(value)))) == 7


def test_a_known_scalar_is_its_value(backend):
    _, ops = backends.of(backend.array(np.zeros(1)))
    assert ops.known(backend.array(np.asarray(7))) in (7, None)


@pytest.mark.not_on("numpy", reason="NumPy has one device")
@pytest.mark.not_on("torch", reason="only the meta device is a second device, and is tested separately")
@pytest.mark.not_on("tensorflow", reason="TensorFlow computes on the device of its scope, not of its inputs")
def test_everything_stays_on_its_device(backend):
    xp, device = backend.xp, backend.second_device
    x, labels = xp.ones((3, 2), device=device), xp.asarray([0, 0, 1], device=device)
    objective = xbm.Objective(warmup=1, settle=1.0, compensate=xbm.Compensation(probes=8))
    state = objective.init(capacity=4, dim=2, xp=xp, device=device)
    for options in ({}, {"enqueue": labels == 0}, {"keys": x}, {}):
        result = objective.step(state, x, labels, ids=labels, **options)
        state = result.state
    found = [
        *named(state).values(),
        *named(objective.clear(state)).values(),
        *objective.compensate.probe(state.memory),
        *xbm.rows(state.memory),
        *xbm.resize(state.memory, 2),
        *xbm.clear(state.memory),
        result.loss,
        result.gradient,
        *result.report,
    ]
    assert {array.device for array in found} == {device}
    assert metrics.retrieval(x, labels).queries == 2
    with pytest.raises(ValueError, match=r"labels of shape .* are on device"):
        objective.step(state, x, xp.asarray([0, 0, 1]), ids=labels)
