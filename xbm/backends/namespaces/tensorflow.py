"""An Array API namespace for TensorFlow: the names that the core uses, with the standard's behaviour.

This module can be deleted once array-api-compat supports TensorFlow. Arrays are `tf.Tensor`, eager or symbolic, and
`tf.Variable`, which is only read. All functions work eagerly, in `tf.function` with lengths unknown at tracing time,
and, except `nonzero`, under `jit_compile=True`. Beyond the standard, sizes may be scalar tensors, and float16 and
bfloat16 exist.

Unsupported features of the standard (some keywords, more dimensions, integers for floats, type promotion) raise an
error, mostly TensorFlow's own. Where the standard leaves the order of NaN open, NaN is larger than all numbers.
"""

import builtins
from collections.abc import Callable, Sequence
from math import inf, nan
from types import SimpleNamespace
from typing import Any, Literal, NamedTuple, TypeAlias

import ml_dtypes
import numpy as np
import tensorflow as tf

from xbm.backends import Array

__all__ = [
    "abs",
    "all",
    "any",
    "arange",
    "argmax",
    "argsort",
    "asarray",
    "astype",
    "bfloat16",
    "bool",
    "broadcast_to",
    "clip",
    "concat",
    "count_nonzero",
    "cumulative_sum",
    "exp",
    "finfo",
    "flip",
    "float16",
    "float32",
    "float64",
    "full",
    "full_like",
    "iinfo",
    "inf",
    "int8",
    "int16",
    "int32",
    "int64",
    "isdtype",
    "isfinite",
    "isnan",
    "linalg",
    "log",
    "logaddexp",
    "matrix_transpose",
    "max",
    "maximum",
    "mean",
    "min",
    "minimum",
    "nan",
    "nextafter",
    "nonzero",
    "ones",
    "ones_like",
    "remainder",
    "reshape",
    "searchsorted",
    "sign",
    "sort",
    "sqrt",
    "stack",
    "sum",
    "take",
    "take_along_axis",
    "tanh",
    "uint8",
    "uint16",
    "uint32",
    "uint64",
    "where",
    "zeros",
    "zeros_like",
]

Flag: TypeAlias = builtins.bool
Axes: TypeAlias = int | tuple[int, ...] | None
Shape: TypeAlias = int | tuple[int, ...] | Array  # a length or a tuple of lengths; lengths may be scalar tensors
DType: TypeAlias = Any
Device: TypeAlias = str | None

bool = tf.bool
int8, int16, int32, int64 = tf.int8, tf.int16, tf.int32, tf.int64
uint8, uint16, uint32, uint64 = tf.uint8, tf.uint16, tf.uint32, tf.uint64
bfloat16, float16, float32, float64 = tf.bfloat16, tf.float16, tf.float32, tf.float64

# Dtypes


class Limits(NamedTuple):
    """Limits of a floating-point dtype."""

    bits: int
    eps: float
    max: float
    min: float
    smallest_normal: float
    dtype: DType


def finfo(type: DType, /) -> Limits:
    info = ml_dtypes.finfo(type.as_numpy_dtype)
    eps, most, least, normal = (float(x) for x in (info.eps, info.max, info.min, info.smallest_normal))
    return Limits(info.bits, eps, most, least, normal, type)


class IntegerLimits(NamedTuple):
    """Limits of an integer dtype."""

    bits: int
    max: int
    min: int
    dtype: DType


def iinfo(type: DType, /) -> IntegerLimits:
    return IntegerLimits(8 * type.size, type.max, type.min, type)


_KINDS: dict[str, Callable[[DType], Flag]] = {
    "bool": lambda dtype: dtype.is_bool,
    "signed integer": lambda dtype: dtype.is_integer and not dtype.is_unsigned,
    "unsigned integer": lambda dtype: dtype.is_integer and dtype.is_unsigned,
    "integral": lambda dtype: dtype.is_integer,
    "real floating": lambda dtype: dtype.is_floating,
    "complex floating": lambda dtype: dtype.is_complex,
    "numeric": lambda dtype: dtype.is_integer or dtype.is_floating or dtype.is_complex,
}


def isdtype(dtype: DType, kind: DType | str | tuple[DType | str, ...]) -> Flag:
    if isinstance(kind, tuple):
        return builtins.any(isdtype(dtype, one) for one in kind)
    if not isinstance(kind, str):
        return dtype == kind
    if kind not in _KINDS:
        raise ValueError(f"kind must be a dtype or one of {', '.join(map(repr, _KINDS))}, got {kind!r}")
    return _KINDS[kind](dtype)


def astype(x: Array, dtype: DType, /, *, copy: Flag = True) -> Array:
    return tf.cast(tf.convert_to_tensor(x), dtype)  # tensors are immutable, so `copy` has no effect


# Creation


def asarray(obj: Any, /, *, dtype: DType | None = None, device: Device = None) -> Array:
    with tf.device(device):
        if tf.is_tensor(obj):
            return tf.identity(obj) if dtype is None else astype(obj, dtype)
        if dtype is None and not hasattr(obj, "dtype"):  # Python scalars or nested sequences of them
            dtype = {"i": int64, "f": float32}.get(np.asarray(obj).dtype.kind)
        return tf.convert_to_tensor(obj, dtype)


def arange(
    start: Any, /, stop: Any = None, step: Any = 1, *, dtype: DType | None = None, device: Device = None
) -> Array:
    start, stop = (0, start) if stop is None else (start, stop)
    if dtype is None:
        dtype = float32 if builtins.any(isinstance(x, float) for x in (start, stop, step)) else int64
    with tf.device(device):
        return tf.range(start, stop, step, dtype)


def zeros(shape: Shape, *, dtype: DType | None = None, device: Device = None) -> Array:
    with tf.device(device):
        return tf.zeros(_sizes(shape), dtype or float32)


def ones(shape: Shape, *, dtype: DType | None = None, device: Device = None) -> Array:
    with tf.device(device):
        return tf.ones(_sizes(shape), dtype or float32)


def full(shape: Shape, fill_value: Any, *, dtype: DType | None = None, device: Device = None) -> Array:
    with tf.device(device):
        return tf.fill(_sizes(shape), asarray(fill_value, dtype=dtype))


def zeros_like(x: Array, /, *, dtype: DType | None = None) -> Array:
    return tf.zeros_like(x, dtype)


def ones_like(x: Array, /, *, dtype: DType | None = None) -> Array:
    return tf.ones_like(x, dtype)


def full_like(x: Array, /, fill_value: Any, *, dtype: DType | None = None) -> Array:
    return tf.fill(tf.shape(x), asarray(fill_value, dtype=dtype or x.dtype))


def _sizes(shape: Shape) -> Any:
    return (shape,) if isinstance(shape, int) or tf.is_tensor(shape) else shape


# Elementwise


def _elementwise(function: Callable[[Array], Array]) -> Callable[[Array], Array]:
    def of_one(x: Array, /) -> Array:
        return function(x)

    return of_one


abs, exp, log = _elementwise(tf.abs), _elementwise(tf.exp), _elementwise(tf.math.log)
sqrt, sign, tanh = _elementwise(tf.sqrt), _elementwise(tf.sign), _elementwise(tf.tanh)
isfinite, isnan = _elementwise(tf.math.is_finite), _elementwise(tf.math.is_nan)


def maximum(x1: Array, x2: Array, /) -> Array:
    x1, x2 = _alike(x1, x2)
    return tf.where((x1 > x2) | (x1 != x1), x1, x2)  # tf.maximum drops NaN under XLA


def minimum(x1: Array, x2: Array, /) -> Array:
    x1, x2 = _alike(x1, x2)
    return tf.where((x1 < x2) | (x1 != x1), x1, x2)


def remainder(x1: Array, x2: Array, /) -> Array:
    return tf.math.floormod(*_alike(x1, x2))


def nextafter(x1: Array, x2: Array, /) -> Array:
    return tf.math.nextafter(*_alike(x1, x2))


def logaddexp(x1: Array, x2: Array, /) -> Array:
    x1, x2 = _alike(x1, x2)
    apart = tf.maximum(x1, x2) + tf.math.log1p(tf.exp(-tf.abs(x1 - x2)))
    return tf.where(x1 == x2, x1 + tf.math.log(tf.constant(2, x1.dtype)), apart)  # inf - inf is NaN


def clip(x: Array, /, min: Any = None, max: Any = None) -> Array:
    x = tf.convert_to_tensor(x)
    x = x if min is None else where(x < min, min, x)
    return x if max is None else where(x > max, max, x)


def where(condition: Array, x1: Array, x2: Array, /) -> Array:
    return tf.where(condition, *_alike(x1, x2))


def _alike(x1: Any, x2: Any) -> tuple[Array, Array]:
    """Convert both to tensors of one dtype; a Python number takes the dtype of the other."""
    dtype = (x1 if tf.is_tensor(x1) else x2).dtype
    return tf.convert_to_tensor(x1, dtype), tf.convert_to_tensor(x2, dtype)


# Along axes


def sum(x: Array, /, *, axis: Axes = None, keepdims: Flag = False) -> Array:
    return tf.reduce_sum(_wide(x), axis, keepdims)


def mean(x: Array, /, *, axis: Axes = None, keepdims: Flag = False) -> Array:
    if not x.dtype.is_floating:  # TensorFlow would round the mean of integers
        raise TypeError(f"mean requires floating point, got {x.dtype.name} of shape {tuple(x.shape)}")
    return tf.reduce_mean(x, axis, keepdims)


def max(x: Array, /, *, axis: Axes = None, keepdims: Flag = False) -> Array:
    return _nan_if_any(tf.reduce_max(x, axis, keepdims), x, axis, keepdims)


def min(x: Array, /, *, axis: Axes = None, keepdims: Flag = False) -> Array:
    return _nan_if_any(tf.reduce_min(x, axis, keepdims), x, axis, keepdims)


def all(x: Array, /, *, axis: Axes = None, keepdims: Flag = False) -> Array:
    return tf.reduce_all(tf.cast(x, bool), axis, keepdims)


def any(x: Array, /, *, axis: Axes = None, keepdims: Flag = False) -> Array:
    return tf.reduce_any(tf.cast(x, bool), axis, keepdims)


def count_nonzero(x: Array, /, *, axis: Axes = None, keepdims: Flag = False) -> Array:
    return tf.math.count_nonzero(x, axis, keepdims, int64)


def argmax(x: Array, /, *, axis: int | None = None, keepdims: Flag = False) -> Array:
    rank = x.shape.rank
    x, axis = (tf.reshape(x, (-1,)), 0) if axis is None else (x, axis)
    found = tf.argmax(_nan_is_inf(x), axis)
    if not keepdims:
        return found
    return tf.reshape(found, (1,) * rank) if found.shape.rank == 0 else tf.expand_dims(found, axis)


def cumulative_sum(x: Array, /, *, axis: int | None = None) -> Array:
    return tf.cumsum(_wide(x), _only_axis(x) if axis is None else axis)


def sort(x: Array, /, *, axis: int = -1, descending: Flag = False, stable: Flag = True) -> Array:
    return take_along_axis(x, argsort(x, axis=axis, descending=descending), axis=axis)


def argsort(x: Array, /, *, axis: int = -1, descending: Flag = False, stable: Flag = True) -> Array:
    x = _nan_is_inf(x)
    if x.dtype.is_floating:  # XLA sorts -0 before 0
        x = tf.where(x == 0, tf.constant(0, x.dtype), x)
    return tf.cast(tf.argsort(x, axis, "DESCENDING" if descending else "ASCENDING", stable=True), int64)


def _wide(x: Array) -> Array:
    """Cast integers to 64 bits, the dtype of sums; return other dtypes unchanged."""
    return tf.cast(x, uint64 if x.dtype.is_unsigned else int64) if x.dtype.is_integer else x


def _nan_if_any(found: Array, x: Array, axis: Axes, keepdims: Flag) -> Array:
    """Return `found`, a reduction of x along axes, with NaN where x has a NaN, which XLA's reductions ignore."""
    if not x.dtype.is_floating:
        return found
    return tf.where(tf.reduce_any(tf.math.is_nan(x), axis, keepdims), tf.constant(nan, x.dtype), found)


def _nan_is_inf(x: Array) -> Array:
    """Return x with NaN replaced by inf, because NaN breaks sorting in TensorFlow and XLA."""
    return tf.where(tf.math.is_nan(x), tf.constant(inf, x.dtype), x) if x.dtype.is_floating else tf.convert_to_tensor(x)


def _only_axis(x: Array) -> int:
    if x.shape.rank != 1:
        raise ValueError(f"axis may be omitted for 1-D arrays only, got shape {tuple(x.shape)}")
    return 0


# Shapes and indices


def reshape(x: Array, /, shape: tuple[Any, ...]) -> Array:
    return tf.reshape(x, shape)


def flip(x: Array, /, *, axis: Axes = None) -> Array:
    every = tuple(range(x.shape.rank)) if axis is None else axis
    return tf.reverse(x, [every] if isinstance(every, int) else every)


def broadcast_to(x: Array, /, shape: tuple[Any, ...]) -> Array:
    return tf.broadcast_to(x, shape)


def matrix_transpose(x: Array, /) -> Array:
    return tf.linalg.matrix_transpose(x)


def concat(arrays: Sequence[Array], /, *, axis: int = 0) -> Array:
    return tf.concat(arrays, axis)


def stack(arrays: Sequence[Array], /, *, axis: int = 0) -> Array:
    return tf.stack(arrays, axis)


def nonzero(x: Array, /) -> tuple[Array, ...]:
    return tuple(tf.unstack(tf.where(x), axis=1))


def searchsorted(x1: Array, x2: Array, /, *, side: Literal["left", "right"] = "left") -> Array:
    return tf.searchsorted(x1, x2, side, int64)


def take(x: Array, indices: Array, /, *, axis: int | None = None) -> Array:
    return tf.gather(x, indices, axis=_only_axis(x) if axis is None else axis)


def take_along_axis(x: Array, indices: Array, /, *, axis: int = -1) -> Array:
    return tf.gather(
        x, indices, axis=axis, batch_dims=x.shape.rank - 1
    )  # axes other than the last raise TensorFlow's error


# Linear algebra: an extension of the standard


def _inv(x: Array, /) -> Array:
    return tf.linalg.inv(x)


linalg = SimpleNamespace(inv=_inv)
