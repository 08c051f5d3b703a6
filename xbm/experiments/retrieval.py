"""Splitting pictures into blocks for an encoder, and the retrieval metrics of its embeddings."""

import rich.table

from xbm import metrics
from xbm.backends import array_namespace
from xbm.experiments.errors import DivergenceError

EMBED_ELEMENTS = 1024 * 28 * 28  # array elements of a block of pictures
EMBED_ROWS = 16  # minimum number of pictures in a block


def blocks(images):
    """Yield pictures (n, C, H, W) in blocks for the encoder."""
    rows = max(EMBED_ROWS, EMBED_ELEMENTS // images[0].size)
    for i in range(0, len(images), rows):
        yield images[i : i + rows]


def finite(embeddings):
    """Return the embeddings unchanged, after a check.

    Raises
    ------
    DivergenceError
        If an embedding is not finite.
    """
    xp = array_namespace(embeddings)
    if not xp.all(xp.isfinite(embeddings)):
        raise DivergenceError("the network's embeddings are not finite: expected no NaN or infinity")
    return embeddings


def retrieval(embeddings, labels, k=(1,)):
    """Return the metrics of retrieval within a set: embeddings (n, D) of any library, labels (n,) of NumPy."""
    xp = array_namespace(embeddings)
    return metrics.retrieval(embeddings, xp.asarray(labels, device=embeddings.device), k=k)


def table(chosen, found, title):
    """Return the retrieval metrics as a rich table."""
    figures = {f"R@{k}": value for k, value in found.recall.items()}
    figures |= {"R-Precision": found.r_precision, "MAP@R": found.map_at_r}
    result = rich.table.Table(title=title)
    for column in ("classes", "pictures", *figures):
        result.add_column(column, justify="right")
    counts = (f"{len(one):,}" for one in (chosen.names, chosen.labels))
    result.add_row(*counts, *(f"{value:.3f}" for value in figures.values()))
    return result
