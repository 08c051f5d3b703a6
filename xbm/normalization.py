"""Normalisation of rows to unit length, and its gradient in closed form."""

from xbm.backends import Array, array_namespace

EPS = 1e-6  # minimum divisor: shorter rows are divided by EPS instead of their length


def normalize(x: Array) -> tuple[Array, Array]:
    """Return `(z, length)`: the rows z = x / max(|x|, EPS), and the divisor (B, 1).

    Each row is scaled by its largest entry before squaring, to prevent overflow and underflow. The scale is at most a
    quarter of the dtype's maximum, so that compilers can replace the division by a multiplication with its inverse. A
    length above the dtype's range is reported as half the dtype's maximum.
    """
    xp = array_namespace(x)
    most = float(xp.finfo(x.dtype).max)
    largest = xp.clip(xp.max(xp.abs(x), axis=1, keepdims=True), max=most / 4)
    largest = xp.where(largest > 0, largest, 1.0)
    unit = x / largest
    excess = xp.sqrt(xp.sum(unit**2, axis=1, keepdims=True))  # |x| / largest: at least 1, or 0 for zero rows
    longest = most / 2 / xp.where(excess > 1, excess, 1.0)
    length = xp.where(largest > longest, longest, largest) * excess
    short = length < EPS  # False for NaN
    return xp.where(short, x, unit) / xp.where(short, EPS, excess), xp.where(short, EPS, length)


def through_normalize(gradient: Array, z: Array, length: Array) -> Array:
    """Return dL/dx from dL/dz: the component of dL/dz orthogonal to z, divided by the length.

    For rows that were divided by EPS, the map is linear, so the component along z is kept.
    """
    xp = array_namespace(z)
    along = xp.sum(gradient * z, axis=1, keepdims=True)
    return (gradient - xp.where(length > EPS, along, 0.0) * z) / length
