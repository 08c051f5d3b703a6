"""Rounds of drift compensation, on the host: when one is due, and which samples it needs embeddings of."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from xbm.backends import Array


class Probes(NamedTuple):
    """Memory rows to embed again (p = number of probes)."""

    slots: Array  #: (p,) integer, slots of the rows, all different
    filled: Array  #: (p,) bool, whether the slot holds a row
    ids: Array  #: (p,) integer, sample of each row; negative = unknown


class Rounds:
    """Counts training calls on the host, so that the device is read once and not at every call.

    Parameters
    ----------
    due : callable
        From the number of calls so far to whether a round comes before the next: `Compensation.due`.
    """

    def __init__(self, due: Callable[[int], bool]) -> None:
        self._due = due
        self._calls: int | None = None

    def due(self, read_step: Callable[[], int]) -> bool:
        """Return whether a round comes before the next training call; `read_step` reads the calls made so far."""
        if self._calls is None:
            self._calls = read_step()
        return self._due(self._calls)

    def count(self) -> None:
        """Count one training call."""
        if self._calls is not None:
            self._calls += 1

    def forget(self) -> None:
        """Forget the count, as after another state was loaded: it is read anew."""
        self._calls = None


def check_known(*, filled: bool, known: bool) -> None:
    """Raise a ValueError if none of the filled slots asked for holds a row with an id."""
    if filled and not known:
        raise ValueError(
            "Compensation(probes=...) embeds samples again by their ids, and the memory rows have none: pass the ids "
            "of each batch, or compensate without probes"
        )
