"""Keras, on any of its backends: `model.fit` with `XBMCallback`, on the same batches as the other engines."""

from importlib import import_module

import keras
import numpy as np
from keras import layers

from xbm.experiments.engines import cpu
from xbm.experiments.plan import CONV
from xbm.experiments.retrieval import blocks
from xbm.integrations.keras import XBMCallback

# Keras adds epsilon before Adam's bias correction, PyTorch and optax after it. This value equals their 1e-8 at step 1.
EPSILON = 1e-8 * (1 - 0.999) ** 0.5


def one_thread():
    """Use one CPU thread."""
    cpu.one_thread(keras.backend.backend())


def versions():
    """Return {package: version} of Keras and its backend."""
    backend = keras.backend.backend()
    return {"keras": keras.__version__, f"on {backend}": import_module(backend).__version__}


class Engine:
    """The plan's network, optimiser and memory; interface in `xbm.experiments.engines`."""

    def __init__(self, plan, images):
        self.model = conv_net(plan.dim, images.shape[1:], seed=plan.seed)
        self.rates = keras.optimizers.schedules.CosineDecay(plan.learning_rate, plan.steps)  # equal to `Batch.rate`
        self.model.compile(keras.optimizers.Adam(self.rates, epsilon=EPSILON))
        self.callback = XBMCallback(
            capacity=plan.capacity if plan.weight else 1,
            loss=plan.loss,
            miner=plan.miner,
            reduction=plan.reduction,
            weight=plan.weight,
            warmup=plan.warmup,
            compensate=plan.compensation,
            data=(lambda ids: as_input(images[ids])) if plan.compensation and plan.probes else None,
            labels="labels",
            ids="ids",
        )

    @property
    def memory_bytes(self):
        """Size of the memory in bytes."""
        return sum(int(np.prod(one.shape)) * np.dtype(one.dtype).itemsize for one in self.callback.memory.variables)

    def fit(self, batches, after):
        """Train on one batch after another; stop when `after(loss)` returns true."""

        def took(batch, logs):
            now = self.callback.report
            if after(now["batch_loss"] + now["memory_loss"]):
                self.model.stop_training = True

        given = ((as_input(one.images), {"labels": one.labels, "ids": one.ids}) for one in batches)
        options = {"steps_per_epoch": len(batches), "shuffle": False, "verbose": 0}
        callbacks = [self.callback, keras.callbacks.LambdaCallback(on_train_batch_end=took)]
        self.model.fit(given, callbacks=callbacks, **options)

    def embed(self, images):
        """Return the embeddings (n, D) of pictures (n, C, H, W) uint8, as a NumPy array."""
        return np.concatenate([self.model.predict_on_batch(as_input(block)) for block in blocks(images)])

    def figures(self):
        """Return the figures of the last step, as {name: float}."""
        return dict(self.callback.report)


def as_input(images):
    """Convert pictures (n, C, H, W) uint8 to the network's input, (n, H, W, C) float32 in [0, 1]."""
    return np.moveaxis(images, 1, -1).astype(np.float32) / 255


def conv_net(dim, shape, *, seed):
    """Return the architecture of `networks.conv_net`, for pictures of shape (channels, height, width).

    The initial weights have PyTorch's default distribution: uniform in ±1 / sqrt(fan in).
    """
    seeds = keras.random.SeedGenerator(seed)
    channels, *sides = shape
    model = keras.Sequential([keras.Input((*sides, channels))])
    for width, stride in CONV:
        uniform = keras.initializers.VarianceScaling(1 / 3, "fan_in", "uniform", seed=seeds)
        model.add(layers.ZeroPadding2D(1))
        model.add(layers.Conv2D(width, 3, strides=stride, use_bias=False, kernel_initializer=uniform))
        model.add(layers.BatchNormalization(momentum=0.9, epsilon=1e-5))
        model.add(layers.ReLU())
    model.add(layers.Flatten())
    bound = model.output_shape[-1] ** -0.5
    uniform = keras.initializers.RandomUniform(-bound, bound, seed=seeds)
    model.add(layers.Dense(dim, kernel_initializer=uniform, bias_initializer=uniform))
    return model
