"""Rounds of drift compensation: rows of the memory embedded anew by the model that trains."""

from collections.abc import Callable
from typing import Any, TypeAlias

import keras
import numpy as np

from xbm import backends
from xbm.compensation import Compensation
from xbm.integrations.keras.graph import without_gradient
from xbm.integrations.keras.memory import Memory
from xbm.integrations.keras.selection import Outputs

Data: TypeAlias = Any | Callable[[Any], Any]
"""NumPy arrays, in whatever structure, whose rows i are sample i; or a function of ids (n,) to a model's inputs."""


class Rounds:
    """Knows when a round is due, and what to make it of."""

    def __init__(self, compensation: Compensation, data: Data, *, normalize: bool) -> None:
        self.compensation, self.data, self.normalize = compensation, data, normalize
        self.calls: int | None = None  # training calls before the next one, once read
        if callable(data):
            return
        arrays = keras.tree.flatten(data)
        if not arrays or not all(isinstance(one, np.ndarray) and one.ndim for one in arrays):
            kinds = ", ".join(sorted({type(one).__name__ for one in arrays})) or "nothing"
            raise TypeError(
                f"data must be a NumPy array, a dict, list or tuple of them, or callable as data(ids), got {kinds}"
            )
        if len({len(one) for one in arrays}) > 1:
            raise ValueError(f"data must be arrays of one length, got shapes {[one.shape for one in arrays]}")

    def due(self, memory: Memory) -> bool:
        """Tell whether a round comes before the next training call, and count that call."""
        if self.calls is None:
            self.calls = int(keras.ops.convert_to_numpy(memory.step.value)) if memory.begun else 0
        self.calls += 1
        return self.compensation.due(self.calls - 1)

    def move(self, memory: Memory, model: keras.Model, outputs: Outputs) -> None:
        """Embed some rows anew, and move the memory by what they tell."""
        state, motion = memory.state(), memory.motion()
        xp, _ = backends.of(state.embeddings)
        slots, filled = self.compensation.slots(state)
        ids = keras.ops.convert_to_numpy(xp.take(state.ids, slots))
        filled = keras.ops.convert_to_numpy(filled)
        known = filled & (ids >= 0)
        if known.any():
            # Others stand in for unknown samples: a shape of its own would be compiled anew.
            ids = np.where(known, ids, np.resize(ids[known], len(ids)))
            fresh = self._embedded(ids, model, outputs)
            valid = keras.ops.convert_to_tensor(known)
            moved = self.compensation.move(state, motion, slots, fresh, valid, normalize=self.normalize)
            memory.keep(state, *moved)
        elif filled.any():
            raise ValueError("the memory knows no samples to embed anew: the ids of all its rows are negative")

    def _embedded(self, ids: Any, model: keras.Model, outputs: Outputs) -> Any:
        """Return the embeddings (n, D) of samples, without a trace in the model."""
        inputs = self._inputs(ids)
        with without_gradient(), keras.StatelessScope():
            fresh = outputs.of(model(inputs, training=True))
        if fresh.shape[0] != len(ids):
            raise ValueError(
                f"data(ids) must return the inputs of each of the {len(ids)} samples, of which the model then makes as "
                f"many embeddings, got embeddings of shape {tuple(fresh.shape)}"
            )
        return fresh

    def _inputs(self, ids: Any) -> Any:
        if callable(self.data):
            return self.data(ids)
        n = len(keras.tree.flatten(self.data)[0])
        if ids.max() >= n:
            raise ValueError(f"row i of data must be sample i, but there are {n} rows, and ids up to {ids.max()}")
        return keras.tree.map_structure(lambda one: one[ids], self.data)
