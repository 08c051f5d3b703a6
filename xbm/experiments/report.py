"""The report: one self-contained HTML page with the results and the training curves of each run.

The numbers and pictures are computed here and in `charts`; text and style are in `report.html.jinja`.
"""

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral
from pathlib import Path

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image

from xbm.experiments import charts
from xbm.experiments.files import written_whole

SHOWN = 10  # neighbours shown per query
SPRITES = 16  # images per row of the sprite sheet
THUMBNAIL = 64  # pixels; maximum of a photograph's longer side
CRISP = 32  # pixels; photographs up to this size are stored losslessly


@dataclass(frozen=True)
class Run:
    """The results of one training run (m test images).

    A figure may contain NaN where it was not available, or be missing.
    """

    name: str
    recall_steps: Sequence[int]  # steps at which recall was measured
    recall: Sequence[float]  # R@1 on the watched classes at those steps, in [0, 1]
    figures_steps: Sequence[int]  # steps at which the figures were recorded
    figures: Mapping[str, Sequence[float]]  # batch_loss, memory_loss, fill, pairs, drift, drift_age
    recall_at_1: float  # on the test images at the end, like r_precision and map_at_r
    r_precision: float
    map_at_r: float
    seconds: float  # training time without measurements
    memory_megabytes: float  # size of the memory; 0 without one
    neighbours: np.ndarray  # (m, 10) indices of each test image's nearest other images, nearest first
    probe_steps: Sequence[int] = ()  # steps at which the slow drift was measured
    probe: Mapping[int, Sequence[float]] = field(default_factory=dict)  # mean D(x, t; dt) at those steps for each dt


def write(path, runs, *, images, labels, queries, settings, warmup, names=None, watched="test"):
    """Write the report atomically.

    Parameters
    ----------
    path : path
        File to write, in an existing folder. An existing file is replaced.
    runs : sequence of Run
        One to four runs. The first is the baseline; the headline compares the last run with it.
    images : (m, height, width) or (m, height, width, 3) uint8
        The test images: greyscale glyphs with high values for ink, or RGB photographs.
    labels : (m,) integer
        Classes of the test images.
    queries : (q,) integer
        Indices of the images whose neighbours are shown.
    settings : mapping
        Settings of the runs, as name: value. An integer "capacity" also appears in the headline.
    warmup : int
        Step from which on the memory loss is added.
    names : sequence of str, optional
        Class names; by default the page shows the class numbers.
    watched : {"test", "validation"}
        The classes on which recall was measured during training.

    Raises
    ------
    ValueError
        If there are no runs or more than four, or if labels or a run's neighbours do not have one row per image.
    OSError
        If the file cannot be written.

    """
    path, images, labels = Path(path), np.asarray(images), np.asarray(labels)
    if not 1 <= len(runs) <= charts.MOST_RUNS:
        raise ValueError(f"runs must be a sequence of 1 to {charts.MOST_RUNS} runs, got {len(runs)}")
    for run in runs:
        if len(run.neighbours) != len(images) or len(labels) != len(images):
            raise ValueError(
                "images, labels and neighbours must have one row per test image, got shapes "
                f"{images.shape}, {labels.shape} and, for {run.name!r}, {np.shape(run.neighbours)}"
            )
    names = range(labels.max(initial=-1) + 1) if names is None else names
    page = _page(runs, images, labels, queries, settings, warmup, names, watched)
    with written_whole(path) as file:
        file.write(page.encode())


def _page(runs, images, labels, queries, settings, warmup, names, watched):
    environment = Environment(
        loader=PackageLoader("xbm.experiments", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"points": _points, "plain": _plain, "legend": charts.legend}
    # Unique indices of the images on the page, in the order of the sprite sheet.
    seen = np.unique(
        np.concatenate([queries, *(_nearest(run, query) for run in runs for query in queries)]).astype(int)
    )
    switched_on = warmup if warmup > 0 and any(run.memory_megabytes > 0 for run in runs) else None
    capacity = settings.get("capacity") if runs[-1].memory_megabytes > 0 else None
    return environment.get_template("report.html.jinja").render(
        runs=runs,
        capacity=capacity if isinstance(capacity, Integral) else None,
        images=len(images),
        classes=len(np.unique(labels)),
        charts={
            name: [(chart, charts.drawings(chart, switched_on)) for chart in group]
            for name, group in charts.groups(runs)
        },
        retrievals=[_retrieval(runs, labels, query, seen, names) for query in queries],
        sprites=_ink(images[seen]) if images.ndim == 3 else _photographs(images[seen]),
        ink=images.ndim == 3,
        watched=watched,
        columns=SPRITES,
        switched_on=switched_on,
        settings=settings,
        palette=charts.PALETTE,
    )


def _points(value, base):
    """Return the signed gain over a base in percentage points, consistent with the rounded values on the page."""
    gain = round(100 * (round(value, 3) - round(base, 3)), 1)
    return f"{gain:+.1f}".replace("-", "\N{MINUS SIGN}") if gain else "\N{PLUS-MINUS SIGN}0.0"


def _plain(value):
    """Return a setting as text, integers with thousands separators."""
    return f"{value:,}" if isinstance(value, Integral) and not isinstance(value, bool) else str(value)


def _nearest(run, query):
    return np.asarray(run.neighbours[query])[:SHOWN]


def _retrieval(runs, labels, query, seen, names):
    """Return a query and each run's neighbours as (position in the sprite sheet, class, whether the class is right)."""

    def shown(i):
        return int(np.searchsorted(seen, i)), names[labels[i]], bool(labels[i] == labels[query])

    return {"query": shown(query), "rows": [[shown(i) for i in _nearest(run, query)] for run in runs]}


def _ink(images):
    """Return a sprite sheet of all images, `SPRITES` per row, as a data URI: PNG, black ink on transparent paper."""
    count, side = len(images), images.shape[1]
    rows = max(-(-count // SPRITES), 1)
    sheet = np.zeros((rows * SPRITES, side, side), np.uint8)
    sheet[:count] = images
    ink = Image.fromarray(sheet.reshape(rows, SPRITES, side, side).swapaxes(1, 2).reshape(rows * side, -1))
    return _uri(Image.merge("LA", (Image.new("L", ink.size), ink)), "PNG", optimize=True)


def _photographs(images):
    """Return a sprite sheet of thumbnails, each centred in a transparent square, as a data URI: WebP."""
    thumbnails = [Image.fromarray(image) for image in images]
    for thumbnail in thumbnails:
        thumbnail.thumbnail((THUMBNAIL, THUMBNAIL))
    side = max((max(thumbnail.size) for thumbnail in thumbnails), default=1)
    sheet = Image.new("RGBA", (SPRITES * side, max(-(-len(images) // SPRITES), 1) * side))
    for i, thumbnail in enumerate(thumbnails):
        corner = (i % SPRITES * side, i // SPRITES * side)
        sheet.paste(thumbnail, tuple(at + (side - one) // 2 for at, one in zip(corner, thumbnail.size, strict=True)))
    return _uri(sheet, "WEBP", lossless=side <= CRISP, quality=85)


def _uri(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return Markup(f"data:image/{kind.lower()};base64,{base64.b64encode(file.getvalue()).decode()}")
