"""What a framework does in a training run: one small file each, with the same names.

`Engine(plan, images)` is a network, its optimiser and the memory, for pictures (n, C, H, W) to train on.
`fit(batches, after)` takes a step for each `Batch`, of which there are `len(batches)`; `after` then gets the loss and
says whether to end there.
`embed` turns pictures into an array (n, D) of any library, `figures` returns the last step's, `memory_bytes` is what
the memory takes. Beside the class, `one_thread()` keeps the framework to one thread of the CPU, and `versions()` names
what it is made of.

To add a framework, write `xbm/experiments/engines/<name>.py` with these, and name it in `plan.FRAMEWORKS`.
"""

from importlib import import_module
from types import ModuleType
from typing import NamedTuple

import numpy as np

from xbm.experiments.errors import InputError


class Batch(NamedTuple):
    """What one training step takes."""

    images: np.ndarray  # (B, channels, height, width) uint8
    labels: np.ndarray  # (B,) int64
    ids: np.ndarray  # (B,) int64, numbers of the pictures
    rate: float  # of learning


def of(framework: str) -> ModuleType:
    """Return the module of a framework.

    Raises
    ------
    InputError
        If a package that it needs is not installed.
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
    """An engine with a loop of its own: `step` takes a batch's parts and returns the loss, a float."""

    def fit(self, batches, after):
        """Train on one batch after another; end where `after(loss)` is true."""
        for batch in batches:
            if after(self.step(*batch)):
                break
