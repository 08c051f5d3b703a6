"""Slow drift: the distance between two embeddings of a probe set, and its record over a run."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import xbm
from tests import oracle
from tests.strategies import lengths


@given(seed=st.integers(0, 2**32 - 1), rows=lengths(1, 5, [3]), normalize=st.booleans())
def test_between_is_the_mean_squared_distance(backend, seed, rows, normalize):
    rng = np.random.default_rng(seed)
    old, new = rng.normal(size=(2, rows, 3)) * 5
    found = xbm.drift.between(backend.array(old), backend.array(new), normalize=normalize)
    if normalize:
        old, new = oracle.normalize(old), oracle.normalize(new)
    assert float(found) == pytest.approx(np.mean([np.sum((new[i] - old[i]) ** 2) for i in range(rows)]), rel=1e-12)


@given(
    apart=st.lists(st.integers(1, 7), min_size=1, max_size=3, unique=True),
    every=st.integers(1, 6),
    steps=st.integers(1, 30),
    start=st.integers(0, 3),
    saved_at=st.integers(0, 30),
)
def test_a_probe_reads_what_all_embeddings_would_tell(backend, apart, every, steps, start, saved_at):
    """Embeddings are recorded only when due, and the probe can be saved and resumed in between."""
    rng = np.random.default_rng(0)
    embeddings = [backend.array(rng.normal(size=(2, 3))) for _ in range(steps)]
    probe = xbm.drift.Probe(apart=apart, every=every)
    for step in range(start, steps):
        if step == saved_at:
            probe = xbm.drift.Probe(apart=apart, every=every, past=probe.past)
        found = probe.record(step, embeddings[step]) if probe.due(step) else {}
        known = [dt for dt in apart if step % every == 0 and step - dt >= start]
        assert found == {dt: float(xbm.drift.between(embeddings[step - dt], embeddings[step])) for dt in known}
        assert len(probe.past) <= len(apart) * (max(apart) // every + 1)


@pytest.mark.parametrize(
    ("old", "new", "error", "sentence"),
    [
        (np.ones((2, 3)), np.ones((3, 3)), ValueError, r"same samples, got \(2, 3\) and \(3, 3\)"),
        (np.ones(3), np.ones(3), ValueError, r"must be \(n, D\) rows"),
        (np.ones((0, 3)), np.ones((0, 3)), ValueError, r"must be \(n, D\) rows"),
        (np.ones((2, 3)), np.ones((2, 3), np.int64), TypeError, "must be floating point, got .*float64 and .*int64"),
    ],
)
def test_between_refuses(backend, old, new, error, sentence):
    with pytest.raises(error, match=sentence):
        xbm.drift.between(backend.array(old), backend.array(new))


def test_a_probe_takes_any_iterable():
    assert xbm.drift.Probe(apart=(10**n for n in (1, 2))).apart == (10, 100)


@pytest.mark.parametrize("options", [{"every": 0}, {"apart": (10, 0)}])
def test_a_probe_refuses(options):
    with pytest.raises(ValueError, match="must be at least 1"):
        xbm.drift.Probe(**options)
