"""JAX: a flax.nnx network, optax's Adam, and one compiled train step whose carry includes the memory."""

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import xbm
from xbm.experiments.engines import Stepwise, cpu
from xbm.experiments.plan import CONV
from xbm.experiments.retrieval import blocks
from xbm.report import REPORT

UNIFORM = nnx.initializers.variance_scaling(1 / 3, "fan_in", "uniform")  # U(-b, b), b = 1 / sqrt(fan in), as PyTorch


def one_thread():
    """Use one CPU thread."""
    cpu.one_thread("jax")


def versions():
    """Return {package: version}."""
    return {"jax": jax.__version__, "flax": flax.__version__}


class Engine(Stepwise):
    """The plan's network, optimiser and memory; interface in `xbm.experiments.engines`."""

    def __init__(self, plan, images):
        network = conv_net(plan.dim, images.shape[1:], rngs=nnx.Rngs(plan.seed))
        self.definition, weights, statistics = nnx.split(network, nnx.Param, nnx.BatchStat)
        self.objective = xbm.Objective(
            loss=plan.loss,
            reduction=plan.reduction,
            miner=plan.miner,
            weight=plan.weight,
            warmup=plan.warmup,
            compensate=plan.compensation,
        )
        self.adam = optax.scale_by_adam()
        state = self.objective.init(capacity=plan.capacity if plan.weight else 1, dim=plan.dim, xp=jnp)
        self.carry = weights, statistics, self.adam.init(weights), state
        self.memory_bytes = sum(array.nbytes for array in state.memory)
        self.images, self.report, self.steps = images, None, 0
        self._step = jax.jit(self._stepped, donate_argnums=0)
        self._move = jax.jit(self._moved, donate_argnums=0)
        self._embed = jax.jit(self._embedded)

    def step(self, images, labels, ids, rate):
        """Take one step with learning rate `rate`; return the loss before the update."""
        labels, ids = (one.astype(np.int32) for one in (labels, ids))
        compensation = self.objective.compensate
        if compensation is not None and compensation.due(self.steps):
            probes = compensation.probe(self.carry[3].memory)
            self.carry = self._move(self.carry, probes, self.images[np.maximum(probes.ids, 0)])
        self.steps += 1
        self.carry, loss, self.report = self._step(self.carry, images, labels, ids, np.float32(rate))
        return float(loss)

    def _stepped(self, carry, images, labels, ids, rate):
        weights, statistics, moments, state = carry

        def loss_of(weights):
            network = nnx.merge(self.definition, weights, statistics, copy=True)
            result = self.objective.step(state, network(as_input(images)), labels, ids=ids)
            return result.loss, (nnx.state(network, nnx.BatchStat), result)

        (loss, (statistics, result)), gradient = jax.value_and_grad(loss_of, has_aux=True)(weights)
        updates, moments = self.adam.update(gradient, moments)
        weights = jax.tree.map(lambda weight, update: weight - rate * update, weights, updates)
        return (weights, statistics, moments, result.state), loss, result.report.stacked()

    def _moved(self, carry, probes, images):
        """Return the carry with the memory moved, from the network's embeddings of some rows' pictures."""
        weights, statistics, moments, state = carry
        network = nnx.merge(self.definition, weights, statistics, copy=True)
        fresh = network(as_input(images))  # in training mode: batch statistics, and the running ones are dropped
        return weights, statistics, moments, self.objective.move(state, probes, fresh)

    def embed(self, images):
        """Return the embeddings (n, D) of pictures (n, C, H, W) uint8, as a NumPy array."""
        weights, statistics, *_ = self.carry
        return np.concatenate([self._embed(weights, statistics, block) for block in blocks(images)])

    def _embedded(self, weights, statistics, images):
        network = nnx.merge(self.definition, weights, statistics, copy=True)
        network.eval()
        return network(as_input(images))

    def figures(self):
        """Return the figures of the last step, as {name: float}."""
        return dict(zip(REPORT, self.report.tolist(), strict=True))


def as_input(images):
    """Convert pictures (n, C, H, W) uint8 to the network's input, (n, H, W, C) float32 in [0, 1]."""
    return jnp.moveaxis(images, 1, -1).astype(jnp.float32) / 255


def conv_net(dim, shape, *, rngs):
    """Return the architecture of `networks.conv_net`, for pictures of shape (channels, height, width)."""
    channels, *sides = shape
    layers = []
    for width, stride in CONV:
        layers += [
            nnx.Conv(
                channels, width, (3, 3), strides=stride, padding=1, use_bias=False, kernel_init=UNIFORM, rngs=rngs
            ),
            nnx.BatchNorm(width, momentum=0.9, use_fast_variance=False, rngs=rngs),
            nnx.relu,
        ]
        channels, sides = width, [-(-side // stride) for side in sides]
    inputs = channels * sides[0] * sides[1]

    def bias_init(key, shape, dtype):
        return jax.random.uniform(key, shape, dtype, -(inputs**-0.5), inputs**-0.5)

    linear = nnx.Linear(inputs, dim, kernel_init=UNIFORM, bias_init=bias_init, rngs=rngs)
    return nnx.Sequential(*layers, flat, linear)


def flat(x):
    """Reshape x (n, ...) to (n, D)."""
    return x.reshape(len(x), -1)
