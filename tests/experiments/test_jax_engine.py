"""The demo's JAX engine: PyTorch's losses from PyTorch's initial weights, one compilation, and no import of PyTorch."""

import numpy as np
import pytest
from flax import nnx

from tests.experiments.parity import channels_last, demo_without, losses, pair
from xbm.experiments.engines.jax import conv_net
from xbm.experiments.errors import DivergenceError


def take(engine, weights):
    """Set the weights of each layer of an engine's network."""
    _, _, *rest = engine.carry
    network = nnx.merge(engine.definition, *engine.carry[:2], copy=True)
    layers = [layer for layer in network.layers if isinstance(layer, nnx.Module)]
    for layer, (first, *others) in zip(layers, weights, strict=True):
        (layer.scale if isinstance(layer, nnx.BatchNorm) else layer.kernel)[...] = first
        for bias in others:
            layer.bias[...] = bias
    engine.carry = (*nnx.split(network, nnx.Param, nnx.BatchStat)[1:], *rest)


@pytest.mark.parametrize("options", [{}, {"weight": 0.0}, {"loss": "supcon", "weight": 0.5}], ids=repr)
def test_the_first_losses_are_those_of_torch(data, options):
    expected, found = pair(data, "jax", **options)
    take(found.engine, channels_last(expected.engine.encoder))
    images = expected.watched.images
    np.testing.assert_allclose(found.engine.embed(images), expected.engine.embed(images).numpy(), atol=1e-5)
    np.testing.assert_allclose(losses(found), losses(expected), rtol=2e-5)
    for name, figure in expected.now.items():
        np.testing.assert_allclose(found.now[name], figure, rtol=2e-3, err_msg=name)
    assert (found.now.get("memory_loss", 0) > 0) == (options.get("weight") != 0)


def test_left_and_taken_up_again(data):
    _, whole = pair(data, "jax")
    _, parted = pair(data, "jax")
    first = losses(parted, until=3)
    assert len(first) == parted.step == 3
    assert first + losses(parted) == losses(whole)


def test_the_outcome_after_one_compilation(data):
    _, training = pair(data, "jax", steps=10)
    training.run()
    assert training.engine._step._cache_size() <= 1  # may be 0: JAX's cache is bounded
    assert training.now["fill"] == 1
    run, found = training.outcome(training.watched, k=(1, 3))
    assert run.recall[-1] == run.recall_at_1 == found.recall[1] <= found.recall[3]
    assert run.neighbours.shape == (24, 10)
    assert run.memory_megabytes == pytest.approx(10 * (8 * 4 + 12) / 1e6, rel=0.1)
    assert training.curves["probe_steps"] == [10]


def test_a_training_that_breaks_down_says_so(data):
    _, training = pair(data, "jax", learning_rate=1e30)
    with pytest.raises(DivergenceError, match="the loss is nan at step"):
        training.run()


def test_initial_weights_are_drawn_as_torch_draws_them():
    network = conv_net(64, (3, 28, 28), rngs=nnx.Rngs(0))
    for layer in network.layers:
        if isinstance(layer, (nnx.Conv, nnx.Linear)):
            *around, _ = layer.kernel.shape
            bound = np.prod(around) ** -0.5
            assert 0.97 * bound < abs(layer.kernel[...]).max() <= bound
            assert layer.kernel[...].std() == pytest.approx(bound / 3**0.5, rel=0.06)
    assert 0.8 * bound < abs(layer.bias[...]).max() <= bound


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 9, 14)])
def test_pictures_become_embeddings(shape):
    images = np.zeros((2, *shape[1:], shape[0]), np.float32)
    assert conv_net(5, shape, rngs=nnx.Rngs(0))(images).shape == (2, 5)


def test_the_demo_needs_no_torch(tmp_path):
    result = demo_without("torch", "jax", tmp_path)
    assert result.returncode == 0, result.stderr
    assert "jax 0." in result.stdout
    assert "flax 0." in (tmp_path / "report.html").read_text()


def test_a_missing_package_is_named(tmp_path):
    result = demo_without("optax", "jax", tmp_path)
    assert result.returncode == 2
    (sentence,) = result.stderr.strip().splitlines()
    assert sentence.startswith("Error: --framework jax needs the package optax, which is not installed: pip install")
    assert "xbm[demo-jax]" in sentence
