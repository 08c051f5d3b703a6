"""Indexing each row of an array with its own row of indices."""

from xbm import backends
from xbm.backends import Array, device_of


def take_in_rows(x: Array, indices: Array) -> Array:
    """Return y (B, k) with y[i, j] = x[i, indices[i, j]], from x (B, m)."""
    xp, ops = backends.of(x)
    # Not take_along_axis, with which torch.compile would specialise the graph to one batch size.
    first = xp.arange(ops.length(indices), dtype=indices.dtype, device=device_of(indices)) * ops.length(x, 1)
    places = xp.reshape(indices + first[:, None], (-1,))
    return xp.reshape(xp.take(xp.reshape(x, (-1,)), places), (-1, ops.length(indices, 1)))
