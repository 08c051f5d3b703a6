"""Hypothesis strategies: batches, options and whole histories, as NumPy arrays."""

from typing import NamedTuple

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tests.table import BACKENDS

FEW = any(row.compiles for row in BACKENDS) and settings.default.max_examples < 1000  # all lengths nightly
MAX_DIM = 4
MAX_CAPACITY = 9
SIZES = [0, 1, 3, 12]  # of batches: none, one, a part of the memory and its end, more than it has


def lengths(least, most, few):
    """Draw a whole number; one of a few where a backend compiles anew for each shape.

    Those few are the same wherever they can be, since it is their product that costs: D 3, M 5, B one of SIZES. Every
    length is drawn on NumPy, strict and PyTorch, whose numbers the others' are (test_parity), and nightly on all.
    """
    some = [n for n in few if least <= n <= most]
    return st.sampled_from(some) if FEW else st.integers(least, most)


def memories(few):
    """Draw a memory's (M, D), together; one of a few where a backend compiles anew for each shape."""
    every = st.tuples(st.integers(1, MAX_CAPACITY), st.integers(1, MAX_DIM))
    return st.sampled_from(few) if FEW else every


def named(options):
    """Return a test id for options, without memory addresses."""
    return ", ".join(f"{name}={'function' if callable(value) else value}" for name, value in options.items())


dims = lengths(1, MAX_DIM, [3])
capacities = lengths(1, MAX_CAPACITY, [5])
other_capacities = lengths(1, MAX_CAPACITY, [2, 5, 7])  # to shrink and to grow to
labels = st.integers(0, 3)
big_integers = st.sampled_from([0, 1, 2**24 + 1, 2**31 + 7, 2**40 + 5, 2**63 - 1])
sample_ids = st.one_of(st.integers(-3, 5), big_integers)

eighths = st.integers(-64, 64).map(lambda n: n / 8)
"""Numbers that are exact in every float format."""


class Batch(NamedTuple):
    """One call's input."""

    x: np.ndarray
    labels: np.ndarray
    ids: np.ndarray | None
    mask: np.ndarray | None


@st.composite
def batches(draw, dim, *, sizes=None, finite=True, with_ids=None):
    """Draw a batch of any size, with or without ids and a mask, and optionally with non-finite rows."""
    size = draw(lengths(0, 2 * MAX_CAPACITY + 1, SIZES) if sizes is None else sizes)
    x = draw(hnp.arrays(np.float32, (size, dim), elements=eighths))
    if not finite and size:
        bad = draw(
            st.lists(st.tuples(st.integers(0, size - 1), st.sampled_from([np.nan, np.inf, -np.inf])), max_size=2)
        )
        for row, value in bad:
            x[row, draw(st.integers(0, dim - 1))] = value
    with_ids = draw(st.booleans()) if with_ids is None else with_ids
    return Batch(
        x,
        draw(hnp.arrays(np.int64, (size,), elements=labels | big_integers)),
        draw(hnp.arrays(np.int64, (size,), elements=sample_ids)) if with_ids else None,
        draw(st.none() | hnp.arrays(np.bool_, (size,))),
    )


@st.composite
def histories(draw, *, dim=None, finite=True, with_ids=None):
    """Draw a sequence of batches with one embedding dimension."""
    dim = draw(dims) if dim is None else dim
    return [draw(batches(dim, finite=finite, with_ids=with_ids)) for _ in range(draw(st.integers(1, 6)))]
