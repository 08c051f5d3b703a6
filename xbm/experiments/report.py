"""The demo's report: one HTML page, complete in itself, on what each run reached and how it got there.

Numbers and pictures are made here, words and looks are in `report.html.jinja`. A colour has a name in `PALETTE`:
charts are drawn in its light value and then refer to the page's variable of that name, so they follow the reader's
colour scheme like the text round them.
"""

import base64
import io
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path
from typing import NamedTuple

import matplotlib.style
import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, StrMethodFormatter
from PIL import Image

PALETTE = {  # name: (on light paper, on dark paper)
    "run-1": ("#0072b2", "#5bb4e8"),  # the first two are a colour-blind safe pair
    "run-2": ("#c05000", "#f0994d"),
    "run-3": ("#7a4b9d", "#c6a0e6"),
    "run-4": ("#55606a", "#aab4bd"),
    "right": ("#0b7a5b", "#4cc79c"),
    "wrong": ("#b0305c", "#f08aac"),
    "paper": ("#fdfdfb", "#15181c"),
    "ink": ("#1d2327", "#e6e8ea"),
    "muted": ("#5d6870", "#9aa4ad"),
    "rule": ("#dde1e3", "#343b43"),
}
MOST_RUNS = sum(name.startswith("run-") for name in PALETTE)

WIDE, NARROW, PANEL = (912, 340), (400, 280), (440, 210)  # pixels; a narrow screen shows the second for the first
TICKS = (1, 2, 2.5, 5, 10)  # distances between them, up to a power of ten
MARKERS = "os^D"  # one per run, for those who cannot tell the colours
MARKED = 40  # points at most of a line whose points are marked
SMOOTHED = 1 / 40  # of a line's points are averaged for one of the smooth line
STYLE = {
    "svg.fonttype": "none",  # text stays text, in the page's font
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 12,
    **dict.fromkeys(["text.color", "axes.labelcolor", "xtick.color", "ytick.color"], PALETTE["muted"][0]),
    **{f"axes.spines.{side}": False for side in ("left", "top", "right")},
    **dict.fromkeys(["axes.edgecolor", "grid.color"], PALETTE["rule"][0]),
    **dict.fromkeys(["xtick.major.size", "ytick.major.size"], 0),
    **dict.fromkeys(["xtick.major.pad", "ytick.major.pad"], 7),
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "lines.linewidth": 2,
    "lines.markersize": 5,
}

SHOWN = 10  # neighbours of a query
SPRITES = 16  # images side by side in the picture that holds all of them


@dataclass(frozen=True)
class Run:
    """What one training run left behind (m test images).

    A figure may hold NaN where there was nothing to read, or be missing.
    """

    name: str
    recall_steps: Sequence[int]  # steps at which recall was measured
    recall: Sequence[float]  # R@1 on the test classes at those steps, in [0, 1]
    figures_steps: Sequence[int]  # steps at which the figures were read
    figures: Mapping[str, Sequence[float]]  # batch_loss, memory_loss, fill, pairs, drift, drift_age
    recall_at_1: float  # at the end, as the next two
    r_precision: float
    map_at_r: float
    seconds: float  # of training alone
    memory_megabytes: float  # what the memory adds; 0 without one
    neighbours: np.ndarray  # (m, 10) indices of each test image's nearest others, nearest first


class Line(NamedTuple):
    """One run's readings in a chart (p points)."""

    run: int  # counted from 0
    label: str
    steps: np.ndarray  # (p,)
    values: np.ndarray  # (p,) float, NaN = gap
    dashed: bool = False

    @property
    def ends(self):
        """The first and the last reading."""
        return self.values[np.isfinite(self.values)][[0, -1]]


class Chart(NamedTuple):
    """Lines over the training steps, and how they are drawn."""

    name: str  # among the page's charts; seeds the ids in its SVG
    title: str
    lines: list[Line]
    sizes: tuple[tuple[int, int], ...] = (PANEL,)
    noisy: bool = True  # smoothed, the readings faint behind
    percent: bool = False


def write(path, runs, *, images, labels, queries, settings, warmup):
    """Write the report: whole, or not at all.

    Parameters
    ----------
    path : path
        File to write, in a folder that exists. A file there is replaced.
    runs : sequence of Run
        One to four. The first is the baseline, the last is what the headline compares it with.
    images : (m, 28, 28) uint8
        The test images, ink high.
    labels : (m,) integer
        Their classes.
    queries : (q,) integer
        Indices of the images whose neighbours are shown.
    settings : mapping
        What was run, as name: value. A whole number "capacity" also appears in the headline.
    warmup : int
        Step at which the memory switches on.

    Raises
    ------
    ValueError
        If there are no runs or too many, or if a run's neighbours are not one row per image.
    OSError
        If the file cannot be written.

    """
    path, images, labels = Path(path), np.asarray(images), np.asarray(labels)
    if not 1 <= len(runs) <= MOST_RUNS:
        raise ValueError(f"a report has 1 to {MOST_RUNS} runs, got {len(runs)}")
    for run in runs:
        if len(run.neighbours) != len(images) or len(labels) != len(images):
            raise ValueError(
                "images, labels and neighbours must have a row per test image, got shapes "
                f"{images.shape}, {labels.shape} and, for {run.name!r}, {np.shape(run.neighbours)}"
            )
    _replace(path, _page(runs, images, labels, queries, settings, warmup))


def _page(runs, images, labels, queries, settings, warmup):
    environment = Environment(
        loader=PackageLoader("xbm.experiments", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"points": _points, "plain": _plain, "legend": _legend}
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
        charts={name: [(chart, _drawings(chart, switched_on)) for chart in charts] for name, charts in _charts(runs)},
        retrievals=[_retrieval(runs, labels, query, seen) for query in queries],
        sprites=_sprites(images[seen]),
        columns=SPRITES,
        switched_on=switched_on,
        settings=settings,
        palette=PALETTE,
    )


def _points(value, base):
    """Return the gain over a base in points of a hundred, signed; it agrees with the rounded numbers beside it."""
    gain = round(100 * (round(value, 3) - round(base, 3)), 1)
    return f"{gain:+.1f}".replace("-", "\N{MINUS SIGN}") if gain else "\N{PLUS-MINUS SIGN}0.0"


def _plain(value):
    """Return a setting as text: whole numbers in groups of three digits."""
    return f"{value:,}" if isinstance(value, Integral) and not isinstance(value, bool) else str(value)


def _charts(runs):
    """Yield the page's groups of charts as (name, charts); a chart without lines is left out."""
    recall = [
        Line(i, run.name, np.asarray(run.recall_steps), np.asarray(run.recall, float))
        for i, run in enumerate(runs)
        if np.isfinite(run.recall).any()
    ]
    losses = [
        line._replace(label=f"{line.label}: {term}", dashed=dashed)
        for name, term, dashed in (("batch_loss", "batch loss", False), ("memory_loss", "memory loss", True))
        for line in _readings(runs, name)
    ]
    groups = {
        "recall": [Chart("recall", "R@1", recall, (WIDE, NARROW), noisy=False)],
        "losses": [Chart("losses", "Loss", sorted(losses, key=lambda line: line.run), (WIDE, NARROW))],
        "memory": [
            Chart("fill", "Fill of the memory", _readings(runs, "fill"), noisy=False, percent=True),
            Chart("pairs", "Pairs in use", _readings(runs, "pairs")),
            Chart("drift", "Drift of rows that return", _readings(runs, "drift")),
            Chart("drift-age", "Age of these rows, in steps", _readings(runs, "drift_age")),
        ],
    }
    for name, charts in groups.items():
        yield name, [chart for chart in charts if chart.lines]


def _readings(runs, name):
    """Return a line for each run that has the figure; what does not count yet reads 0 and is a gap."""
    lines = []
    for i, run in enumerate(runs):
        values = np.array(run.figures.get(name, ()), float)
        values[~np.isfinite(values)] = np.nan
        counts = np.cumsum(np.nan_to_num(values) != 0) > 0
        values[~counts] = np.nan
        if counts.any():
            lines.append(Line(i, run.name, np.asarray(run.figures_steps), values))
    return lines


def _smooth(values):
    """Return the centred moving mean of the readings there are; gaps stay gaps."""
    window = np.ones(int(SMOOTHED * len(values)) // 2 * 2 + 1)
    there = np.isfinite(values)
    total = np.convolve(np.where(there, values, 0), window, "same")
    return np.where(there, total / np.maximum(np.convolve(there, window, "same"), 1), np.nan)


def _legend(drawn):
    """Return what the lines of some charts stand for, each once, as (run, label, dashed)."""
    return list(dict.fromkeys((line.run, line.label, line.dashed) for chart, _ in drawn for line in chart.lines))


def _drawings(chart, switched_on):
    """Return the chart as inline SVG in each of its sizes."""
    return [_svg(chart, size, switched_on) for size in chart.sizes]


def _svg(chart, size, switched_on):
    name = f"{chart.name}-{size[0]}"
    with matplotlib.style.context(["default", STYLE, {"svg.hashsalt": name}]):
        figure = Figure([pixels / 72 for pixels in size], layout="constrained")
        _draw(figure.subplots(), chart, switched_on)
        file = io.StringIO()
        nothing = dict.fromkeys(["Creator", "Date", "Format", "Type"])
        figure.savefig(file, format="svg", transparent=True, metadata=nothing)
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :]  # without the XML prolog
    svg = re.sub(r'(?<=<svg)(.*?) width="[^"]*" height="[^"]*"', r"\1", svg, count=1)  # the page sets the size
    svg = re.sub(r"<style.*?</style>", "", svg, flags=re.DOTALL)  # would hold for the whole page
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)  # the same in every chart, and nothing refers to them
    for colour, (light, _) in PALETTE.items():
        svg = svg.replace(light, f"var(--{colour})")
    return Markup(svg)


def _draw(axes, chart, switched_on):
    for line in chart.lines:
        values, colour = line.values * (100 if chart.percent else 1), PALETTE[f"run-{line.run + 1}"][0]
        there = np.pad(np.isfinite(values), 1)
        alone = there[1:-1] & ~there[:-2] & ~there[2:]  # a line does not show them
        all_marked = len(values) <= MARKED and not chart.noisy
        axes.plot(
            line.steps,
            _smooth(values) if chart.noisy else values,
            color=colour,
            linestyle=(0, (4, 2)) if line.dashed else "-",
            marker=MARKERS[line.run],
            markevery=None if all_marked else alone,
            clip_on=False,
            zorder=3,
        )
        if chart.noisy:
            axes.plot(line.steps, values, color=colour, alpha=0.25, linewidth=1)
    if chart.noisy or chart.percent:
        axes.set_ylim(bottom=0, top=100 if chart.percent else None)
    end = max(1, *(line.steps[-1] for line in chart.lines))
    axes.set_xlim(0, end)
    if switched_on is not None and switched_on < end:
        axes.axvline(switched_on, color=PALETTE["muted"][0], linewidth=1)
        place = {"xy": (switched_on, 1), "xycoords": axes.get_xaxis_transform(), "textcoords": "offset points"}
        axes.annotate("memory on", **place, xytext=(0, 5), ha="left" if switched_on < end / 2 else "right")
    axes.set_xlabel("step", loc="right")
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, steps=TICKS))
    axes.yaxis.set_major_locator(MaxNLocator(5, steps=TICKS))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,.10g}%" if chart.percent else "{x:,.10g}"))


def _nearest(run, query):
    return np.asarray(run.neighbours[query])[:SHOWN]


def _retrieval(runs, labels, query, seen):
    """Return a query and each run's answers as (place among the sprites, class, whether it is the query's)."""

    def shown(i):
        return int(np.searchsorted(seen, i)), labels[i], bool(labels[i] == labels[query])

    return {"query": shown(query), "rows": [[shown(i) for i in _nearest(run, query)] for run in runs]}


def _sprites(images):
    """Return one PNG with all images, `SPRITES` to a row, as a data URI: black ink on transparent paper."""
    count, side = len(images), images.shape[1]
    rows = max(-(-count // SPRITES), 1)
    sheet = np.zeros((rows * SPRITES, side, side), np.uint8)
    sheet[:count] = images
    ink = Image.fromarray(sheet.reshape(rows, SPRITES, side, side).swapaxes(1, 2).reshape(rows * side, -1))
    file = io.BytesIO()
    Image.merge("LA", (Image.new("L", ink.size), ink)).save(file, "PNG", optimize=True)
    return Markup("data:image/png;base64," + base64.b64encode(file.getvalue()).decode())


def _replace(path, text):
    """Write a file under a temporary name beside it, then put it in place."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
