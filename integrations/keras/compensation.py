"""Rounds of drift compensation: rows of the memory embedded anew by the model that trains."""

from collections.abc import Callable
from functools import partial
from typing import Any, TypeAlias

import keras
import numpy as np

from xbm import backends
from xbm.backends import Array
from xbm.compensation import Compensation
from xbm.integrations.keras.graph import compiled, without_a_trace
from xbm.integrations.keras.memory import Memory
from xbm.integrations.keras.selection import Outputs
from xbm.memory import MemoryState

Data: TypeAlias = Any | Callable[[Any], Any]
"""NumPy arrays, in whatever structure, whose rows i are sample i; or a function of ids (n,) to a model's inputs."""


class Rounds:
    """Tells when a round is due, and makes it."""

    def __init__(self, compensation: Compensation, data: Data, *, normalize: bool) -> None:
        self.due_at, self.data = compensation.due, data
        self.calls: int | None = None  # training calls so far, once read
        self._asked = compiled(partial(_asked, compensation))
        self._moved = compiled(partial(compensation.move, normalize=normalize), donated=(0,))
        self._embedded: Any = None  # from a model's variables and inputs to embeddings
        if not callable(data):
            _check(data)

    def begin(self, model: keras.Model, outputs: Outputs) -> None:
        """Embed by a model from now on."""
        told = {"training": True} if model._call_has_training_arg else {}  # as Keras' own steps ask

        def embedded(trainable: list[Any], others: list[Any], inputs: Any) -> Any:
            return outputs.of(model.stateless_call(trainable, others, inputs, **told)[0])

        traced = model.jit_compile and not model.run_eagerly
        self._embedded = compiled(embedded) if traced else embedded

    def due(self, memory: Memory) -> bool:
        """Tell whether a round comes before the next training call, and count that call."""
        if self.calls is None:
            self.calls = int(keras.ops.convert_to_numpy(memory.step.value)) if memory.begun else 0
        self.calls += 1
        return self.due_at(self.calls - 1)

    def move(self, memory: Memory, model: keras.Model) -> None:
        """Embed some rows anew, without a trace in the model, and move the memory by what they tell."""
        state = memory.state()
        slots, filled, ids = self._asked(state)
        filled, ids = keras.ops.convert_to_numpy(filled), keras.ops.convert_to_numpy(ids)
        known = filled & (ids >= 0)
        if not known.any():
            if filled.any():
                raise ValueError("the memory knows no samples to embed anew: all ids asked for are negative")
            return
        # Known samples stand in for the others: another shape would be compiled anew.
        inputs = self._inputs(np.where(known, ids, np.resize(ids[known], len(ids))))
        values = [[v.value for v in some] for some in (model.trainable_variables, model.non_trainable_variables)]
        with without_a_trace():
            fresh = self._embedded(*values, inputs)
            if fresh.shape[0] != len(ids):
                raise ValueError(
                    f"data(ids) must return the inputs of the {len(ids)} samples, and the model made embeddings of "
                    f"shape {tuple(fresh.shape)} of what it returned"
                )
            valid = keras.ops.convert_to_tensor(known)
            memory.keep(state, *self._moved(state, memory.motion(), slots, fresh, valid))

    def _inputs(self, ids: Any) -> Any:
        if callable(self.data):
            return self.data(ids)
        n = len(keras.tree.flatten(self.data)[0])
        if ids.max() >= n:
            raise ValueError(f"row i of data must be sample i: it has {n} rows, and ids reach {ids.max()}")
        return keras.tree.map_structure(lambda one: one[ids], self.data)


def _asked(compensation: Compensation, state: MemoryState) -> tuple[Array, Array, Array]:
    """Return the slots (p,) to embed anew, which of them are filled, and their ids."""
    xp, _ = backends.of(state.embeddings)
    slots, filled = compensation.slots(state)
    return slots, filled, xp.take(state.ids, slots)


def _check(data: Any) -> None:
    """Refuse what are no arrays of samples."""
    arrays = keras.tree.flatten(data)
    if not arrays or not all(isinstance(one, np.ndarray) and one.ndim for one in arrays):
        kinds = ", ".join(sorted({type(one).__name__ for one in arrays})) or "nothing"
        raise TypeError(
            f"data must be a NumPy array, a dict, list or tuple of them, or callable as data(ids), got {kinds}"
        )
    if len({len(one) for one in arrays}) > 1:
        raise ValueError(f"data must be arrays of one length, got shapes {[one.shape for one in arrays]}")
