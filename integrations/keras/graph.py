"""Helpers for code that runs while a graph is being traced, and for compilation on the different backends."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import keras


def eagerly() -> AbstractContextManager[Any]:
    """Return a context in which variables can be created, even while TensorFlow traces a function."""
    if keras.backend.backend() != "tensorflow":
        return nullcontext()
    import tensorflow as tf

    return tf.init_scope()


def compiled(function: Callable[..., Any], *, donated: tuple[int, ...] = ()) -> Callable[..., Any]:
    """Compile a function of arrays on JAX, with the given arguments donated; return it unchanged on other backends.

    Without this, JAX would dispatch each operation separately, and copy arrays that other backends modify in place.
    """
    if keras.backend.backend() != "jax":
        return function
    import jax

    return jax.jit(function, donate_argnums=donated)


@contextmanager
def without_a_trace() -> Iterator[None]:
    """On PyTorch, disable autograd and updates of batch norm statistics; do nothing on other backends."""
    if keras.backend.backend() != "torch":
        yield
        return
    import torch

    from xbm.integrations.torch.compensation import unchanged_statistics

    with torch.no_grad(), unchanged_statistics():
        yield


def strategy() -> Any:
    """Return TensorFlow's current distribution strategy; None on other backends."""
    if keras.backend.backend() != "tensorflow":
        return None
    import tensorflow as tf

    return tf.distribute.get_strategy()


def refuse_replicas(strategy: Any) -> None:
    """Raise an error for TensorFlow strategies that split a batch over several replicas."""
    replicas = getattr(strategy, "num_replicas_in_sync", 1)
    if replicas > 1:
        raise RuntimeError(
            f"expected 1 replica, got {replicas} with {type(strategy).__name__}, where each would store only its part "
            f"of the batch: train on one device, or on the JAX backend with keras.distribution.DataParallel"
        )
