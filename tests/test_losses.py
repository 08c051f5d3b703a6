"""Every loss on its own: its formula, its weights, and degenerate rows."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import xbm
from tests import formulas
from tests.oracle import gradient, normalize
from tests.pair_losses import FORMULAS, LOSSES, MINED, HardestNegatives
from tests.strategies import lengths
from xbm import BatchHardTriplet, Block, Circle, NTXent, SmoothAP, SupCon, TupletMargin

THRESHOLDS = (0.8, 0.5, 0.3, 0.02, 0.68, -0.4, -0.25, 0.41, -0.23)
SHARP = [NTXent(temperature=0.01), SupCon(temperature=0.01), Circle(gamma=512), TupletMargin(scale=256)]
FEWER = settings(max_examples=max(5, settings.default.max_examples // 3))


@st.composite
def rows_of_pairs(draw):
    """Draw (S, P, N) as float64: cosines all different and away from every threshold, pairs at random."""
    anchors, rows = draw(lengths(1, 4, [3])), draw(lengths(1, 9, [9]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    grid = np.linspace(-0.93, 0.93, anchors * rows)
    for threshold in THRESHOLDS:
        grid = np.where(np.abs(grid - threshold) < 2e-3, grid + 4e-3, grid)
    S = rng.permutation(grid).reshape(anchors, rows)
    kind = rng.integers(3, size=S.shape)
    return S, (kind == 0).astype(float), (kind == 1).astype(float)


def block_of(backend, S, P, N):
    """Return one block with all the rows."""
    slots, anchors = np.arange(S.shape[1]), np.arange(S.shape[0])
    return Block(*(backend.array(one) for one in (S, P, N, slots, anchors)))


def among_others(*rows):
    """Return rows of pairs in the first rows and columns of (3, 9), where no others are pairs: one shape for JAX."""
    return tuple(np.pad(one, ((0, 3 - one.shape[0]), (0, 9 - one.shape[1]))) for one in rows)


def on_numpy(loss, S, P, N):
    """Return a loss's values and weights for whole rows, with NumPy."""
    return loss.whole(Block(S, P, N, np.arange(S.shape[1]), np.arange(S.shape[0])))


@pytest.mark.parametrize("loss", FORMULAS, ids=repr)
@FEWER
@given(drawn=rows_of_pairs())
def test_value_is_the_formulas(backend, loss, drawn):
    value, _ = loss.whole(block_of(backend, *drawn))
    np.testing.assert_allclose(backend.numpy(value), formulas.rows(FORMULAS[loss], *drawn), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("loss", LOSSES, ids=repr)
@FEWER
@given(drawn=rows_of_pairs(), soft=st.booleans())
def test_weights_are_the_values_derivative(backend, loss, drawn, soft):
    S, P, N = drawn
    if soft and not isinstance(loss, Circle):  # its formula has no pair weights
        shade = np.random.default_rng(0).uniform(0.2, 2, size=S.shape)
        P, N = P * shade, N * shade
    _, W = loss.whole(block_of(backend, S, P, N))

    def value(moved):
        if isinstance(loss, Circle):
            return float(np.sum(formulas.rows(FORMULAS[loss], moved, P, N, held=S)))
        return float(np.sum(on_numpy(loss, moved, P, N)[0]))

    np.testing.assert_allclose(backend.numpy(W), gradient(value, S, step=1e-6), rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize("loss", [xbm.Triplet(), xbm.SemiHardTriplet(margin=0.5671)], ids=repr)
@FEWER
@given(drawn=rows_of_pairs(), seed=st.integers(0, 1000))
def test_triplets_weigh_as_their_pairs_do(backend, loss, drawn, seed):
    """Compared with an enumeration of all triplets; without active triplets, value and weights are exactly 0."""
    S, P, N = drawn
    weights = np.random.default_rng(seed).uniform(0.1, 1, size=S.shape)
    P, N = P * weights, N * weights
    value, W = (backend.numpy(one) for one in loss.whole(block_of(backend, S, P, N)))
    for i in range(len(S)):
        cost = count = 0.0
        for p, n in np.ndindex(S.shape[1], S.shape[1]):
            gap = S[i, n] - S[i, p]
            if gap > -loss.margin and (isinstance(loss, xbm.Triplet) or gap < 0):
                cost += P[i, p] * N[i, n] * (gap + loss.margin)
                count += P[i, p] * N[i, n]
        np.testing.assert_allclose(value[i], cost / count if count else 0, rtol=1e-9, atol=1e-12)
        if not count:
            assert not np.any(W[i])


@FEWER
@given(drawn=rows_of_pairs(), seed=st.integers(0, 1000))
def test_smooth_ap_is_a_weighted_mean_of_precisions(backend, drawn, seed):
    """The value is in [0, 1] for all pair weights, which affect the ranks and the mean over positives."""
    S, P, N = drawn
    weights = np.random.default_rng(seed).uniform(0.1, 10, size=S.shape)
    value, _ = SmoothAP(temperature=0.1).whole(block_of(backend, S, P * weights, N * weights))
    assert np.all((backend.numpy(value) >= -1e-12) & (backend.numpy(value) <= 1))


@pytest.mark.parametrize("c", [0.1, 10.0])
def test_recall_is_of_positives_whatever_they_weigh(backend, c):
    """One positive, and nothing before it: half a hit at 1, as if it weighed 1."""
    S, one, none = among_others(np.asarray([[0.5, 0.1]]), np.asarray([[c, 0.0]]), np.zeros((1, 2)))
    value, _ = xbm.RecallAtK(k=(1,)).whole(block_of(backend, S, one, none))
    np.testing.assert_allclose(backend.numpy(value)[:1], [0.5])


@pytest.mark.parametrize("loss", FORMULAS, ids=repr)
def test_a_weight_that_is_no_number_is_seen_in_the_loss(backend, loss):
    S = np.asarray([[0.9, 0.2, -0.4, 0.7]])
    P = np.asarray([[1.0, np.nan, 0.0, 0.0]])
    with np.errstate(invalid="ignore"):
        value, _ = loss.whole(block_of(backend, *among_others(S, P, np.asarray([[0.0, 0.0, 1.0, 1.0]]))))
    assert np.isnan(backend.numpy(value)[0]) or isinstance(loss, BatchHardTriplet)  # which takes it for no pair


@pytest.mark.parametrize("loss", LOSSES, ids=repr)
@FEWER
@given(drawn=rows_of_pairs(), seed=st.integers(0, 1000))
def test_order_of_rows_changes_nothing(backend, loss, drawn, seed):
    shuffled = np.random.default_rng(seed).permutation(drawn[0].shape[1])
    block, again = block_of(backend, *drawn), block_of(backend, *(one[:, shuffled] for one in drawn))
    again = again._replace(slots=backend.array(shuffled))  # same slots, so random miners draw the same pairs
    (value, W), (value_again, W_again) = loss.whole(block), loss.whole(again)
    np.testing.assert_allclose(backend.numpy(value_again), backend.numpy(value), rtol=1e-11, atol=1e-13)
    np.testing.assert_allclose(backend.numpy(W_again), backend.numpy(W)[:, shuffled], rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("loss", LOSSES, ids=repr)
@pytest.mark.parametrize("kinds", ["none", "positives", "negatives"])
def test_rows_without_pairs_are_finite(backend, loss, kinds):
    S = np.tile(np.asarray([[0.9, 0.2, -0.4], [1.0, 1.0, -1.0], [0.3, 0.6, 0.1]]), (1, 3))
    P, N = (np.ones_like(S) if kinds == kind else np.zeros_like(S) for kind in ("positives", "negatives"))
    value, W = loss.whole(block_of(backend, S, P, N))
    assert np.all(np.isfinite(backend.numpy(value)))
    assert np.all(np.isfinite(backend.numpy(W)))
    if kinds == "none":
        assert not np.any(backend.numpy(value))
        assert not np.any(backend.numpy(W))


@pytest.mark.parametrize("loss", LOSSES, ids=repr)
@pytest.mark.parametrize("kind", ["positive", "negative"])
def test_a_similarity_that_is_no_number_is_seen_in_the_loss(backend, loss, kind):
    S = np.asarray([[0.9, 0.2, -0.4, 0.7], [0.9, 0.2, -0.4, 0.7]])
    P = np.asarray([[1.0, 1.0, 0.0, 0.0]] * 2)
    S[0, 0 if kind == "positive" else 3] = np.nan
    with np.errstate(invalid="ignore"):
        value, _ = loss.whole(block_of(backend, *among_others(S, P, 1 - P)))
    value = backend.numpy(value)
    assert np.isnan(value[0]) or (isinstance(loss, HardestNegatives) and kind == "positive")
    assert np.isfinite(value[1]) or getattr(loss, "reduction", None) == "mean-nonzero"


@pytest.mark.parametrize("loss", [*FORMULAS, *SHARP], ids=repr)
@pytest.mark.parametrize("similarity", [-1.0, 0.5, 1.0])
def test_equal_similarities(backend, loss, similarity):
    """With ties everywhere, value and weights are finite and agree in float32 and float64."""
    P = np.asarray([[1.0, 1.0, 0.0, 0.0, 0.0]] * 2)
    S, N = np.full(P.shape, similarity), np.asarray([[0.0, 0.0, 1.0, 1.0, 0.0]] * 2)
    S, P, N = among_others(S, P, N)
    expected, W = (backend.numpy(one) for one in loss.whole(block_of(backend, S, P, N)))
    assert np.all(np.isfinite(W))
    value, W_again = loss.whole(block_of(backend, *(one.astype(np.float32) for one in (S, P, N))))
    np.testing.assert_allclose(backend.numpy(value), expected, rtol=1e-5, atol=1e-5)
    assert np.all(np.isfinite(backend.numpy(W_again)))
    if not isinstance(loss, BatchHardTriplet):  # which uses only the pair in the lowest slot
        np.testing.assert_allclose(W[:, [0, 2]], W[:, [1, 3]], rtol=1e-9)


@pytest.mark.parametrize("loss", [*FORMULAS, *SHARP], ids=repr)
def test_float32_is_float64_rounded(backend, loss):
    rng = np.random.default_rng(0)
    S = rng.permutation(np.linspace(-1, 1, 48)).reshape(3, 16)
    kind = rng.integers(3, size=S.shape)
    S, P, N = (one.astype(np.float32) for one in (S, kind == 0, kind == 1))
    value, W = (backend.numpy(one) for one in loss.whole(block_of(backend, S, P, N)))
    expected, W_64 = (
        backend.numpy(one) for one in loss.whole(block_of(backend, *(x.astype(float) for x in (S, P, N))))
    )
    assert value.dtype == W.dtype == np.float32
    np.testing.assert_allclose(value, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(W, W_64, rtol=1e-3, atol=1e-4 * np.abs(W_64).max())


def block_rows(backend, rows, batch):
    """Return rows of a block: as many as the batch has where each shape is compiled, and the in-batch term is one."""
    return batch if backend.compiles else rows


@pytest.mark.parametrize("loss", [*LOSSES, *SHARP], ids=repr)
def test_a_memory_of_the_batch_is_the_batch(backend, loss):
    """With exactly the batch in the memory, both terms are equal, because each anchor's own slot is excluded."""
    rng = np.random.default_rng(3)
    x, labels = backend.array(rng.normal(size=(12, 16))), backend.array(np.arange(12) % 3)
    objective = xbm.Objective(loss=loss, warmup=0, block_rows=block_rows(backend, 5, 12))
    state = objective.init(capacity=24, dim=16, dtype=backend.xp.float64, xp=backend.xp)
    nothing = objective.evaluate(state, x, labels)
    assert float(nothing.report.memory_loss) == 0
    assert np.isfinite(float(nothing.loss))
    report = objective.step(state, x, labels).report
    assert float(report.batch_loss) != 0
    np.testing.assert_allclose(float(report.memory_loss), float(report.batch_loss), rtol=1e-5)


@pytest.mark.not_on("strict", reason="the standard has no float16")
@pytest.mark.parametrize("loss", [*LOSSES, *SHARP], ids=repr)
def test_half_precision_does_not_overflow(backend, loss):
    """Rows and inputs are in half precision; all arithmetic is in float32, with its range of exponents."""
    xp, rng = backend.xp, np.random.default_rng(1)
    rows = normalize(rng.normal(size=(12, 16)))
    rows[:4] = rows[0]  # equal rows of different classes
    labels = backend.array(np.arange(12) % 3)
    objective = xbm.Objective(loss=loss, warmup=0, block_rows=block_rows(backend, 5, 12))
    for dtype in {"float16", "bfloat16"} & {*backend.storable}:
        x = backend.array(rows, dtype)
        result = objective.step(objective.init(capacity=24, dim=16, dtype=x.dtype, xp=xp), x, labels)
        gradient = backend.numpy(xp.astype(result.gradient, xp.float32))
        assert np.isfinite(float(result.loss))
        assert np.all(np.isfinite(gradient))
        assert np.any(gradient)
        wide = objective.init(capacity=24, dim=16, dtype=xp.float64, xp=xp)
        same = objective.step(wide, xp.astype(x, xp.float64), labels)
        if loss not in MINED and not isinstance(loss, SmoothAP):  # rounding may change choices and ranks
            np.testing.assert_allclose(float(result.loss), float(same.loss), rtol=0.05)


@pytest.mark.parametrize("loss", [*LOSSES, *SHARP], ids=repr)
def test_batches_of_one(backend, loss):
    """A batch of one sample, with an empty memory and later: finite, and 0 without pairs."""
    rng = np.random.default_rng(5)
    objective = xbm.Objective(loss=loss, warmup=0, block_rows=3)
    state = objective.init(capacity=6, dim=16, dtype=backend.xp.float64, xp=backend.xp)
    for call in range(8):
        x, label = backend.array(rng.normal(size=(1, 16))), backend.array(np.asarray([call % 2]))
        result = objective.step(state, x, label)
        state = result.state
        assert np.isfinite(float(result.loss))
        assert np.all(np.isfinite(backend.numpy(result.gradient)))
        if call == 0:
            assert float(result.loss) == 0
            assert not np.any(backend.numpy(result.gradient))


MEANS = [loss for loss in LOSSES if getattr(loss, "reduction", "sum").startswith("mean")] + [xbm.BinomialDeviance()]


@pytest.mark.parametrize("loss", MEANS, ids=repr)
@FEWER
@given(drawn=rows_of_pairs())
def test_a_mean_does_not_grow_with_the_memory(backend, loss, drawn):
    """Duplicating every row gives the same loss, with half the weight per row."""
    (value, W), (twice, W_twice) = (
        loss.whole(block_of(backend, *(np.tile(one, (1, times)) for one in drawn))) for times in (1, 2)
    )
    np.testing.assert_allclose(backend.numpy(twice), backend.numpy(value), rtol=1e-11)
    np.testing.assert_allclose(2 * backend.numpy(W_twice)[:, : W.shape[1]], backend.numpy(W), rtol=1e-11)


REDUCED = ["contrastive", "margin", "triplet", "semi-hard-triplet"]


@pytest.mark.parametrize("name", REDUCED)
@FEWER
@given(drawn=rows_of_pairs())
def test_reductions_divide_the_same_sum(backend, name, drawn):
    """Reductions divide by each anchor's number of pairs, or by the batch's: then all active pairs weigh alike."""
    total, mean, nonzero = (
        backend.numpy(xbm.losses.get(name, reduction).whole(block_of(backend, *drawn))[1])
        for reduction in ("sum", "mean", "mean-nonzero")
    )
    np.testing.assert_array_equal(mean != 0, total != 0)
    for side in (-1, 1):
        share, whole = np.maximum(side * nonzero, 0), np.maximum(side * total, 0)
        np.testing.assert_allclose(share * whole.sum(), whole * share.sum(), rtol=1e-11)
        if name != "margin":  # whose weights also depend on the distance
            np.testing.assert_allclose(share.sum(), len(total) * whole.any(), rtol=1e-11)


def test_triplets_at_the_margin_do_not_count(backend):
    """A triplet with S_n = S_p - m exactly has loss and weight 0, in any order of rows."""
    S = np.asarray([[0.75, 0.5, 0.5, 0.75], [0.5, 0.75, 0.75, 0.5]])
    P, N = np.asarray([[1.0, 0.0, 0.0, 1.0], [0.0, 1.0, 1.0, 0.0]]), np.asarray([[0.0, 1, 1, 0], [1, 0, 0, 1]])
    for loss in (xbm.Triplet(margin=0.25), xbm.SemiHardTriplet(margin=0.25)):
        value, W = loss.whole(block_of(backend, *among_others(S, P, N.astype(float))))
        assert not np.any(backend.numpy(value))
        assert not np.any(backend.numpy(W))


def test_lifted_structure_pulls_until_nothing_is_lacking(backend):
    """One positive and one negative: the hinge of 1 - S_p + S_n, with slope 1 where it is above 0."""
    S, P = np.asarray([[0.9, 0.3], [0.9, -0.3]]), np.asarray([[1.0, 0.0]] * 2)
    value, W = xbm.LiftedStructure().whole(block_of(backend, *among_others(S, P, 1 - P)))
    np.testing.assert_allclose(backend.numpy(value), [0.4, 0.0, 0.0], atol=1e-12)
    np.testing.assert_allclose(backend.numpy(W), *among_others(np.asarray([[-1.0, 1.0], [0.0, 0.0]])), atol=1e-12)


def test_a_negative_as_near_as_the_positive_is_not_semi_hard(backend):
    S, P = np.asarray([[0.5, 0.5, 0.25]]), np.asarray([[1.0, 0.0, 0.0]])
    _, W = xbm.SemiHardTriplet(margin=0.5).whole(block_of(backend, *among_others(S, P, 1 - P)))
    np.testing.assert_array_equal(backend.numpy(W), *among_others(np.asarray([[-1.0, 0.0, 1.0]])))


@pytest.mark.parametrize("name", xbm.losses.LOSSES)
def test_by_name_it_is_the_object_with_its_defaults(name):
    loss = xbm.losses.get(name)
    assert loss == xbm.losses.LOSSES[name]()
    assert loss.needs_cosines is (name in ("margin", "circle", "tuplet-margin"))
    if name in REDUCED:
        assert xbm.losses.get(name, "mean-nonzero").reduction == "mean-nonzero"
    else:
        with pytest.raises(ValueError, match="'contrastive', 'margin', 'triplet', 'semi-hard-triplet'"):
            xbm.losses.get(name, "mean")


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: xbm.Contrastive(neg_margin=np.nan), ValueError, "neg_margin must be a finite number"),
        (lambda: xbm.Contrastive(reduction="median"), ValueError, "reduction must be"),
        (lambda: xbm.Margin(alpha="0.2"), TypeError, "alpha must be a number"),
        (lambda: xbm.Triplet(margin=np.inf), ValueError, "margin must be a finite number"),
        (lambda: xbm.SemiHardTriplet(margin=0), ValueError, "margin must be above 0"),
        (lambda: xbm.NTXent(temperature=0), ValueError, "temperature must be above 0"),
        (lambda: xbm.NCA(temperature=-1), ValueError, "temperature must be above 0"),
        (lambda: xbm.BinomialDeviance(beta=0), ValueError, "beta must be above 0"),
        (lambda: xbm.LiftedStructure(gamma=0), ValueError, "gamma must be above 0"),
        (lambda: xbm.Circle(gamma=-80), ValueError, "gamma must be above 0"),
        (lambda: xbm.TupletMargin(scale=0), ValueError, "scale must be above 0"),
        (lambda: xbm.SmoothAP(positives=0), ValueError, "positives must be at least 1"),
        (lambda: xbm.SmoothAP(temperature=None), TypeError, "temperature must be a number"),
        (lambda: xbm.RecallAtK(k=4), TypeError, "k must be a tuple of ints"),
        (lambda: xbm.RecallAtK(k=(0,)), ValueError, "k must be at least 1"),
    ],
)
def test_options_out_of_range_are_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()
