"""The memory: a first-in-first-out ring of embeddings, labels, ids and steps, as a pure state machine.

Every transition takes a `MemoryState` and returns the next one. It *consumes* its argument, like a donated buffer: rows
are written in place if the library can, so only the returned state may be used afterwards. If an input raises an error,
the state is unchanged.
"""

from __future__ import annotations

from typing import Any, Literal

import array_api_compat.numpy as numpy_namespace

from xbm import backends, checks
from xbm.backends import Array, Namespace, device_of
from xbm.integers import at_most
from xbm.memory_state import MemoryState, Rows, class_of_slot
from xbm.placing import Placement, place
from xbm.ranks import Shard


def init(*, capacity: int, dim: int, dtype: Any = None, device: Any = None, xp: Namespace | None = None) -> MemoryState:
    """Return an empty memory.

    Parameters
    ----------
    capacity : int
        M, the most rows it holds, at least 1.
    dim : int
        D, the embeddings' size, at least 1.
    dtype : dtype of `xp`, optional
        Dtype of the stored rows: float32 (default), bfloat16, float16 or float64.
    device : device of `xp`, optional
        Device of the memory; the library's default if left out.
    xp : namespace, optional
        The array library; NumPy if left out.

    Raises
    ------
    TypeError, ValueError
        If a size is not an int of at least 1, or the dtype is not one of the four.

    Examples
    --------
    >>> import xbm
    >>> state = xbm.init(capacity=4, dim=2)
    >>> state.embeddings.shape, int(state.count)
    ((4, 2), 0)
    """
    checks.whole_number("capacity", capacity, at_least=1)
    checks.whole_number("dim", dim, at_least=1)
    xp = numpy_namespace if xp is None else xp
    dtype = xp.float32 if dtype is None else dtype
    if isinstance(dtype, str) or dtype not in checks.floats(xp):  # TensorFlow's equal their names
        names = ", ".join(f"{backends.library(xp)}'s {checks.dtype_name(one)}" for one in checks.floats(xp))
        got = repr(dtype) if isinstance(dtype, str) else checks.dtype_name(dtype)
        raise TypeError(f"dtype must be one of {names} (the dtype itself, not its name), got {got}")

    integer = backends.operations(xp).integer_dtype(xp)

    def scalar() -> Array:
        return xp.zeros((), dtype=integer, device=device)

    return MemoryState(
        embeddings=xp.zeros((capacity, dim), dtype=dtype, device=device),
        labels=xp.zeros((capacity,), dtype=integer, device=device),
        ids=xp.full((capacity,), -1, dtype=integer, device=device),
        stored_at=xp.full((capacity,), -1, dtype=integer, device=device),
        cursor=scalar(),
        count=scalar(),
        step=scalar(),
        skipped=scalar(),
    )


def enqueue(
    state: MemoryState,
    embeddings: Array,
    labels: Array,
    *,
    ids: Array | None = None,
    mask: Array | None = None,
    copies: Literal["keep", "replace"] = "keep",
    on_nonfinite: Literal["skip", "raise"] = "skip",
    age: int = 0,
) -> MemoryState:
    """Append a batch, dropping the oldest rows when full, exactly as `collections.deque(maxlen=M)` does.

    A batch can have any size: 0, 1, M, or more than M (the newest M rows stay). Rows are stored detached, cast to the
    memory's dtype, with the current step.

    With `copies="replace"`, a memory that began empty holds one row for each id, the newest. Of the rows with one id in
    a batch, only the last is stored. A row whose id is in the memory is written into that slot, which keeps its place
    in the ring. The other rows are appended. Appending drops the oldest rows, even one that the same batch renewed.

    Parameters
    ----------
    state : MemoryState
        Consumed: use only the returned state.
    embeddings : (B, D) floating point
        Stored as given. Normalise them first for cosine similarities.
    labels : (B,) integer
        Class of each row.
    ids : (B,) integer, optional
        Sample of each row, >= 0; negative = none.
    mask : (B,) bool, optional
        Rows to store. A row where it is False changes nothing.
    copies : {"keep", "replace"}
        Whether to keep all rows of one id, or only the newest.
    on_nonfinite : {"skip", "raise"}
        How to treat rows with NaN or infinity, also after the cast to the memory's dtype: leave them out and count
        them in `skipped`, or raise an error (which synchronises the device, and cannot be compiled).
    age : int
        Training calls since the rows were current. With 1, they are older than the rows of the next call.

    Returns
    -------
    MemoryState

    Raises
    ------
    TypeError, ValueError
        On float labels, another D, length, library or device, and with `on_nonfinite="raise"` on non-finite rows. The
        state is then unchanged.

    Examples
    --------
    >>> import numpy as np, xbm
    >>> state = xbm.init(capacity=3, dim=1)
    >>> for label in range(5):
    ...     state = xbm.enqueue(state, np.ones((1, 1), np.float32), np.asarray([label]))
    >>> xbm.rows(state).labels
    array([2, 3, 4])
    >>> state = xbm.init(capacity=3, dim=1)
    >>> for sample in (7, 8, 7):
    ...     one = np.asarray([sample])
    ...     state = xbm.enqueue(state, np.ones((1, 1), np.float32), one, ids=one, copies="replace")
    >>> xbm.rows(state).ids
    array([7, 8])
    """
    checks.embeddings("embeddings", embeddings, state.embeddings)
    checks.integers("labels", labels, embeddings, state.embeddings)
    if ids is not None:
        checks.integers("ids", ids, embeddings, state.embeddings)
    if mask is not None:
        checks.mask("mask", mask, embeddings, state.embeddings)
    checks.choice("copies", copies, ("keep", "replace"))
    checks.whole_number("age", age, at_least=0)
    keep, bad = storable(state, embeddings, mask=mask, on_nonfinite=on_nonfinite)
    if ids is not None:
        xp, _ = backends.of(state.embeddings)
        ids = xp.clip(xp.astype(ids, state.ids.dtype, copy=False), min=-1)
    placement = place(state, keep, replace=ids if copies == "replace" else None)
    return write(state, embeddings, labels, ids, keep, bad, placement, age=age)


def storable(
    state: MemoryState,
    embeddings: Array,
    *,
    mask: Array | None = None,
    on_nonfinite: Literal["skip", "raise"] = "skip",
) -> tuple[Array, Array]:
    """Return `(keep, bad)`, each (B,) bool: the rows to store, and the rows left out because they are not finite."""
    checks.choice("on_nonfinite", on_nonfinite, ("skip", "raise"))
    xp, ops = backends.of(state.embeddings)
    largest = min(float(xp.finfo(dtype).max) for dtype in (embeddings.dtype, state.embeddings.dtype))
    finite = xp.all(xp.abs(embeddings) <= largest, axis=1)
    asked = xp.ones_like(finite) if mask is None else mask
    bad = asked & ~finite
    if on_nonfinite == "raise":
        if ops.is_compiling(embeddings):
            raise RuntimeError('on_nonfinite="raise" reads values, which is impossible under a compiler: use "skip"')
        if xp.any(bad):
            n, dtype = int(xp.count_nonzero(bad)), checks.dtype_name(state.embeddings.dtype)
            raise ValueError(
                f"{n} of the embeddings {tuple(embeddings.shape)} are not finite in the memory's {dtype}; "
                f"nothing was stored"
            )
    return asked & finite, bad


def write(
    state: MemoryState,
    embeddings: Array,
    labels: Array,
    ids: Array | None,
    keep: Array,
    bad: Array,
    placement: Placement,
    *,
    age: int = 0,
) -> MemoryState:
    """Store the rows where `keep` is True in their places, and count the rows where `bad` is. Nothing is checked."""
    xp, ops = backends.of(state.embeddings)
    integer = state.cursor.dtype
    source, slots, valid, appended, capacity, _ = placement

    def put(array: Array, new: Array) -> Array:
        new = xp.take(xp.astype(new, array.dtype, copy=False), source, axis=0)
        old = xp.take(array, slots, axis=0)
        return ops.write_rows(array, slots, xp.where(valid if len(array.shape) == 1 else valid[:, None], new, old))

    finite = xp.where(keep[:, None], ops.stop_gradient(embeddings), 0.0)
    none = xp.full_like(keep, -1, dtype=integer)
    return MemoryState(
        embeddings=put(state.embeddings, finite),
        labels=put(state.labels, labels),
        ids=put(state.ids, none if ids is None else ids),
        stored_at=put(state.stored_at, xp.zeros_like(none) + state.step - age),
        cursor=xp.asarray(xp.remainder(state.cursor + appended, capacity)),
        count=xp.asarray(at_most(state.count + appended, capacity)),
        step=state.step,
        skipped=xp.asarray(state.skipped + xp.sum(xp.astype(bad, integer))),
    )


def advance(state: MemoryState) -> MemoryState:
    """Return the state with one more training call counted."""
    xp, _ = backends.of(state.embeddings)
    return state._replace(step=xp.asarray(state.step + 1))


def clear(state: MemoryState) -> MemoryState:
    """Return the memory without its rows; `step` and `skipped` keep their values."""
    return _emptied(state, state.labels.shape[0])


def rows(state: MemoryState) -> Rows:
    """Return copies of the filled rows, oldest first. The shape depends on the state, so it cannot be compiled."""
    return _in_slots(state, _newest(state, int(state.count)))


def of_shard(state: MemoryState, shard: Shard) -> MemoryState:
    """Return a shard as a memory of its own: the same rows, with a cursor and count for its slots alone."""
    xp, _ = backends.of(state.embeddings)
    m = state.labels.shape[0]
    cursor, count = (at_most(xp.clip(one - shard.first(m), min=0), m) for one in (state.cursor, state.count))
    return state._replace(cursor=xp.asarray(xp.remainder(cursor, m)), count=xp.asarray(count))


def resize(state: MemoryState, capacity: int) -> MemoryState:
    """Return a memory of another capacity with the newest rows that fit, in the same order."""
    xp, _ = backends.of(state.embeddings)
    checks.whole_number("capacity", capacity, at_least=1)
    count = min(int(state.count), capacity)
    slots = _newest(state, count)
    kept, empty = _in_slots(state, slots), _emptied(state, capacity)
    moved = class_of_slot(xp.arange(count, dtype=slots.dtype, device=device_of(slots)))
    kept = kept._replace(labels=xp.where(kept.labels == class_of_slot(slots), moved, kept.labels))

    def scalar(value: int) -> Array:
        return xp.asarray(value, dtype=state.cursor.dtype, device=device_of(state.embeddings))

    columns = (xp.concat([filled, blank[count:, ...]]) for filled, blank in zip(kept, empty, strict=False))
    return empty._replace(
        **dict(zip(Rows._fields, columns, strict=True)), cursor=scalar(count % capacity), count=scalar(count)
    )


def _newest(state: MemoryState, n: int) -> Array:
    """Return the slots of the newest n rows, oldest first."""
    xp, _ = backends.of(state.embeddings)
    rank = xp.arange(n, dtype=state.cursor.dtype, device=device_of(state.embeddings))
    return xp.remainder(state.cursor - n + rank, state.embeddings.shape[0])


def _in_slots(state: MemoryState, slots: Array) -> Rows:
    xp, _ = backends.of(state.embeddings)
    return Rows(*(xp.take(column, slots, axis=0) for column in state[: len(Rows._fields)]))


def _emptied(state: MemoryState, capacity: int) -> MemoryState:
    """Return an empty memory of a capacity, otherwise like `state`; `step` and `skipped` keep their values."""
    V = state.embeddings
    xp, _ = backends.of(V)
    empty = init(capacity=capacity, dim=V.shape[1], dtype=V.dtype, device=device_of(V), xp=xp)
    return empty._replace(step=state.step, skipped=state.skipped)
