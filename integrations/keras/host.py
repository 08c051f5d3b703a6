"""Host-side checks for JAX: integers that do not fit into 32 bits, and train steps that lose the memory's state."""

import inspect
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import keras
import numpy as np

from xbm.integrations.keras.memory import fits, integer_dtype
from xbm.integrations.keras.metric import MemoryMetric

Check = Callable[[Any], None]


def refuse_large(name: str, integers: Any) -> None:
    """Raise an error for NumPy integers that the memory's dtype cannot hold; JAX would truncate them silently."""
    if isinstance(integers, np.ndarray) and not fits(integers):
        raise ValueError(
            f"{name} must fit into {integer_dtype()}, JAX's integer dtype, got {integers.min()} to {integers.max()}: "
            f"set jax_enable_x64, or number them from 0"
        )


def checked(function: Callable[..., Any], check: Check) -> Callable[..., Any]:
    """Wrap JAX's train or test function to call `check` on each batch while it is on the host."""
    last: list[Any] = [None, None]

    def run(state: Any, iterator: Iterator[Any]) -> Any:
        if last[0] is not iterator:
            last[:] = [iterator, _before_transfer(iterator, check)]
        return function(state, last[1])

    return run


def _before_transfer(iterator: Iterator[Any], check: Check) -> Iterator[Any]:
    """Return an iterator over the same batches that checks them while they are NumPy arrays.

    On accelerators, and with a distribution, Keras passes a generator that transfers batches to devices ahead of the
    step. If the generator has not started, it is recreated over checked batches.
    """

    def passed(batches: Iterable[Any]) -> Iterator[Any]:
        for batch in batches:
            check(batch)
            yield batch

    if inspect.isgenerator(iterator) and inspect.getgeneratorstate(iterator) == inspect.GEN_CREATED:
        known = inspect.getgeneratorlocals(iterator)
        owner: Any = known.get("self")
        if "numpy_iterator" in known:
            return owner._one_batch_ahead_iterator(passed(known["numpy_iterator"]))
        if "distribution" in known:
            batches = owner.data_adapter.get_jax_iterator
            owner.data_adapter.get_jax_iterator = lambda: passed(batches())
            return iterator
    return passed(iterator)


def remembering(function: Callable[..., Any], model: keras.Model, memory: MemoryMetric) -> Callable[..., Any]:
    """Wrap JAX's train function: raise an error after the first call if the step did not return the updated memory."""
    first = True

    def run(state: Any, iterator: Iterator[Any]) -> Any:
        nonlocal first
        if not first:
            return function(state, iterator)
        first = False
        place = next(i for i, variable in enumerate(model.metrics_variables) if variable is memory.step)
        before = int(state[-1][place])
        logs, state = function(state, iterator)
        if int(state[-1][place]) == before:
            raise RuntimeError(
                f"{type(model).__name__}.train_step must return the updated metrics variables, got the memory's old "
                f"values, so nothing is stored: return the metrics variables from self.compute_loss_and_updates"
            )
        return logs, state

    return run
