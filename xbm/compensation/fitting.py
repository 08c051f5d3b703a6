"""The map from old rows to fresh rows of the same samples: fitted by ridge regression, validated on held-out pairs."""

from __future__ import annotations

from typing import NamedTuple

from xbm import backends
from xbm.backends import Array, device_of
from xbm.normalization import normalize as unit

RIDGES = (0.1, 0.3, 1.0, 3.0, 10.0)  # candidates, in multiples of the mean variance of the pairs' dimensions
LEAST_PAIRS = 8  # with fewer, a leave-one-out error says nothing


class Map(NamedTuple):
    """A motion of rows: row v with exposure a in [0, 1] moves to v + a (shift + (v - centre) matrix)."""

    centre: Array  #: (D,)
    shift: Array  #: (D,)
    matrix: Array | None  #: (D, D); None for a shift alone
    before: Array  #: () mean squared distance of the pairs
    after: Array  #: () the same after each pair was moved by a map fitted to the other pairs
    good: Array  #: () bool, whether to move the memory


def fit(old: Array, fresh: Array, exposure: Array, *, ridges: tuple[float, ...], normalize: bool) -> Map:
    """Fit fresh = old + a (shift + (old - centre) matrix) by least squares, with a ridge on the matrix.

    The candidates are the shift alone and a map for each ridge. The one with the smallest leave-one-out error is
    returned; that error has a closed form, the residual of a pair over one minus its leverage. The map is good if it
    reduces the pairs' mean squared distance by more than the standard error of that reduction. Shapes are fixed.

    Parameters
    ----------
    old, fresh : (p, D) floating point
        Row i of both is the same sample.
    exposure : (p,) floating point
        Part of the motion that row i has missed, a in [0, 1]; 0 = no pair.
    ridges : tuple of float
        Candidates, in multiples of the mean variance of the dimensions; empty for the shift alone.
    normalize : bool
        Whether to normalise moved rows before they are compared with the fresh ones.

    Returns
    -------
    Map
    """
    xp, ops = backends.of(old)
    a, eps = exposure[:, None], float(xp.finfo(old.dtype).eps)
    old = unit(old)[0] if normalize else old  # bit for bit as the fresh rows are normalised
    old, motion = (xp.where(a > 0, one, 0.0) for one in (old, fresh - old))
    fresh = xp.where(a > 0, fresh, 0.0)
    n, squares = xp.sum(xp.astype(a > 0, a.dtype)), xp.sum(a**2)
    weight = a / xp.where(squares > 0, squares, 1.0)
    centre, shift = xp.sum(weight * a * old, axis=0), xp.sum(weight * motion, axis=0)
    U, R, leverage = a * (old - centre), motion - a * shift, weight * a

    def errors(residual: Array, leverage: Array) -> Array:
        freedom = 1 - leverage  # 0: the pair is fitted exactly whatever it is, and its error is 0 / 0
        found = fresh - residual / xp.clip(freedom, min=eps**0.5)
        found = unit(found)[0] if normalize else found
        each = xp.sum(xp.where(a > 0, (found - fresh) ** 2, 0.0), axis=1)
        return xp.where(xp.min(freedom) > eps**0.5, each, float(xp.finfo(old.dtype).max) ** 0.25)

    still, least = xp.sum(motion**2, axis=1), errors(R, leverage)
    matrix = None
    varied = xp.sum(U**2)
    if ridges:
        p, D = ops.length(U), U.shape[1]
        primal, across = isinstance(p, int) and p > D, xp.matrix_transpose(U)
        with ops.full_precision(old):
            square, right = (across @ U, across @ R) if primal else (U @ across, R)
            square = xp.where(xp.all(xp.isfinite(square)), square, 0.0)
            place = xp.arange(D if primal else p, device=device_of(old))
            diagonal = xp.astype(place[:, None] == place[None, :], old.dtype)
            best = xp.zeros_like(right)
            for ridge in ridges:
                # Never singular. (A float32 eigendecomposition can fail to converge if most pairs are excluded.)
                added = xp.where(varied > 0, varied / D * xp.clip(D * n * eps, min=ridge), 1.0)
                inverse = xp.linalg.inv(square + added * diagonal)
                tried = inverse @ right
                more = xp.sum((U @ inverse) * U if primal else square * inverse, axis=1, keepdims=True)
                each = errors(R - (U if primal else square) @ tried, leverage + more)
                better = xp.sum(each) < xp.sum(least)
                best, least = xp.where(better, tried, best), xp.where(better, each, least)
            matrix = best if primal else across @ best
    # Keeps the square of a moved row of length 1 far from overflow.
    most = float(xp.finfo(old.dtype).max) ** (0.25 if normalize else 1)
    before, after = (xp.sum(one) / xp.where(n > 0, n, xp.nan) for one in (still, least))
    won = before - after
    spread = xp.sum(xp.where(exposure > 0, (still - least - won) ** 2, 0.0))
    good = (n >= LEAST_PAIRS) & (won > xp.sqrt(spread / xp.clip(n * (n - 1), min=1.0)))
    good = good & xp.all(xp.abs(shift) <= most)
    if matrix is not None:
        # Equal pairs have a variance above 0, from the rounding of their rows and of their mean.
        good = good & (varied > n * (n * eps**2) * xp.sum((a * old) ** 2)) & xp.all(xp.abs(matrix) <= most)
    return Map(centre, shift, matrix, before, after, good)
