"""All that a training run remembers between two calls, as one pytree."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from xbm.backends import Array
from xbm.compensation.motion import Motion
from xbm.memory_state import MemoryState
from xbm.schedule import WarmUp


class State(NamedTuple):
    """State of an `Objective`: made by its `init`, and returned by each `step`."""

    memory: MemoryState  #: the rows
    warmup: WarmUp | None = None  #: only with `settle`
    motion: Motion | None = None  #: only with `compensate`


PARTS: dict[str, Any] = {"": MemoryState, "warmup_": WarmUp, "motion_": Motion}
"""The parts of a `State` in its order, by the prefix of their names in `named`."""

NAMES = tuple(f"{prefix}{name}" for prefix, kind in PARTS.items() for name in kind._fields)
"""All names that `named` can give, in its order."""


def named(state: State) -> dict[str, Array]:
    """Return the arrays of a state by name: `embeddings`, `labels`, ..., `warmup_drift`, ..., `motion_shift`, ..."""
    return {
        f"{prefix}{name}": value
        for prefix, part in zip(PARTS, state, strict=True)
        if part is not None
        for name, value in part._asdict().items()
    }


def from_named(values: Mapping[str, Array]) -> State:
    """Return the state with these arrays; a part that has none of its arrays, or not all of them, is None."""
    parts: list[Any] = []
    for prefix, kind in PARTS.items():
        names = [f"{prefix}{name}" for name in kind._fields]
        parts.append(kind(*(values[name] for name in names)) if all(name in values for name in names) else None)
    return State(*parts)
