"""The layer in custom steps and functional models, and the loss for `compile`."""

import json

import keras
import numpy as np
import pytest

import xbm
from tests.integrations.keras.simulation import DIM, RATE, Simulation, dense, make, weight, weights_at_first
from xbm.integrations.keras import XBM, InBatchLoss, XBMCallback

FIT = {"batch_size": 8, "shuffle": False, "verbose": 0}


def simulated(x, y, *, epochs=2, ids=None, capacity=32):
    return Simulation(weights_at_first(), capacity=capacity, warmup=2).fit(x, y, epochs=epochs, ids=ids)


class WithLayer(keras.Model):
    """A model with an encoder and an XBM, whose forward pass takes the labels."""

    def __init__(self, **options):
        super().__init__()
        self.encoder = dense()
        self.xbm = XBM(**({"capacity": 32, "warmup": 2} | options))

    def call(self, inputs, training=None):
        return self.xbm(self.encoder(inputs["image"]), inputs["label"], inputs.get("id"), training=training)


def functional():
    image, label = keras.Input((6,), name="image"), keras.Input((), dtype="int32", name="label")
    layer = XBM(capacity=32, warmup=2, passthrough=True)
    model = keras.Model({"image": image, "label": label}, layer(dense()(image), label))
    model.compile(keras.optimizers.SGD(RATE))
    return model, layer


def test_in_a_functional_graph(data, tmp_path):
    x, y = data
    model, layer = functional()
    inputs = {"image": x, "label": y.astype("int32")}
    history = model.fit(inputs, epochs=2, validation_data=(inputs,), **FIT)
    expected = Simulation(weights_at_first(), capacity=32, warmup=2).fit(x, y, epochs=2, validation=(x, y))
    for name in ("loss", "val_loss"):
        np.testing.assert_allclose(history.history[name], expected.history[name], rtol=1e-5)
    np.testing.assert_allclose(weight(model), expected.W, rtol=0, atol=1e-6)
    expected.remembers(layer.rows())
    before = layer.rows()
    assert model.predict(inputs, verbose=0).shape == (50, DIM)
    model.evaluate(inputs, verbose=0)
    model.save(str(tmp_path / "model.keras"))
    loaded = keras.models.load_model(str(tmp_path / "model.keras"))
    for name in before._fields:
        np.testing.assert_array_equal(getattr(layer.rows(), name), getattr(before, name))
        np.testing.assert_array_equal(getattr(loaded.layers[-1].rows(), name), getattr(before, name))


def test_in_a_model_whose_output_is_the_loss(data):
    x, y = data

    class Own(WithLayer):
        def compute_loss(self, x, y, y_pred, sample_weight, training=True):
            return y_pred

        def compute_metrics(self, x, y, y_pred, sample_weight):
            return {"loss": self._loss_tracker.result()}

    model = Own(capacity=64)
    model.compile(keras.optimizers.SGD(RATE))
    inputs = {"image": x, "label": y, "id": np.arange(50)}
    history = model.fit(inputs, epochs=2, **FIT)
    expected = simulated(x, y, ids=np.arange(50), capacity=64)
    np.testing.assert_allclose(history.history["loss"], expected.history["loss"], rtol=1e-5)
    expected.remembers(model.xbm.rows())
    assert model.xbm.report["drift"] > 0


@pytest.mark.not_on("jax", reason="JAX's steps are stateless, see test_a_hand_written_jax_step")
def test_the_layer_within_a_train_step(data):
    x, y = data

    class Own(WithLayer):
        def train_step(self, data):
            inputs, _, _ = keras.utils.unpack_x_y_sample_weight(data)
            if keras.backend.backend() == "tensorflow":
                import tensorflow as tf

                with tf.GradientTape() as tape:
                    loss = self(inputs, training=True)
                gradients = tape.gradient(loss, self.trainable_variables)
            else:
                self.zero_grad()
                loss = self(inputs, training=True)
                loss.backward()
                gradients = [variable.value.grad for variable in self.trainable_variables]
            self.optimizer.apply(gradients, self.trainable_variables)
            return {"loss": loss}

    model = Own()
    model.compile(keras.optimizers.SGD(RATE))
    model.fit({"image": x, "label": y}, epochs=2, **FIT)
    expected = simulated(x, y)
    np.testing.assert_allclose(weight(model), expected.W, rtol=0, atol=1e-6)
    expected.remembers(model.xbm.rows())


@pytest.mark.not_on("torch", "tensorflow", reason="stateless steps exist on JAX only")
def test_a_hand_written_jax_step(data):
    import jax

    x, y = data
    model = WithLayer()
    optimizer = keras.optimizers.SGD(RATE)
    model({"image": x[:8], "label": y[:8]})
    optimizer.build(model.trainable_variables)

    @jax.jit
    def step(trainable, untrained, variables, inputs):
        def loss(trainable):
            return model.stateless_call(trainable, untrained, inputs, training=True)

        (_, untrained), gradients = jax.value_and_grad(loss, has_aux=True)(trainable)
        trainable, variables = optimizer.stateless_apply(variables, gradients, trainable)
        return trainable, untrained, variables

    state = [[v.value for v in one] for one in (model.trainable_variables, model.non_trainable_variables)]
    state.append([v.value for v in optimizer.variables])
    for start in range(0, 50, 8):
        state = step(*state, {"image": x[start : start + 8], "label": y[start : start + 8]})
    for variables, values in zip((model.trainable_variables, model.non_trainable_variables), state, strict=False):
        for variable, value in zip(variables, values, strict=True):
            variable.assign(value)
    expected = simulated(x, y, epochs=1)
    np.testing.assert_allclose(weight(model), expected.W, rtol=0, atol=1e-6)
    expected.remembers(model.xbm.rows())


@pytest.mark.not_on("torch", "tensorflow", reason="stateless steps exist on JAX only")
def test_a_step_that_drops_the_layers_memory_shows(data):
    import jax

    x, y = data
    model = WithLayer()
    inputs = {"image": x[:8], "label": y[:8]}
    model(inputs)
    state = [[v.value for v in one] for one in (model.trainable_variables, model.non_trainable_variables)]
    assert len(model.xbm.rows().labels) == 0
    jax.jit(lambda one: model.stateless_call(*state, one, training=True)[0])(inputs)
    for look in (lambda: model.xbm.rows(), lambda: model.xbm.report):
        with pytest.raises(RuntimeError, match="its variables are unchanged"):
            look()


@pytest.mark.not_on("torch", "tensorflow", reason="stateless steps exist on JAX only")
def test_the_layer_refuses_a_step_without_its_variables(data):
    import jax

    x, y = data
    model = WithLayer()
    inputs = {"image": x[:8], "label": y[:8]}
    model(inputs)
    with pytest.raises(RuntimeError, match=r"without its variables.*stateless_call"):
        jax.jit(lambda one: model(one, training=True))(inputs)
    sequential = keras.Sequential([keras.Input((6,)), dense()])
    sequential.xbm = XBM(capacity=8)
    sequential.xbm.build((None, DIM))
    sequential.call = lambda x, training=None, mask=None: sequential.xbm(x[:, :DIM], y[:8], training=training)
    with pytest.raises(RuntimeError, match="without its variables"):
        sequential.stateless_call(
            [v.value for v in sequential.trainable_variables],
            [v.value for v in sequential.non_trainable_variables],
            x[:8],
            training=True,
        )


@pytest.mark.not_on("torch", "tensorflow", reason="all state is in variables, which a step cannot drop")
def test_a_step_that_drops_the_memory_is_refused(data):
    class Drops(type(make("subclassed"))):
        def train_step(self, state, data):
            logs, (*kept, _) = super().train_step(state, data)
            return logs, (*kept, state[-1])

    model = Drops()
    model.compile("sgd")
    with pytest.raises(RuntimeError, match="must return the updated metrics variables"):
        model.fit(*data, callbacks=[XBMCallback(capacity=8)], **FIT)


def test_eager_calls(data):
    x, y = data
    layer = XBM(capacity=32, warmup=1)
    objective = xbm.Objective(warmup=1)
    state = objective.init(capacity=32, dim=6)
    for start in range(0, 50, 8):
        rows = slice(start, start + 8)
        evaluated = float(layer(x[rows], y[rows])) if start else None
        expected = objective.evaluate(state, x[rows], y[rows]).loss
        assert evaluated is None or evaluated == pytest.approx(float(expected), rel=1e-5)
        loss = layer(x[rows], y[rows], training=True)
        step = objective.step(state, x[rows], y[rows])
        state = step.state
        assert float(loss) == pytest.approx(float(step.loss), rel=1e-5)
    assert layer.report["fill"] == 1
    assert len(layer.rows().labels) == 32
    layer.clear()
    assert len(layer.rows().labels) == 0


@pytest.mark.parametrize("with_labels", [True, False], ids=["labels", "no labels"])
def test_two_towers(with_labels, data):
    """Keys are stored and compared; without labels, the positive of each query is its key."""
    x, y = data
    layer = XBM(capacity=32, loss="supcon", warmup=1)
    objective = xbm.Objective(loss="supcon", warmup=1)
    state = objective.init(capacity=32, dim=6)
    for start in range(0, 50, 8):
        rows = slice(start, start + 8)
        given = {"labels": y[rows], "key_labels": y[rows][::-1].copy()} if with_labels else {}
        given |= {"keys": x[rows][:, ::-1].copy(), "ids": np.arange(50)[rows]}
        loss = layer(x[rows], **given, training=True)
        step = objective.step(state, x[rows], **given)
        state = step.state
        assert float(loss) == pytest.approx(float(step.loss), rel=1e-5)
    np.testing.assert_array_equal(layer.rows().labels, xbm.rows(state.memory).labels)
    evaluated = objective.evaluate(state, x[:8], keys=x[:8]).loss
    assert float(layer(x[:8], keys=x[:8])) == pytest.approx(float(evaluated), rel=1e-5)


def test_two_towers_in_a_functional_graph(data):
    """MoCo's pairs in a compiled `fit`, without labels."""
    x, _ = data
    image, view = keras.Input((6,), name="image"), keras.Input((6,), name="view")
    layer = XBM(capacity=32, loss="supcon", warmup=0, passthrough=True)
    encoder = dense()
    model = keras.Model({"image": image, "view": view}, layer(encoder(image), keys=encoder(view)))
    model.compile(keras.optimizers.SGD(RATE))
    model.fit({"image": x, "view": x[:, ::-1]}, **FIT)
    W, objective = weights_at_first(), xbm.Objective(loss="supcon", warmup=0)
    state = objective.init(capacity=32, dim=DIM)
    for start in range(0, 50, 8):
        images, views = x[start : start + 8], x[start : start + 8, ::-1]
        step = objective.step(state, images @ W, keys=views @ W)
        state, W = step.state, W - RATE * (images.T @ step.gradient + views.T @ step.key_gradient)
    np.testing.assert_allclose(weight(model), W, rtol=0, atol=1e-5)
    mine, theirs = (
        layer.rows().labels,
        xbm.rows(state.memory).labels,
    )  # numbered from the lowest integer, of 32 bits on JAX
    np.testing.assert_array_equal(mine - np.iinfo(mine.dtype).min, theirs - np.iinfo(theirs.dtype).min)


def test_the_layer_under_mixed_precision_keeps_float32(data):
    x, y = data
    keras.config.set_dtype_policy("mixed_float16")
    layer = XBM(capacity=32)
    layer(x[:8], y[:8], training=True)
    np.testing.assert_allclose(np.linalg.norm(layer.rows().embeddings, axis=1), 1, atol=1e-6)


def test_the_layer_leaves_the_dtype_of_embeddings(data):
    x, y = data
    layer = XBM(capacity=32, passthrough=True)
    passed = layer(keras.ops.cast(x[:8], "float16"), y[:8])
    assert keras.backend.standardize_dtype(passed.dtype) == "float16"


@pytest.mark.parametrize("name", ["contrastive", "multi-similarity", "batch-hard-triplet", "supcon"])
def test_the_loss_is_the_cores(name, data):
    x, y = data
    loss = InBatchLoss(name)
    objective = xbm.Objective(loss=name)
    expected = objective.evaluate(objective.init(capacity=1, dim=6), x[:8], y[:8]).loss
    assert float(loss(y[:8], x[:8])) == pytest.approx(float(expected), rel=1e-5)
    assert float(loss(y[:8, None], x[:8])) == pytest.approx(float(expected), rel=1e-5)


def test_the_loss_trains(data):
    x, y = data
    model = make(loss=InBatchLoss())
    history = model.fit(x, y, epochs=2, **FIT)
    expected = Simulation(weights_at_first(), capacity=1, weight=0).fit(x, y, epochs=2)
    np.testing.assert_allclose(history.history["loss"], expected.history["loss"], rtol=1e-5)
    np.testing.assert_allclose(weight(model), expected.W, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"loss": "contrastive", "reduction": "sum"},
        {"loss": xbm.MultiSimilarity(alpha=3.0), "miner": xbm.MultiSimilarityMiner(0.2), "normalize": True},
        {"loss": xbm.RecallAtK(k=(1, 3)), "miner": xbm.DistanceWeightedMiner(dim=8, seed=3)},
        {"loss": "n-pair", "miner": "easy-positives"},
    ],
    ids=str,
)
def test_losses_and_layers_are_serialised(options):
    loss = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(InBatchLoss(**options)))
    assert loss.objective == InBatchLoss(**options).objective
    layer = XBM(capacity=5, warmup=3, dtype="float16", passthrough=True, ignore_label=7, **options)
    again = XBM.from_config(layer.get_config())
    assert again.get_config() == layer.get_config()
    assert again.objective == layer.objective
    written = json.loads(json.dumps(layer.get_config()))  # as in a saved model
    assert XBM.from_config(written).objective == layer.objective


def test_a_loss_of_ones_own_says_that_it_is_not_saved():
    with pytest.raises(TypeError, match="cannot be saved with the model"):
        InBatchLoss(lambda S, P, N: S[:, 0]).get_config()
    with pytest.raises(TypeError, match="cannot be saved with the model"):
        XBM(match=lambda a, b: a[:, None] == b[None, :]).get_config()


def test_sample_weights_are_refused_by_the_loss(data):
    x, y = data
    with pytest.raises(ValueError, match="takes no sample_weight"):
        make(loss=InBatchLoss()).fit(x, y, sample_weight=np.ones(50), **FIT)
