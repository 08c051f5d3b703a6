"""The demo's Keras engine, on the current backend: PyTorch's losses from PyTorch's initial weights in `model.fit`."""

import keras
import numpy as np
import pytest
from keras import layers

from tests.experiments.parity import PLAN, channels_last, demo_without, losses, pair
from xbm.experiments.engines.keras import conv_net
from xbm.experiments.errors import DivergenceError
from xbm.experiments.training import cosine

BACKEND = keras.backend.backend()

# A warning of Keras itself, about its variables and PyTorch tensors under NumPy 2.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")


def take(engine, weights):
    """Set the weights of each layer of an engine's network."""
    for layer, new in zip((layer for layer in engine.model.layers if layer.weights), weights, strict=True):
        layer.set_weights(new + layer.get_weights()[len(new) :])  # keep batch norm's statistics


@pytest.mark.parametrize("options", [{}, {"weight": 0.0}, {"loss": "supcon", "weight": 0.5}], ids=repr)
def test_the_first_losses_are_those_of_torch(data, options):
    expected, found = pair(data, "keras", **options)
    take(found.engine, channels_last(expected.engine.encoder))
    images = expected.watched.images
    np.testing.assert_allclose(found.engine.embed(images), expected.engine.embed(images).numpy(), atol=1e-5)
    np.testing.assert_allclose(losses(found), losses(expected), rtol=2e-5)
    for name, figure in expected.now.items():
        np.testing.assert_allclose(found.now[name], figure, rtol=2e-3, err_msg=name)
    assert (found.now.get("memory_loss", 0) > 0) == (options.get("weight") != 0)


def test_measuring_changes_nothing(data):
    _, seldom = pair(data, "keras")
    _, often = pair(data, "keras", evaluate_every=1)
    assert losses(seldom) == losses(often)
    assert len(often.curves["recall"]) == PLAN.steps + 1


def test_left_and_taken_up_again(data):
    _, whole = pair(data, "keras")
    _, parted = pair(data, "keras")
    first = losses(parted, until=3)
    assert len(first) == parted.step == 3
    np.testing.assert_allclose(first + losses(parted), losses(whole), rtol=1e-5)


def test_the_outcome(data):
    _, training = pair(data, "keras", steps=10)
    training.run()
    run, found = training.outcome(training.watched, k=(1, 3))
    assert run.recall[-1] == run.recall_at_1 == found.recall[1] <= found.recall[3]
    assert run.neighbours.shape == (24, 10)
    assert run.figures["fill"] == [1.0]
    assert run.memory_megabytes == pytest.approx(10 * (8 * 4 + 24) / 1e6, rel=0.4)
    assert training.curves["probe_steps"] == [10]


def test_a_training_that_breaks_down_says_so(data):
    _, training = pair(data, "keras", learning_rate=1e30)
    with pytest.raises(DivergenceError, match="the loss is nan at step"):
        training.run()


def test_learning_rates_are_those_of_the_plan(data):
    _, training = pair(data, "keras")
    rates = [float(training.engine.rates(step)) for step in range(PLAN.steps)]
    np.testing.assert_allclose(rates, cosine(PLAN.learning_rate, PLAN.steps), rtol=1e-5)


def test_initial_weights_are_drawn_as_torch_draws_them():
    network = conv_net(64, (3, 28, 28), seed=0)
    for layer in network.layers:
        if isinstance(layer, (layers.Conv2D, layers.Dense)):
            kernel, *bias = layer.get_weights()
            bound = np.prod(kernel.shape[:-1]) ** -0.5
            assert 0.97 * bound < abs(kernel).max() <= bound * (1 + 1e-6)
            assert kernel.std() == pytest.approx(bound / 3**0.5, rel=0.06)
    assert 0.8 * bound < abs(bias[0]).max() <= bound
    again, other = (conv_net(64, (3, 28, 28), seed=seed).get_weights()[0] for seed in (0, 1))
    assert (again == network.get_weights()[0]).all()
    assert not (again == other).all()


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 9, 14)])
def test_pictures_become_embeddings(shape):
    images = np.zeros((2, *shape[1:], shape[0]), np.float32)
    assert conv_net(5, shape, seed=0)(images).shape == (2, 5)


def test_the_demo_needs_no_torch(tmp_path):
    result = demo_without("none" if BACKEND == "torch" else "torch", "keras", tmp_path)
    assert result.returncode == 0, result.stderr
    for text in (result.stdout, (tmp_path / "report.html").read_text()):
        assert f"keras {keras.__version__}, on {BACKEND}" in text


def test_a_missing_package_is_named(tmp_path):
    result = demo_without("keras", "keras", tmp_path)
    assert result.returncode == 2
    sentence = result.stderr.strip().splitlines()[-1]
    assert sentence.startswith("Error: --framework keras needs the package keras, which is not installed: pip install")
    assert "xbm[demo-keras]" in sentence
