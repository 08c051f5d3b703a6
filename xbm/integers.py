"""Labels and ids on their way from the host into a library whose integers may be narrower; and a bound for integers."""

from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from xbm import backends
from xbm.backends import Array, Namespace


def as_integers(values: ArrayLike, *, xp: Namespace, device: Any = None) -> Array:
    """Return labels or ids as the integers that a library's memory holds, exactly or not at all.

    JAX makes 32-bit integers of NumPy's without a word, 5 of 2^40 + 5, unless `jax_enable_x64` is on. Called on a
    batch before it is handed to a compiled function, this refuses such numbers.

    Parameters
    ----------
    values : (B,) integer
        Anything `numpy.asarray` takes on the host.
    xp : namespace
        The array library.
    device : device of `xp`, optional
        Where they go; the library's default if left out.

    Returns
    -------
    (B,) int64, on JAX int32 unless `jax_enable_x64` is on

    Raises
    ------
    TypeError
        If they are no integers.
    OverflowError
        If the library's integers cannot hold them.

    Examples
    --------
    >>> import jax.numpy as jnp, numpy as np, xbm
    >>> xbm.as_integers(np.asarray([3, 2**31 - 1]), xp=jnp).tolist()
    [3, 2147483647]
    """
    values = np.asarray(values)
    if not np.issubdtype(values.dtype, np.integer):
        raise TypeError(f"labels and ids must be integers, got {values.dtype} of shape {values.shape}")
    dtype = backends.operations(xp).integer_dtype(xp)
    if not fits(values, limits := xp.iinfo(dtype)):
        raise OverflowError(
            f"labels and ids must lie in [{limits.min}, {limits.max}], what {backends.library(xp)} holds exactly here, "
            f"got {values.min()} to {values.max()}: number them from 0, or set jax_enable_x64"
        )
    return xp.asarray(values.astype(np.int64), dtype=dtype, device=device)


def fits(values: np.ndarray[Any, Any], limits: Any) -> bool:
    """Tell whether NumPy integers lie within the limits of a dtype, an `iinfo`."""
    return values.size == 0 or (limits.min <= int(values.min()) and int(values.max()) <= limits.max)


def at_most(x: Array, most: int) -> Array:
    """Return integers x, or `most` where that is less.

    Not by `clip`: once it has met memories of two capacities, torch.compile takes them for symbols, which that refuses.
    """
    return backends.array_namespace(x).where(x < most, x, most)
