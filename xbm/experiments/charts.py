"""The report's charts: the lines of each chart, and their rendering as inline SVG.

`PALETTE` names the colours. Charts are drawn with the light values, which are then replaced by the CSS variable of the
same name. The charts therefore follow the reader's colour scheme, as the text does.
"""

import io
import re
from typing import NamedTuple

import matplotlib.style
import numpy as np
from markupsafe import Markup
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator, StrMethodFormatter

PALETTE = {  # name: (light theme, dark theme)
    "run-1": ("#0072b2", "#5bb4e8"),  # run-1 and run-2 are a colour-blind safe pair
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

WIDE, NARROW, PANEL = (912, 340), (400, 280), (440, 210)  # pixels; narrow screens show NARROW in place of WIDE
TICKS = (1, 2, 2.5, 5, 10)  # allowed tick distances, times a power of ten
MARKERS = "os^D"  # one per run, for readers who cannot distinguish the colours
DASHES = {"": "-", "dashed": (0, (4, 2)), "dotted": (0, (1, 1.5))}  # the page's CSS uses the same names
MARKED = 40  # largest number of points for which every point gets a marker
SMOOTHED = 1 / 40  # window of the moving mean, as a fraction of the line's points
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
    """One run's values in a chart (p points)."""

    run: int  # index of the run, from 0
    label: str
    steps: np.ndarray  # (p,)
    values: np.ndarray  # (p,) float, NaN = gap
    dash: str = ""  # a key of DASHES

    @property
    def ends(self):
        """The first and the last finite value."""
        return self.values[np.isfinite(self.values)][[0, -1]]


class Chart(NamedTuple):
    """Lines over the training steps, and their drawing options."""

    name: str  # unique on the page; seeds the ids in the SVG
    title: str
    lines: list[Line]
    sizes: tuple[tuple[int, int], ...] = (PANEL,)
    noisy: bool = True  # draw the moving mean, with the raw values faint behind it
    percent: bool = False
    log: bool = False


def groups(runs):
    """Yield the page's groups of charts as (name, charts). Charts without lines are omitted."""
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
        line._replace(label=f"{line.label}: {when} compensation", dash=dash)
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
            Chart("drift", "Drift of samples seen again", readings(runs, "drift")),
            Chart("drift-age", "Age of their rows, in steps", readings(runs, "drift_age")),
        ],
        "compensation": [Chart("compensation", "Drift before and after compensation", moved, (WIDE, NARROW))],
    }
    for name, charts in groups.items():
        yield name, [chart for chart in charts if chart.lines]


def readings(runs, name):
    """Return one line for each run that recorded this figure."""
    lines = [_line(i, run.name, run.figures_steps, run.figures.get(name, ())) for i, run in enumerate(runs)]
    return [line for line in lines if line]


def probed(runs):
    """Return the lines of the slow drift, one per run and distance in steps. The longest distance is a solid line."""
    lines = []
    for i, run in enumerate(runs):
        for dash, apart in zip(DASHES, sorted(run.probe, reverse=True), strict=False):
            lines.append(_line(i, f"{run.name}: {apart:,} steps apart", run.probe_steps, run.probe[apart], dash))
    return [line for line in lines if line]


def _line(run, label, steps, values, dash=""):
    """Return a line, or None if it has no values. Zeros before the first nonzero value become gaps."""
    values = np.array(values, float)
    values[~np.isfinite(values)] = np.nan
    counts = np.cumsum(np.nan_to_num(values) != 0) > 0
    values[~counts] = np.nan
    return Line(run, label, np.asarray(steps), values, dash) if counts.any() else None


def smooth(values):
    """Return the centred moving mean of the finite values; gaps stay gaps."""
    window = np.ones(int(SMOOTHED * len(values)) // 2 * 2 + 1)
    there = np.isfinite(values)
    total = np.convolve(np.where(there, values, 0), window, "same")
    return np.where(there, total / np.maximum(np.convolve(there, window, "same"), 1), np.nan)


def legend(drawn):
    """Return the legend entries of some charts without duplicates, as (run, label, dash)."""
    return list(dict.fromkeys((line.run, line.label, line.dash) for chart, _ in drawn for line in chart.lines))


def drawings(chart, switched_on):
    """Return one inline SVG per size of the chart."""
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
    svg = re.sub(r"<style.*?</style>", "", svg, flags=re.DOTALL)  # would apply to the whole page
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)  # duplicated between charts and never referenced
    for colour, (light, _) in PALETTE.items():
        svg = svg.replace(light, f"var(--{colour})")
    return Markup(svg)


def _draw(axes, chart, switched_on):
    for line in chart.lines:
        values, colour = line.values * (100 if chart.percent else 1), PALETTE[f"run-{line.run + 1}"][0]
        there = np.pad(np.isfinite(values), 1)
        alone = there[1:-1] & ~there[:-2] & ~there[2:]  # isolated points are invisible without a marker
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
