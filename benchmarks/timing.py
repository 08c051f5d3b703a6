"""Comparable timings: every contender runs in every round, on the same inputs."""

import gc
from statistics import median
from time import perf_counter
from typing import NamedTuple


class Times(NamedTuple):
    """Durations of a contender's calls."""

    fastest: float  # seconds
    median: float  # seconds

    def times(self, unit):
        """Return the fastest and the median as multiples of those of another contender."""
        return Times(self.fastest / unit.fastest, self.median / unit.median)


def interleaved(contenders, inputs, *, rounds, wait):
    """Time contenders in turns, so that a slow phase of the machine affects all of them.

    Parameters
    ----------
    contenders : dict of str to callable
        Contenders by name. They must be warmed up already.
    inputs : callable
        Maps the number of a round, from 0, to the arguments of every contender in this round.
    rounds : int
        At least 1. Each round starts with a different contender.
    wait : callable
        Waits until the device has finished all queued work.

    Returns
    -------
    dict of str to Times
    """
    names = list(contenders)
    seconds = {name: [] for name in names}
    gc.collect()
    gc.disable()  # a collection would distort the time of one contender
    try:
        for number in range(rounds):
            arguments, first = inputs(number), number % len(names)
            for name in names[first:] + names[:first]:
                seconds[name].append(clocked(contenders[name], arguments, wait=wait))
    finally:
        gc.enable()
    return {name: Times(min(calls), median(calls)) for name, calls in seconds.items()}


def clocked(contender, arguments, *, wait):
    """Return the duration of one call in seconds."""
    wait()
    begin = perf_counter()
    contender(*arguments)
    wait()
    return perf_counter() - begin
