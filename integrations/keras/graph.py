"""What a graph under construction asks of the code that builds it."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import keras


def eagerly() -> AbstractContextManager[Any]:
    """Return a context in which variables can be made, even while TensorFlow traces a function."""
    if keras.backend.backend() != "tensorflow":
        return nullcontext()
    import tensorflow as tf

    return tf.init_scope()


def compiled(function: Callable[..., Any], *, donated: tuple[int, ...] = ()) -> Callable[..., Any]:
    """Return a function of arrays as JAX compiles it, giving some arguments away; others run it as it is.

    JAX would compile each of its operations alone, and copy what others write in place.
    """
    if keras.backend.backend() != "jax":
        return function
    import jax

    return jax.jit(function, donate_argnums=donated)


@contextmanager
def without_a_trace() -> Iterator[None]:
    """Have PyTorch keep nothing of eager calls for a backward pass, and leave a wrapped module's batch norm alone."""
    if keras.backend.backend() != "torch":
        yield
        return
    import torch

    from xbm.integrations.torch.compensation import unchanged_statistics

    with torch.no_grad(), unchanged_statistics():
        yield


def strategy() -> Any:
    """Return TensorFlow's current distribution strategy, None on other backends."""
    if keras.backend.backend() != "tensorflow":
        return None
    import tensorflow as tf

    return tf.distribute.get_strategy()


def refuse_replicas(strategy: Any) -> None:
    """Refuse a TensorFlow strategy that runs a step on several devices, each with a part of the batch."""
    replicas = getattr(strategy, "num_replicas_in_sync", 1)
    if replicas > 1:
        raise RuntimeError(
            f"{type(strategy).__name__} runs {replicas} replicas, each of which would see and store its own part of a "
            f"batch alone: train on one device, or on the JAX backend with keras.distribution.DataParallel"
        )
