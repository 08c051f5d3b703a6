"""Operations for any library of the Array API standard: correct everywhere, fastest nowhere.

The standard has no scatter, so a write copies the array; nothing else here is slower than it must be.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from xbm.backends import Array, Namespace, array_namespace, device_of

GATHER_BELOW = 0.25  # share of columns up to which gathering them beats computing with all


def write_rows(array: Array, slots: Array, rows: Array) -> Array:
    """Write rows (K, ...) into slots (K,) of a ring (M, ...), K <= M; return the ring.

    No slot comes twice. Consumes `array`: only the returned one may be used afterwards. A full copy here.
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
    """Replace the rows of a ring (M, ...) by `visit(rows, column)` of each block of `size` rows and of a column (M,).

    Consumes `array`: only the returned one may be used afterwards. A full copy here.
    """
    xp, M = array_namespace(array), array.shape[0]
    blocks = [slice(i, min(i + size, M)) for i in range(0, M, size)]
    return xp.concat([visit(array[block, ...], column[block]) for block in blocks])


def rewrite_in_place(array: Array, visit: Callable[..., Array], column: Array, size: int) -> Array:
    """Do the same block by block in the array itself, where slices can be assigned to."""
    for i in range(0, array.shape[0], size):
        array[i : i + size] = visit(array[i : i + size], column[i : i + size])
    return array


def stop_gradient(x: Array) -> Array:
    """Return x as a constant for whatever differentiates through the library."""
    return x


def fold(visit: Callable[..., Any], columns: Sequence[Array], size: int, *, limit: int | None = None) -> Any:
    """Fold `carry = visit(carry, start, *blocks)` over blocks of `size` rows of arrays of equal length.

    The first carry is None. Blocks that begin at row `limit` or later are left out.
    """
    length = columns[0].shape[0]
    carry = None
    for start in range(0, length if limit is None else min(limit, length), size):
        stop = min(start + size, length)
        carry = visit(carry, start, *(column[start:stop, ...] for column in columns))
    return carry


def top_k(x: Array, k: int) -> tuple[Array, Array]:
    """Return the k largest of each row of x (B, n) as (values, indices), both (B, k), k <= n.

    In falling order; of equal values the lowest index comes first.
    """
    xp = array_namespace(x)
    indices = xp.argsort(x, axis=1, descending=True, stable=True)[:, :k]
    return xp.take_along_axis(x, indices, axis=1), indices


def running_sum(x: Array) -> Array:
    """Return the sums of the first i + 1 entries along the last axis, in x's dtype."""
    return array_namespace(x).cumulative_sum(x, axis=-1)


def restore_order(x: Array, order: Array) -> Array:
    """Return y (B, m) with y[i, order[i, j]] = x[i, j], where each row of `order` (B, m) is a permutation."""
    xp = array_namespace(x)
    return xp.take_along_axis(x, xp.argsort(order, axis=1), axis=1)


def is_positive(x: Array) -> Array:
    """Return 1 where x > 0 and 0 elsewhere, in x's dtype."""
    return array_namespace(x).astype(x > 0, x.dtype)


def few(mask: Array) -> Array | None:
    """Return the indices of a mask's True entries, at least one, if they are few and cost nothing to read, else None.

    The only place where a shape or a branch may depend on values.
    """
    return None


def few_on_host(mask: Array) -> Array | None:
    """Return the indices of a mask's True entries, at least one, if they are few: for eager code on the host."""
    xp = array_namespace(mask)
    (indices,) = xp.nonzero(mask)
    if indices.shape[0] > GATHER_BELOW * mask.shape[0]:
        return None
    return indices if indices.shape[0] else xp.zeros((1,), dtype=indices.dtype, device=device_of(mask))


def value_and_gradient(function: Callable[[Array], Array], x: Array) -> tuple[Array, Array]:
    """Return `(function(x) (B,), d sum(function(x)) / dx)` by automatic differentiation."""
    raise NotImplementedError(
        f"{type(x).__module__} cannot differentiate a function: give the loss as an xbm.PairLoss, with its weights"
    )


def full_precision(x: Array) -> AbstractContextManager[Any]:
    """Return a context in which nothing is computed in less than the inputs' precision."""
    return nullcontext()


def known(x: Array) -> int | None:
    """Return the value of an integer scalar if reading it costs nothing (no device waits), else None."""
    return None


def is_compiling(x: Array) -> bool:
    """Tell whether a call with x is being traced by a compiler, so that no value may be read."""
    return False


def unrolls(x: Array) -> bool:
    """Tell whether x is being traced by a compiler that repeats the walk's body for each block."""
    return False


def on_host(x: Array) -> bool:
    """Tell whether x lies where the processor's cache is what makes a block too large."""
    return True


def integer_dtype(xp: Namespace) -> Any:
    """Return the dtype of labels, ids and counters: int64, or the widest integers there are."""
    return xp.int64


def after(x: Array, value: Array) -> Array:
    """Return integers x, to be used only once `value`, a scalar that is never negative, is computed.

    A compiler that orders operations by nothing but their data copies an array which it may have to read after it was
    written into.
    """
    return x


def length(x: Array, axis: int = 0, *, most: int | None = None) -> Any:
    """Return the length of an axis, or `most` if that is less: an int if known when traced, else a scalar array."""
    size = x.shape[axis]
    return size if most is None else min(size, most)


def may_differentiate(x: Array) -> bool:
    """Tell whether something may differentiate what is made of x, other than by the returned gradient."""
    return False


def attach_gradient(value: Array, *pairs: tuple[Array, Array]) -> Array:
    """Return the scalar `value` with a gradient known in closed form for each `(x, gradient)` in `pairs`.

    Where the library cannot differentiate, `value` itself.
    """
    return value
