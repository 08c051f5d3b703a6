"""Pseudo-random numbers that are a function of counters: the same for any block, shard, order and array library.

Integers are mixed by the finaliser of MurmurHash3 (Austin Appleby, 2011, public domain): 32-bit shifts and products, in
the integers that a library has. Its constants are written as negative 32-bit numbers, so that a product fits 64 bits,
and a shift as a floor division, which every library has as an operator.
"""

from __future__ import annotations

from typing import Any

from xbm import backends
from xbm.backends import Array

INCREMENT = 0x9E3779B9 - 2**32  # 2^32 over the golden ratio: 0 is not mapped to 0
MULTIPLIERS = (0x85EBCA6B - 2**32, 0xC2B2AE35 - 2**32)


def gumbel(seed: int, step: Array | int, anchors: Array, slots: Array, *, dtype: Any) -> Array:
    """Return one number (B, m) for each anchor and slot, distributed as -log(-log(u)) with u uniform.

    Parameters
    ----------
    seed : int
    step : () integer
    anchors : (B,) integer
    slots : (m,) integer
    dtype : floating-point dtype
    """
    xp = backends.array_namespace(slots)
    zero = xp.zeros_like(slots[:1])
    call = mixed(mixed(zero + seed % 2**31) ^ (zero + step))
    rows, columns = mixed(call ^ anchors), mixed(slots)
    h = mixed(rows[:, None] ^ columns[None, :])
    # 23 bits and a half: exact in float32, and never 0 or 1.
    u = (xp.astype(h // 2**9 & 0x7FFFFF, dtype) + 0.5) / 2**23
    return -xp.log(-xp.log(u))


def bits(number: Array) -> Array:
    """Return 31 pseudo-random bits, () integer, of a () integer."""
    h = mixed(backends.array_namespace(number).reshape(number, (1,)))
    return (h // 2 & 0x7FFFFFFF)[0]


def mixed(h: Array) -> Array:
    """Return the mix of integers, whose lower 32 bits count: a permutation of 32-bit numbers."""
    h = _low(_low(h) + INCREMENT)
    for multiplier, shift in zip(MULTIPLIERS, (16, 13), strict=True):
        h = _low((h ^ (h // 2**shift & (2 ** (32 - shift) - 1))) * multiplier)
    return h ^ (h // 2**16 & 0xFFFF)


def _low(h: Array) -> Array:
    """Return the lower 32 bits of integers, which are all that 32-bit ones have."""
    xp = backends.array_namespace(h)
    return h if xp.iinfo(h.dtype).bits == 32 else h & 0xFFFFFFFF
