"""Operations for NumPy: writes in place, selects by partial sorting."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from xbm.backends.standard import (
    after,
    attach_gradient,
    fold,
    full_precision,
    integer_dtype,
    is_compiling,
    is_positive,
    length,
    may_differentiate,
    on_host,
    running_sum,
    stop_gradient,
    unrolls,
    value_and_gradient,
)
from xbm.backends.standard import few_on_host as few
from xbm.backends.standard import rewrite_in_place as rewrite

__all__ = [
    "after",
    "attach_gradient",
    "few",
    "fold",
    "full_precision",
    "integer_dtype",
    "is_compiling",
    "is_positive",
    "known",
    "length",
    "may_differentiate",
    "on_host",
    "restore_order",
    "rewrite",
    "running_sum",
    "stop_gradient",
    "top_k",
    "unrolls",
    "value_and_gradient",
    "write_rows",
]


def write_rows(array: NDArray[Any], slots: NDArray[Any], rows: NDArray[Any]) -> NDArray[Any]:
    """Write rows (K, ...) into distinct slots (K,) of a ring buffer (M, ...), K <= M; return the buffer."""
    array[slots] = rows
    return array


def top_k(x: NDArray[Any], k: int) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return the k largest of each row of x (B, n) as (values, indices), both (B, k), k <= n.

    The values are in descending order; ties are ordered by index.
    """
    indices = np.sort(np.argpartition(x, -k, axis=1)[:, -k:], axis=1)
    least = np.take_along_axis(x, indices, axis=1).min(axis=1, keepdims=True)
    tied = np.count_nonzero(x >= least, axis=1) > k
    # argpartition may select any of the entries tied with the smallest selected value.
    indices[tied] = np.sort(np.argsort(-x[tied], axis=1, stable=True)[:, :k], axis=1)
    values = np.take_along_axis(x, indices, axis=1)
    order = np.argsort(-values, axis=1, stable=True)
    return np.take_along_axis(values, order, axis=1), np.take_along_axis(indices, order, axis=1)


def restore_order(x: NDArray[Any], order: NDArray[Any]) -> NDArray[Any]:
    """Return y (B, m) with y[i, order[i, j]] = x[i, j], where each row of `order` (B, m) is a permutation."""
    restored = np.empty_like(x)
    np.put_along_axis(restored, order, x, axis=1)
    return restored


def known(x: NDArray[Any]) -> int:
    """Return the value of an integer scalar, which NumPy can always read."""
    return int(x)
