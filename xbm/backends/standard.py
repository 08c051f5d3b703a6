"""Operations for any library of the Array API standard, written in the standard alone.

The standard has no scatter, so a write copies the array.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from xbm.backends import Array, Namespace, array_namespace, device_of

GATHER_BELOW = 0.25  # largest share of columns for which gathering them is faster than computing with all columns


def write_rows(array: Array, slots: Array, rows: Array) -> Array:
    """Write rows (K, ...) into distinct slots (K,) of a ring buffer (M, ...), K <= M; return the buffer.

    `array` is consumed: use only the returned array afterwards. This implementation makes a full copy.
    """
    size, written = array.shape[0], rows.shape[0]
    if written == 0:
        return array
    xp = array_namespace(array)
    order = xp.argsort(slots)
    every = xp.arange(size, dtype=slots.dtype, device=device_of(array))
    source = xp.take(order, xp.clip(xp.searchsorted(xp.take(slots, order), every), max=written - 1))
    hit = xp.reshape(xp.take(slots, source) == every, (size,) + (1,) * (len(array.shape) - 1))
    return xp.where(hit, xp.take(rows, source, axis=0), array)


def rewrite(array: Array, visit: Callable[..., Array], column: Array, size: int) -> Array:
    """Replace the rows of a ring buffer (M, ...) by `visit(rows, column)`, for each block of `size` rows.

    `visit` also gets the block of `column` (M,). `array` is consumed: use only the returned array afterwards. This
    implementation makes a full copy.
    """
    xp, M = array_namespace(array), array.shape[0]
    blocks = [slice(i, min(i + size, M)) for i in range(0, M, size)]
    return xp.concat([visit(array[block, ...], column[block]) for block in blocks])


def rewrite_in_place(array: Array, visit: Callable[..., Array], column: Array, size: int) -> Array:
    """Do the same in place, for libraries that support slice assignment."""
    for i in range(0, array.shape[0], size):
        array[i : i + size] = visit(array[i : i + size], column[i : i + size])
    return array


def stop_gradient(x: Array) -> Array:
    """Return x as a constant for automatic differentiation."""
    return x


def fold(visit: Callable[..., Any], columns: Sequence[Array], size: int, *, limit: int | None = None) -> Any:
    """Fold `carry = visit(carry, start, *blocks)` over blocks of `size` rows of arrays of equal length.

    The first carry is None. Blocks that start at row `limit` or later are skipped.
    """
    length = columns[0].shape[0]
    carry = None
    for start in range(0, length if limit is None else min(limit, length), size):
        stop = min(start + size, length)
        carry = visit(carry, start, *(column[start:stop, ...] for column in columns))
    return carry


def top_k(x: Array, k: int) -> tuple[Array, Array]:
    """Return the k largest of each row of x (B, n) as (values, indices), both (B, k), k <= n.

    The values are in descending order; ties are ordered by index.
    """
    xp = array_namespace(x)
    indices = xp.argsort(x, axis=1, descending=True, stable=True)[:, :k]
    return xp.take_along_axis(x, indices, axis=1), indices


def running_sum(x: Array) -> Array:
    """Return the cumulative sums along the last axis, in x's dtype."""
    return array_namespace(x).cumulative_sum(x, axis=-1)


def restore_order(x: Array, order: Array) -> Array:
    """Return y (B, m) with y[i, order[i, j]] = x[i, j], where each row of `order` (B, m) is a permutation."""
    xp = array_namespace(x)
    return xp.take_along_axis(x, xp.argsort(order, axis=1), axis=1)


def is_positive(x: Array) -> Array:
    """Return 1 where x > 0 and 0 elsewhere, in x's dtype."""
    return array_namespace(x).astype(x > 0, x.dtype)


def few(mask: Array) -> Array | None:
    """Return the indices of a mask's True entries if they are few and can be read without a device sync, else None.

    The result has at least one index, also if no entry is True. This is the only operation whose shape may depend on
    values.
    """
    return None


def few_on_host(mask: Array) -> Array | None:
    """Implement `few` for eager code on the host."""
    xp = array_namespace(mask)
    (indices,) = xp.nonzero(mask)
    if indices.shape[0] > GATHER_BELOW * mask.shape[0]:
        return None
    return indices if indices.shape[0] else xp.zeros((1,), dtype=indices.dtype, device=device_of(mask))


def value_and_gradient(function: Callable[[Array], Array], x: Array) -> tuple[Array, Array]:
    """Return `(function(x) (B,), d sum(function(x)) / dx)` by automatic differentiation."""
    raise NotImplementedError(
        f"a function as a loss needs automatic differentiation, which {type(x).__module__} lacks: "
        "use an xbm.PairLoss, which defines its weights"
    )


def full_precision(x: Array) -> AbstractContextManager[Any]:
    """Return a context in which no operation uses less than the inputs' precision."""
    return nullcontext()


def known(x: Array) -> int | None:
    """Return the value of an integer scalar if it can be read without a device sync, else None."""
    return None


def is_compiling(x: Array) -> bool:
    """Return whether a call with x is being traced by a compiler, so that values are not available."""
    return False


def unrolls(x: Array) -> bool:
    """Return whether x is being traced by a compiler that unrolls the walk's loop over blocks."""
    return False


def on_host(x: Array) -> bool:
    """Return whether x is on the CPU, where the cache limits the block size."""
    return True


def integer_dtype(xp: Namespace) -> Any:
    """Return the dtype of labels, ids and counters: int64, or the library's widest integers."""
    return xp.int64


def after(x: Array, value: Array) -> Array:
    """Return integers x with a data dependence on `value`, a non-negative scalar, so that `value` is computed first.

    A compiler that orders operations by data dependence alone copies an array if a read may follow an in-place write.
    """
    return x


def length(x: Array, axis: int = 0, *, most: int | None = None) -> Any:
    """Return the length of an axis, at most `most`: an int if known at tracing time, else a scalar array."""
    size = x.shape[axis]
    return size if most is None else min(size, most)


def may_differentiate(x: Array) -> bool:
    """Return whether automatic differentiation may differentiate results computed from x."""
    return False


def attach_gradient(value: Array, *pairs: tuple[Array, Array]) -> Array:
    """Return the scalar `value` with a closed-form gradient for each `(x, gradient)` in `pairs`.

    Libraries without automatic differentiation return `value` itself.
    """
    return value
