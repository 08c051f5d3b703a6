"""Checks of options and inputs, made before anything changes.

An error states the expected and the actual value, and the shapes. Everything checked is static (types, dtypes, shapes,
devices), so no check synchronises a device or breaks a compiler.
"""

from math import isfinite
from numbers import Integral, Real
from typing import Any

from xbm import backends
from xbm.backends import Array, Namespace, array_namespace, device_of

FLOATS = ("float32", "bfloat16", "float16", "float64")


def whole_number(name: str, value: object, *, at_least: int) -> int:
    """Return a whole number of at least `at_least` as an int, or raise."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be an int, got {value!r} of type {type(value).__name__}")
    if value < at_least:
        raise ValueError(f"{name} must be at least {at_least}, got {value}")
    return int(value)  # NumPy's own would widen what they meet


def number(name: str, value: object, *, at_least: float | None = None) -> float:
    """Return a finite real number of at least `at_least` as a float, or raise."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, got {value!r} of type {type(value).__name__}")
    if not isfinite(value):
        raise ValueError(f"{name} must be a finite number, got {value}")
    if at_least is not None and value < at_least:
        raise ValueError(f"{name} must be at least {at_least}, got {value}")
    return float(value)


def positive(name: str, value: object) -> float:
    """Return a finite real number above 0 as a float, or raise."""
    found = number(name, value)
    if found <= 0:
        raise ValueError(f"{name} must be above 0, got {value}")
    return found


def flag(name: str, value: object) -> bool:
    """Return True or False, or raise on anything else."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")
    return value


def choice(name: str, value: object, accepted: tuple[object, ...]) -> object:
    """Return a value that is among `accepted`, or raise."""
    if value not in accepted:
        *others, last = map(repr, accepted)
        raise ValueError(f"{name} must be {', '.join(others)} or {last}, got {value!r}")
    return value


def same_library(name: str, array: Array, like: Array) -> None:
    """Raise if an object is not an array of the library and on the device of `like`."""
    xp, got = array_namespace(like), type(array)
    library = backends.library(xp)
    try:
        other = array_namespace(array)
    except TypeError:
        raise TypeError(f"{name} must be an array of {library}, got {got.__name__}") from None
    if other is not xp:
        raise TypeError(f"{name} must be an array of {library}, got a {got.__module__}.{got.__name__}: convert one")
    here, there = device_of(array), device_of(like)
    if here != there and None not in (here, there):
        raise ValueError(
            f"{name} of shape {tuple(array.shape)} are on device {here}, what they meet is on {there}: move one of them"
        )


def floats(xp: Namespace) -> list[Any]:
    """Return the dtypes of a library that embeddings can have."""
    wide = backends.operations(xp).integer_dtype(xp) == xp.int64  # JAX has no 64-bit numbers unless told to
    return [getattr(xp, name) for name in FLOATS if hasattr(xp, name) and (wide or name != "float64")]


def dtype_name(dtype: Any) -> str:
    """Return the name of a dtype for a message."""
    return getattr(dtype, "name", None) or getattr(dtype, "__name__", None) or str(dtype)


def embeddings(name: str, array: Array, like: Array) -> None:
    """Raise unless an array is floating point, of shape (B, D), with the memory's D, library and device."""
    same_library(name, array, like)
    xp = array_namespace(like)
    dim, shape = like.shape[1], tuple(array.shape)
    if array.dtype not in floats(xp):
        raise TypeError(
            f"{name} must be {', '.join(FLOATS[:-1])} or {FLOATS[-1]}, got {dtype_name(array.dtype)} of shape {shape}"
        )
    if len(shape) != 2 or shape[1] != dim:
        raise ValueError(f"{name} must have shape (B, {dim}), as the memory's rows have {dim} dimensions, got {shape}")


def integers(name: str, array: Array, rows: Array, like: Array, *, of: str = "embeddings") -> None:
    """Raise unless an array holds exact integers, one for each of `rows`; messages call the rows `of`."""
    same_library(name, array, like)
    xp = array_namespace(like)
    shape = tuple(array.shape)
    one_each(name, shape, rows, of)
    if xp.isdtype(array.dtype, ("real floating", "complex floating", "bool")):
        raise TypeError(
            f"{name} must be integers, got {dtype_name(array.dtype)} of shape {shape}: a float or bool cannot hold "
            f"every class or sample exactly"
        )
    if array.dtype == getattr(xp, "uint64", None):
        raise TypeError(f"{name} must fit int64, got uint64 of shape {shape}: cast them to int64")


def mask(name: str, array: Array, rows: Array, like: Array, *, of: str = "embeddings") -> None:
    """Raise unless an array holds booleans, one for each of `rows`; messages call the rows `of`."""
    same_library(name, array, like)
    if not array_namespace(like).isdtype(array.dtype, "bool"):
        raise TypeError(f"{name} must be boolean, got {dtype_name(array.dtype)} of shape {tuple(array.shape)}")
    one_each(name, tuple(array.shape), rows, of)


def one_each(name: str, shape: tuple[int, ...], rows: Array, of: str) -> None:
    """Raise unless a shape holds one entry for each row of a batch."""
    if len(shape) == 2 and shape[0] == rows.shape[0]:
        hint = ": one-hot or multi-label rows are not class numbers (take the argmax of one-hot ones)"
    else:
        hint = ""
    if shape != (rows.shape[0],):
        raise ValueError(
            f"{name} must have shape ({rows.shape[0]},), one for each of the {of} {tuple(rows.shape)}, "
            f"got {shape}{hint}"
        )
