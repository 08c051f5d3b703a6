"""The step, compared with a deque and double loops over drawn histories."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

import xbm
from tests import oracle
from tests.strategies import capacities, histories, lengths
from tests.test_memory import assert_same_state, snapshot
from xbm import Block
from xbm.normalization import normalize, through_normalize
from xbm.pairs import batch_pairs


def keywords(backend, **given_ones):
    """Return the given arrays, converted to a library."""
    return {name: backend.array(value) for name, value in given_ones.items() if value is not None}


def away_from_thresholds(z, keys, thresholds=(0.5, 1.0)):
    """Return whether all similarities, except of a row with itself, are more than 1e-3 from the loss's kinks."""
    S = z @ keys.T
    return all(np.all((np.abs(S - threshold) > 1e-3) | (S > 1 - 1e-9)) for threshold in thresholds)


@given(
    history=histories(),
    capacity=capacities,
    warmup=st.integers(0, 3),
    weight=st.sampled_from([0.0, 0.5, 1.0]),
    copies=st.sampled_from(["exclude", "keep"]),
    reduction=st.sampled_from(["mean", "sum"]),
    in_batch=st.booleans(),
    block_rows=lengths(1, 10, [3]),
)
def test_step_is_its_definition(backend, history, capacity, warmup, weight, copies, reduction, in_batch, block_rows):
    """Losses and memory of whole runs equal those of loops over a deque."""
    objective = xbm.Objective(
        loss=xbm.Contrastive(reduction=reduction),
        warmup=warmup,
        weight=weight,
        copies=copies,
        in_batch=in_batch,
        block_rows=block_rows,
    )
    state = objective.init(capacity=capacity, dim=history[0].x.shape[1], dtype=backend.xp.float64, xp=backend.xp)
    model = oracle.Memory(capacity)

    def loss_of(*row):
        return oracle.contrastive(*row, reduction=reduction)

    for call, batch in enumerate(history):
        x = batch.x.astype(np.float64)
        z = oracle.normalize(x)
        result = objective.step(
            state, backend.array(x), backend.array(batch.labels), **keywords(backend, ids=batch.ids, enqueue=batch.mask)
        )
        model.enqueue(z, batch.labels, batch.ids, batch.mask, mark=True)

        expected = oracle.batch_term(z, batch.labels, loss=loss_of) if in_batch else 0.0
        if call >= warmup:
            expected += weight * oracle.memory_term(model, z, batch.labels, batch.ids, copies=copies, loss=loss_of)

        assert float(result.loss) == pytest.approx(expected, rel=1e-9, abs=1e-12)
        stored = np.asarray([row.z for row in model.rows]).reshape(-1, x.shape[1])
        model.end_call()
        state = result.state
        rows = xbm.rows(state.memory)
        np.testing.assert_allclose(backend.numpy(rows.embeddings), stored, rtol=1e-12)
        assert backend.numpy(rows.labels).tolist() == [row.label for row in model.rows]
        assert backend.numpy(rows.ids).tolist() == [row.id for row in model.rows]
        assert int(state.memory.step) == call + 1


@given(
    seed=st.integers(0, 2**32 - 1),
    calls=st.integers(1, 4),
    capacity=lengths(1, 12, [5]),
    size=lengths(1, 5, [3]),
    weight=st.sampled_from([0.5, 1.0]),
    reduction=st.sampled_from(["mean", "sum"]),
    in_batch=st.booleans(),
    length=st.sampled_from([1.0, 1e-3, 1e4]),
)
def test_gradient_is_finite_differences(backend, seed, calls, capacity, size, weight, reduction, in_batch, length):
    """In general position: no ties, no duplicates, no thresholds. Memory rows are constants."""
    rng = np.random.default_rng(seed)
    objective = xbm.Objective(
        loss=xbm.Contrastive(reduction=reduction), warmup=0, weight=weight, in_batch=in_batch, block_rows=3
    )
    state = objective.init(capacity=capacity, dim=3, dtype=backend.xp.float64, xp=backend.xp)
    model = oracle.Memory(capacity)

    def loss_of(*row):
        return oracle.contrastive(*row, reduction=reduction)

    for _ in range(calls):
        x, labels, ids = length * rng.normal(size=(size, 3)), rng.integers(3, size=size), rng.integers(9, size=size)
        mask = rng.random(size) < 0.8
        z = oracle.normalize(x)
        result = objective.step(
            state, backend.array(x), backend.array(labels), ids=backend.array(ids), enqueue=backend.array(mask)
        )
        model.enqueue(z, labels, ids, mask, mark=True)
        stored = np.asarray([row.z for row in model.rows]).reshape(-1, 3)
        assume(away_from_thresholds(z, np.vstack([z, stored])))

        def expected(x, labels=labels, ids=ids):
            z = oracle.normalize(x)
            batch = oracle.batch_term(z, labels, loss=loss_of) if in_batch else 0.0
            return batch + weight * oracle.memory_term(model, z, labels, ids, loss=loss_of)

        slope = oracle.gradient(expected, x, step=1e-6 * length)
        np.testing.assert_allclose(backend.numpy(result.gradient) * length, slope * length, rtol=1e-5, atol=1e-7)
        model.end_call()
        state = result.state


@given(history=histories(with_ids=True), capacity=capacities)
def test_evaluation_leaves_the_memory_alone(backend, history, capacity):
    objective = xbm.Objective(warmup=1)
    state = objective.init(capacity=capacity, dim=history[0].x.shape[1], xp=backend.xp)
    model = oracle.Memory(capacity)
    for batch in history:
        x, labels = backend.array(batch.x), backend.array(batch.labels)
        before = snapshot(backend, state)
        result = objective.evaluate(state, x, labels, **keywords(backend, ids=batch.ids), gradient=True)
        assert_same_state(backend, state, before)
        assert_same_state(backend, result.state, before)
        z = oracle.normalize(batch.x)
        expected = oracle.batch_term(z, batch.labels)
        if model.step >= 1:
            expected += oracle.memory_term(model, z, batch.labels, batch.ids)
        # In float32, similarities at the margin of 0.5 round to either side, and the count of active negatives jumps.
        stored = np.asarray([row.z for row in model.rows]).reshape(-1, x.shape[1])
        if away_from_thresholds(z, np.vstack([z, stored]), thresholds=(0.5,)):
            assert float(result.loss) == pytest.approx(expected, rel=1e-4, abs=1e-5)
        state = objective.step(state, x, labels, **keywords(backend, ids=batch.ids, enqueue=batch.mask)).state
        model.enqueue(z, batch.labels, batch.ids, batch.mask)
        model.end_call()


@given(history=histories(), capacity=capacities, seed=st.integers(0, 100))
def test_names_of_classes_and_samples_change_nothing(backend, history, capacity, seed):
    rename = np.random.default_rng(seed).permutation(np.arange(1000, 1010))
    objective = xbm.Objective(warmup=0)
    dim = history[0].x.shape[1]
    states = [objective.init(capacity=capacity, dim=dim, dtype=backend.xp.float64, xp=backend.xp) for _ in range(2)]
    for batch in history:
        losses = []
        for which, state in enumerate(states):
            labels, ids = batch.labels % 4, None if batch.ids is None else np.where(batch.ids < 0, -1, batch.ids % 6)
            if which:
                labels = rename[labels]
                ids = None if ids is None else np.where(ids < 0, -1, rename[ids])
            x = backend.array(batch.x.astype(np.float64))
            result = objective.step(state, x, backend.array(labels), **keywords(backend, ids=ids, enqueue=batch.mask))
            states[which] = result.state
            losses.append(
                (backend.numpy(result.loss), backend.numpy(result.gradient), backend.numpy(result.report.stacked()))
            )
        for one, other in zip(*losses, strict=True):
            np.testing.assert_array_equal(one, other)


@given(history=histories(), capacity=capacities)
def test_warmup_is_the_plain_loss_exactly(backend, history, capacity):
    dim = history[0].x.shape[1]
    warm, cold = xbm.Objective(warmup=len(history)), xbm.Objective(warmup=0)
    state = warm.init(capacity=capacity, dim=dim, xp=backend.xp)
    for batch in history:
        x, labels = backend.array(batch.x), backend.array(batch.labels)
        plain = cold.evaluate(cold.init(capacity=1, dim=dim, xp=backend.xp), x, labels, gradient=True)
        result = warm.step(state, x, labels, **keywords(backend, ids=batch.ids, enqueue=batch.mask))
        state = result.state
        np.testing.assert_array_equal(backend.numpy(result.loss), backend.numpy(plain.loss))
        np.testing.assert_array_equal(backend.numpy(result.gradient), backend.numpy(plain.gradient))
    assert int(state.memory.step) == len(history)


@given(seed=st.integers(0, 2**32 - 1), size=lengths(1, 6, [3]), repeat=st.integers(1, 3))
def test_memory_that_holds_the_batch_has_its_value_and_the_anchors_gradient(backend, seed, size, repeat):
    rng = np.random.default_rng(seed)
    x, labels = backend.array(rng.normal(size=(size, 3))), backend.array(rng.integers(3, size=size))
    alone = replace(xbm.Objective(warmup=0), in_batch=False)
    state = alone.init(capacity=size, dim=3, dtype=backend.xp.float64, xp=backend.xp)
    plain = replace(xbm.Objective(warmup=0), weight=0.0).evaluate(state, x, labels, gradient=True)
    for _ in range(repeat):
        result = alone.step(state, x, labels)
        state = result.state
    assert float(result.loss) == pytest.approx(float(plain.loss), rel=1e-12)
    z = oracle.normalize(backend.numpy(x))
    P, N = batch_pairs(labels, labels, own=backend.array(np.arange(size)), dtype=backend.xp.float64)
    arange = backend.array(np.arange(size))
    _, W = alone.loss.whole(Block(backend.array(z @ z.T), P, N, arange, arange))
    half = backend.array(backend.numpy(W) @ z / size)
    expected = through_normalize(half, *normalize(x))
    np.testing.assert_allclose(backend.numpy(result.gradient), backend.numpy(expected), atol=1e-12)


@given(history=histories(with_ids=True), capacity=capacities)
def test_copies_are_no_pairs(backend, history, capacity):
    """A memory with only older copies of the anchors has no pairs; with copies kept, it has."""
    batch = history[0]
    assume(len(batch.x))
    size = len(batch.x)
    ids, labels = backend.array(np.arange(size)), backend.array(np.zeros(size, np.int64))
    x = backend.array(batch.x)
    for copies in ("exclude", "keep"):
        objective = xbm.Objective(warmup=0, in_batch=False, copies=copies)
        state = objective.init(capacity=size, dim=batch.x.shape[1], xp=backend.xp)
        state = objective.step(state, x, labels, ids=ids).state
        none_stored = backend.array(np.zeros(size, bool))
        result = objective.step(state, x[:1, ...], labels[:1], ids=ids[:1], enqueue=none_stored[:1])
        others = oracle.normalize(batch.x)
        rows = [j for j in range(size) if j or copies == "keep"]
        expected = oracle.contrastive([others[0] @ others[j] for j in rows], [True] * len(rows), [False] * len(rows))
        assert float(result.loss) == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_two_views_in_one_call_stay_positives(backend):
    x = backend.array(np.asarray([[1.0, 0.0], [0.6, 0.8]]))
    same = backend.array(np.asarray([3, 3]))
    objective = xbm.Objective(warmup=0)
    state = objective.init(capacity=8, dim=2, dtype=backend.xp.float64, xp=backend.xp)
    result = objective.step(state, x, same, ids=same)
    assert float(result.loss) == pytest.approx(2 * 0.4)  # 1 - 0.6 in the batch, and the same in the memory


def test_samples_without_an_id_are_no_copies_of_each_other(backend):
    x, label = backend.array(np.asarray([[1.0, 0.0]])), backend.array(np.asarray([3]))
    objective = xbm.Objective(warmup=0, in_batch=False)
    state = objective.step(objective.init(capacity=4, dim=2, xp=backend.xp), x, label).state
    result = objective.step(state, -x, label, ids=backend.array(np.asarray([-1])))
    assert float(result.loss) == 2
    assert np.isnan(float(result.report.drift))


def test_filled_rows_are_older_than_the_call_to_come(backend):
    objective = xbm.Objective(warmup=0, in_batch=False)
    x, one = backend.array(np.asarray([[1.0, 0.0]])), backend.array(np.asarray([5]))
    state = objective.store(objective.init(capacity=4, dim=2, xp=backend.xp), x, one, ids=one)
    assert int(state.memory.step) == 0
    result = objective.step(state, x, one, ids=one)
    assert float(result.report.pairs) == 0
    assert float(result.report.drift) == 0
    assert float(result.report.drift_age) == 1


@given(seed=st.integers(0, 2**32 - 1), size=lengths(1, 5, [3]), more=lengths(0, 3, [2]), capacity=capacities)
def test_queries_against_keys(backend, seed, size, more, capacity):
    """Keys are stored and compared, queries are not, and no pair is excluded."""
    rng = np.random.default_rng(seed)
    objective = xbm.Objective(warmup=0)
    state, model = (
        objective.init(capacity=capacity, dim=3, dtype=backend.xp.float64, xp=backend.xp),
        oracle.Memory(capacity),
    )
    for _ in range(2):
        q, k = rng.normal(size=(size, 3)), rng.normal(size=(size + more, 3))
        labels, key_labels = rng.integers(3, size=size), rng.integers(3, size=size + more)
        result = objective.step(
            state,
            backend.array(q),
            backend.array(labels),
            keys=backend.array(k),
            key_labels=backend.array(key_labels),
        )
        model.enqueue(oracle.normalize(k), key_labels)

        def against_batch(q, k, labels=labels, key_labels=key_labels):
            return oracle.batch_term(oracle.normalize(q), labels, oracle.normalize(k), key_labels)

        def expected(q, k, labels=labels):
            return against_batch(q, k) + oracle.memory_term(model, oracle.normalize(q), labels)

        assert float(result.loss) == pytest.approx(expected(q, k), rel=1e-9)
        stored = np.asarray([row.z for row in model.rows])
        if away_from_thresholds(oracle.normalize(q), np.vstack([oracle.normalize(k), stored])):
            of_queries = oracle.gradient(lambda q, k=k: expected(q, k), q)
            of_keys = oracle.gradient(lambda k, q=q: against_batch(q, k), k)
            np.testing.assert_allclose(backend.numpy(result.gradient), of_queries, rtol=1e-5, atol=1e-7)
            np.testing.assert_allclose(backend.numpy(result.key_gradient), of_keys, rtol=1e-5, atol=1e-7)
        model.end_call()
        state = result.state


def test_micro_batches_see_earlier_ones(backend):
    x, labels = backend.array(np.asarray([[1.0, 0.0], [0.0, 1.0]])), backend.array(np.asarray([0, 0]))
    objective = xbm.Objective(warmup=0, in_batch=False)
    state = objective.init(capacity=8, dim=2, xp=backend.xp)
    first = objective.step(state, x[:1, ...], labels[:1])
    second = objective.step(first.state, x[1:, ...], labels[1:])
    assert float(first.loss) == 0
    assert float(second.loss) == 1


def test_huge_tiny_and_zero_rows(backend):
    x = np.asarray([[3e30, 4e30], [3e38, 3e38], [3e-5, 4e-5], [0.0, 0.0], [3e-8, 4e-8]], np.float32)
    labels = backend.array(np.asarray([0, 0, 0, 1, 1]))
    objective = xbm.Objective(warmup=0)
    result = objective.step(objective.init(capacity=5, dim=2, xp=backend.xp), backend.array(x), labels)
    expected = [[0.6, 0.8], [0.5**0.5, 0.5**0.5], [0.6, 0.8], [0.0, 0.0], [0.03, 0.04]]
    np.testing.assert_allclose(backend.numpy(xbm.rows(result.state.memory).embeddings), expected, rtol=1e-6)
    assert np.all(np.isfinite(backend.numpy(result.gradient)))
    assert np.isfinite(float(result.loss))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_nonfinite_rows_are_skipped_and_counted_while_the_loss_shows_them(backend, value):
    x = np.asarray([[1.0, 0.0], [value, 1.0]])
    labels = backend.array(np.asarray([0, 0]))
    objective = xbm.Objective(warmup=0)
    state = objective.init(capacity=4, dim=2, xp=backend.xp)
    with np.errstate(invalid="ignore"):  # NumPy's own word about inf / inf
        result = objective.step(state, backend.array(x), labels)
    assert np.isnan(float(result.loss))
    assert int(result.state.memory.count) == 1
    assert float(result.report.skipped) == 1
    clean = objective.step(result.state, backend.array(x[:1]), labels[:1])
    assert np.isfinite(float(clean.loss))
    before = snapshot(backend, clean.state)
    with np.errstate(invalid="ignore"), pytest.raises(ValueError, match=r"1 of the embeddings \(2, 2\) are not finite"):
        xbm.Objective(on_nonfinite="raise").step(clean.state, backend.array(x), labels)
    assert_same_state(backend, clean.state, before)


def test_an_infinite_memory_term_does_not_reach_the_warmup(backend):
    """A disabled memory loss is masked, not multiplied by 0."""
    objective = xbm.Objective(loss=xbm.Contrastive(pos_margin=1e308), warmup=2, normalize=False, in_batch=False)
    state = objective.init(capacity=4, dim=1, dtype=backend.xp.float64, xp=backend.xp)
    x = np.asarray([[1e150], [-1e160]])
    with np.errstate(over="ignore", invalid="ignore"):
        result = objective.step(state, backend.array(x), backend.array(np.asarray([0, 0])))
    assert float(result.loss) == 0


def test_dtypes(backend):
    """S in float32, or float64 if an input is; the gradient in the input's."""
    xp, objective = backend.xp, xbm.Objective(warmup=0)
    labels = backend.array(np.asarray([0, 0]))
    for rows in backend.storable:
        for given_as in backend.storable:
            state = objective.init(capacity=4, dim=2, dtype=getattr(xp, rows), xp=xp)
            x = xp.astype(backend.array(np.asarray([[1.0, 0.0], [0.5, 0.5]])), getattr(xp, given_as))
            result = objective.step(state, x, labels)
            assert result.loss.dtype == (xp.float64 if "float64" in (rows, given_as) else xp.float32)
            assert result.gradient.dtype == x.dtype
            assert result.state.memory.embeddings.dtype == getattr(xp, rows)
            assert all(one.dtype == xp.float32 for one in result.report)
            assert float(result.loss) == pytest.approx(2 * (1 - 0.5**0.5), rel=1e-2)


def test_options_of_numpys_widen_nothing(backend):
    half = np.float64(0.5)
    objective = xbm.Objective(loss=xbm.Contrastive(neg_margin=half), weight=half, warmup=np.int64(0))
    x, labels = backend.array(np.ones((2, 2), np.float32)), backend.array(np.asarray([0, 1]))
    assert objective.step(objective.init(capacity=4, dim=2, xp=backend.xp), x, labels).loss.dtype == backend.xp.float32


def test_report(backend):
    objective = xbm.Objective(warmup=0, weight=0.5)
    state = objective.init(capacity=4, dim=2, dtype=backend.xp.float64, xp=backend.xp)
    x, labels = np.asarray([[1.0, 0.0], [0.0, 1.0]]), backend.array(np.asarray([0, 1]))
    ids = backend.array(np.asarray([10, 11]))
    state = objective.step(state, backend.array(x), labels, ids=ids).state
    moved = backend.array(np.asarray([[0.8, 0.6]]))
    result = objective.step(state, moved, labels[:1], ids=ids[:1])
    assert result.report._fields == xbm.REPORT
    np.testing.assert_array_equal(backend.numpy(result.report.stacked()), [float(one) for one in result.report])
    report = {name: float(one) for name, one in result.report._asdict().items()}
    assert report["batch_loss"] == 0
    assert report["memory_loss"] == pytest.approx(
        0.5 * 0.1
    )  # the copy is excluded; the other row is a negative above the margin by 0.6 - 0.5
    assert report["fill"] == 0.75
    assert report["pairs"] == 1
    assert report["drift"] == pytest.approx(0.2**2 + 0.6**2)
    assert report["drift_age"] == 1
    assert report["skipped"] == 0


@pytest.mark.parametrize(
    ("options", "error", "sentence"),
    [
        ({"weight": -1.0}, ValueError, "weight must be at least 0, got -1.0"),
        ({"weight": float("nan")}, ValueError, "weight must be a finite number"),
        ({"weight": "1"}, TypeError, "weight must be a number, got '1'"),
        ({"warmup": -1}, ValueError, "warmup must be at least 0, got -1"),
        ({"warmup": 1.5}, TypeError, "warmup must be an int, got 1.5"),
        ({"copies": "drop"}, ValueError, "copies must be 'exclude', 'keep' or 'replace', got 'drop'"),
        ({"on_nonfinite": "ignore"}, ValueError, "on_nonfinite must be 'skip' or 'raise'"),
        ({"normalize": 1}, TypeError, "normalize must be True or False, got 1"),
        ({"in_batch": None}, TypeError, "in_batch must be True or False"),
        ({"block_rows": 0}, ValueError, "block_rows must be at least 1"),
        ({"loss": "contrastiv"}, ValueError, "loss must be one of the names .*'contrastive', .*got 'contrastiv'"),
        ({"loss": None}, TypeError, "such as a PairLoss, a callable, or .*, got None"),
        ({"loss": xbm.Contrastive}, TypeError, "a callable, or .*, got <class"),
        ({"miner": "hard"}, ValueError, "miner must be one of the names .*'margin', .*got 'hard'"),
        ({"miner": 3}, TypeError, "an xbm.Miner, a list of them or None, got 3"),
        ({"loss": "circle", "normalize": False}, ValueError, r"Circle\(.*\) is a function of cosines"),
        ({"loss": "margin", "miner": "multi-similarity", "normalize": False}, ValueError, "function of cosines"),
    ],
)
def test_objective_refuses(options, error, sentence):
    with pytest.raises(error, match=sentence):
        xbm.Objective(**options)


@pytest.mark.parametrize(
    ("change", "error", "sentence"),
    [
        ({"keys": np.ones((2, 4))}, ValueError, r"keys must have shape \(B, 3\)"),
        ({"key_labels": np.zeros(2, np.int64)}, ValueError, "key_labels were given without keys"),
        ({"keys": np.ones((3, 3))}, ValueError, "key_labels are needed unless"),
        (
            {"keys": np.ones((1, 3)), "key_labels": np.zeros(1, np.int64), "ids": np.zeros(2, np.int64)},
            ValueError,
            "2 queries and 1 keys",
        ),
        ({"enqueue": np.ones(3, bool)}, ValueError, r"enqueue must have shape \(2,\)"),
        ({"labels": np.zeros(2)}, TypeError, "labels must be integers"),
        ({"x": np.ones((2, 4))}, ValueError, r"embeddings must have shape \(B, 3\)"),
        ({"ids": np.zeros(2)}, TypeError, "ids must be integers"),
    ],
)
def test_step_refuses_and_loses_nothing(backend, change, error, sentence):
    objective = xbm.Objective()
    state = objective.init(capacity=4, dim=3, xp=backend.xp)
    good = {"x": np.ones((2, 3)), "labels": np.zeros(2, np.int64)}
    before = snapshot(backend, state)
    with pytest.raises(error, match=sentence):
        objective.step(state, **{name: backend.array(one) for name, one in (good | change).items()})
    assert_same_state(backend, state, before)


def test_drift_reads_the_newest_of_more_old_rows_than_the_batch_has(backend):
    one = backend.array(np.asarray([7]))
    state = xbm.init(capacity=3, dim=1, dtype=backend.xp.float64, xp=backend.xp)
    for x in (1.0, 2.0, 3.0, 4.0):
        state = xbm.advance(xbm.enqueue(state, backend.array(np.asarray([[x]])), one, ids=one))
    found = xbm.drift.returning(state, backend.array(np.asarray([[6.0]])), one)
    assert (float(found.distance), float(found.age)) == (4.0, 1.0)


def test_keys_of_another_precision(backend):
    """Everything is computed in float64 if any input is."""
    x, labels = backend.array(np.ones((2, 3), np.float32)), backend.array(np.asarray([0, 1]))
    keys = backend.array(np.ones((2, 3)))
    objective = xbm.Objective(warmup=0)
    result = objective.step(objective.init(capacity=4, dim=3, xp=backend.xp), x, labels, keys=keys)
    assert result.loss.dtype == backend.xp.float64
    assert (result.gradient.dtype, result.key_gradient.dtype) == (x.dtype, keys.dtype)


@given(history=histories(with_ids=True), capacity=capacities, steps_apart=st.integers(1, 3))
def test_drift_is_the_mean_over_returning_samples(backend, history, capacity, steps_apart):
    dim = history[0].x.shape[1]
    state, model = (
        xbm.init(capacity=capacity, dim=dim, dtype=backend.xp.float64, xp=backend.xp),
        oracle.Memory(capacity),
    )
    for batch in history:
        x = batch.x.astype(np.float64)
        found = xbm.drift.returning(state, backend.array(x), backend.array(batch.ids))
        # Each old row is paired with the first batch row of its id; only the newest B old rows are read.
        first = {sample: i for i, sample in reversed(list(enumerate(batch.ids.tolist()))) if sample >= 0}
        pairs = [(x[first[row.id]] - row.z, model.step - row.stored_at) for row in model.rows if row.id in first]
        pairs = pairs[::-1][: len(x)]
        if pairs:
            assert float(found.distance) == pytest.approx(np.mean([moved @ moved for moved, _ in pairs]), abs=1e-12)
            assert float(found.age) == pytest.approx(np.mean([age for _, age in pairs]))
        else:
            assert np.isnan(float(found.distance))
            assert np.isnan(float(found.age))
        state = xbm.enqueue(state, backend.array(x), backend.array(batch.labels), ids=backend.array(batch.ids))
        model.enqueue(x, batch.labels, batch.ids)
        for _ in range(steps_apart):
            state = xbm.advance(state)
            model.end_call()
