"""What only the host can see on JAX: integers that would not fit, and a step that forgets the memory."""

import inspect
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import keras
import numpy as np

from xbm.integrations.keras.memory import fits, integer_dtype
from xbm.integrations.keras.metric import MemoryMetric

Check = Callable[[Any], None]


def refuse_large(name: str, integers: Any) -> None:
    """Refuse NumPy integers that the memory's dtype cannot hold: JAX would cut them off without a word."""
    if isinstance(integers, np.ndarray) and not fits(integers):
        raise ValueError(
            f"{name} reach from {integers.min()} to {integers.max()}, but JAX makes {integer_dtype()} of them: set "
            f"jax_enable_x64, or number them from 0"
        )


def checked(function: Callable[..., Any], check: Check) -> Callable[..., Any]:
    """Return JAX's train or test function over batches that pass `check` while they are on the host."""
    last: list[Any] = [None, None]

    def run(state: Any, iterator: Iterator[Any]) -> Any:
        if last[0] is not iterator:
            last[:] = [iterator, _before_transfer(iterator, check)]
        return function(state, last[1])

    return run


def _before_transfer(iterator: Iterator[Any], check: Check) -> Iterator[Any]:
    """Return an iterator over the same batches that checks them where they are NumPy arrays.

    On an accelerator, and with a distribution, Keras hands out a generator that moves batches to devices ahead of the
    step. One that has not begun is made again over checked batches.
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
    """Return JAX's train function, which raises after its first call if the memory did not come out of the step."""
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
                f"{type(model).__name__}.train_step returns its metrics variables without the memory's new ones, so "
                f"nothing would ever be stored: return those that self.compute_loss_and_updates gives back"
            )
        return logs, state

    return run
