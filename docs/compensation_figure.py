"""Draw `docs/images/compensation.svg` from the runs that `python -m benchmarks.drift --json FILE` has left."""

import json
import sys
from pathlib import Path
from statistics import mean

import matplotlib
from matplotlib.figure import Figure

from xbm.experiments.charts import PALETTE

CAPACITY = 2048
NAMES = {"glyphs": "Glyphs", "omniglot_background": "Omniglot"}
FORMS = {  # as they are called, and in which colour
    "no memory": "run-1",
    "larger batch": "muted",
    "stale memory": "run-2",
    "follow": "run-3",
    "shift, 32 every 8": "run-3",
    "follow + map, 32 every 8": "run-3",
    "map, 64 every 4": "run-3",
    "oracle": "right",
}


def main(path):
    """Draw MAP@R on the test classes: a dot for each seed, a line for their mean."""
    runs = [json.loads(line) for line in Path(path).read_text().splitlines()]
    matplotlib.rcParams |= {"svg.hashsalt": "compensation", "svg.fonttype": "none", "font.size": 11}
    figure = Figure((9.0, 3.6), layout="constrained")
    for axes, (data, name) in zip(figure.subplots(1, 2, sharey=True), NAMES.items(), strict=True):
        for place, (form, colour) in enumerate(FORMS.items()):
            found = [
                run["test"]["map_at_r"]
                for run in runs
                if (run["data"], run["capacity"], run["form"]) == (data, CAPACITY, form)
            ]
            if found:
                axes.plot(found, [-place] * len(found), "o", color=PALETTE[colour][0], alpha=0.45, markersize=5)
                axes.plot([mean(found)] * 2, [-place - 0.3, -place + 0.3], color=PALETTE[colour][0], linewidth=3)
        axes.set(title=f"{name}, {CAPACITY:,} rows", xlabel="MAP@R on unseen classes")
        axes.set_yticks([-place for place in range(len(FORMS))], list(FORMS))
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(axis="y", length=0)
        axes.grid(axis="x", color=PALETTE["rule"][0])
        axes.set_axisbelow(True)
    figure.savefig(Path(__file__).parent / "images" / "compensation.svg", metadata={"Date": None}, facecolor="white")


if __name__ == "__main__":
    main(sys.argv[1])
