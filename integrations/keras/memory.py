"""The state of an objective as Keras variables: how it begins, is read, kept and saved. No mathematics."""

from collections.abc import Mapping
from typing import Any

import keras
import ml_dtypes
import numpy as np

from xbm import backends, checks, memory
from xbm.integers import fits as within
from xbm.memory_state import MemoryState, Rows, inconsistency
from xbm.objective import Objective
from xbm.state import NAMES, State, from_named, named


class Memory:
    """Holds the `State` of an objective in variables named as by `xbm.state.named`: part of a layer or a metric."""

    embeddings: keras.Variable
    labels: keras.Variable
    ids: keras.Variable
    stored_at: keras.Variable
    cursor: keras.Variable
    count: keras.Variable
    step: keras.Variable
    skipped: keras.Variable

    objective: Objective
    capacity: int
    row_dtype: str

    @property
    def begun(self) -> bool:
        """Whether the variables exist, which takes the embeddings' size."""
        return getattr(self, "embeddings", None) is not None

    @property
    def lost(self) -> bool:
        """Whether the values are gone: an eager step of JAX that fails has already donated them."""
        return self.begun and any(getattr(value, "is_deleted", bool)() for value in self._values().values())

    @property
    def dim(self) -> int | None:
        """D, the embeddings' size; None before the memory has begun."""
        return self.embeddings.shape[1] if self.begun else None

    def begin(self, dim: int) -> None:
        """Make the variables of an empty memory."""
        for name, values in named(self.objective.init(capacity=self.capacity, dim=dim)).items():

            def initial(shape: tuple[int, ...], dtype: str, values: Any = values) -> Any:
                return keras.ops.convert_to_tensor(values, dtype=dtype)

            floating = self.row_dtype if name == "embeddings" else "float32"
            dtype = integer_dtype() if np.issubdtype(values.dtype, np.integer) else floating
            # Not by `add_weight`: its synchronisation mode makes TensorFlow refuse a scatter.
            variable = keras.Variable(
                initial, shape=values.shape, dtype=dtype, trainable=False, autocast=False, name=name
            )
            setattr(self, name, variable)

    def rows(self) -> Rows:
        """Return the filled rows as NumPy arrays, oldest first: `embeddings` (n, D), `labels`, `ids`, `stored_at`."""
        return memory.rows(self._to_numpy().memory)

    def clear(self) -> None:
        """Empty the memory and reset its motion. Steps and skipped rows keep their counts, and so does the warm-up."""
        self._assign(self.objective.clear(self._to_numpy()))

    def state(self) -> State:
        """Return the variables' values."""
        return from_named(self._values())

    def keep(self, before: State, after: State) -> None:
        """Assign the values that the step from `before` to `after` did not write in place."""
        old = named(before)
        for name, new in named(after).items():
            if new is not old[name]:
                getattr(self, name).assign(new)

    def save_own_variables(self, store: Any) -> None:
        """Save the state, unless the memory has not begun."""
        if self.begun:
            for name, values in named(self._to_numpy()).items():
                store[name] = values

    def load_own_variables(self, store: Mapping[str, Any]) -> None:
        """Load a memory of any capacity, its newest rows. A part that was not saved begins anew."""
        names = set(store.keys()) if store is not None else set()
        missing = sorted(set(MemoryState._fields) - names)
        if missing and len(missing) < len(MemoryState._fields):
            raise ValueError(f"The memory is unchanged. The saved one has no {', '.join(missing)}")
        if not missing:
            self._assign(self._fitted(from_named({name: _widened(np.array(store[name])) for name in names})))
        elif self.begun:
            self._assign(self.objective.init(capacity=self.capacity, dim=self.embeddings.shape[1]))

    def _values(self) -> dict[str, Any]:
        """Return the variables' values by name."""
        return {name: getattr(self, name).value for name in NAMES if hasattr(self, name)}

    def _assign(self, state: State) -> None:
        """Set all variables, which begin here if they do not exist."""
        if not self.begun:
            self.begin(state.memory.embeddings.shape[1])
        for name, value in named(state).items():
            getattr(self, name).assign(value)

    def _to_numpy(self) -> State:
        return from_named({name: _widened(keras.ops.convert_to_numpy(value)) for name, value in self._values().items()})

    def _fitted(self, saved: State) -> State:
        """Return a saved state in this memory's capacity; raise a ValueError if it does not fit."""
        problem = inconsistency(saved.memory)
        if problem is None and self.begun and saved.memory.embeddings.shape[1] != self.dim:
            problem = f"it holds rows of {saved.memory.embeddings.shape[1]} dimensions, this one of {self.dim}"
        if problem is None:
            fitted = saved.memory
            if fitted.labels.shape[0] != self.capacity:
                fitted = memory.resize(fitted, self.capacity)
            with np.errstate(over="ignore"):
                rows = fitted.embeddings.astype(_numpy_dtype(self.row_dtype)).astype(fitted.embeddings.dtype)
            if not np.isfinite(rows).all():
                problem = f"some of its rows are not finite in {self.row_dtype}"
            elif any(not fits(values) for values in fitted[1:]):
                problem = f"some of its labels or ids do not fit {integer_dtype()}"
        if problem:
            raise ValueError(f"The memory is unchanged. The saved one cannot be loaded: {problem}")
        fresh = self.objective.begin(fitted)
        others: list[Any] = [
            mine if theirs is None or not _alike(mine, theirs) else theirs
            for mine, theirs in zip(fresh[1:], saved[1:], strict=True)
        ]
        return State(fitted, *others)


def _alike(mine: Any, theirs: Any) -> bool:
    """Return whether a saved part of a state has the shapes of this memory's part, which can be None."""
    return mine is not None and all(a.shape == b.shape for a, b in zip(mine, theirs, strict=True))


def integer_dtype() -> str:
    """Return the dtype of labels, ids and counters: int64, but int32 on JAX unless `jax_enable_x64` is on."""
    xp, ops = backends.of(keras.ops.zeros((), "int32"))
    return keras.backend.standardize_dtype(ops.integer_dtype(xp))


def row_dtype(dtype: Any) -> str:
    """Return the name of a dtype of rows, or raise if rows cannot have it."""
    name = keras.backend.standardize_dtype(dtype)
    checks.choice("dtype", name, checks.FLOATS)
    if keras.backend.standardize_dtype(keras.ops.zeros((), name).dtype) != name:
        raise ValueError(f'dtype="{name}" needs jax_enable_x64: without it, JAX uses float32')
    return name


def fits(integers: Any) -> bool:
    """Return whether NumPy integers fit the dtype of labels and ids."""
    return not np.issubdtype(integers.dtype, np.integer) or within(integers, np.iinfo(integer_dtype()))


def _widened(values: Any) -> Any:
    """Return NumPy values in a dtype of NumPy's own: bfloat16 as float32."""
    return values.astype(np.float32) if values.dtype == ml_dtypes.bfloat16 else values


def _numpy_dtype(name: str) -> Any:
    return ml_dtypes.bfloat16 if name == "bfloat16" else np.dtype(name)
