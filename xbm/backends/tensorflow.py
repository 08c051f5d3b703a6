"""Operations for TensorFlow: scatters into variables, walks in a graph loop, differentiates with gradient tapes."""

from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

from xbm.backends.standard import few, full_precision, integer_dtype, is_positive, known, unrolls
from xbm.backends.standard import fold as fold_unrolled
from xbm.backends.standard import rewrite as rewrite_copied

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


def write_rows(array: tf.Tensor | tf.Variable, slots: tf.Tensor, rows: tf.Tensor) -> tf.Tensor | tf.Variable:
    """Write rows (K, ...) into distinct slots (K,) of a ring buffer (M, ...), K <= M; return the buffer.

    A variable is written in place. A tensor is immutable, so a full copy is returned.
    """
    if isinstance(array, tf.Variable):
        array.scatter_update(tf.IndexedSlices(rows, slots))
        return array
    return tf.tensor_scatter_nd_update(array, slots[:, None], rows)


def rewrite(
    array: tf.Tensor | tf.Variable, visit: Callable[..., tf.Tensor], column: tf.Tensor, size: int
) -> tf.Tensor | tf.Variable:
    """Replace the rows of a ring buffer (M, ...) by `visit(rows, column)`, for each block of `size` rows.

    `visit` also gets the block of `column` (M,). A variable is written in place, and only one block is read at a time;
    in a graph, this is one loop. For a tensor, a copy is returned.
    """
    if not isinstance(array, tf.Variable):
        return rewrite_copied(array, visit, column, size)

    def block(start: Any, n: int) -> None:
        slots = start + tf.range(n, dtype=tf.int64)
        rows = visit(tf.gather(array, slots), tf.gather(column, slots))
        array.scatter_update(tf.IndexedSlices(rows, slots))

    def step(start: tf.Tensor) -> tuple[tf.Tensor]:
        block(start, size)
        return (start + size,)

    whole, rest = divmod(array.shape[0], size)
    if whole:
        tf.while_loop(lambda start: start < whole * size, step, (tf.constant(0, tf.int64),), maximum_iterations=whole)
    if rest:
        block(whole * size, rest)
    return array


def stop_gradient(x: tf.Tensor) -> tf.Tensor:
    """Return x as a constant for gradient tapes."""
    return tf.stop_gradient(x)


def fold(
    visit: Callable[..., Any], columns: Sequence[tf.Tensor | tf.Variable], size: int, *, limit: int | None = None
) -> Any:
    """Fold `carry = visit(carry, start, *blocks)` over blocks of `size` rows of arrays of equal length.

    In a graph, all blocks except the first and a shorter last one run in one loop.
    """
    columns = [tf.convert_to_tensor(column) for column in columns]  # read each variable only once
    rows = columns[0].shape[0]
    whole = rows // size
    if whole < 3 or tf.executing_eagerly():
        return fold_unrolled(visit, columns, size, limit=limit)

    def step(i: tf.Tensor, carry: Any) -> tuple[tf.Tensor, Any]:
        start = i * size
        blocks = [tf.slice(column, [start, *[0] * (column.ndim - 1)], [size, *column.shape[1:]]) for column in columns]
        return i + 1, visit(carry, start, *blocks)

    carry = visit(None, 0, *(column[:size] for column in columns))
    first = tf.constant(1, tf.int64)
    _, carry = tf.while_loop(lambda i, _: i < whole, step, (first, carry), maximum_iterations=whole - 1)
    rest = whole * size
    return carry if rest == rows else visit(carry, rest, *(column[rest:] for column in columns))


def after(x: tf.Tensor, value: tf.Tensor) -> tf.Tensor:
    """Return integers x with a data dependence on `value`, a non-negative scalar, so that `value` is computed first."""
    return x + tf.cast(value < 0, x.dtype)


def top_k(x: tf.Tensor, k: int) -> tuple[tf.Tensor, tf.Tensor]:
    """Return the k largest of each row of x (B, n) as (values, indices), both (B, k), k <= n.

    The values are in descending order; ties are ordered by index.
    """
    ordered = tf.where(tf.math.is_nan(x), tf.constant(float("inf"), x.dtype), x)  # NaN breaks tf.math.top_k
    indices = tf.math.top_k(ordered, k).indices
    return tf.gather(x, indices, axis=1, batch_dims=1), tf.cast(indices, tf.int64)


def running_sum(x: tf.Tensor) -> tf.Tensor:
    """Return the cumulative sums along the last axis, in x's dtype."""
    return tf.cumsum(x, axis=-1)


def restore_order(x: tf.Tensor, order: tf.Tensor) -> tf.Tensor:
    """Return y (B, m) with y[i, order[i, j]] = x[i, j], where each row of `order` (B, m) is a permutation."""
    return tf.gather(x, tf.argsort(order, axis=1), axis=1, batch_dims=1)


def value_and_gradient(function: Callable[[tf.Tensor], tf.Tensor], x: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Return `(function(x) (B,), d sum(function(x)) / dx)`, computed with a separate gradient tape.

    The value remains differentiable with respect to the function's learned parameters.
    """
    with tf.GradientTape(watch_accessed_variables=False) as tape:
        leaf = tf.stop_gradient(x)
        tape.watch(leaf)
        value = function(leaf)
    gradient = tape.gradient(value, leaf, unconnected_gradients=tf.UnconnectedGradients.ZERO)
    return value, tf.stop_gradient(gradient)


def is_compiling(x: tf.Tensor) -> bool:
    """Return whether a graph is being traced, so that values are not available."""
    return not tf.executing_eagerly()


def on_host(x: tf.Tensor) -> bool:
    """Return whether tensors are on the CPU, where the cache limits the block size."""
    return not tf.config.list_logical_devices("GPU")


def length(x: tf.Tensor, axis: int = 0, *, most: int | None = None) -> Any:
    """Return the length of an axis, at most `most`: an int if known at tracing time, else a scalar tensor."""
    size = x.shape[axis]
    if size is not None:
        return size if most is None else min(size, most)
    size = tf.shape(x, tf.int64)[axis]
    return size if most is None else tf.minimum(size, most)


def may_differentiate(x: tf.Tensor) -> bool:
    """Return True, because TensorFlow does not tell whether a gradient tape is watching x."""
    return True


def attach_gradient(value: tf.Tensor, *pairs: tuple[tf.Tensor, tf.Tensor]) -> tf.Tensor:
    """Return the scalar `value` with a closed-form gradient for each `(x, gradient)` in `pairs`.

    The gradients are scaled in their own dtype before the cast to x's dtype. `value` remains differentiable with
    respect to learned parameters.
    """
    xs, gradients = zip(*pairs, strict=True)

    def closed_form(value: tf.Tensor, *xs: tf.Tensor) -> Any:
        def backward(upstream: tf.Tensor) -> tuple[tf.Tensor, ...]:
            return upstream, *(tf.cast(upstream * g, x.dtype) for g, x in zip(gradients, xs, strict=True))

        return tf.identity(value), backward

    return tf.custom_gradient(closed_form)(value, *xs)
