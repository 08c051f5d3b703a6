"""Operations missing from the Array API standard: one small module per array library.

The core uses only the standard. The few operations the standard lacks (writing rows in place, stopping a gradient,
walking over an array in blocks, ...) are plain functions with the same names in every module here. A library without
its own module uses `standard`, which is written in the standard alone.

A library that neither implements the standard nor is supported by array-api-compat has a namespace with the standard's
names in `xbm.backends.namespaces`.

To add a backend, write `xbm/backends/<name>.py` with the names in `OPERATIONS`. Import those that need no special
implementation from `standard`.
"""

from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any, TypeAlias

import array_api_compat

Array: TypeAlias = Any
"""An array of any library. It is Any, because the libraries share no base type."""

Namespace: TypeAlias = ModuleType
"""The functions and dtypes of one library, as returned by `array_namespace`."""

OPERATIONS = (
    "write_rows",
    "rewrite",
    "stop_gradient",
    "fold",
    "top_k",
    "running_sum",
    "restore_order",
    "is_positive",
    "few",
    "value_and_gradient",
    "full_precision",
    "known",
    "is_compiling",
    "unrolls",
    "on_host",
    "integer_dtype",
    "length",
    "attach_gradient",
    "may_differentiate",
    "after",
)


def array_namespace(x: Array) -> Namespace:
    """Return the namespace of an array's library, cached by the type of the array.

    Raises
    ------
    TypeError
        If x is not an array.
    """
    kind = type(x)
    if kind not in _namespaces:
        _namespaces[kind] = _ours(kind.__module__.split(".")[0]) or array_api_compat.array_namespace(x)
    return _namespaces[kind]


def of(array: Array) -> tuple[Namespace, ModuleType]:
    """Return `(xp, ops)`: the namespace of the array's library, and the module with its operations.

    Raises
    ------
    TypeError
        If `array` is not an array.
    """
    xp = array_namespace(array)
    return xp, operations(xp)


def device_of(array: Array) -> Any:
    """Return the device of an array; None if a compiler has not assigned one yet."""
    return getattr(array, "device", None) or None


def library(xp: Namespace) -> str:
    """Return the name of the library whose namespace is `xp`, such as "numpy"."""
    return xp.__name__.removeprefix("array_api_compat.").removeprefix(f"{__name__}.namespaces.").split(".")[0]


def operations(xp: Namespace) -> ModuleType:
    """Return the module with the operations of the library whose namespace is `xp`."""
    name = library(xp)
    if name not in _loaded:
        module = f"{__name__}.{name}"
        _loaded[name] = import_module(module if find_spec(module) else f"{__name__}.standard")
        _ours(name)
    return _loaded[name]


def _ours(library: str) -> Namespace | None:
    """Return the namespace of a library from `xbm.backends.namespaces`, or None if there is none."""
    if library not in _own:
        module = f"{__name__}.namespaces.{library}"
        _own[library] = import_module(module) if find_spec(module) else None
    return _own[library]


# Plain dicts, because torch.compile traces into functools.cache and warns.
_namespaces: dict[type, Namespace] = {}  # by type of array
_loaded: dict[str, ModuleType] = {}  # operations by name of library
_own: dict[str, Namespace | None] = {}  # by name of library
