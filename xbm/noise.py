"""Pseudo-random numbers that are a function of counters: the same for any block, shard, order or array library.

A Feistel network on pairs of 16-bit halves, in integers that stay below 2^31, so that 32-bit ones serve.
"""

from __future__ import annotations

from typing import Any, TypeAlias

from xbm import backends
from xbm.backends import Array

Halves: TypeAlias = tuple[Array, Array]
"""The upper and the lower 16 bits of a number, as integers."""

ROUNDS = ((0x5E2D, 0x0D17), (0x6A09, 0x1F83), (0x7B85, 0x2E1B), (0x54A5, 0x3C6F))  # odd multipliers, and what is added


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
    xp, ops = backends.of(slots)
    start = xp.zeros_like(slots[:1])
    integer = ops.integer_dtype(xp)
    of_call = absorbed(absorbed((start, start), seed), xp.astype(start + step, integer, copy=False))
    rows = absorbed(of_call, anchors)
    columns = absorbed((start, start), slots)
    high, low = mixed((rows[0][:, None] ^ columns[0][None, :], rows[1][:, None] ^ columns[1][None, :]))
    # 23 bits and a half: exact in float32, and never 0 or 1.
    u = (xp.astype(high * 128 + low // 512, dtype) + 0.5) / 2**23
    return -xp.log(-xp.log(u))


def bits(number: Array) -> Array:
    """Return 31 pseudo-random bits, () integer, for a () integer."""
    nought = backends.array_namespace(number).zeros_like(number)
    high, low = absorbed((nought, nought), number)
    return high * 32768 + low // 2


def absorbed(state: Halves, numbers: Array | int) -> Halves:
    """Return the state mixed with integers, of whose size 32 bits count."""
    high, low = state
    return mixed((high ^ (numbers // 65536 & 0xFFFF), low ^ (numbers & 0xFFFF)))


def mixed(state: Halves) -> Halves:
    """Return the state after the rounds: a permutation of 32-bit numbers."""
    left, right = state
    for multiplier, added in ROUNDS:
        left, right = right, left ^ ((right * multiplier + added) // 256 & 0xFFFF)
    return left, right
