"""What the Array API standard has no word for: one small file per array library.

The core speaks the standard only. The few things it lacks (writing rows in place, stopping a gradient,
walking an array in blocks, ...) are plain functions of the same names in every file here. A library
without a file of its own runs through `standard`, which needs nothing but the standard.

To add a backend, write `xbm/backends/<name>.py` with the names in `OPERATIONS`, importing from `standard`
whatever it has no better word for.
"""

from functools import cache
from importlib import import_module
from importlib.util import find_spec

from array_api_compat import array_namespace

OPERATIONS = (
    "write_rows",
    "stop_gradient",
    "fold",
    "top_k",
    "apply_weights",
    "full_precision",
    "known",
    "is_compiling",
)


def of(array):
    """Return `(xp, ops)`: the namespace of the array's library, and its operations beyond the standard.

    Raises
    ------
    TypeError
        If it is no array.
    """
    xp = array_namespace(array)
    return xp, operations(xp)


def library(xp):
    """Return the name of the library whose namespace is `xp`, such as "numpy"."""
    return xp.__name__.removeprefix("array_api_compat.").split(".")[0]


@cache
def operations(xp):
    """Return the module with the operations of the library whose namespace is `xp`."""
    name = f"{__name__}.{library(xp)}"
    return import_module(name if find_spec(name) else f"{__name__}.standard")
