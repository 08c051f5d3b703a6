"""The progress bar of a training run."""

from math import isfinite

from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn


def bars(console):
    """Return progress bars with the share of steps, loss, fill of the memory, pairs in use, and drift."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=6),
        TaskProgressColumn(),
        TextColumn("{task.fields[figures]}"),
        TimeElapsedColumn(),
        console=console,
    )


def shown(training, progress, name):
    """Add a progress bar for a training; return a function to call with the step number after each step."""
    task = progress.add_task(name, total=training.plan.steps, completed=training.step, figures="")

    def show(step):
        if training.curves["figures_steps"][-1:] == [step]:
            progress.update(task, completed=step, figures=_figures(training.now))

    return show


def _figures(now):
    text = f"loss {now['batch_loss'] + now.get('memory_loss', 0):.3f}"
    if "fill" in now:
        moved = isfinite(now["drift_after"])
        drift = f"{now['drift_before']:.3f} to {now['drift_after']:.3f}" if moved else f"{now['drift']:.3f}"
        text += f" fill {now['fill']:4.0%} pairs {now['pairs']:5.0f} drift {drift}"
    return text
