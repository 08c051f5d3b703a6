"""The framework-specific part of a training run: one module per framework, all with the same interface.

`Engine(plan, images)` holds a network, its optimiser and the memory, for training pictures (n, C, H, W).

- `fit(batches, after)` takes one step per `Batch`; `len(batches)` is their number. After each step it calls
  `after(loss)` and stops if that returns true.
- `embed` maps pictures to an array (n, D) of any library.
- `figures` returns the figures of the last step.
- `memory_bytes` is the size of the memory in bytes.

Next to the class, `one_thread()` limits the framework to one CPU thread, and `versions()` returns the versions of its
packages.

To add a framework, write `xbm/experiments/engines/<name>.py` with these names and add it to `plan.FRAMEWORKS`.
"""

from importlib import import_module
from types import ModuleType
from typing import NamedTuple

import numpy as np

from xbm.experiments.errors import InputError


class Batch(NamedTuple):
    """The input of one training step."""

    images: np.ndarray  # (B, channels, height, width) uint8
    labels: np.ndarray  # (B,) int64
    ids: np.ndarray  # (B,) int64, indices of the pictures
    rate: float  # learning rate


def of(framework: str) -> ModuleType:
    """Return the engine module of a framework.

    Raises
    ------
    InputError
        If a required package is not installed.
    """
    try:
        return import_module(f"{__name__}.{framework}")
    except ModuleNotFoundError as error:
        package, _, _ = (error.name or framework).partition(".")
        extra = "demo" if framework == "torch" else f"demo-{framework}"
        raise InputError(
            f"--framework {framework} needs the package {package}, which is not installed: pip install xbm[{extra}]"
        ) from error


class Stepwise:
    """Base of the engines with their own training loop: `step(*batch)` returns the loss as a float."""

    def fit(self, batches, after):
        """Train on one batch after another; stop when `after(loss)` returns true."""
        for batch in batches:
            if after(self.step(*batch)):
                break
