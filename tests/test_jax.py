"""JAX: compilation, donation, differentiation, vmap, and rows on several devices."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import xbm
from tests.pair_losses import BY_NAME
from tests.table import DEVICES
from tests.test_compensation import rotation
from xbm.compensation import moving
from xbm.memory_state import MemoryState, Rows

SIZES = [8, 3, 8, 1, 0, 20, 3, 8]  # batch sizes, for a memory of 12 slots
LOSSES = [
    {},
    {"loss": xbm.Contrastive(reduction="sum"), "copies": "keep"},
    {"loss": "multi-similarity", "miner": "multi-similarity"},
    {"loss": "batch-hard-triplet"},
    {"loss": "supcon", "in_batch": False},
    {"copies": "replace"},
]


@pytest.fixture(autouse=True, params=[False, True], ids=["32 bits", "64 bits"])
def wide(request):
    with jax.enable_x64(request.param):
        yield request.param


def batches(sizes=SIZES, dim=4, seed=0):
    """Yield `(x, labels, ids)` as NumPy arrays, with repeated samples."""
    rng = np.random.default_rng(seed)
    for size in sizes:
        ids = rng.integers(30, size=size)
        yield rng.normal(size=(size, dim)).astype(np.float32), ids % 3, ids


def arrays(batch):
    return tuple(xbm.as_integers(one, xp=jnp) if one.dtype == np.int64 else jnp.asarray(one) for one in batch)


def compiled(objective, traced=None):
    """Return a train step that JAX differentiates, with an identity encoder.

    Each compilation appends its batch size to `traced`. JAX's own count may be 0, because its cache is bounded.
    """

    def loss_of(x, state, labels, ids):
        if traced is not None:
            traced.append(x.shape[0])
        result = objective.step(state, x, labels, ids=ids)
        return result.loss, result

    return jax.jit(jax.value_and_grad(loss_of, has_aux=True), donate_argnums=1)


@pytest.mark.parametrize("options", LOSSES, ids=str)
def test_compiled_and_differentiated_it_is_numpys_step(options):
    objective = xbm.Objective(warmup=1, block_rows=2, **options)  # 12 rows in six blocks, which run in a loop
    traced = []
    step, state = compiled(objective, traced), objective.init(capacity=12, dim=4, xp=jnp)
    plain = objective.init(capacity=12, dim=4)
    for batch in batches():
        x, labels, ids = arrays(batch)
        (loss, result), gradient = step(x, state, labels, ids)
        expected = objective.step(plain, *batch[:2], ids=batch[2])
        state, plain = result.state, expected.state
        np.testing.assert_allclose(loss, expected.loss, rtol=2e-5, atol=1e-6)
        np.testing.assert_allclose(gradient, expected.gradient, rtol=1e-4, atol=1e-5)
        np.testing.assert_array_equal(gradient, result.gradient)
        np.testing.assert_allclose(result.report.stacked(), expected.report.stacked(), rtol=1e-4, atol=1e-5)
        for name, one, other in zip(MemoryState._fields, state.memory, plain.memory, strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-6 if name == "embeddings" else 0, err_msg=name)
    assert sorted(traced) == sorted(
        set(SIZES)
    )  # one compilation per batch shape, whether the memory is filling, full or wrapped


@pytest.mark.parametrize("options", BY_NAME, ids=str)
def test_every_loss_and_miner_is_compiled_too(options, wide):
    """In float64, so that rounding does not change the choice of pairs."""
    if not wide:
        return
    objective = xbm.Objective(warmup=0, block_rows=5, **options)
    state = objective.init(capacity=12, dim=4, dtype=jnp.float64, xp=jnp)
    traced = []
    step, plain = compiled(objective, traced), objective.init(capacity=12, dim=4, dtype=np.dtype("float64"))
    for x, labels, ids in batches([8, 8, 8]):
        x = x.astype(np.float64)
        (loss, result), gradient = step(*arrays((x,)), state, *arrays((labels, ids)))
        expected = objective.step(plain, x, labels, ids=ids)
        state, plain = result.state, expected.state
        np.testing.assert_allclose(loss, expected.loss, rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(gradient, expected.gradient, rtol=1e-7, atol=1e-10)
    assert traced == [8]


def test_a_last_block_may_be_shorter():
    losses = []
    for block_rows in (5, 100):
        objective = xbm.Objective(warmup=0, block_rows=block_rows)
        state = objective.init(capacity=18, dim=4, xp=jnp)
        for batch in batches([18, 8]):
            x, labels, _ = arrays(batch)
            result = jax.jit(objective.step)(state, x, labels)
            state = result.state
        losses.append(result)
    np.testing.assert_allclose(losses[0].loss, losses[1].loss, rtol=1e-6)
    np.testing.assert_allclose(losses[0].gradient, losses[1].gradient, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("copies", ["exclude", "replace"])
def test_rows_are_written_in_place(copies):
    objective = xbm.Objective(warmup=0, copies=copies)
    state = objective.init(capacity=1024, dim=16, xp=jnp)
    step = compiled(objective)
    place = state.memory.embeddings.unsafe_buffer_pointer()
    for batch in batches([8] * 4, dim=16):
        x, labels, ids = arrays(batch)
        before = state
        (_, result), _ = step(x, state, labels, ids)
        state = result.state
        assert before.memory.embeddings.is_deleted()
        assert state.memory.embeddings.unsafe_buffer_pointer() == place
        stored = "replace" if copies == "replace" else "keep"
        state = state._replace(memory=xbm.enqueue(state.memory, x, labels, ids=ids, copies=stored))  # not compiled
        assert state.memory.embeddings.unsafe_buffer_pointer() == place
    program = step.lower(x, state, labels, ids).compile().as_text()
    assert re.search(r"= f32\[1024,16\]\S* (scatter|fusion|dynamic-update-slice|while)\(", program)
    assert not re.findall(r"= f32\[1024,16\]\S* copy\(.*", program)


def rounds(objective):
    """Return a train step and a round over a state, which is given away."""
    return compiled(objective), jax.jit(objective.move, donate_argnums=0)


def test_a_compiled_memory_that_moves_is_numpys(wide, monkeypatch):
    if wide:
        return
    monkeypatch.setattr(moving, "CACHE", 5 * 4)  # of 32 rows, so a loop and a shorter last block
    compensate = xbm.Compensation(returning=True, probes=16, every=2, ridge=0.1)
    objective = xbm.Objective(warmup=1, compensate=compensate)
    step, move = rounds(objective)
    states, helped = [objective.init(capacity=32, dim=4, xp=jnp), objective.init(capacity=32, dim=4)], False
    turn = rotation(np.random.default_rng(3), 0.3, 4).astype(np.float32)
    base = np.random.default_rng(4).normal(size=(30, 4)).astype(np.float32)
    for call, (noise, _, ids) in enumerate(batches([16] * 6)):
        now = base @ np.linalg.matrix_power(turn, call)
        if call and call % 2 == 0:
            each = jax.jit(compensate.probe)(states[0].memory), compensate.probe(states[1].memory)
            for one, other in zip(*each, strict=True):
                np.testing.assert_array_equal(one, other)
            fresh = now[each[1].ids]
            states = [move(states[0], each[0], jnp.asarray(fresh)), objective.move(states[1], each[1], fresh)]
            helped = helped or states[1].motion.after < states[1].motion.before
        x = now[ids] + 0.01 * noise
        (loss, result), gradient = step(jnp.asarray(x), states[0], *arrays((ids, ids)))
        expected = objective.step(states[1], x, ids, ids=ids)
        states = [result.state, expected.state]
        np.testing.assert_allclose(loss, expected.loss, rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(gradient, expected.gradient, rtol=1e-2, atol=1e-3)
        for one, other in zip(*map(jax.tree.leaves, states), strict=True):
            np.testing.assert_allclose(one, other, rtol=2e-3, atol=2e-4)
    assert helped


def test_a_memory_is_moved_in_place(wide, monkeypatch):
    if wide:
        return
    monkeypatch.setattr(moving, "CACHE", 600 * 16)  # of 2048 rows, so a loop and a shorter last block
    compensate = xbm.Compensation(returning=True, probes=16, ridge=0.1)
    objective = xbm.Objective(warmup=0, compensate=compensate)
    (step, move), state = rounds(objective), objective.init(capacity=2048, dim=16, xp=jnp)
    place = state.memory.embeddings.unsafe_buffer_pointer()
    for batch in batches([16] * 2, dim=16):
        x, labels, ids = arrays(batch)
        (_, result), _ = step(x, state, labels, ids)
        state = move(result.state, compensate.probe(result.state.memory), x)
        assert state.memory.embeddings.unsafe_buffer_pointer() == place
    programs = [step.lower(x, state, labels, ids), move.lower(state, compensate.probe(state.memory), x)]
    for program in (one.compile().as_text() for one in programs):
        assert re.search(r"f32\[2048,16\]\S*.* while\(", program)
        assert not re.findall(r"= f32\[2048,16\]\S* copy\(.*", program)


def test_the_gradient_is_scaled_in_its_own_precision():
    objective = xbm.Objective(warmup=0, weight=1e-9, in_batch=False)
    state = objective.init(capacity=8, dim=4, xp=jnp)
    x, labels, _ = arrays(next(batches([6])))
    scaled = jax.grad(lambda x: 2.0**30 * objective.step(state, x, labels * 0).loss)
    gradient = scaled(x.astype(jnp.float16))
    assert gradient.dtype == jnp.float16
    assert jnp.count_nonzero(gradient) == 24
    assert jnp.all(jnp.isfinite(gradient))


def test_second_derivatives_are_refused():
    objective = xbm.Objective(warmup=0)
    state = objective.init(capacity=8, dim=4, xp=jnp)
    x, labels, _ = arrays(next(batches([6])))

    def loss_of(x):
        return objective.evaluate(state, x, labels).loss

    np.testing.assert_array_equal(jax.grad(loss_of)(x), objective.evaluate(state, x, labels, gradient=True).gradient)
    for twice in (jax.hessian(loss_of), jax.grad(lambda x: jnp.sum(jax.grad(loss_of)(x) ** 2))):
        for transform in (lambda f: f, jax.jit):
            with pytest.raises(RuntimeError, match="first derivatives only"):
                transform(twice)(x)
    with pytest.raises(TypeError):
        jax.jvp(loss_of, (x,), (x,))
    assert jnp.any(jax.jit(jax.grad(jax.checkpoint(loss_of)))(x) != 0)


def test_keys_get_their_gradient():
    objective = xbm.Objective(warmup=0)
    state = objective.init(capacity=8, dim=4, xp=jnp)
    (x, labels, _), (k, _, _) = map(arrays, batches([6, 6]))

    def loss_of(x, k):
        result = objective.evaluate(state, x, labels, keys=k, gradient=True)
        return result.loss, (result.gradient, result.key_gradient)

    found, expected = jax.grad(loss_of, argnums=(0, 1), has_aux=True)(x, k)
    for one, other in zip(found, expected, strict=True):
        assert jnp.any(one != 0)
        np.testing.assert_array_equal(one, other)


def test_a_function_is_a_loss_and_learns():
    """JAX computes the loss's weights and the gradient of the variables it closes over."""
    x, labels, _ = arrays(next(batches([6])))

    def loss_of(scale, x):
        def pull(S, positive, negative):
            return scale * jnp.sum(jnp.where(positive, (1 - S) ** 2, 0.0), axis=1)

        objective = xbm.Objective(loss=pull, warmup=0)
        return objective.step(objective.init(capacity=8, dim=4, xp=jnp), x, labels).loss

    def direct(scale, x):
        z = x / jnp.linalg.norm(x, axis=1, keepdims=True)
        S, same = z @ z.T, (labels[:, None] == labels[None]) & ~jnp.eye(len(x), dtype=bool)
        stale = z @ jax.lax.stop_gradient(z).T  # the memory holds the batch, as constants
        return scale * sum(jnp.sum(jnp.where(same, (1 - one) ** 2, 0.0)) for one in (S, stale)) / len(x)

    for transform in (lambda f: f, jax.jit):
        found = transform(jax.value_and_grad(loss_of, argnums=(0, 1)))(0.7, x)
        expected = jax.value_and_grad(direct, argnums=(0, 1))(0.7, x)
        np.testing.assert_allclose(found[0], expected[0], rtol=1e-5)
        for one, other in zip(found[1], expected[1], strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)


def test_several_memories_at_once():
    """`vmap` over states and batches equals a loop over them."""
    objective = xbm.Objective(warmup=0, block_rows=2)
    apart = [objective.init(capacity=12, dim=4, xp=jnp) for _ in range(3)]
    together = jax.tree.map(lambda *ones: jnp.stack(ones), *apart)
    one_by_one = jax.jit(lambda state, x, labels, ids: objective.step(state, x, labels, ids=ids))
    at_once = jax.jit(jax.vmap(one_by_one))
    for call in range(3):
        taken = [arrays(next(batches([5], seed=10 * call + i))) for i in range(3)]
        alone = [one_by_one(state, x, labels, ids) for state, (x, labels, ids) in zip(apart, taken, strict=True)]
        apart = [result.state for result in alone]
        x, labels, ids = (jnp.stack(ones) for ones in zip(*taken, strict=True))
        found = at_once(together, x, labels, ids)
        together = found.state
        for one, other in zip(
            jax.tree.leaves(found), jax.tree.leaves(jax.tree.map(lambda *a: jnp.stack(a), *alone)), strict=True
        ):
            np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("memory_over", "batch_over"),
    [(("rows",), ()), ((), ("rows",)), (("rows",), ("rows",))],
    ids=["rows", "batch", "rows and batch"],
)
def test_several_devices_give_the_same_loss_and_gradient(memory_over, batch_over):
    """The devices share the rows of the memory, the batch (as in data parallelism), or both."""
    assert len(jax.devices()) == DEVICES
    mesh = Mesh(np.asarray(jax.devices()), ("rows",), axis_types=(AxisType.Auto,))
    capacity = 16 * DEVICES
    objective = xbm.Objective(warmup=1, block_rows=capacity)  # each device compares its own rows
    step, alone = (compiled(objective) for _ in range(2))
    state, plain = (objective.init(capacity=capacity, dim=4, xp=jnp) for _ in range(2))
    over_rows, over_batch, whole = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (memory_over, batch_over, ()))
    state = objective.begin(
        MemoryState(
            **{
                name: jax.device_put(value, over_rows if name in Rows._fields else whole)
                for name, value in state.memory._asdict().items()
            }
        )
    )
    for batch in batches([8, 32, 48, 8, 8], seed=3):
        x, labels, ids = arrays(batch)
        (expected, result), expected_gradient = alone(x, plain, labels, ids)
        plain = result.state
        x, labels, ids = jax.device_put((x, labels, ids), over_batch)
        (loss, result), gradient = step(x, state, labels, ids)
        state = result.state
        assert state.memory.embeddings.sharding.is_equivalent_to(over_rows, 2)
        np.testing.assert_allclose(loss, expected, rtol=1e-5)
        np.testing.assert_allclose(gradient, expected_gradient, rtol=1e-4, atol=1e-6)
        for one, other in zip(state.memory, plain.memory, strict=True):
            np.testing.assert_array_equal(one, other)
    program = step.lower(x, state, labels, ids).compile().as_text()
    gathered = [line for line in program.splitlines() if f"f32[{capacity},4]" in line and "all-gather" in line]
    assert not gathered


def test_integers_are_exact_or_refused(wide):
    large = np.asarray([2**31 - 1, 2**31 + 7, 2**40 + 5])
    if wide:
        assert xbm.as_integers(large, xp=jnp).tolist() == large.tolist()
    else:
        with pytest.raises(OverflowError, match=r"must lie in \[-2147483648, 2147483647\].*got 2147483647 to 1099511"):
            xbm.as_integers(large, xp=jnp)
    exact = xbm.as_integers(large[:1], xp=jnp)
    state = xbm.enqueue(xbm.init(capacity=2, dim=1, xp=jnp), jnp.ones((1, 1)), exact, ids=exact)
    assert int(state.labels[0]) == int(state.ids[0]) == 2**31 - 1
    with pytest.raises(TypeError, match="must be integers, got float64"):
        xbm.as_integers([0.5], xp=jnp)


def test_wide_rows_need_wide_numbers(wide):
    if wide:
        assert xbm.init(capacity=2, dim=1, dtype=jnp.float64, xp=jnp).embeddings.dtype == jnp.float64
    else:
        with pytest.raises(
            TypeError, match=r"dtype must be one of jax's float32, jax's bfloat16, jax's float16 \(.*\), got float64"
        ):
            xbm.init(capacity=2, dim=1, dtype=jnp.float64, xp=jnp)


def test_raising_on_values_is_refused_under_a_compiler():
    objective = xbm.Objective(on_nonfinite="raise")
    state = objective.init(capacity=2, dim=4, xp=jnp)
    x, labels, _ = arrays(next(batches([2])))
    with pytest.raises(RuntimeError, match='which is impossible under a compiler: use "skip"'):
        jax.jit(objective.step)(state, x, labels)
    with pytest.raises(ValueError, match="1 of the embeddings"):
        objective.step(state, x.at[1, 1].set(jnp.nan), labels)
