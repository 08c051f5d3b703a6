"""The memory as Keras variables: how it begins, is read, kept and saved. No mathematics."""

from collections.abc import Mapping
from typing import Any

import keras
import ml_dtypes
import numpy as np

from xbm import backends, checks, compensation, memory
from xbm.compensation import Motion
from xbm.integers import fits as within
from xbm.memory import MemoryState, Rows


class Memory:
    """Holds a `MemoryState` in variables of the fields' names: a part of a layer or of a metric, which track them.

    Where it moves, its `Motion` is in variables beside them: `motion_shift`, ...
    """

    embeddings: keras.Variable
    labels: keras.Variable
    ids: keras.Variable
    stored_at: keras.Variable
    cursor: keras.Variable
    count: keras.Variable
    step: keras.Variable
    skipped: keras.Variable

    capacity: int
    row_dtype: str
    moves: bool

    @property
    def begun(self) -> bool:
        """Whether the variables are there: until the embeddings' size is known they are not."""
        return getattr(self, "embeddings", None) is not None

    @property
    def lost(self) -> bool:
        """Whether the values are gone: an eager step of JAX's that fails has already given them away."""
        return self.begun and any(getattr(value, "is_deleted", bool)() for value in self.state())

    @property
    def dim(self) -> int | None:
        """D, the embeddings' size; None before the memory has begun."""
        return self.embeddings.shape[1] if self.begun else None

    def begin(self, dim: int) -> None:
        """Make the variables of an empty memory."""
        state = memory.init(capacity=self.capacity, dim=dim)
        for name, values in (state._asdict() | self._named(compensation.init(state))).items():

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
        """Return the filled rows, oldest first: `embeddings` (n, D), `labels`, `ids`, `stored_at` (n,), of NumPy."""
        return memory.rows(self._to_numpy())

    def clear(self) -> None:
        """Empty the memory, which is then still. Steps and skipped rows count on: a warm-up that is over stays over."""
        state, motion = memory.clear(self._to_numpy()), self.motion()
        self._assign(state, motion and compensation.clear(state, motion))

    def state(self) -> MemoryState:
        """Return the variables' values."""
        return MemoryState(*(getattr(self, name).value for name in MemoryState._fields))

    def motion(self) -> Motion | None:
        """Return how the memory moves; None if it does not."""
        if not self.moves:
            return None
        return Motion(*(getattr(self, f"motion_{name}").value for name in Motion._fields))

    def keep(self, before: MemoryState, after: MemoryState, motion: Motion | None = None) -> None:
        """Assign what the step from `before` to `after` did not write in place, and the motion after it."""
        for name, old, new in zip(MemoryState._fields, before, after, strict=True):
            if new is not old:
                getattr(self, name).assign(new)
        if motion is not None:
            self._assign_all(self._named(motion))

    def save_own_variables(self, store: Any) -> None:
        """Save the memory, unless it has not begun."""
        if self.begun:
            motion = {name: keras.ops.convert_to_numpy(value) for name, value in self._named(self.motion()).items()}
            for name, values in (self._to_numpy()._asdict() | motion).items():
                store[name] = values

    def load_own_variables(self, store: Mapping[str, Any]) -> None:
        """Take a memory of any capacity, its newest rows, and its motion; a file without either begins it anew."""
        names = set(store.keys()) if store is not None else set()
        missing = sorted(set(MemoryState._fields) - names)
        if missing and len(missing) < len(MemoryState._fields):
            raise ValueError(f"The saved memory has no {', '.join(missing)}, the one here is left as it is")
        if not missing:
            saved = MemoryState(*(_widened(np.array(store[name])) for name in MemoryState._fields))
            self._assign(self._fitted(saved), _motion_in(store, saved.embeddings.shape[1]))
        elif self.begun:
            self._assign(memory.init(capacity=self.capacity, dim=self.embeddings.shape[1]))

    def _assign(self, state: MemoryState, motion: Motion | None = None) -> None:
        """Begin anew with these rows, and this motion if it is known."""
        if not self.begun:
            self.begin(state.embeddings.shape[1])
        self._assign_all(state._asdict() | self._named(motion or compensation.init(state)))

    def _assign_all(self, values: Mapping[str, Any]) -> None:
        for name, value in values.items():
            getattr(self, name).assign(value)

    def _named(self, motion: Motion | None) -> dict[str, Any]:
        """Return a motion by its variables' names; nothing of it where the memory does not move."""
        if motion is None or not self.moves:
            return {}
        return {f"motion_{name}": value for name, value in motion._asdict().items()}

    def _to_numpy(self) -> MemoryState:
        return MemoryState(*(_widened(keras.ops.convert_to_numpy(value)) for value in self.state()))

    def _fitted(self, saved: MemoryState) -> MemoryState:
        """Return a saved memory in this one's capacity, or raise a ValueError that says why not."""
        problem = memory.inconsistency(saved)
        if problem is None and self.begun and saved.embeddings.shape[1] != self.dim:
            problem = f"it holds rows of {saved.embeddings.shape[1]} dimensions, this one of {self.dim}"
        if problem is None:
            fitted = saved if saved.labels.shape[0] == self.capacity else memory.resize(saved, self.capacity)
            with np.errstate(over="ignore"):
                rows = fitted.embeddings.astype(_numpy_dtype(self.row_dtype)).astype(fitted.embeddings.dtype)
            if not np.isfinite(rows).all():
                problem = f"some of its rows are not finite in {self.row_dtype}"
            elif any(not fits(values) for values in fitted[1:]):
                problem = f"some of its labels or ids do not fit {integer_dtype()}"
        if problem:
            raise ValueError(f"The memory was left as it is. The saved one cannot be loaded: {problem}")
        return fitted


def _motion_in(store: Mapping[str, Any], dim: int) -> Motion | None:
    """Return the motion in a file; None where there is none of rows of this size."""
    found = {name: np.array(store[f"motion_{name}"]) for name in Motion._fields if f"motion_{name}" in store}
    whole = len(found) == len(Motion._fields) and found["shift"].shape == (dim,)
    return Motion(**found) if whole else None


def integer_dtype() -> str:
    """Return the dtype of labels, ids and counters: int64, on JAX int32 unless `jax_enable_x64` is on."""
    xp, ops = backends.of(keras.ops.zeros((), "int32"))
    return keras.backend.standardize_dtype(ops.integer_dtype(xp))


def row_dtype(dtype: Any) -> str:
    """Return the name of a dtype that rows may have, or refuse it."""
    name = keras.backend.standardize_dtype(dtype)
    checks.choice("dtype", name, checks.FLOATS)
    if keras.backend.standardize_dtype(keras.ops.zeros((), name).dtype) != name:
        raise ValueError(f'dtype="{name}" needs jax_enable_x64, without which JAX makes it float32')
    return name


def fits(integers: Any) -> bool:
    """Tell whether NumPy integers fit the dtype of labels and ids."""
    return not np.issubdtype(integers.dtype, np.integer) or within(integers, np.iinfo(integer_dtype()))


def _widened(values: Any) -> Any:
    """Return NumPy values in a dtype that NumPy has a name for."""
    return values.astype(np.float32) if values.dtype == ml_dtypes.bfloat16 else values


def _numpy_dtype(name: str) -> Any:
    return ml_dtypes.bfloat16 if name == "bfloat16" else np.dtype(name)
