"""What the Array API standard has no word for: one small file per array library.

The core speaks the standard only. The few things it lacks (writing rows in place, stopping a gradient,
walking an array in blocks, ...) are plain functions of the same names in every file here. A library
without a file of its own runs through `standard`, which needs nothing but the standard.

A library that neither speaks the standard nor is known to array-api-compat has a namespace of standard names in
`xbm.backends.namespaces`.

To add a backend, write `xbm/backends/<name>.py` with the names in `OPERATIONS`, importing from `standard`
whatever it has no better word for.
"""

from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any, TypeAlias

import array_api_compat

Array: TypeAlias = Any
"""An array of any library: the standard names no type that all of them share."""

Namespace: TypeAlias = ModuleType
"""The functions and dtypes of one library, as `array_namespace` finds them."""

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
    """Return the namespace of an array's library, looked up once per type of array.

    Raises
    ------
    TypeError
        If it is no array.
    """
    kind = type(x)
    if kind not in _namespaces:
        _namespaces[kind] = _ours(kind.__module__.split(".")[0]) or array_api_compat.array_namespace(x)
    return _namespaces[kind]


def of(array: Array) -> tuple[Namespace, ModuleType]:
    """Return `(xp, ops)`: the namespace of the array's library, and its operations beyond the standard.

    Raises
    ------
    TypeError
        If it is no array.
    """
    xp = array_namespace(array)
    return xp, operations(xp)


def device_of(array: Array) -> Any:
    """Return where an array lies, None where a compiler has yet to decide."""
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
    """Return our own namespace of a library, None if it has a better one."""
    if library not in _own:
        module = f"{__name__}.namespaces.{library}"
        _own[library] = import_module(module) if find_spec(module) else None
    return _own[library]


# Plain dicts: torch.compile looks through functools.cache, and warns.
_namespaces: dict[type, Namespace] = {}  # by type of array
_loaded: dict[str, ModuleType] = {}  # operations by name of library
_own: dict[str, Namespace | None] = {}  # by name of library
