"""What a graph under construction asks of the code that builds it."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import keras


def eagerly() -> AbstractContextManager[Any]:
    """Return a context in which variables can be made, even while TensorFlow traces a function."""
    if keras.backend.backend() != "tensorflow":
        return nullcontext()
    import tensorflow as tf

    return tf.init_scope()


def without_gradient() -> AbstractContextManager[Any]:
    """Return a context in which eager calls keep nothing for a backward pass: PyTorch's do unless told."""
    if keras.backend.backend() != "torch":
        return nullcontext()
    import torch

    return torch.no_grad()


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
