"""Functions that several losses are made of."""

from xbm.backends import Array, array_namespace


def softplus(x: Array) -> Array:
    """Return log(1 + exp(x)), 0 at -inf."""
    xp = array_namespace(x)
    return xp.logaddexp(x, xp.zeros_like(x))


def inverse(count: Array) -> Array:
    """Return 1 / count, finite where the count is 0 (what it multiplies is 0 there)."""
    xp = array_namespace(count)
    return 1.0 / (count + xp.finfo(count.dtype).smallest_normal)
