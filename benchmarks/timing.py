"""Times that bear comparing: every contender in every round, on the same inputs."""

import gc
from statistics import median
from time import perf_counter
from typing import NamedTuple


class Times(NamedTuple):
    """Of a contender's calls."""

    fastest: float  # seconds
    median: float  # seconds

    def times(self, unit):
        """Return fastest and median as multiples of another contender's."""
        return Times(self.fastest / unit.fastest, self.median / unit.median)


def interleaved(contenders, inputs, *, rounds, wait):
    """Time contenders in turns, so that a slow minute of the machine meets all of them.

    Parameters
    ----------
    contenders : dict of str to callable
        By name; each has run before, so nothing is set up for the first time here.
    inputs : callable
        Number of a round, from 0, to the arguments that every contender gets in it.
    rounds : int
        At least 1. Each begins with another contender.
    wait : callable
        Returns when the device has done what it was given.

    Returns
    -------
    dict of str to Times
    """
    names = list(contenders)
    seconds = {name: [] for name in names}
    gc.collect()
    gc.disable()  # a collection would be charged to whoever runs then
    try:
        for number in range(rounds):
            arguments, first = inputs(number), number % len(names)
            for name in names[first:] + names[:first]:
                seconds[name].append(clocked(contenders[name], arguments, wait=wait))
    finally:
        gc.enable()
    return {name: Times(min(calls), median(calls)) for name, calls in seconds.items()}


def clocked(contender, arguments, *, wait):
    """Return the seconds of one call."""
    wait()
    begin = perf_counter()
    contender(*arguments)
    wait()
    return perf_counter() - begin
