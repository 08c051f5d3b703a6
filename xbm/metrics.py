"""Retrieval metrics: how often the nearest neighbours of an embedding have its class.

The neighbours of one block of queries at a time are selected without a full sort. The extra memory is one block of
similarities, never the whole matrix. Selecting a few of many items takes two stages, see `_largest`.
"""

from collections.abc import Iterable, Iterator
from math import isqrt
from typing import Any, NamedTuple

from xbm import backends, checks
from xbm.backends import Array, device_of
from xbm.normalization import normalize

BLOCK_ELEMENTS = 2**25  # similarities in a block, within the following bounds
LEAST_ROWS, MOST_ROWS = 128, 512  # queries in a block: fewer make the product memory-bound, more make it no faster
LEAST_WIDTH = 16  # items per chunk below which the two-stage selection excludes too few items to pay off


class Retrieval(NamedTuple):
    """Means over the queries with at least one relevant item, in [0, 1]; NaN if no query has one."""

    recall: dict[int, float]  #: R@K for each K: share of queries with a relevant item among the K nearest
    r_precision: float  #: share of relevant items among the R nearest, R = the query's relevant items
    map_at_r: float  #: mean of (1/R) sum_{i<=R} P(i) rel(i)
    queries: int  #: number of queries in the means


def retrieval(
    embeddings: Array,
    labels: Array,
    *,
    gallery: Array | None = None,
    gallery_labels: Array | None = None,
    k: int | Iterable[int] = (1,),
    block_rows: int | None = None,
) -> Retrieval:
    r"""Return R@K, R-precision and MAP@R of queries against a gallery, or of a set against itself.

    Let rel(i) be 1 if the i-th nearest item has the query's class, else 0; P(i) the mean of rel(1) .. rel(i); and R the
    number of the query's relevant items, not counting the query itself:

        R@K = max_{i<=K} rel(i),  R-precision = (1/R) sum_{i<=R} rel(i),  MAP@R = (1/R) sum_{i<=R} P(i) rel(i)

    Items are ranked by cosine similarity; equal similarities are ranked by index. Queries without a relevant item
    (R = 0) are excluded from all means.

    Parameters
    ----------
    embeddings : (n, D) floating point
        Queries, n >= 1. Similarities are computed in float64 if the queries or the gallery are float64, else in
        float32.
    labels : (n,) integer
        Classes of the queries.
    gallery : (G, D) floating point, optional
        Items to search, G >= 1. By default, the embeddings themselves are searched, excluding each query's own row by
        its index.
    gallery_labels : (G,) integer, optional
        Classes of the gallery.
    k : int or sequence of int
        The K of R@K, each at least 1. A K larger than the gallery means the whole gallery.
    block_rows : int, optional
        Number of queries compared at a time; extra memory is O(block_rows G). By default it is chosen from G.

    Returns
    -------
    Retrieval

    Raises
    ------
    TypeError, ValueError
        If labels are not integers, lengths, dimensions, libraries or devices differ, there are no rows, rows are not
        finite, a K is less than 1, or only one of `gallery` and `gallery_labels` is given.

    Examples
    --------
    >>> import numpy as np
    >>> from xbm import metrics
    >>> x = np.asarray([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.1, 0.9], [0.66, 0.6]])
    >>> found = metrics.retrieval(x, np.asarray([0, 0, 1, 1, 1]), k=(1, 4))
    >>> found.recall, found.r_precision, found.map_at_r, found.queries
    ({1: 0.8, 4: 1.0}, 0.9, 0.85, 5)

    References
    ----------
    Musgrave, Belongie, Lim, "A Metric Learning Reality Check", ECCV 2020, arXiv 2003.08505, section 3.2.
    """
    ks = tuple(k) if isinstance(k, Iterable) else (k,)
    for one in ks:
        checks.whole_number("k", one, at_least=1)
    if (gallery is None) != (gallery_labels is None):
        given, missing = ("gallery_labels", "gallery") if gallery is None else ("gallery", "gallery_labels")
        raise ValueError(
            f"gallery and gallery_labels must be given together, got {given} without {missing}: "
            "give both, or neither to search the embeddings themselves"
        )
    Z, V, itself = _compared(embeddings, gallery, block_rows)
    xp, ops = backends.of(Z)
    checks.integers("labels", labels, embeddings, embeddings)
    if gallery is not None:
        checks.integers("gallery_labels", gallery_labels, gallery, embeddings)
    labels = xp.astype(labels, ops.integer_dtype(xp))
    item_labels = labels if gallery is None else xp.astype(gallery_labels, labels.dtype)

    ordered = xp.sort(item_labels)
    R = xp.searchsorted(ordered, labels, side="right") - xp.searchsorted(ordered, labels, side="left") - itself
    some = xp.astype(xp.clip(R, min=1), Z.dtype)
    most = int(xp.max(R))  # largest rank that R-precision and MAP@R need
    deepest = min(max(1, *ks, most), V.shape[0] - itself)
    rank = xp.arange(1, most + 1, dtype=R.dtype, device=device_of(Z))

    figures = []
    for block, nearest in _nearest(Z, V, deepest, itself, block_rows):
        found = xp.reshape(xp.take(item_labels, xp.reshape(nearest, (-1,))), nearest.shape)
        relevant = found == labels[block][:, None]
        rel = xp.astype(relevant[:, :most] & (rank[None, :] <= R[block][:, None]), Z.dtype)
        precision = xp.cumulative_sum(rel, axis=1) / xp.astype(rank, Z.dtype)
        recall = [xp.astype(xp.any(relevant[:, : min(one, deepest)], axis=1), Z.dtype) for one in ks]
        r_precision, map_at_r = (xp.sum(x, axis=1) / some[block] for x in (rel, precision * rel))
        figures.append(xp.stack([*recall, r_precision, map_at_r]))

    queries = int(xp.count_nonzero(R))
    totals = xp.sum(xp.concat(figures, axis=1), axis=1)  # queries with R = 0 contribute 0
    *recall, r_precision, map_at_r = (
        float(totals[i]) / queries if queries else float("nan") for i in range(totals.shape[0])
    )
    return Retrieval(dict(zip(ks, recall, strict=True)), r_precision, map_at_r, queries)


def neighbours(embeddings: Array, *, k: int, gallery: Array | None = None, block_rows: int | None = None) -> Array:
    """Return the indices of each row's k nearest items by cosine similarity, nearest first, as (n, k) integers.

    Items with equal similarities are ranked by index.

    Parameters
    ----------
    embeddings : (n, D) floating point
        Queries, n >= 1.
    k : int
        At least 1 and at most the number of items.
    gallery : (G, D) floating point, optional
        Items to search. By default, the embeddings themselves are searched, excluding each query's own row by its
        index, so there are n - 1 items.
    block_rows : int, optional
        Number of queries compared at a time; see `retrieval`.

    Raises
    ------
    TypeError, ValueError
        If k is out of range, dimensions, libraries or devices differ, there are no rows, or rows are not finite.

    Examples
    --------
    >>> import numpy as np
    >>> from xbm import metrics
    >>> metrics.neighbours(np.asarray([[1.0, 0.0], [1.0, 0.0], [0.8, 0.6], [0.0, 1.0]]), k=2)
    array([[1, 2],
           [0, 2],
           [0, 1],
           [2, 0]])
    """
    checks.whole_number("k", k, at_least=1)
    Z, V, itself = _compared(embeddings, gallery, block_rows)
    xp, _ = backends.of(Z)
    items = V.shape[0] - itself
    if k > items:
        raise ValueError(f"k must be at most the number of items to search, {items}, got {k}")
    return xp.concat([nearest for _, nearest in _nearest(Z, V, k, itself, block_rows)])


def _nearest(Z: Array, V: Array, k: int, itself: int, block_rows: int | None) -> Iterator[tuple[slice, Array]]:
    """Yield `(block, indices (b, k))`: the k nearest rows of V for each block of queries Z, nearest first.

    `itself` is 1 if V is Z and each query's own row is excluded, else 0.
    """
    xp, ops = backends.of(Z)
    size = block_rows or max(LEAST_ROWS, min(BLOCK_ELEMENTS // V.shape[0], MOST_ROWS))
    for start in range(0, Z.shape[0], size):
        block = slice(start, min(start + size, Z.shape[0]))
        with ops.full_precision(Z):
            S = Z[block, :] @ xp.matrix_transpose(V)
        indices = _largest(S, k + itself)
        if itself:
            # k + 1 rows were selected. Skip the query itself; if it is not among them, because copies with lower
            # indices precede it, drop the last row.
            own = xp.arange(block.start, block.stop, dtype=indices.dtype, device=device_of(Z))
            passed = xp.cumulative_sum(xp.astype(indices[:, :k] == own[:, None], indices.dtype), axis=1)
            rank = xp.arange(k, dtype=indices.dtype, device=device_of(Z))
            indices = xp.take_along_axis(indices, rank[None, :] + passed, axis=1)
        yield block, indices


def _largest(S: Array, k: int) -> Array:
    """Return the indices (b, k) of the k largest entries of each row of S, in descending order, ties by index.

    The k largest entries lie in the k chunks of the row with the largest maxima, or in the remainder after the last
    chunk. Therefore, the chunks are selected first, then their entries.
    """
    xp, ops = backends.of(S)
    rows, columns = S.shape
    width = isqrt(columns // k)  # makes both selections equally large
    if width < LEAST_WIDTH:
        return ops.top_k(S, k)[1]
    chunks = columns // width
    _, best = ops.top_k(xp.max(xp.reshape(S[:, : chunks * width], (rows, chunks, width)), axis=2), k)
    best = xp.sort(best, axis=1)  # sorted, so that ties are resolved by index
    column = xp.arange(columns, dtype=best.dtype, device=device_of(S))
    inside = xp.reshape(best[:, :, None] * width + column[:width], (rows, -1))
    entries = xp.concat([inside, xp.broadcast_to(column[chunks * width :], (rows, columns - chunks * width))], axis=1)
    _, places = ops.top_k(xp.take_along_axis(S, entries, axis=1), k)
    return xp.take_along_axis(entries, places, axis=1)


def _compared(embeddings: Array, gallery: Array | None, block_rows: int | None) -> tuple[Array, Array, int]:
    """Return `(Z, V, itself)`: validated rows of unit length, and 1 if the items V are the queries Z, else 0."""
    if block_rows is not None:
        checks.whole_number("block_rows", block_rows, at_least=1)
    _check_rows("embeddings", embeddings)
    xp, _ = backends.of(embeddings)
    if gallery is not None:
        checks.same_library("gallery", gallery, embeddings)
        _check_rows("gallery", gallery)
        if gallery.shape[1] != embeddings.shape[1]:
            raise ValueError(
                f"gallery must have shape (G, {embeddings.shape[1]}) for embeddings of shape "
                f"{tuple(embeddings.shape)}, got {tuple(gallery.shape)}"
            )
    wide = any(x is not None and x.dtype == xp.float64 for x in (embeddings, gallery))
    dtype = xp.float64 if wide else xp.float32
    Z = _unit_rows("embeddings", embeddings, dtype)
    return (Z, Z, 1) if gallery is None else (Z, _unit_rows("gallery", gallery, dtype), 0)


def _check_rows(name: str, x: Array) -> None:
    """Raise an error unless x is floating point of shape (n, D) with n and D at least 1."""
    try:
        xp, _ = backends.of(x)
    except TypeError:
        raise TypeError(f"{name} must be an array, got {type(x).__name__}") from None
    if not xp.isdtype(x.dtype, "real floating"):
        raise TypeError(
            f"{name} must be real floating point, got {checks.dtype_name(x.dtype)} of shape {tuple(x.shape)}"
        )
    if len(x.shape) != 2 or 0 in x.shape:
        raise ValueError(f"{name} must have shape (n, D) with n and D at least 1, got {tuple(x.shape)}")


def _unit_rows(name: str, x: Array, dtype: Any) -> Array:
    """Return x in a dtype with rows of unit length; raise an error if rows are not finite."""
    xp, ops = backends.of(x)
    bad = int(xp.count_nonzero(~xp.all(xp.isfinite(x), axis=1)))
    if bad:
        raise ValueError(f"{name} must be finite, got {bad} rows with NaN or infinity in shape {tuple(x.shape)}")
    return normalize(xp.astype(ops.stop_gradient(x), dtype, copy=False))[0]
