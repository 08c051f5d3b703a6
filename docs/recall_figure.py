"""Draw `docs/images/recall.svg` and print the table beside it: the demo on three seeds (about 6 minutes)."""

from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure

from xbm.experiments import glyphs
from xbm.experiments.charts import PALETTE
from xbm.experiments.demo import one_run, plans
from xbm.experiments.plan import Plan

SEEDS = (0, 1, 2)


def main():
    """Make the demo's runs on every seed; draw each thin and their mean thick."""
    torch.set_num_threads(1)
    data = glyphs.split(glyphs.load())
    matplotlib.rcParams |= {"svg.hashsalt": "recall", "svg.fonttype": "none", "font.size": 11}
    figure = Figure((8.4, 3.2), layout="constrained")
    axes = figure.subplots()
    for kind, above in enumerate((-4, -9, 2)):  # points: the two best end close together
        colour = PALETTE[f"run-{kind + 1}"][0]
        runs = [one_run(plans(Plan(seed=seed))[kind], *data) for seed in SEEDS]
        for run in runs:
            axes.plot(run.recall_steps, run.recall, color=colour, alpha=0.3, linewidth=1)
            print(f"{run.name}: R@1 {run.recall_at_1:.3f}, MAP@R {run.map_at_r:.3f}, {run.seconds:.1f} s", flush=True)
        mean = np.mean([run.recall for run in runs], axis=0)
        axes.plot(runs[0].recall_steps, mean, color=colour, linewidth=2.2)
        name, place = f"{runs[0].name}: {mean[-1]:.3f}", (Plan.steps, mean[-1])
        axes.annotate(name, place, (6, above), color=colour, textcoords="offset points", annotation_clip=False)
    axes.axvline(Plan.warmup, color=PALETTE["muted"][0], linewidth=0.8)
    axes.annotate("memory on", (Plan.warmup, 1), (4, -12), ("data", "axes fraction"), "offset points",
                  color=PALETTE["muted"][0])  # fmt: skip
    axes.set(xlabel="step", ylabel="R@1 on unseen classes", xlim=(0, Plan.steps))
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(Path(__file__).parent / "images" / "recall.svg", metadata={"Date": None}, facecolor="white")


if __name__ == "__main__":
    main()
