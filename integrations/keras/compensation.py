"""Rounds of drift compensation: the model embeds rows of the memory again."""

from collections.abc import Callable
from typing import Any, TypeAlias

import keras
import numpy as np

from xbm.compensation import Compensation, Rounds
from xbm.compensation.rounds import check_known
from xbm.integrations.keras.graph import compiled, without_a_trace
from xbm.integrations.keras.memory import Memory
from xbm.integrations.keras.selection import Outputs
from xbm.objective import Objective

Data: TypeAlias = Any | Callable[[Any], Any]
"""NumPy arrays, in any structure, whose rows i are sample i; or a function of ids (n,) to a model's inputs."""


class Embedding:
    """Rounds of drift compensation by a model: knows when one is due, and makes it."""

    def __init__(self, objective: Objective, compensation: Compensation, data: Data) -> None:
        self.rounds, self.data = Rounds(compensation.due), data
        self._probes = compiled(compensation.probe)
        self._moved = compiled(objective.move, donated=(0,))
        self._embedded: Any = None  # from a model's variables and inputs to embeddings
        if not callable(data):
            _check(data)

    def begin(self, model: keras.Model, outputs: Outputs) -> None:
        """Embed by a model from now on."""
        mode = {"training": True} if model._call_has_training_arg else {}  # as Keras' own steps pass it

        def embedded(trainable: list[Any], others: list[Any], inputs: Any) -> Any:
            return outputs.of(model.stateless_call(trainable, others, inputs, **mode)[0])

        traced = model.jit_compile and not model.run_eagerly
        self._embedded = compiled(embedded) if traced else embedded

    def due(self, memory: Memory) -> bool:
        """Return whether a round comes before the next training call, and count that call."""
        due = self.rounds.due(lambda: int(keras.ops.convert_to_numpy(memory.step.value)) if memory.begun else 0)
        self.rounds.count()
        return due

    def move(self, memory: Memory, model: keras.Model) -> None:
        """Embed some rows again, without a trace in the model, and move the memory by the map fitted to them."""
        state = memory.state()
        probes = self._probes(state.memory)
        ids = keras.ops.convert_to_numpy(probes.ids)
        known = ids >= 0
        check_known(filled=bool(keras.ops.convert_to_numpy(probes.filled).any()), known=bool(known.any()))
        if not known.any():
            return
        # Known samples stand in for the others, since another shape would be compiled anew.
        inputs = self._inputs(np.where(known, ids, np.resize(ids[known], len(ids))))
        values = [[v.value for v in some] for some in (model.trainable_variables, model.non_trainable_variables)]
        with without_a_trace():
            fresh = self._embedded(*values, inputs)
            if fresh.shape[0] != len(ids):
                raise ValueError(
                    f"data(ids) must return the inputs of the {len(ids)} samples, but the model returned embeddings of "
                    f"shape {tuple(fresh.shape)} for its result"
                )
            memory.keep(state, self._moved(state, probes, fresh, keras.ops.convert_to_tensor(known)))

    def _inputs(self, ids: Any) -> Any:
        if callable(self.data):
            return self.data(ids)
        n = len(keras.tree.flatten(self.data)[0])
        if ids.max() >= n:
            raise ValueError(f"row i of data must be sample i: it has {n} rows, and ids reach {ids.max()}")
        return keras.tree.map_structure(lambda one: one[ids], self.data)


def _check(data: Any) -> None:
    """Raise unless data are NumPy arrays of one length."""
    arrays = keras.tree.flatten(data)
    if not arrays or not all(isinstance(one, np.ndarray) and one.ndim for one in arrays):
        kinds = ", ".join(sorted({type(one).__name__ for one in arrays})) or "nothing"
        raise TypeError(
            f"data must be a NumPy array, a dict, list or tuple of them, or callable as data(ids), got {kinds}"
        )
    if len({len(one) for one in arrays}) > 1:
        raise ValueError(f"data must be arrays of one length, got shapes {[one.shape for one in arrays]}")
