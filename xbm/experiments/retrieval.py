"""Pictures in blocks for an encoder, and how well its embeddings retrieve, in any array library."""

import rich.table

from xbm import metrics
from xbm.backends import array_namespace
from xbm.experiments.errors import DivergenceError

EMBED_ELEMENTS = 1024 * 28 * 28  # of the pictures embedded at a time, unless that leaves fewer than EMBED_ROWS
EMBED_ROWS = 16


def blocks(images):
    """Yield pictures (n, C, H, W) as many at a time as are embedded at once."""
    rows = max(EMBED_ROWS, EMBED_ELEMENTS // images[0].size)
    for i in range(0, len(images), rows):
        yield images[i : i + rows]


def finite(embeddings):
    """Return the embeddings.

    Raises
    ------
    DivergenceError
        If one is not finite.
    """
    xp = array_namespace(embeddings)
    if not xp.all(xp.isfinite(embeddings)):
        raise DivergenceError("the network's embeddings are not finite")
    return embeddings


def retrieval(embeddings, labels, k=(1,)):
    """Return the retrieval metrics of a set against itself: embeddings (n, D) of any library, labels (n,) of NumPy."""
    xp = array_namespace(embeddings)
    return metrics.retrieval(embeddings, xp.asarray(labels, device=embeddings.device), k=k)


def table(chosen, found, title):
    """Return the metrics of some pictures as a table."""
    figures = {f"R@{k}": value for k, value in found.recall.items()}
    figures |= {"R-Precision": found.r_precision, "MAP@R": found.map_at_r}
    result = rich.table.Table(title=title)
    for column in ("classes", "pictures", *figures):
        result.add_column(column, justify="right")
    counts = (f"{len(one):,}" for one in (chosen.names, chosen.labels))
    result.add_row(*counts, *(f"{value:.3f}" for value in figures.values()))
    return result
