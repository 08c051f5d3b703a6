"""Rows of unit length, and the gradient through them in closed form."""

from xbm.backends import Array, array_namespace

EPS = 1e-6  # rows shorter than this are divided by it instead of by their length


def normalize(x: Array) -> tuple[Array, Array]:
    """Return `(z, length)`: z = x / max(|x|, EPS) by rows, and that divisor, (B, 1).

    Lengths are taken relative to a row's largest entry, so that no square overflows or vanishes, or to a quarter of the
    largest number there is, of which compilers can still take the inverse. A length that the dtype cannot hold is
    reported as half the largest number it can.
    """
    xp = array_namespace(x)
    most = float(xp.finfo(x.dtype).max)
    largest = xp.clip(xp.max(xp.abs(x), axis=1, keepdims=True), max=most / 4)
    largest = xp.where(largest > 0, largest, 1.0)
    unit = x / largest
    excess = xp.sqrt(xp.sum(unit**2, axis=1, keepdims=True))  # |x| / largest, at least 1, or 0
    longest = most / 2 / xp.where(excess > 1, excess, 1.0)
    length = xp.where(largest > longest, longest, largest) * excess
    short = length < EPS  # a NaN is not
    return xp.where(short, x, unit) / xp.where(short, EPS, excess), xp.where(short, EPS, length)


def through_normalize(gradient: Array, z: Array, length: Array) -> Array:
    """Return dL/dx from dL/dz: the part of it across z, over the length.

    Rows that were divided by EPS have no part along z to lose.
    """
    xp = array_namespace(z)
    along = xp.sum(gradient * z, axis=1, keepdims=True)
    return (gradient - xp.where(length > EPS, along, 0.0) * z) / length
