"""Which classes are trained on, which draw the curve, and which are kept for the end."""

import numpy as np

from xbm.experiments.errors import InputError
from xbm.experiments.plan import PARTS

VALIDATION, TEST = 0.1, 0.4  # shares of the classes, or of the groups; the others are trained on
LEAST = 2  # classes of a part: among the pictures of one, retrieval is never wrong


def split(names, *, seed=0, groups=None, by=None):
    """Divide classes at random into those of training, validation and test.

    Parameters
    ----------
    names : sequence of str
        The classes.
    seed : int
        Of the division, and of nothing else: runs that differ in theirs share the test classes.
    groups : (C,) array, optional
        Group of each class; whole groups go to one part.
    by : str, optional
        What the groups are, for the error.

    Returns
    -------
    dict of str to list of str
        Class names of "train", "validation" and "test", each in the order given.

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
        raise InputError(f"{found} are too few to split ({sizes}): each part needs at least {LEAST}")
    return parts
