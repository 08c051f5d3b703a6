"""The same histories on every library: labels, ids, steps and counters agree exactly, the rest up to rounding."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

import xbm
from tests.oracle import normalize
from tests.strategies import SIZES, lengths, memories
from xbm.memory_state import MemoryState

TOLERANCE = {"float32": {"rtol": 2e-5, "atol": 2e-6}, "float64": {"rtol": 1e-10, "atol": 1e-12}}
LOSSES = [
    {"loss": loss, "miner": miner}
    for loss in (xbm.Contrastive(), xbm.Contrastive(reduction="sum"), *map(str, ("multi-similarity", "supcon")))
    for miner in (None, "multi-similarity")
] + [{"loss": "batch-hard-triplet"}, {"loss": xbm.BatchHardTriplet(soft=True), "copies": "keep"}]


@given(
    options=st.sampled_from(LOSSES),
    sizes=st.lists(lengths(0, 20, SIZES), min_size=1, max_size=5),
    shape=memories([(5, 3), (1, 1)]),
    seed=st.integers(0, 2**32 - 1),
    dtype=st.sampled_from([*TOLERANCE]),
    unit=st.booleans(),
    with_ids=st.booleans(),
    with_mask=st.booleans(),
)
@settings(max_examples=max(30, settings.default.max_examples // 2))  # it holds the backends that draw few of the rest
def test_a_history_is_numpys(backend, options, sizes, shape, seed, dtype, unit, with_ids, with_mask):
    """In general position: no ties and no similarity on a threshold, where rounding decides."""
    rng, (capacity, dim) = np.random.default_rng(seed), shape
    objective = xbm.Objective(warmup=1, block_rows=3, normalize=not unit, **options)
    state = objective.init(capacity=capacity, dim=dim, dtype=getattr(backend.xp, dtype), xp=backend.xp)
    plain = objective.init(capacity=capacity, dim=dim, dtype=np.dtype(dtype))
    for size in sizes:
        x = rng.normal(size=(size, dim + 2))[:, :dim]
        x = (normalize(x) * rng.uniform(0.6, 0.99, size=(size, 1)) if unit else x).astype(dtype)
        labels = rng.choice([0, 1, 2**24 + 1, 2**40 + 5], size=size)
        given_ones = {}
        if with_ids:
            given_ones["ids"] = rng.choice([-1, 3, 4, 5, 2**31 + 7, 2**62 + 1], size=size)
        if with_mask:
            given_ones["enqueue"] = rng.random(size) < 0.7
        expected = objective.step(plain, x, labels, **given_ones)
        given_ones = {name: backend.array(one) for name, one in given_ones.items()}
        result = objective.step(state, backend.array(x), backend.array(labels), **given_ones)
        state, plain = result.state, expected.state

        for name, one, other in zip(MemoryState._fields, state.memory, plain.memory, strict=True):
            same = unit or name != "embeddings"  # what is handed in normalised is stored to the last bit
            tolerance = {"rtol": 0} if same else TOLERANCE[dtype]
            np.testing.assert_allclose(backend.numpy(one), other, **tolerance, err_msg=name)
        for name in ("loss", "gradient"):
            found, wanted = backend.numpy(getattr(result, name)), getattr(expected, name)
            assert found.dtype == wanted.dtype
            np.testing.assert_allclose(found, wanted, **TOLERANCE[dtype], err_msg=name)
        # Weights that are all but 0 count as pairs or not, as the library rounds them.
        counted = [name != "pairs" or isinstance(options["loss"], xbm.Contrastive) for name in xbm.REPORT]
        found, wanted = backend.numpy(result.report.stacked())[counted], expected.report.stacked()[counted]
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5, err_msg=str(xbm.REPORT))
