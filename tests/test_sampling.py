"""P x K sampling: the contents of batches and epochs, and that a batch depends on seed and index alone."""

from collections import Counter
from itertools import combinations, islice

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from xbm.sampling import PKSampler

steps = st.integers(0, 40)


@st.composite
def cases(draw):
    """Draw `(labels, options)`: classes of any size and value in any order, and the sampler's P, K and seed."""
    sizes = draw(st.lists(st.integers(1, 6), min_size=1, max_size=8))
    names = draw(st.lists(st.integers(-(2**63), 2**63 - 1), min_size=len(sizes), max_size=len(sizes), unique=True))
    labels = draw(st.permutations(np.repeat(np.asarray(names), sizes).tolist()))
    classes, instances = draw(st.integers(1, len(sizes))), draw(st.integers(1, 8))
    return np.asarray(labels), {"classes": classes, "instances": instances, "seed": draw(st.integers(0, 2**70))}


def classes_of(labels, batch, options):
    """Return the P classes of a batch in their order."""
    return labels[batch].reshape(options["classes"], options["instances"])[:, 0].tolist()


@given(case=cases(), t=steps)
def test_a_batch_is_k_instances_of_each_of_p_classes_repeated_only_in_need(case, t):
    labels, options = case
    P, K = options["classes"], options["instances"]
    batch = PKSampler(labels, **options).batch(t)
    assert batch.shape == (P * K,)
    assert batch.dtype == np.int64
    rows = batch.reshape(P, K)
    chosen = classes_of(labels, batch, options)
    assert len(set(chosen)) == P
    for name, row in zip(chosen, rows, strict=True):
        instances = np.flatnonzero(labels == name)
        assert np.all(labels[row] == name)
        times = [np.count_nonzero(row == one) for one in instances]
        assert {*times} <= {K // len(instances), -(-K // len(instances))}


@given(case=cases(), ts=st.lists(steps, min_size=1, max_size=6))
def test_a_batch_is_a_function_of_seed_and_index(case, ts):
    labels, options = case
    sampler = PKSampler(labels, **options)
    for t in ts:
        np.testing.assert_array_equal(sampler.batch(t), PKSampler(labels, **options).batch(t))


@given(case=cases(), batches=st.integers(1, 12), data=st.data())
def test_start_resumes_exactly(case, batches, data):
    labels, options = case
    start = data.draw(st.integers(0, batches))
    whole = list(PKSampler(labels, **options, batches=batches))
    resumed = PKSampler(labels, **options, batches=batches, start=start)
    endless = PKSampler(labels, **options, start=start)
    assert len(whole) == batches
    assert list(resumed) == list(resumed) == list(islice(endless, batches - start)) == whole[start:]
    assert len(resumed) == batches - start
    assert all(type(index) is int for batch in whole for index in batch)


@given(case=cases(), epoch=st.integers(0, 3))
def test_every_class_comes_once_in_an_epoch_before_any_returns(case, epoch):
    labels, options = case
    sampler = PKSampler(labels, **options)
    n = sampler.batches_per_epoch
    order = [name for t in range(epoch * n, (epoch + 1) * n) for name in classes_of(labels, sampler.batch(t), options)]
    every = np.unique(labels).tolist()
    assert sorted(order[: len(every)]) == every
    fill = order[len(every) :]
    assert len(fill) < options["classes"]
    assert fill == order[: len(fill)]


def test_every_way_to_draw_instances_is_as_likely():
    labels, draws = np.repeat(np.arange(4), 5), 500
    sampler = PKSampler(labels, classes=4, instances=3, seed=1)
    rows = np.concatenate([sampler.batch(t).reshape(4, 3) for t in range(draws)])
    subsets = Counter(tuple(sorted(row.tolist())) for row in rows)
    expected = draws / 10
    five_sigma = 5 * expected**0.5
    for name in range(4):
        for subset in combinations(np.flatnonzero(labels == name).tolist(), 3):
            assert abs(subsets[subset] - expected) < five_sigma
    at = Counter((place, int(one)) for row in rows for place, one in enumerate(row))
    assert all(abs(at[place, one] - draws / 5) < 5 * (draws / 5) ** 0.5 for place in range(3) for one in range(20))


def test_seeds_batches_and_epochs_differ():
    labels, options = np.repeat(np.arange(50), 5), {"classes": 10, "instances": 2}
    sampler, other = PKSampler(labels, **options), PKSampler(labels, **options, seed=1)
    orders = [
        [classes_of(labels, s.batch(t), options) for t in range(e, e + 5)] for s in (sampler, other) for e in (0, 5)
    ]
    assert len({str(order) for order in orders}) == 4

    sampler = PKSampler(labels[:50], **options)  # one batch of all ten classes in every epoch
    instances = [{*sampler.batch(t).tolist()} for t in range(4)]
    assert all(one != two for one, two in combinations(instances, 2))


def test_labels_are_taken_from_any_library_and_from_lists(backend):
    labels, options = np.repeat(np.arange(4), 3), {"classes": 2, "instances": 2}
    expected = PKSampler(labels, **options).batch(3)
    for given_ones in (backend.array(labels), backend.array(labels, "uint8"), labels.tolist(), tuple(labels.tolist())):
        np.testing.assert_array_equal(PKSampler(given_ones, **options).batch(3), expected)


def test_an_endless_sampler_has_no_length():
    with pytest.raises(TypeError, match="infinite"):
        len(PKSampler([0, 1], classes=2, instances=1))


@pytest.mark.parametrize(
    ("change", "error", "sentence"),
    [
        ({"labels": []}, ValueError, r"labels must have shape \(n,\) with n at least 1, got \(0,\)"),
        ({"labels": [[0, 1]]}, ValueError, r"labels must have shape \(n,\).*got \(1, 2\)"),
        ({"labels": [0.0, 1.0]}, TypeError, r"labels must be integers, got float64 of shape \(2,\)"),
        ({"labels": [True, False]}, TypeError, "labels must be integers, got bool"),
        ({"labels": ["a", "b"]}, TypeError, "labels must be integers"),
        ({"classes": 3}, ValueError, "classes must be at most the number of classes in labels, 2, got 3"),
        ({"classes": 0}, ValueError, "classes must be at least 1, got 0"),
        ({"classes": 2.0}, TypeError, "classes must be an int, got 2.0"),
        ({"instances": 0}, ValueError, "instances must be at least 1, got 0"),
        ({"seed": -1}, ValueError, "seed must be at least 0, got -1"),
        ({"batches": 0}, ValueError, "batches must be at least 1, got 0"),
        ({"start": -1}, ValueError, "start must be at least 0, got -1"),
        ({"batches": 3, "start": 4}, ValueError, "start must be at most batches = 3, got 4"),
    ],
)
def test_sampler_refuses(change, error, sentence):
    options = {"labels": [0, 1, 1], "classes": 2, "instances": 1} | change
    with pytest.raises(error, match=sentence):
        PKSampler(options.pop("labels"), **options)


def test_batch_refuses_a_negative_index():
    with pytest.raises(ValueError, match="t must be at least 0, got -1"):
        PKSampler([0, 1], classes=2, instances=1).batch(-1)
