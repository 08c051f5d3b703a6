"""The random split of the classes into training, validation and test classes."""

import numpy as np

from xbm.experiments.errors import InputError
from xbm.experiments.plan import PARTS

VALIDATION, TEST = 0.1, 0.4  # shares of the classes or groups; the rest is for training
LEAST = 2  # minimum number of classes in a part: with one class, every retrieval is correct


def split(names, *, seed=0, groups=None, by=None):
    """Split classes at random into training, validation and test classes.

    Parameters
    ----------
    names : sequence of str
        Names of the C classes.
    seed : int
        Seed of the split. It is separate from a run's seed, so that runs with different seeds share the test classes.
    groups : (C,) array, optional
        Group of each class. All classes of a group go to the same part.
    by : str, optional
        Name of the groups, for the error message.

    Returns
    -------
    dict of str to list of str
        Class names of "train", "validation" and "test", each in the order of `names`.

    Raises
    ------
    InputError
        If a part would have fewer than two classes.
    """
    unit = np.arange(len(names)) if groups is None else np.unique(groups, return_inverse=True)[1]
    count = unit.max() + 1
    least = LEAST if groups is None else 1
    validation, test = (max(least, round(share * count)) for share in (VALIDATION, TEST))
    ends = np.cumsum([max(count - validation - test, 0), validation, test])
    place = np.random.default_rng(seed).permutation(count)[unit]
    part = np.searchsorted(ends, place, side="right")
    parts = {which: [name for name, p in zip(names, part, strict=True) if p == i] for i, which in enumerate(PARTS)}
    if min(map(len, parts.values())) < LEAST:
        found = f"{len(names)} classes" + ("" if groups is None else f" in {count} groups of {by}")
        sizes = ", ".join(f"{len(classes)} for {which}" for which, classes in parts.items())
        raise InputError(f"{found} are too few to split: each part needs at least {LEAST} classes, got {sizes}")
    return parts
