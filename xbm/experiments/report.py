"""The report: one HTML page, complete in itself, on what each run reached and how it got there.

Numbers and pictures are made here and in `charts`, words and looks are in `report.html.jinja`.
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

SHOWN = 10  # neighbours of a query
SPRITES = 16  # images side by side in the picture that holds all of them
THUMBNAIL = 64  # pixels at most of a photograph's longer side
CRISP = 32  # pixels; photographs no larger are kept without a loss


@dataclass(frozen=True)
class Run:
    """What one training run left behind (m test images).

    A figure may hold NaN where there was nothing to read, or be missing.
    """

    name: str
    recall_steps: Sequence[int]  # steps at which recall was measured
    recall: Sequence[float]  # R@1 on the watched classes at those steps, in [0, 1]
    figures_steps: Sequence[int]  # steps at which the figures were read
    figures: Mapping[str, Sequence[float]]  # batch_loss, memory_loss, fill, pairs, drift, drift_age
    recall_at_1: float  # at the end, as the next two
    r_precision: float
    map_at_r: float
    seconds: float  # of training alone
    memory_megabytes: float  # what the memory adds; 0 without one
    neighbours: np.ndarray  # (m, 10) indices of each test image's nearest others, nearest first
    probe_steps: Sequence[int] = ()  # steps at which the slow drift was read
    probe: Mapping[int, Sequence[float]] = field(default_factory=dict)  # mean D(x, t; dt) at those steps for each dt


def write(path, runs, *, images, labels, queries, settings, warmup, names=None, watched="test"):
    """Write the report: whole, or not at all.

    Parameters
    ----------
    path : path
        File to write, in a folder that exists. A file there is replaced.
    runs : sequence of Run
        One to four. The first is the baseline, the last is what the headline compares it with.
    images : (m, height, width) or (m, height, width, 3) uint8
        The test images: ink on paper, ink high, or photographs in RGB.
    labels : (m,) integer
        Their classes.
    queries : (q,) integer
        Indices of the images whose neighbours are shown.
    settings : mapping
        What was run, as name: value. A whole number "capacity" also appears in the headline.
    warmup : int
        Step at which the memory switches on.
    names : sequence of str, optional
        Of the classes; without them their numbers are shown.
    watched : {"test", "validation"}
        The classes on which recall was measured while training.

    Raises
    ------
    ValueError
        If there are no runs or too many, or if a run's neighbours are not one row per image.
    OSError
        If the file cannot be written.

    """
    path, images, labels = Path(path), np.asarray(images), np.asarray(labels)
    if not 1 <= len(runs) <= charts.MOST_RUNS:
        raise ValueError(f"a report has 1 to {charts.MOST_RUNS} runs, got {len(runs)}")
    for run in runs:
        if len(run.neighbours) != len(images) or len(labels) != len(images):
            raise ValueError(
                "images, labels and neighbours must have a row per test image, got shapes "
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
    # Indices of the images that appear, each once, in the order of their places in the sprite picture.
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
    """Return the gain over a base in points of a hundred, signed; it agrees with the rounded numbers beside it."""
    gain = round(100 * (round(value, 3) - round(base, 3)), 1)
    return f"{gain:+.1f}".replace("-", "\N{MINUS SIGN}") if gain else "\N{PLUS-MINUS SIGN}0.0"


def _plain(value):
    """Return a setting as text: whole numbers in groups of three digits."""
    return f"{value:,}" if isinstance(value, Integral) and not isinstance(value, bool) else str(value)


def _nearest(run, query):
    return np.asarray(run.neighbours[query])[:SHOWN]


def _retrieval(runs, labels, query, seen, names):
    """Return a query and each run's answers as (place among the sprites, class, whether it is the query's)."""

    def shown(i):
        return int(np.searchsorted(seen, i)), names[labels[i]], bool(labels[i] == labels[query])

    return {"query": shown(query), "rows": [[shown(i) for i in _nearest(run, query)] for run in runs]}


def _ink(images):
    """Return one PNG with all images, `SPRITES` to a row, as a data URI: black ink on transparent paper."""
    count, side = len(images), images.shape[1]
    rows = max(-(-count // SPRITES), 1)
    sheet = np.zeros((rows * SPRITES, side, side), np.uint8)
    sheet[:count] = images
    ink = Image.fromarray(sheet.reshape(rows, SPRITES, side, side).swapaxes(1, 2).reshape(rows * side, -1))
    return _uri(Image.merge("LA", (Image.new("L", ink.size), ink)), "PNG", optimize=True)


def _photographs(images):
    """Return one WebP with thumbnails of all images, each in the middle of a transparent square, as a data URI."""
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
