"""Functions that several losses are made of."""

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
    """Return [x]+ = max(x, 0); a NaN stays one."""
    xp = array_namespace(x)
    return xp.where(x <= 0, xp.zeros_like(x), x)


def inverse(count: Array) -> Array:
    """Return 1 / count, 0 where the count is 0."""
    xp = array_namespace(count)
    # No division by almost 0: a compiler that multiplies in another order would find infinities.
    return xp.where(count == 0, 0.0, 1.0 / xp.where(count == 0, 1.0, count))


def share(x: Array, weight: Array, log_sum: Array) -> Array:
    """Return each pair's part w exp(x) of a row's sum exp(log_sum (B,)), (B, m); 0 where there is no pair."""
    xp = array_namespace(x)
    # Where there is no pair the exponent is not bounded by the row's sum.
    return weight * xp.exp(xp.where(weight > 0, x - log_sum[:, None], -xp.inf))
