"""Every miner on its own: the pairs it keeps, compared with loops over one anchor's pairs."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import xbm
from tests.pair_losses import MINERS
from tests.strategies import lengths
from tests.test_losses import block_of, rows_of_pairs
from xbm import (
    DistanceWeightedMiner,
    EasyPositiveMiner,
    HardNegativeMiner,
    MarginMiner,
    MultiSimilarityMiner,
    SemiHardMiner,
)
from xbm.losses.base import summarised
from xbm.noise import gumbel


def margin(P, N, *, pos_margin, neg_margin):
    """Return the similarities of the active positives and negatives."""
    return [s for s in P if s < pos_margin], [s for s in N if s > neg_margin]


def multi_similarity(P, N, *, epsilon):
    """Return the positives below max(N) + epsilon, and the negatives above min(P) - epsilon."""
    return [s for s in P if N and s < max(N) + epsilon], [s for s in N if P and s > min(P) - epsilon]


def hard_negatives(P, N, *, k):
    """Return all positives, and the k largest."""
    return P, sorted(N)[-k:]


def semi_hard(P, N, *, margin):
    """Return all positives, and the negatives less similar than the most similar positive by less than the margin."""
    return P, [s for s in N if P and max(P) - margin < s < max(P)]


def easy_positives(P, N, *, k):
    """Return the k largest, and all negatives."""
    return sorted(P)[-k:], N


KEEPS = {
    MarginMiner: margin,
    MultiSimilarityMiner: multi_similarity,
    HardNegativeMiner: hard_negatives,
    SemiHardMiner: semi_hard,
    EasyPositiveMiner: easy_positives,
}


def selected(backend, miner, S, P, N, **changes):
    """Return the pair weights (P, N) after mining whole rows, as NumPy arrays."""
    block = block_of(backend, S, P, N)._replace(**changes)
    chosen = miner.select(block, summarised(miner.stages, block))
    np.testing.assert_array_equal(backend.numpy(chosen.S), S)
    return backend.numpy(chosen.P), backend.numpy(chosen.N)


@pytest.mark.parametrize("miner", [miner for miner in MINERS if type(miner) in KEEPS], ids=repr)
@given(drawn=rows_of_pairs())
def test_keeps_what_its_definition_says(backend, miner, drawn):
    S, P, N = drawn
    of_P, of_N = selected(backend, miner, S, 0.5 * P, 2 * N)
    options = {name: getattr(miner, name) for name in miner.__dataclass_fields__}
    for i in range(len(S)):
        expected = KEEPS[type(miner)](S[i][P[i] > 0].tolist(), S[i][N[i] > 0].tolist(), **options)
        for found, weight, kept in zip((of_P[i], of_N[i]), (0.5, 2), expected, strict=True):
            np.testing.assert_array_equal(found, weight * np.isin(S[i], kept))


@pytest.mark.parametrize("miner", [HardNegativeMiner(k=2), EasyPositiveMiner(k=2)], ids=repr)
def test_of_equal_similarities_the_lowest_slots_are_kept(backend, miner):
    S = np.full((1, 5), 0.5)
    P = np.asarray([[0.0, 1, 1, 1, 0]]) if isinstance(miner, EasyPositiveMiner) else np.zeros((1, 5))
    N = np.zeros((1, 5)) if isinstance(miner, EasyPositiveMiner) else np.asarray([[0.0, 1, 1, 1, 0]])
    of_P, of_N = selected(backend, miner, S, P, N)
    np.testing.assert_array_equal(of_P + of_N, [[0, 1, 1, 0, 0]])


def test_the_easiest_positive_is_neither_the_anchor_nor_its_stale_copy(backend):
    """An older row of the anchor itself is not its easiest positive; another row of its class is, even if farther."""
    x, other = np.asarray([[1.0, 0.0]]), np.asarray([[0.0, 1.0]])
    objective = xbm.Objective(loss="contrastive", miner=EasyPositiveMiner(), warmup=0)
    state = objective.init(capacity=8, dim=2, dtype=backend.xp.float64, xp=backend.xp)
    for rows, sample in ((x, 7), (other, 8), (x, 7)):
        one = np.asarray([0])
        result = objective.step(state, backend.array(rows), backend.array(one), ids=backend.array(one + sample))
        state = result.state
    assert float(result.loss) == 1  # 1 - 0, for the other row


@given(drawn=rows_of_pairs(), k=lengths(1, 5, [2]), step=st.integers(0, 2**40), seed=st.integers(0, 2**31))
def test_draws_k_negatives_within_reach(backend, drawn, k, step, seed):
    S, P, N = drawn
    miner = DistanceWeightedMiner(dim=16, k=k, beyond=1.2, seed=seed)
    of_P, of_N = selected(backend, miner, S, P, N, step=backend.array(np.asarray(step % 2**31)))
    np.testing.assert_array_equal(of_P, P)
    reach = N * (S >= 1 - 1.2**2 / 2)
    assert np.all(of_N <= reach)
    np.testing.assert_array_equal(of_N.sum(axis=1), np.minimum(reach.sum(axis=1), k))


def test_draws_by_the_inverse_density_of_distances(backend):
    """Over many anchors, the frequency of each distance is proportional to 1 / q."""
    distances, dim, anchors = np.asarray([0.4, 0.5, 0.7, 0.9, 1.1]), 9, 6000
    S = np.tile(1 - distances**2 / 2, (anchors, 1))
    _, drawn = selected(backend, DistanceWeightedMiner(dim=dim, k=1), S, np.zeros_like(S), np.ones_like(S))
    at = np.maximum(distances, 0.5)
    expected = at ** (2.0 - dim) * (1 - at**2 / 4) ** ((3.0 - dim) / 2)
    expected /= expected.sum()
    # Four standard deviations of a count.
    np.testing.assert_array_less(np.abs(drawn.mean(axis=0) - expected), 4 * np.sqrt(expected / anchors))


def test_each_step_anchor_and_seed_draws_anew(backend):
    S = np.full((40, 30), 0.3)
    none, N = np.zeros_like(S), np.ones_like(S)

    def drawn(seed, step):
        miner = DistanceWeightedMiner(dim=8, k=3, seed=seed)
        return selected(backend, miner, S, none, N, step=backend.array(np.asarray(step)))[1]

    first = drawn(0, 5)
    np.testing.assert_array_equal(first, drawn(0, 5))
    for other in (drawn(1, 5), drawn(0, 6), np.roll(first, 1, axis=0)):
        assert np.mean(np.sum(first * other, axis=1)) < 1  # 0.3 by chance


@given(seed=st.integers(0, 2**31), step=st.integers(0, 2**31 - 1), start=st.integers(0, 2**30))
def test_noise_is_the_same_whichever_rows_are_asked_for(backend, seed, step, start):
    xp = backend.xp
    slots, anchors = np.arange(start, start + 6), np.arange(4)
    step = backend.array(np.asarray(step))
    whole = backend.numpy(gumbel(seed, step, backend.array(anchors), backend.array(slots), dtype=xp.float64))
    assert np.all(np.isfinite(whole))
    part = gumbel(seed, step, backend.array(anchors[1:3]), backend.array(slots[2:]), dtype=xp.float64)
    np.testing.assert_array_equal(backend.numpy(part), whole[1:3, 2:])
    in_numpy = gumbel(seed, int(step), anchors, slots, dtype=np.float64)
    np.testing.assert_allclose(whole, in_numpy, rtol=1e-12, atol=1e-14)


def test_noise_is_gumbels(backend):
    """Mean 0.5772, variance pi^2 / 6, and no correlation between anchors, slots or steps."""
    xp = backend.xp
    anchors, slots = (backend.array(np.arange(n)) for n in (40, 500))
    one, other = (
        backend.numpy(gumbel(7, backend.array(np.asarray(step)), anchors, slots, dtype=xp.float64)) for step in (0, 1)
    )
    assert one.mean() == pytest.approx(0.5772, abs=0.04)
    assert one.var() == pytest.approx(np.pi**2 / 6, rel=0.05)
    for a, b in ((one, other), (one[1:], one[:-1]), (one[:, 1:], one[:, :-1])):
        assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 0.03  # four standard deviations


def test_several_miners_choose_one_after_the_other(backend):
    """Chained miners keep the nearest positive and the negatives slightly less similar: same result as by hand."""
    S = np.asarray([[0.9, 0.2, 0.95, 0.8, 0.75, 0.1]])
    P = np.asarray([[1.0, 1.0, 0.0, 0.0, 0.0, 0.0]])
    objective = xbm.Objective(loss="nca", miner=["easy-positives", SemiHardMiner(margin=0.2)])
    _, W = objective.criterion.whole(block_of(backend, S, P, 1 - P))
    np.testing.assert_array_equal(backend.numpy(W) != 0, [[True, False, False, True, True, False]])
    assert objective.miner == (EasyPositiveMiner(), SemiHardMiner(margin=0.2))
    assert xbm.Objective(miner=["margin"]).miner == MarginMiner()
    assert xbm.Objective(miner=[]).miner is None


@pytest.mark.parametrize(
    ("chosen", "error", "sentence"),
    [
        (lambda block: None, TypeError, "must return the block with other P and N, got NoneType"),
        (
            lambda block: block._replace(P=block.P[:, 0]),
            ValueError,
            r"P and N of shape \(2, 2\), got \(2,\) and \(2, 2\)",
        ),
    ],
)
def test_what_a_miner_selects_is_checked(chosen, error, sentence):
    class Own(xbm.Miner):
        def select(self, block, r):
            return chosen(block)

    x, labels, objective = np.eye(2), np.asarray([0, 1]), xbm.Objective(miner=Own())
    with pytest.raises(error, match=sentence):
        objective.step(objective.init(capacity=4, dim=2), x, labels)


def test_distances_of_another_size_are_refused():
    objective, x = xbm.Objective(miner=DistanceWeightedMiner(dim=8)), np.eye(4)
    with pytest.raises(ValueError, match="made for embeddings of size 8, got 4"):
        objective.step(objective.init(capacity=4, dim=4), x, np.arange(4))


@pytest.mark.parametrize("name", xbm.mining.MINERS)
def test_by_name_it_is_the_object_with_its_defaults(name):
    assert xbm.mining.get(name) == xbm.mining.MINERS[name]()


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: MarginMiner(pos_margin=np.nan), ValueError, "pos_margin must be a finite number"),
        (lambda: HardNegativeMiner(k=0), ValueError, "k must be at least 1"),
        (lambda: EasyPositiveMiner(k=1.5), TypeError, "k must be an int"),
        (lambda: SemiHardMiner(margin=0), ValueError, "margin must be above 0"),
        (lambda: DistanceWeightedMiner(dim=1), ValueError, "dim must be at least 2"),
        (lambda: DistanceWeightedMiner(dim=8, seed=-1), ValueError, "seed must be at least 0"),
        (lambda: DistanceWeightedMiner(dim=8, cutoff=1.5), ValueError, "cutoff must be below beyond"),
        (lambda: xbm.mining.get("hardest"), ValueError, "'semi-hard', an xbm.Miner, a list of them or None"),
        (lambda: xbm.mining.get(HardNegativeMiner), TypeError, "an xbm.Miner, a list of them or None"),
    ],
)
def test_options_out_of_range_are_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_a_miner_of_cosines_refuses_other_similarities():
    with pytest.raises(
        ValueError, match=r"DistanceWeightedMiner\(.*\) is a function of cosines: it needs normalize=True"
    ):
        xbm.Objective(miner=DistanceWeightedMiner(dim=8), normalize=False)
