"""Functions shared by several losses."""

from xbm.backends import Array, array_namespace


def softplus(x: Array) -> Array:
    """Return log(1 + exp(x)), 0 at -inf."""
    xp = array_namespace(x)
    return xp.logaddexp(x, xp.zeros_like(x))


def sigmoid(x: Array) -> Array:
    """Return 1 / (1 + exp(-x)), the slope of `softplus`, without overflow."""
    xp = array_namespace(x)
    return 0.5 + 0.5 * xp.tanh(0.5 * x)


def hinge(x: Array) -> Array:
    """Return [x]+ = max(x, 0); NaN stays NaN."""
    xp = array_namespace(x)
    return xp.where(x <= 0, xp.zeros_like(x), x)


def inverse(count: Array) -> Array:
    """Return 1 / count, or 0 where the count is 0."""
    xp = array_namespace(count)
    # Do not divide by a tiny number instead: a compiler that reorders products could produce infinities.
    return xp.where(count == 0, 0.0, 1.0 / xp.where(count == 0, 1.0, count))


def share(x: Array, weight: Array, log_sum: Array) -> Array:
    """Return each pair's share w exp(x) / exp(log_sum), (B, m), of a row's sum, log_sum (B,); 0 for excluded pairs."""
    xp = array_namespace(x)
    # Mask excluded pairs: their exponents are not bounded by the row's sum and could overflow.
    return weight * xp.exp(xp.where(weight > 0, x - log_sum[:, None], -xp.inf))
