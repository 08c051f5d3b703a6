"""The report's charts: which lines there are, and each as inline SVG.

A colour has a name in `PALETTE`: charts are drawn in its light value and then refer to the page's variable of that
name, so they follow the reader's colour scheme like the text round them.
"""

import io
import re
from typing import NamedTuple

import matplotlib.style
import numpy as np
from markupsafe import Markup
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator, StrMethodFormatter

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
DASHES = {"": "-", "dashed": (0, (4, 2)), "dotted": (0, (1, 1.5))}  # names in the page's styles too
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


class Line(NamedTuple):
    """One run's readings in a chart (p points)."""

    run: int  # counted from 0
    label: str
    steps: np.ndarray  # (p,)
    values: np.ndarray  # (p,) float, NaN = gap
    dash: str = ""  # among DASHES

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
    log: bool = False


def groups(runs):
    """Yield the page's groups of charts as (name, charts); a chart without lines is left out."""
    recall = [
        Line(i, run.name, np.asarray(run.recall_steps), np.asarray(run.recall, float))
        for i, run in enumerate(runs)
        if np.isfinite(run.recall).any()
    ]
    losses = [
        line._replace(label=f"{line.label}: {term}", dash=dash)
        for name, term, dash in (("batch_loss", "batch loss", ""), ("memory_loss", "memory loss", "dashed"))
        for line in readings(runs, name)
    ]
    moved = [
        line._replace(label=f"{line.label}: {when} the move", dash=dash)
        for name, when, dash in (("drift_before", "before", ""), ("drift_after", "after", "dashed"))
        for line in readings(runs, name)
    ]
    groups = {
        "recall": [Chart("recall", "R@1", recall, (WIDE, NARROW), noisy=False)],
        "probe": [Chart("probe", "Slow drift", probed(runs), (WIDE, NARROW), noisy=False, log=True)],
        "losses": [Chart("losses", "Loss", sorted(losses, key=lambda line: line.run), (WIDE, NARROW))],
        "memory": [
            Chart("fill", "Fill of the memory", readings(runs, "fill"), noisy=False, percent=True),
            Chart("pairs", "Pairs in use", readings(runs, "pairs")),
            Chart("drift", "Drift of rows that return", readings(runs, "drift")),
            Chart("drift-age", "Age of these rows, in steps", readings(runs, "drift_age")),
        ],
        "compensation": [Chart("compensation", "Drift before and after compensation", moved, (WIDE, NARROW))],
    }
    for name, charts in groups.items():
        yield name, [chart for chart in charts if chart.lines]


def readings(runs, name):
    """Return a line for each run that has the figure."""
    lines = [_line(i, run.name, run.figures_steps, run.figures.get(name, ())) for i, run in enumerate(runs)]
    return [line for line in lines if line]


def probed(runs):
    """Return the lines of the slow drift, one for each run and distance in steps; the longest is drawn through."""
    lines = []
    for i, run in enumerate(runs):
        for dash, apart in zip(DASHES, sorted(run.probe, reverse=True), strict=False):
            lines.append(_line(i, f"{run.name}: {apart:,} steps apart", run.probe_steps, run.probe[apart], dash))
    return [line for line in lines if line]


def _line(run, label, steps, values, dash=""):
    """Return a line, or None if there is nothing to show; what does not count yet reads 0 and is a gap."""
    values = np.array(values, float)
    values[~np.isfinite(values)] = np.nan
    counts = np.cumsum(np.nan_to_num(values) != 0) > 0
    values[~counts] = np.nan
    return Line(run, label, np.asarray(steps), values, dash) if counts.any() else None


def smooth(values):
    """Return the centred moving mean of the readings there are; gaps stay gaps."""
    window = np.ones(int(SMOOTHED * len(values)) // 2 * 2 + 1)
    there = np.isfinite(values)
    total = np.convolve(np.where(there, values, 0), window, "same")
    return np.where(there, total / np.maximum(np.convolve(there, window, "same"), 1), np.nan)


def legend(drawn):
    """Return what the lines of some charts stand for, each once, as (run, label, dash)."""
    return list(dict.fromkeys((line.run, line.label, line.dash) for chart, _ in drawn for line in chart.lines))


def drawings(chart, switched_on):
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
            smooth(values) if chart.noisy else values,
            color=colour,
            linestyle=DASHES[line.dash],
            marker=MARKERS[line.run],
            markevery=None if all_marked else alone,
            clip_on=False,
            zorder=3,
        )
        if chart.noisy:
            axes.plot(line.steps, values, color=colour, alpha=0.25, linewidth=1)
    if chart.log:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 3)))
    else:
        axes.yaxis.set_major_locator(MaxNLocator(5, steps=TICKS))
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
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,.10g}%" if chart.percent else "{x:,.10g}"))
    axes.yaxis.set_minor_locator(NullLocator())
