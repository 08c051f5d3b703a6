"""Operations for JAX: writes into donated buffers, walks in a compiled loop, differentiates with `jax.vjp`."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from xbm.backends import Namespace
from xbm.backends.standard import few, is_positive, known, length, unrolls
from xbm.backends.standard import fold as fold_unrolled
from xbm.backends.standard import rewrite as rewrite_eagerly

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


@partial(jax.jit, donate_argnums=0)
def write_rows(array: Array, slots: Array, rows: Array) -> Array:
    """Write rows (K, ...) into distinct slots (K,) of a ring buffer (M, ...), K <= M; return the buffer.

    The write is in place if `array` is donated. An eager call donates it; a compiled function must donate it itself.
    """
    return array.at[slots].set(rows, unique_indices=True)


def rewrite(array: Array, visit: Callable[..., Array], column: Array, size: int) -> Array:
    """Replace the rows of a ring buffer (M, ...) by `visit(rows, column)`, for each block of `size` rows.

    `visit` also gets the block of `column` (M,). Under tracing, this is one loop in place; eagerly, it copies.
    """
    if not is_compiling(array):
        return rewrite_eagerly(array, visit, column, size)

    def block(start: Any, array: Array, n: int) -> Array:
        rows, some = (jax.lax.dynamic_slice_in_dim(one, start, n) for one in (array, column))
        return jax.lax.dynamic_update_slice_in_dim(array, visit(rows, some), start, 0)

    whole, rest = divmod(array.shape[0], size)
    if whole:
        array = jax.lax.fori_loop(0, whole, lambda i, array: block(i * size, array, size), array)
    return block(whole * size, array, rest) if rest else array


def stop_gradient(x: Array) -> Array:
    """Return x as a constant for JAX's transformations."""
    return jax.lax.stop_gradient(x)


def fold(visit: Callable[..., Any], columns: Sequence[Array], size: int, *, limit: int | None = None) -> Any:
    """Fold `carry = visit(carry, start, *blocks)` over blocks of `size` rows of arrays of equal length.

    Under tracing, all blocks except the first and a shorter last one run in one loop, which is compiled once.
    """
    rows = columns[0].shape[0]
    whole = rows // size
    if whole < 3 or not is_compiling(columns[0]):
        return fold_unrolled(visit, columns, size, limit=limit)

    def block(start: Any) -> list[Array]:
        return [jax.lax.dynamic_slice_in_dim(column, start, size) for column in columns]

    carry = visit(None, 0, *block(0))
    carry = jax.lax.fori_loop(1, whole, lambda i, carry: visit(carry, i * size, *block(i * size)), carry)
    rest = whole * size
    return carry if rest == rows else visit(carry, rest, *(column[rest:] for column in columns))


def after(x: Array, value: Array) -> Array:
    """Return integers x with a data dependence on `value`, a non-negative scalar, so that `value` is computed first."""
    return x + (value < 0)


def top_k(x: Array, k: int) -> tuple[Array, Array]:
    """Return the k largest of each row of x (B, n) as (values, indices), both (B, k), k <= n.

    The values are in descending order; ties are ordered by index.
    """
    values, indices = jax.lax.top_k(x, k)
    return values, indices


def running_sum(x: Array) -> Array:
    """Return the cumulative sums along the last axis, in x's dtype."""
    return jnp.cumsum(x, axis=-1, dtype=x.dtype)


def restore_order(x: Array, order: Array) -> Array:
    """Return y (B, m) with y[i, order[i, j]] = x[i, j], where each row of `order` (B, m) is a permutation."""
    return jax.vmap(lambda row, places: jnp.zeros_like(row).at[places].set(row, unique_indices=True))(x, order)


def value_and_gradient(function: Callable[[Array], Array], x: Array) -> tuple[Array, Array]:
    """Return `(function(x) (B,), d sum(function(x)) / dx)` by reverse-mode differentiation.

    The value remains differentiable with respect to the function's learned parameters.
    """
    value, pull_back = jax.vjp(function, stop_gradient(x))
    (gradient,) = pull_back(jnp.ones_like(value))
    return value, stop_gradient(gradient)


def full_precision(x: Array) -> AbstractContextManager[Any]:
    """Return a context in which float32 matrix products use full precision, which accelerators reduce by default."""
    return jax.default_matmul_precision("float32")


def is_compiling(x: Array) -> bool:
    """Return whether x is being traced, so that its value is not available."""
    return isinstance(x, jax.core.Tracer)


def on_host(x: Array) -> bool:
    """Return whether arrays are on the CPU, where the cache limits the block size."""
    return jax.default_backend() == "cpu"


def integer_dtype(xp: Namespace) -> Any:
    """Return the dtype of labels, ids and counters: int32, or int64 if `jax_enable_x64` is on."""
    return xp.__array_namespace_info__().default_dtypes()["integral"]


def may_differentiate(x: Array) -> bool:
    """Return whether x is being traced, by `grad` or by a compiler. The compiler removes unused gradients."""
    return is_compiling(x)


def attach_gradient(value: Array, *pairs: tuple[Array, Array]) -> Array:
    """Return the scalar `value` with a closed-form gradient for each `(x, gradient)` in `pairs`.

    Only the gradients are saved for the backward pass. They are scaled in their own dtype before the cast to x's dtype.
    `value` remains differentiable with respect to learned parameters.
    """
    xs, gradients = zip(*pairs, strict=True)
    return _closed_form(value, xs, tuple(map(stop_gradient, gradients)))


@jax.custom_vjp
def _closed_form(value: Array, xs: tuple[Array, ...], gradients: tuple[Array, ...]) -> Array:
    return value


def _forward(value: Array, xs: tuple[Array, ...], gradients: tuple[Array, ...]) -> tuple[Array, Any]:
    return value, (_differentiated_once(gradients, xs), [jnp.empty((0,), x.dtype) for x in xs])


def _backward(kept: Any, upstream: Array) -> tuple[Any, ...]:
    gradients, like = kept
    scaled = tuple((upstream * g).astype(x.dtype) for g, x in zip(gradients, like, strict=True))
    return upstream, scaled, tuple(map(jnp.zeros_like, gradients))


@jax.custom_jvp
def _differentiated_once(gradients: tuple[Array, ...], xs: tuple[Array, ...]) -> tuple[Array, ...]:
    """Return the gradients unchanged. Differentiating them, as a second derivative would, raises an error."""
    return gradients


@_differentiated_once.defjvp
def _refused(primals: Any, tangents: Any) -> Any:
    raise RuntimeError("XBM supports first derivatives only, in closed form: differentiate its loss only once")


_closed_form.defvjp(_forward, _backward)
