"""Safe conversion of labels and ids from the host to libraries with narrower integers, and a bound for integers."""

from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from xbm import backends
from xbm.backends import Array, Namespace


def as_integers(values: ArrayLike, *, xp: Namespace, device: Any = None) -> Array:
    """Convert labels or ids to the integers of a library's memory; raise an error if any value does not fit.

    Unless `jax_enable_x64` is on, JAX silently truncates 64-bit integers to 32 bits; for example, 2^40 + 5 becomes 5.
    Call this function on a batch before passing it to a compiled function, to get an error instead.

    Parameters
    ----------
    values : (B,) integer
        Anything `numpy.asarray` accepts on the host.
    xp : namespace
        The array library.
    device : device of `xp`, optional
        Device of the result; by default the library's default device.

    Returns
    -------
    (B,) int64, on JAX int32 unless `jax_enable_x64` is on

    Raises
    ------
    TypeError
        If the values are not integers.
    OverflowError
        If a value does not fit into the library's integers.

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
            f"labels and ids must lie in [{limits.min}, {limits.max}], the range of {backends.library(xp)}'s integers, "
            f"got {values.min()} to {values.max()}: number them from 0, or set jax_enable_x64"
        )
    return xp.asarray(values.astype(np.int64), dtype=dtype, device=device)


def fits(values: np.ndarray[Any, Any], limits: Any) -> bool:
    """Return whether NumPy integers lie within the limits of a dtype, given by its `iinfo`."""
    return values.size == 0 or (limits.min <= int(values.min()) and int(values.max()) <= limits.max)


def at_most(x: Array, most: int) -> Array:
    """Return min(x, most) for integers x.

    This does not use `clip`: under torch.compile, `most` may be symbolic, which `clip` rejects.
    """
    return backends.array_namespace(x).where(x < most, x, most)
