"""Retrieval metrics, compared with a full sort, on sets with many ties and exact copies."""

from itertools import product

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tests import oracle
from tests.strategies import big_integers, labels, lengths
from xbm import backends, metrics

DIM = 4


@st.composite
def exact_rows(draw, n):
    """Draw n rows whose cosines are exact in every float format, so that ties do not depend on the summation order."""
    axis = st.tuples(st.integers(0, DIM - 1), st.sampled_from([-1, 0, 1])).map(lambda a: a[1] * np.eye(DIM)[a[0]])
    corner = st.lists(st.sampled_from([-1, 1]), min_size=DIM, max_size=DIM).map(np.asarray)
    few = draw(st.lists(axis | corner, min_size=1, max_size=4))
    rows = draw(st.lists(st.sampled_from(few), min_size=n, max_size=n))
    scale = draw(hnp.arrays(np.int64, (n, 1), elements=st.integers(1, 3)))
    return (np.stack(rows) * scale).astype(draw(st.sampled_from([np.float32, np.float64])))


@st.composite
def sets(draw):
    """Draw `(x, labels)`."""
    n = draw(lengths(1, 9, [2, 6]))
    return draw(exact_rows(n)), draw(hnp.arrays(np.int64, (n,), elements=labels | big_integers))


def smooth_set(seed, n, dim=3):
    """Return `(x, labels)` without ties."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, dim))
    z = oracle.normalize(x)
    assume(n < 3 or all(np.diff(np.sort(row)).min() > 1e-9 for row in z @ z.T))
    return x, rng.integers(3, size=n)


block_sizes = st.none() | lengths(1, 10, [4])
cutoffs = st.lists(st.integers(1, 12), min_size=1, max_size=3, unique=True)


def arrays(backend, queries, items=None, **options):
    """Return positional and keyword arguments of `retrieval` in a library."""
    if items is not None:
        options |= dict(zip(("gallery", "gallery_labels"), map(backend.array, items), strict=True))
    return tuple(map(backend.array, queries)), options


def slow_neighbours(x, items=None):
    """Return all items for each query, nearest first, ties by index, without the query itself."""
    z = oracle.normalize(x)
    v = z if items is None else oracle.normalize(items)
    found = []
    for i in range(len(z)):
        others = [j for j in range(len(v)) if items is not None or j != i]
        found.append(sorted(others, key=lambda j: (-(z[i] @ v[j]), j)))
    return found


def slow_retrieval(queries, items=None, *, k):
    """Return the metrics from their definitions, one query and one rank at a time."""
    (x, classes), (v, item_classes) = queries, queries if items is None else items
    scores = []
    for i, order in enumerate(slow_neighbours(x, None if items is None else v)):
        rel = [item_classes[j] == classes[i] for j in order]
        R = sum(rel)
        if R == 0:
            continue
        recall = {one: float(any(rel[:one])) for one in k}
        total = 0.0
        for rank in range(1, R + 1):
            total += sum(rel[:rank]) / rank * rel[rank - 1]
        scores.append((recall, sum(rel[:R]) / R, total / R))

    def mean(values):
        return sum(values) / len(values) if values else float("nan")

    recall = {one: mean([score[0][one] for score in scores]) for one in k}
    return metrics.Retrieval(recall, mean([s[1] for s in scores]), mean([s[2] for s in scores]), len(scores))


def flat(found):
    """Return the metrics as a list of numbers, with R@K in the order of K."""
    return [*(found.recall[one] for one in sorted(found.recall)), found.r_precision, found.map_at_r, found.queries]


@given(queries=sets(), items=st.none() | sets(), k=cutoffs, block_rows=block_sizes)
def test_metrics_are_the_definitions(backend, queries, items, k, block_rows):
    positional, options = arrays(backend, queries, items, k=k, block_rows=block_rows)
    found = metrics.retrieval(*positional, **options)
    expected = slow_retrieval(queries, items, k=k)
    assert found.recall.keys() == expected.recall.keys()
    assert flat(found) == pytest.approx(flat(expected), rel=1e-5, nan_ok=True)


@given(queries=sets(), items=st.none() | sets(), block_rows=block_sizes, data=st.data())
def test_neighbours_are_the_nearest_and_ties_go_to_the_lower_index(backend, queries, items, block_rows, data):
    x, v = queries[0], None if items is None else items[0]
    expected = slow_neighbours(x, v)
    assume(len(expected[0]) > 0)
    k = data.draw(st.integers(1, len(expected[0])))
    gallery = None if v is None else backend.array(v)
    found = metrics.neighbours(backend.array(x), k=k, gallery=gallery, block_rows=block_rows)
    assert backend.numpy(found).tolist() == [order[:k] for order in expected]


@given(
    seed=st.integers(0, 2**32),
    n=lengths(metrics.LEAST_WIDTH**2, 1100, [1100]),
    k=st.integers(1, 4),
)
def test_a_few_among_many_are_the_nearest_and_ties_go_to_the_lower_index(backend, seed, n, k):
    rng = np.random.default_rng(seed)
    axes, corners = np.eye(DIM), np.asarray(list(product([-1, 1], repeat=DIM)))
    directions = np.concatenate([axes, -axes, corners])  # exact cosines, as in `exact_rows`
    items = rng.choice(rng.choice(directions, 2), n)
    items[rng.choice(n, 8, replace=False)] = rng.choice(directions, 8)  # a few close items, before and after ties
    queries = rng.choice(directions, 3)
    found = metrics.neighbours(backend.array(queries), k=k, gallery=backend.array(items))
    assert backend.numpy(found).tolist() == [order[:k] for order in slow_neighbours(queries, items)]


@given(queries=sets(), items=st.none() | sets(), k=cutoffs, block_rows=lengths(1, 10, [4]))
def test_any_block_size_is_one_block(backend, queries, items, k, block_rows):
    positional, options = arrays(backend, queries, items, k=k)
    whole = metrics.retrieval(*positional, **options, block_rows=len(queries[0]))
    np.testing.assert_array_equal(flat(metrics.retrieval(*positional, **options, block_rows=block_rows)), flat(whole))


@given(n=lengths(2, 9, [6]), data=st.data())
def test_the_query_is_left_out_by_its_index_among_copies_of_itself(backend, n, data):
    k = data.draw(st.integers(1, n - 1))
    copies = backend.array(np.ones((n, 3), np.float32))
    found = backend.numpy(metrics.neighbours(copies, k=k))
    assert found.tolist() == [[j for j in range(n) if j != i][:k] for i in range(n)]


@given(seed=st.integers(0, 2**32), n=lengths(2, 12, [6]), k=cutoffs, data=st.data())
def test_without_ties_neither_order_nor_names_of_classes_matter(backend, seed, n, k, data):
    x, classes = smooth_set(seed, n)
    names = data.draw(st.lists(st.integers(-(2**63), 2**63 - 1), min_size=3, max_size=3, unique=True))
    order = data.draw(st.permutations(range(n)))
    first = metrics.retrieval(backend.array(x), backend.array(classes), k=k)
    other = metrics.retrieval(backend.array(x[order]), backend.array(np.asarray(names)[classes][order]), k=k)
    assert flat(other) == pytest.approx(flat(first), rel=1e-9, nan_ok=True)


@given(queries=sets(), items=sets(), k=cutoffs, extra=st.integers(1, 3), data=st.data())
def test_queries_without_a_relevant_item_are_left_out(backend, queries, items, k, extra, data):
    lonely = data.draw(exact_rows(extra)), np.full(extra, -7)
    more = tuple(np.concatenate(both) for both in zip(queries, lonely, strict=True))
    positional, options = arrays(backend, queries, items, k=k)
    longer, _ = arrays(backend, more)
    few, many = metrics.retrieval(*positional, **options), metrics.retrieval(*longer, **options)
    assert flat(many) == pytest.approx(flat(few), rel=1e-6, nan_ok=True)


def test_means_over_no_query_are_nan(backend):
    found = metrics.retrieval(backend.array(np.eye(3)), backend.array(np.arange(3)), k=(1, 2))
    assert found.queries == 0
    assert np.all(np.isnan([*found.recall.values(), found.r_precision, found.map_at_r]))


def test_similarities_are_float64_if_the_input_is_and_never_narrower_than_float32(backend):
    for dtype in backend.storable:
        gap = 1e-5 if dtype == "float64" else 1e-2  # cosines equal in the next narrower format
        query, items = np.asarray([[1.0, 0.0]]), np.asarray([[1.0, 2 * gap], [1.0, gap]])
        found = metrics.neighbours(backend.array(query, dtype), k=1, gallery=backend.array(items, dtype))
        assert backend.numpy(found).tolist() == [[1]], dtype


@pytest.mark.parametrize(("block_rows", "expected"), [(7, 7), (None, metrics.LEAST_ROWS)])
def test_no_more_than_a_block_of_similarities_is_made(backend, monkeypatch, block_rows, expected):
    x = backend.array(np.random.default_rng(0).normal(size=(150, 2)))
    _, ops = backends.of(x)
    heights, select = [], ops.top_k

    def recording(similarities, k):
        heights.append(similarities.shape[0])
        return select(similarities, k)

    monkeypatch.setattr(ops, "top_k", recording)
    monkeypatch.setattr(metrics, "BLOCK_ELEMENTS", 1)
    metrics.retrieval(x, backend.array(np.arange(150) // 2), block_rows=block_rows)
    assert max(heights) == expected
    assert sum(heights) == 150


X, LABELS = np.ones((4, 3), np.float32), np.zeros(4, np.int64)


@pytest.mark.parametrize(
    ("change", "error", "sentence"),
    [
        ({"labels": LABELS.astype(np.float32)}, TypeError, r"labels must be integers, got .*float32 of shape \(4,\)"),
        ({"labels": LABELS[:3]}, ValueError, r"labels must have shape \(4,\).*embeddings \(4, 3\), got \(3,\)"),
        ({"labels": [0, 0, 0, 0]}, TypeError, "labels must be an array of .*, got list"),
        ({"gallery_labels": LABELS[:3]}, ValueError, r"gallery_labels must have shape \(4,\).*got \(3,\)"),
        ({"gallery_labels": LABELS > 0}, TypeError, "gallery_labels must be integers, got .*bool"),
        (
            {"gallery_labels": None},
            ValueError,
            "gallery and gallery_labels must be given together, got gallery without",
        ),
        ({"gallery": None}, ValueError, "must be given together, got gallery_labels without gallery"),
        ({"gallery": X[:, :2]}, ValueError, r"gallery must have shape \(G, 3\).*\(4, 3\), got \(4, 2\)"),
        ({"gallery": X[:0]}, ValueError, r"gallery must have shape \(n, D\) with n and D at least 1, got \(0, 3\)"),
        ({"gallery": [[1.0]]}, TypeError, "gallery must be an array of .*, got list"),
        ({"gallery": X * np.inf}, ValueError, r"gallery must be finite, got 4 rows .* in shape \(4, 3\)"),
        ({"embeddings": X[:0]}, ValueError, r"embeddings must have shape \(n, D\).*got \(0, 3\)"),
        ({"embeddings": X[0]}, ValueError, r"embeddings must have shape \(n, D\).*got \(3,\)"),
        ({"embeddings": X.astype(np.int64)}, TypeError, "embeddings must be real floating point, got .*int64"),
        ({"embeddings": [[1.0]]}, TypeError, "embeddings must be an array, got list"),
        ({"embeddings": np.where(np.eye(4, 3) > 0, np.nan, X)}, ValueError, "embeddings must be finite, got 3 rows"),
        ({"k": 0}, ValueError, "k must be at least 1, got 0"),
        ({"k": (1, -2)}, ValueError, "k must be at least 1, got -2"),
        ({"k": 2.5}, TypeError, "k must be an int, got 2.5"),
        ({"block_rows": 0}, ValueError, "block_rows must be at least 1, got 0"),
    ],
)
def test_retrieval_refuses(backend, change, error, sentence):
    given_ones = {"embeddings": X, "labels": LABELS, "gallery": X, "gallery_labels": LABELS} | change
    given_ones = {n: backend.array(one) if isinstance(one, np.ndarray) else one for n, one in given_ones.items()}
    with pytest.raises(error, match=sentence):
        metrics.retrieval(given_ones.pop("embeddings"), given_ones.pop("labels"), **given_ones)


@pytest.mark.parametrize(("gallery", "most"), [(None, 3), (X, 4)])
def test_neighbours_refuses_more_than_there_are(backend, gallery, most):
    gallery = None if gallery is None else backend.array(gallery)
    assert metrics.neighbours(backend.array(X), k=most, gallery=gallery).shape == (4, most)
    with pytest.raises(ValueError, match=f"k must be at most the number of items to search, {most}, got {most + 1}"):
        metrics.neighbours(backend.array(X), k=most + 1, gallery=gallery)
