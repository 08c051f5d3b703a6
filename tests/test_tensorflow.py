"""TensorFlow: graphs for any batch size, XLA, and the memory in variables."""

import re

import numpy as np
import pytest
import tensorflow as tf

import xbm
from tests.pair_losses import BY_NAME
from tests.test_compensation import rotation
from xbm import backends
from xbm.backends.namespaces import tensorflow as xp
from xbm.compensation import moving
from xbm.memory_state import MemoryState
from xbm.state import from_named, named

SIZES = [8, 3, 8, 1, 20, 3, 8]  # batch sizes, for a memory of 12 slots
LOSSES = [
    {},
    {"loss": xbm.Contrastive(reduction="sum"), "copies": "keep"},
    {"loss": "multi-similarity", "miner": "multi-similarity"},
    {"loss": "batch-hard-triplet"},
    {"loss": "supcon", "in_batch": False},
    {"copies": "replace"},
]


def batches(sizes=SIZES, dim=4, seed=0):
    """Yield `(x, labels, ids)` as NumPy arrays, with repeated samples."""
    rng = np.random.default_rng(seed)
    for size in sizes:
        ids = rng.integers(30, size=size)
        yield rng.normal(size=(size, dim)).astype(np.float32), ids % 3, ids


def variables(objective, capacity, dim, **options):
    """Return a state before the first call, in variables that are written in place."""
    state = objective.init(capacity=capacity, dim=dim, xp=xp, **options)
    return from_named({name: tf.Variable(one, trainable=False) for name, one in named(state).items()})


def keep(variables, state):
    """Assign what was not written in place."""
    for variable, new in zip(named(variables).values(), named(state).values(), strict=True):
        if new is not variable:
            variable.assign(new)


def train_step(objective, state):
    """Return a step over a state in variables, whose gradient is TensorFlow's own."""

    def step(x, labels, ids):
        with tf.GradientTape() as tape:
            tape.watch(x)
            result = objective.step(state, x, labels, ids=ids)
        keep(state, result.state)
        return result.loss, tape.gradient(result.loss, x), result.gradient, result.report

    return step


def signature(dim=4):
    """Return the signature of a step for any batch size."""
    return [tf.TensorSpec([None, dim], tf.float32), *[tf.TensorSpec([None], tf.int64)] * 2]


@pytest.mark.parametrize("how", ["eager", "graph", "xla"])
@pytest.mark.parametrize("options", LOSSES, ids=str)
def test_it_is_numpys_step_and_traced_once(options, how):
    objective = xbm.Objective(warmup=1, block_rows=2, **options)  # 12 rows: six blocks, a loop
    state, plain = variables(objective, 12, 4), objective.init(capacity=12, dim=4)
    step, sizes = train_step(objective, state), SIZES
    if how != "eager":
        step = tf.function(step, input_signature=signature(), jit_compile=how == "xla")
    if how == "graph":
        sizes = [*SIZES, 0, 8]
    for batch in batches(sizes):
        loss, gradient, closed, report = step(*map(tf.constant, batch))
        expected = objective.step(plain, *batch[:2], ids=batch[2])
        plain = expected.state
        np.testing.assert_allclose(loss, expected.loss, rtol=2e-5, atol=1e-6)
        np.testing.assert_allclose(gradient, expected.gradient, rtol=1e-4, atol=1e-5)
        np.testing.assert_array_equal(gradient, closed)
        np.testing.assert_allclose(report.stacked(), expected.report.stacked(), rtol=1e-4, atol=1e-5)
        for name, one, other in zip(MemoryState._fields, state.memory, plain.memory, strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-6 if name == "embeddings" else 0, err_msg=name)
    if how != "eager":
        assert step.experimental_get_tracing_count() == 1


@pytest.mark.parametrize("how", ["graph", "xla"])
@pytest.mark.parametrize("options", BY_NAME, ids=str)
def test_every_loss_and_miner_in_a_graph(options, how):
    """In float64, so that rounding does not change the choice of pairs."""
    graph = how == "graph"
    objective = xbm.Objective(warmup=0, block_rows=5 if graph else 12, **options)  # XLA takes seconds for each block
    state = variables(objective, 12, 4, dtype=tf.float64)
    plain = objective.init(capacity=12, dim=4, dtype=np.dtype("float64"))
    wide = [tf.TensorSpec([None, 4], tf.float64), *signature()[1:]]
    step = tf.function(train_step(objective, state), input_signature=wide, jit_compile=not graph)
    for x, labels, ids in batches([8, 3, 8] if graph else [8, 8]):
        x = x.astype(np.float64)
        loss, gradient, closed, _ = step(*map(tf.constant, (x, labels, ids)))
        expected = objective.step(plain, x, labels, ids=ids)
        plain = expected.state
        np.testing.assert_allclose(loss, expected.loss, rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(gradient, expected.gradient, rtol=1e-7, atol=1e-10)
        np.testing.assert_array_equal(gradient, closed)
    assert step.experimental_get_tracing_count() == 1


@pytest.mark.parametrize("how", ["eager", "graph"])
def test_states_may_be_tensors(how):
    """Then every write is a copy, and nothing but the returned state changes."""
    objective = xbm.Objective(warmup=0)
    state, plain = objective.init(capacity=12, dim=4, xp=xp), objective.init(capacity=12, dim=4)
    step = tf.function(objective.step) if how == "graph" else objective.step
    for batch in batches([8, 8]):
        before = [tf.identity(one) for one in state.memory]
        result = step(state, *map(tf.constant, batch[:2]))
        for one, other in zip(state.memory, before, strict=True):
            np.testing.assert_array_equal(one, other)
        state, expected = result.state, objective.step(plain, *batch[:2])
        plain = expected.state
        np.testing.assert_allclose(result.loss, expected.loss, rtol=1e-5)


def test_a_last_block_may_be_shorter():
    losses = []
    for block_rows in (5, 100):
        objective = xbm.Objective(warmup=0, block_rows=block_rows)
        step = tf.function(train_step(objective, variables(objective, 18, 4)))
        for batch in batches([18, 8]):
            *found, report = step(*map(tf.constant, batch))
        losses.append([*found, report.stacked()])
    for one, other in zip(*losses, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("copies", ["exclude", "replace"])
def test_under_xla_no_array_of_the_memorys_size_is_copied(copies):
    objective = xbm.Objective(warmup=0, copies=copies)
    step = tf.function(train_step(objective, variables(objective, 1024, 16)), jit_compile=True)
    batch = [tf.constant(one) for one in next(batches([8], dim=16))]
    step(*batch)
    program = step.experimental_get_compiler_ir(*batch)(stage="optimized_hlo")
    assert re.search(r"= f32\[1024,16\]\S* (scatter|fusion|while)\(", program)
    assert not re.findall(r"= f32\[1024,16\]\S* copy\(.*", program)


def rounds(objective, state):
    """Return a train step and a round over a state in variables."""

    def move(probes, fresh):
        keep(state, objective.move(state, probes, fresh))

    return train_step(objective, state), move


@pytest.mark.parametrize("how", ["eager", "graph", "xla"])
def test_a_memory_that_moves_is_numpys(how, monkeypatch):
    monkeypatch.setattr(moving, "CACHE", 5 * 4)  # of 32 rows, so a loop and a shorter last block
    compensate = xbm.Compensation(returning=True, probes=16, every=2, ridge=0.1)
    objective = xbm.Objective(warmup=1, compensate=compensate)
    state, plain = variables(objective, 32, 4), objective.init(capacity=32, dim=4)
    step, move = rounds(objective, state)
    if how != "eager":
        step = tf.function(step, input_signature=signature() if how == "graph" else None, jit_compile=how == "xla")
        move = tf.function(move, jit_compile=how == "xla")
    turn = rotation(np.random.default_rng(3), 0.3, 4).astype(np.float32)
    base = np.random.default_rng(4).normal(size=(30, 4)).astype(np.float32)
    for call, (noise, _, ids) in enumerate(batches([16, 16, 16, 12, 16, 16][: 3 if how == "xla" else 6])):
        now = base @ np.linalg.matrix_power(turn, call)
        if call and call % 2 == 0:
            each = compensate.probe(state.memory), compensate.probe(plain.memory)
            for one, other in zip(*each, strict=True):
                np.testing.assert_array_equal(one, other)
            fresh = now[each[1].ids]
            move(each[0], tf.constant(fresh))
            plain = objective.move(plain, each[1], fresh)
        x = now[ids] + 0.01 * noise
        loss, gradient, *_ = step(*map(tf.constant, (x, ids, ids)))
        expected = objective.step(plain, x, ids, ids=ids)
        plain = expected.state
        np.testing.assert_allclose(loss, expected.loss, rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(gradient, expected.gradient, rtol=1e-2, atol=1e-3)
        for one, other in zip(named(state).values(), named(plain).values(), strict=True):
            np.testing.assert_allclose(one, other, rtol=2e-3, atol=2e-4)
    assert 0 < plain.motion.after < plain.motion.before
    if how == "graph":
        assert step.experimental_get_tracing_count() == 1


def test_under_xla_a_memory_is_moved_in_place(monkeypatch):
    monkeypatch.setattr(moving, "CACHE", 600 * 16)  # of 2048 rows, so a loop and a shorter last block
    objective = xbm.Objective(warmup=0, compensate=xbm.Compensation(probes=16, ridge=0.1))
    state = variables(objective, 2048, 16)
    step, move = rounds(objective, state)
    x, labels, ids = (tf.constant(one) for one in next(batches([16], dim=16)))
    probes = objective.compensate.probe(state.memory)
    for function, given_ones in ((step, (x, labels, ids)), (move, (probes, x))):
        function = tf.function(function, jit_compile=True)
        program = function.experimental_get_compiler_ir(*given_ones)(stage="optimized_hlo")
        assert re.search(r"f32\[2048,16\]\S*.* while\(", program)
        assert not re.findall(r"= f32\[2048,16\]\S* copy\(.*", program)


def test_keys_get_their_gradient():
    objective = xbm.Objective(warmup=0)
    state = objective.init(capacity=8, dim=4, xp=xp)
    (x, labels, _), (k, _, _) = (map(tf.constant, batch) for batch in batches([6, 6]))
    with tf.GradientTape() as tape:
        tape.watch([x, k])
        result = objective.step(state, x, labels, keys=k)
    for one, other in zip(tape.gradient(result.loss, [x, k]), (result.gradient, result.key_gradient), strict=True):
        assert np.any(one)
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("how", ["eager", "graph"])
def test_evaluation_is_differentiable(how):
    objective = xbm.Objective(warmup=0)
    state = objective.init(capacity=8, dim=4, xp=xp)
    x, labels, _ = map(tf.constant, next(batches([6])))

    def gradient(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            result = objective.evaluate(state, x, labels)
        assert result.gradient is None
        return tape.gradient(result.loss, x)

    found = (tf.function(gradient) if how == "graph" else gradient)(x)
    np.testing.assert_allclose(found, objective.evaluate(state, x, labels, gradient=True).gradient, rtol=1e-6)


def test_the_gradient_is_scaled_in_its_own_precision():
    objective = xbm.Objective(warmup=0, weight=1e-9, in_batch=False)
    state = objective.init(capacity=8, dim=4, xp=xp)
    x, labels, _ = map(tf.constant, next(batches([6])))
    half = tf.cast(x, tf.float16)
    with tf.GradientTape() as tape:
        tape.watch(half)
        loss = objective.step(state, half, labels * 0).loss * 2.0**30
    gradient = tape.gradient(loss, half)
    assert gradient.dtype == tf.float16
    assert np.count_nonzero(gradient) == 24
    assert np.all(np.isfinite(gradient))


@pytest.mark.parametrize("how", ["eager", "graph"])
def test_a_function_is_a_loss_and_learns(how):
    scale = tf.Variable(0.7)
    objective = xbm.Objective(
        loss=lambda S, positive, negative: scale * xp.sum(xp.where(positive, (1 - S) ** 2, 0.0), axis=1), warmup=0
    )
    state = variables(objective, 8, 4)
    x, labels, _ = map(tf.constant, next(batches([6])))

    def step(x, labels):
        with tf.GradientTape() as tape:
            tape.watch(x)
            result = objective.step(state, x, labels)
        keep(state, result.state)
        return result.loss, tape.gradient(result.loss, [x, scale])

    loss, found = (tf.function(step) if how == "graph" else step)(x, labels)
    with tf.GradientTape() as tape:
        tape.watch(x)
        z = tf.math.l2_normalize(x, axis=1)
        same = (labels[:, None] == labels[None]) & ~tf.eye(6, dtype=tf.bool)
        similarities = (tf.matmul(z, other, transpose_b=True) for other in (z, tf.stop_gradient(z)))
        expected = scale * sum(tf.reduce_sum(tf.where(same, (1 - S) ** 2, 0.0)) for S in similarities) / 6
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    for one, other in zip(found, tape.gradient(expected, [x, scale]), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)


def test_lengths_in_a_graph_that_takes_any():
    _, ops = backends.of(tf.zeros(()))

    @tf.function(input_signature=[tf.TensorSpec([None, None])])
    def lengths(x):
        return ops.length(x), ops.length(x, 1), ops.length(x, most=2), ops.length(x, most=9)

    assert [int(n) for n in lengths(tf.zeros((3, 5)))] == [3, 5, 2, 3]


def test_large_labels_are_exact_in_a_graph():
    objective = xbm.Objective()
    state = variables(objective, 4, 1)
    large = tf.constant([2**24 + 1, 2**31 + 7, 2**40 + 5, 2**63 - 1])
    tf.function(train_step(objective, state))(tf.ones((4, 1)), large, large)
    assert state.memory.labels.numpy().tolist() == state.memory.ids.numpy().tolist() == large.numpy().tolist()


def test_raising_on_values_is_refused_in_a_graph():
    objective = xbm.Objective(on_nonfinite="raise")
    state = objective.init(capacity=2, dim=1, xp=xp)
    x, labels = tf.constant([[np.nan]]), tf.constant([0], tf.int64)
    with pytest.raises(RuntimeError, match='which is impossible under a compiler: use "skip"'):
        tf.function(lambda x, labels: objective.step(state, x, labels).loss)(x, labels)
    with pytest.raises(ValueError, match="1 of the embeddings"):
        objective.step(state, x, labels)


def test_variables_and_symbols_are_arrays_of_tensorflow():
    assert backends.array_namespace(tf.Variable(0.0)) is backends.array_namespace(tf.zeros(())) is xp

    @tf.function
    def traced(x):
        assert backends.array_namespace(x) is xp
        return x

    traced(tf.zeros(()))
