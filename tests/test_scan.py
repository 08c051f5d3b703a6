"""Losses through the engine: blocks, weights, gradients."""

from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.pair_losses import LOSSES
from tests.strategies import lengths
from tests.test_losses import FEWER, block_of, rows_of_pairs
from xbm import Contrastive, LogSumExp, Sum, TopK
from xbm.losses import HingeLoss
from xbm.scan import scan


@pytest.mark.parametrize("loss", LOSSES, ids=repr)
@FEWER
@given(drawn=rows_of_pairs(), block_rows=lengths(1, 10, [2]), seed=st.integers(0, 1000))
def test_any_block_size_is_one_block(backend, loss, drawn, block_rows, seed):
    _, P, N = drawn
    rng = np.random.default_rng(seed)
    z, V = rng.normal(size=(len(P), 5)), rng.normal(size=(P.shape[1], 5))
    z, V = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (z, V))
    value, W = loss.whole(block_of(backend, z @ V.T, P, N))
    all_pairs = backend.array(np.stack([P.T, N.T], axis=1))

    class Drawn:
        step = 0

        def candidates(self, slots, both):
            return Rows(both)

        def between(self, rows):
            return tuple(backend.xp.matrix_transpose(rows.both[:, side, :]) for side in (0, 1))

    class Rows(NamedTuple):
        both: Any

        @property
        def filled(self):
            return backend.xp.ones_like(self.both[:, 0, 0])

        def related(self):
            return backend.xp.any(self.both[:, 1, :] == 0, axis=1)

        def take(self, indices):
            return Rows(backend.xp.take(self.both, indices, axis=0))

    found = scan(loss, backend.array(z), backend.array(V), (all_pairs,), Drawn(), block_rows=block_rows)
    np.testing.assert_allclose(backend.numpy(found.value), backend.numpy(value), rtol=1e-12, atol=1e-14)
    expected = backend.numpy(W)
    np.testing.assert_allclose(backend.numpy(found.gradient), expected @ V, rtol=1e-9, atol=1e-12)
    # A smooth weight may round to 0 or not; a hinge's weight is exactly 0 or far from 0.
    most = expected if isinstance(loss, HingeLoss) else P + N
    assert np.count_nonzero(np.abs(expected) > 1e-9) <= int(found.pairs) <= np.count_nonzero(most)
    plain = scan(loss, backend.array(z), backend.array(V), (all_pairs,), Drawn(), block_rows=block_rows, gradient=False)
    np.testing.assert_array_equal(backend.numpy(plain.value), backend.numpy(found.value))
    assert plain.gradient is None


def test_contrastive_at_its_margins(backend):
    S, P, N = np.asarray([[1.0, 0.5, 0.5]]), np.asarray([[1.0, 0.0, 0.0]]), np.asarray([[0.0, 1.0, 1.0]])
    value, W = Contrastive().whole(block_of(backend, S, P, N))
    assert float(value[0]) == 0
    assert not np.any(backend.numpy(W))


def several(elements, sizes):
    """Draw a list of one of these lengths."""
    return sizes.flatmap(lambda n: st.lists(elements, min_size=n, max_size=n))


@given(
    x=several(st.floats(-300, 300), lengths(1, 8, [8])),
    cut=lengths(0, 8, [3, 8]),
    weights=st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=8, max_size=8),
)
def test_log_sum_exp(backend, x, cut, weights):
    x, w = np.asarray([x]), np.asarray([weights[: len(x)]])
    cut = min(max(cut, 1), len(x[0]))
    parts = [slice(None, cut), slice(cut, None)] if cut < len(x[0]) else [slice(None)]
    pieces = [LogSumExp.of(backend.array(x[:, part]), backend.array(w[:, part])) for part in parts]
    found = float((pieces[0].merge(pieces[1]) if len(pieces) == 2 else pieces[0]).result()[0])
    terms = [value + np.log(weight) for value, weight in zip(x[0], w[0], strict=True) if weight]
    assert found == pytest.approx(float(np.logaddexp.reduce(terms)) if terms else -np.inf, rel=1e-12, abs=1e-12)


@given(scores=several(st.integers(0, 2), lengths(1, 9, [9])), k=lengths(1, 5, [3]), block=lengths(1, 9, [2]))
def test_top_k_prefers_the_lowest_slot(backend, scores, k, block):
    S = np.asarray([scores], float)
    w = (np.arange(S.shape[1]) % 3 != 1).astype(float)[None]
    merged = None
    for start in range(0, S.shape[1], block):
        part = slice(start, start + block)
        one = block_of(backend, S[:, part], w[:, part], w[:, part])._replace(
            slots=backend.array(np.arange(S.shape[1])[part])
        )
        top = TopK.of(one.S, one.P, one, k=k)
        merged = top if merged is None else merged.merge(top)
    order = sorted((j for j in range(len(scores)) if w[0, j]), key=lambda j: (-scores[j], j))[:k]
    assert backend.numpy(merged.slot)[0].tolist() == order + [-1] * (k - len(order))
    assert backend.numpy(merged.similarity)[0, : len(order)].tolist() == [scores[j] for j in order]


def test_sums_of_several_at_once(backend):
    x = np.arange(24.0).reshape(2, 3, 4)
    found = Sum.of(backend.array(x)).merge(Sum.of(backend.array(x))).result()
    np.testing.assert_array_equal(backend.numpy(found), 2 * x.sum(axis=1))
