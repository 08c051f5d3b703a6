"""The callback: `fit` agrees with the core, step by step, for every kind of model and every execution mode of Keras."""

import keras
import numpy as np
import pytest

import xbm
from tests.integrations.keras.simulation import KINDS, RATE, Simulation, make, weight, weights_at_first
from tests.strategies import named
from xbm.backends import array_namespace
from xbm.integrations.keras import InBatchLoss, XBMCallback
from xbm.state import named as arrays_of


def near(labels, row_labels):
    """A relation for `match`, for any library."""
    return abs(labels[:, None] - row_labels[None, :]) <= 1


def by_row(labels, row_labels):
    """Weights for `pair_weights`, for any library."""
    xp = array_namespace(row_labels)
    return xp.astype(1 + row_labels % 2, xp.float32)[None, :]


OPTIONS = [
    {"capacity": 5},  # less than the batch size
    {"reduction": "sum", "weight": 0.01},
    {"in_batch": False},
    {"normalize": False},
    {"loss": "supcon"},
    {"loss": "batch-hard-triplet"},
    {"loss": "multi-similarity", "miner": "multi-similarity"},
    {"warmup": 0},
    {"warmup": 100},
    {"match": near, "pair_weights": by_row, "ignore_label": 4},
]


def core(options):
    """The same options for the core."""
    return {"capacity": 32, "warmup": 2} | options


def fit(model, x, y, callback, *, epochs=3, **options):
    keywords = {"batch_size": 8, "shuffle": False, "verbose": 0} | options
    return model.fit(x, y, epochs=epochs, callbacks=[callback], **keywords)


def snapshot(callback):
    return [keras.ops.convert_to_numpy(value).copy() for value in arrays_of(callback.memory.state()).values()]


def assert_same(callback, before):
    for old, new in zip(before, snapshot(callback), strict=True):
        np.testing.assert_array_equal(old, new)


@pytest.mark.parametrize("kind", KINDS)
def test_is_the_core_on_every_kind_of_model(kind, data):
    x, y = data
    model, callback = make(kind), XBMCallback(capacity=32, warmup=2)
    history = fit(model, x, y, callback, validation_data=(x[:12], y[:12]))
    simulated = Simulation(weights_at_first(), capacity=32, warmup=2)
    simulated.fit(x, y, epochs=3, validation=(x[:12], y[:12])).agrees(history, model, callback)


@pytest.mark.parametrize("options", OPTIONS, ids=named)
def test_is_the_core_with_every_option(options, data):
    x, y = data
    model, callback = make(), XBMCallback(**({"capacity": 32, "warmup": 2} | options))
    history = fit(model, x, y, callback)
    Simulation(weights_at_first(), **core(options)).fit(x, y, epochs=3).agrees(history, model, callback)


@pytest.mark.parametrize("copies", ["exclude", "keep"])
def test_ids_exclude_copies_and_show_the_drift(copies, data):
    x, y = data
    ids = np.arange(50)
    model = make("subclassed")
    callback = XBMCallback(capacity=128, warmup=1, copies=copies, ids="id")
    history = fit(model, {"image": x, "id": ids}, y, callback)
    simulated = Simulation(weights_at_first(), capacity=128, warmup=1, copies=copies)
    simulated.fit(x, y, epochs=3, ids=ids).agrees(history, model, callback)
    assert np.isnan(history.history["memory_drift"][0])
    assert history.history["memory_drift"][2] > 0
    assert callback.report["drift_age"] == pytest.approx(7)


@pytest.mark.parametrize("compile_options", [{"run_eagerly": True}, {"jit_compile": True}], ids=str)
def test_compiled_and_eager_steps_are_the_same(compile_options, data, quick_compiler):
    x, y = data
    model, callback = make(**compile_options), XBMCallback(capacity=32, warmup=2)
    history = fit(model, x, y, callback)
    Simulation(weights_at_first(), capacity=32, warmup=2).fit(x, y, epochs=3).agrees(history, model, callback)


@pytest.mark.not_on("torch", reason="Keras does not support steps_per_execution above 1 on PyTorch")
def test_several_steps_per_execution(data):
    x, y = data
    model, callback = make(steps_per_execution=3), XBMCallback(capacity=32, warmup=2)
    history = fit(model, x, y, callback)
    simulated = Simulation(weights_at_first(), capacity=32, warmup=2).fit(x, y, epochs=3)
    simulated.agrees(history, model, callback)
    assert callback.memory.step.numpy() == 21


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
def test_mixed_precision(policy, data):
    x, y = data
    keras.config.set_dtype_policy(policy)
    model, callback = make(), XBMCallback(capacity=32, warmup=2)
    history = fit(model, x, y, callback)
    simulated = Simulation(weights_at_first(), capacity=32, warmup=2).fit(x, y, epochs=3)
    np.testing.assert_allclose(history.history["loss"], simulated.history["loss"], rtol=0.05)
    rows = callback.rows()
    assert rows.embeddings.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(rows.embeddings, axis=1), 1, atol=1e-6)  # normalised in float32
    np.testing.assert_array_equal(rows.labels, xbm.rows(simulated.state.memory).labels)
    np.testing.assert_allclose(weight(model), simulated.W, atol=0.05)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_rows_of_other_dtypes(dtype, data):
    x, y = data
    callback = XBMCallback(capacity=32, warmup=2, dtype=dtype)
    fit(make(), x, y, callback)
    assert keras.backend.standardize_dtype(callback.memory.embeddings.value.dtype) == dtype
    simulated = Simulation(weights_at_first(), capacity=32, warmup=2).fit(x, y, epochs=3)
    simulated.remembers(callback.rows(), atol=0.02)


def test_is_added_to_the_loss_of_compile(data):
    """InBatchLoss in `compile` plus the memory loss of the callback equals both terms in the callback."""
    x, y = data
    model, callback = make(loss=InBatchLoss()), XBMCallback(capacity=32, warmup=2, in_batch=False)
    history = fit(model, x, y, callback)
    simulated = Simulation(weights_at_first(), capacity=32, warmup=2).fit(x, y, epochs=3)
    simulated.agrees(history, model, callback)


def test_is_added_to_regularisers(data):
    x, y = data
    inputs = keras.Input((6,))
    layer = keras.layers.Dense(4, kernel_regularizer=keras.regularizers.L2(10.0))
    model = keras.Model(inputs, layer(inputs))
    model.compile(keras.optimizers.SGD(0.0))
    history = fit(model, x, y, XBMCallback(capacity=32, weight=0, in_batch=False), epochs=1)
    assert history.history["loss"][0] == pytest.approx(10 * np.sum(weight(model) ** 2), rel=1e-5)


def test_leaves_the_model_as_it_was(data):
    x, y = data
    plain, model = make(loss=InBatchLoss()), make(loss=InBatchLoss())
    fit(plain, x, y, keras.callbacks.Callback())
    fit(model, x, y, XBMCallback(capacity=32))
    assert model.count_params() == plain.count_params()
    assert len(model.weights) == len(plain.weights)
    assert len(model.optimizer.variables) == len(plain.optimizer.variables)
    assert not {"compute_loss", "train_step", "test_step"} & set(vars(model))
    assert set(model.evaluate(x, y, verbose=0, return_dict=True)) == {"loss"}
    clone = keras.models.clone_model(model)
    assert not hasattr(clone, "xbm_memory")


@pytest.mark.parametrize("kind", ["functional", "sequential, lazy", "subclassed"])
def test_only_fit_stores(kind, data):
    x, y = data
    model, callback = make(kind, loss=InBatchLoss()), XBMCallback(capacity=32, warmup=0)
    fit(model, x, y, callback, epochs=1)
    before = snapshot(callback)
    model.evaluate(x, y, verbose=0)
    found = model.evaluate(x, y, verbose=0, return_dict=True, callbacks=[callback])
    assert found["memory_loss"] > 0
    model.predict(x, verbose=0)
    model.predict(x, verbose=0, callbacks=[callback])
    model.train_on_batch(x[:8], y[:8])
    model.test_on_batch(x[:8], y[:8])
    model.predict_on_batch(x[:8])
    assert_same(callback, before)
    assert not {"compute_loss", "train_step", "test_step"} & set(vars(model))


def test_early_stopping_restores_the_weights_and_not_the_memory(data):
    x, y = data
    model, callback = make(), XBMCallback(capacity=32, warmup=2)
    stopping = keras.callbacks.EarlyStopping("memory_fill", mode="min", patience=1, restore_best_weights=True)
    keywords = {"batch_size": 8, "shuffle": False, "verbose": 0, "epochs": 4}
    model.fit(x, y, callbacks=[callback, stopping], **keywords)
    simulated = Simulation(weights_at_first(), capacity=32, warmup=2).fit(x, y, epochs=1)
    np.testing.assert_allclose(weight(model), simulated.W, rtol=0, atol=1e-6)
    simulated.fit(x, y, epochs=1).remembers(callback.rows())


def test_refit_goes_on(data):
    x, y = data
    model, callback = make(), XBMCallback(capacity=32, warmup=2)
    fit(model, x, y, callback, epochs=1)
    history = fit(model, x, y, callback, epochs=2)
    simulated = Simulation(weights_at_first(), capacity=32, warmup=2).fit(x, y, epochs=3)
    assert history.history["loss"] == pytest.approx(simulated.history["loss"][1:], rel=1e-5)
    simulated.remembers(callback.rows())


def test_a_second_callback_begins_anew(data):
    x, y = data
    model, first, second = make(), XBMCallback(capacity=32, warmup=2), XBMCallback(capacity=16, warmup=0)
    fit(model, x, y, first, epochs=1)
    history = fit(model, x, y, second, epochs=1)
    begun = Simulation(weights_at_first(), capacity=32, warmup=2).fit(x, y, epochs=1)
    simulated = Simulation(begun.W, capacity=16, warmup=0).fit(x, y, epochs=1)
    simulated.agrees(history, model, second)
    begun.remembers(first.rows())
    assert model.metrics.count(second.memory) == 1
    assert first.memory not in model.metrics


def test_a_model_that_was_compiled_before(data):
    """Keras caches compiled steps, and JAX identifies them by their method."""
    x, y = data
    model, callback = make(loss=InBatchLoss()), XBMCallback(capacity=32, warmup=2, in_batch=False)
    fit(model, x, y, keras.callbacks.Callback(), epochs=1, validation_data=(x, y))
    model.set_weights([weights_at_first()])
    history = fit(model, x, y, callback, validation_data=(x, y))
    simulated = Simulation(weights_at_first(), capacity=32, warmup=2)
    simulated.fit(x, y, epochs=3, validation=(x, y)).agrees(history, model, callback)


def test_one_callback_on_another_model_begins_anew(data):
    x, y = data
    callback = XBMCallback(capacity=32, warmup=2)
    fit(make(), x, y, callback, epochs=1)
    model = make("sequential")
    history = fit(model, x, y, callback)
    Simulation(weights_at_first(), capacity=32, warmup=2).fit(x, y, epochs=3).agrees(history, model, callback)


def test_two_callbacks_in_one_fit_are_refused(data):
    x, y = data
    model = make()
    with pytest.raises(RuntimeError, match="two XBMCallbacks"):
        model.fit(x, y, verbose=0, callbacks=[XBMCallback(capacity=8), XBMCallback(capacity=8)])


class Broken(keras.callbacks.Callback):
    def __init__(self, epoch=0):
        super().__init__()
        self.epoch = epoch

    def on_epoch_begin(self, epoch, logs=None):
        if epoch == self.epoch:
            raise KeyboardInterrupt


@pytest.mark.parametrize("same", [True, False], ids=["the same callback", "another"])
@pytest.mark.parametrize("compile_options", [{}, {"run_eagerly": True}], ids=str)
def test_refit_after_an_exception(same, compile_options, data):
    x, y = data
    model, callback = make(**compile_options), XBMCallback(capacity=32, warmup=2)
    with pytest.raises(KeyboardInterrupt):
        model.fit(x, y, batch_size=8, epochs=3, shuffle=False, verbose=0, callbacks=[callback, Broken(1)])
    begun = simulated = Simulation(weights_at_first(), capacity=32, warmup=2).fit(x, y, epochs=1)
    if not same:
        callback = XBMCallback(capacity=16, warmup=0)
        simulated = Simulation(begun.W, capacity=16, warmup=0)
    history = fit(model, x, y, callback, epochs=2)
    simulated.fit(x, y, epochs=2)
    assert history.history["loss"] == pytest.approx(simulated.history["loss"][-2:], rel=1e-5)
    simulated.remembers(callback.rows())
    assert not {"compute_loss", "train_step", "test_step"} & set(vars(model))


@pytest.mark.not_on("torch", "tensorflow", reason="no buffers are donated")
def test_a_lost_memory_is_refused(data):
    """An eager JAX step donates the rows it writes into; a failure afterwards loses them."""

    class Fails(keras.metrics.Mean):
        calls = 0

        def update_state(self, y_true, y_pred, sample_weight=None):
            self.calls += 1
            if self.calls == 3:  # 1 builds the model; a failure at 2, the first step, would lose it
                raise ZeroDivisionError

    x, y = data
    model, callback = make(run_eagerly=True), XBMCallback(capacity=32, warmup=2)
    fit(model, x, y, callback, epochs=1)
    model.compile("sgd", run_eagerly=True, metrics=[Fails()])
    with pytest.raises(ZeroDivisionError):
        fit(model, x, y, callback, epochs=1)
    model.compile("sgd")
    with pytest.raises(RuntimeError, match="continue with a new XBMCallback"):
        fit(model, x, y, callback)
    again = XBMCallback(capacity=32)
    fit(model, x, y, again, epochs=1)
    assert len(again.rows().labels) == 32


def test_rows_that_are_not_finite(data):
    """Non-finite rows are skipped and counted; with `on_nonfinite="raise"`, eager steps raise an error."""
    x, y = data
    x = x.copy()
    x[3] = np.nan
    callback = XBMCallback(capacity=64)
    make("sequential").fit(x[:8], y[:8], verbose=0, callbacks=[callback])
    assert callback.report["skipped"] == 1
    assert len(callback.rows().labels) == 7
    with pytest.raises(ValueError, match=r"1 of the embeddings .* are not finite"):
        make(run_eagerly=True).fit(x[:8], y[:8], verbose=0, callbacks=[XBMCallback(on_nonfinite="raise")])


def test_a_step_without_compute_loss_is_refused(data):
    class OwnStep(keras.Model):
        def __init__(self):
            super().__init__()
            self.layer = keras.layers.Dense(4)

        def call(self, x):
            return self.layer(x)

        def train_step(self, *arguments):
            return {"loss": 0.0} if keras.backend.backend() != "jax" else ({"loss": 0.0}, arguments[0])

    model = OwnStep()
    model.compile("sgd", loss=InBatchLoss())
    with pytest.raises(RuntimeError, match=r"does not call self\.compute_loss"):
        fit(model, *data, XBMCallback(capacity=8))


def test_a_model_with_its_own_compute_loss(data):
    """An override written for Keras before 3.3, without `training`."""
    x, y = data
    base = make("subclassed", compiled=False).__class__

    class Own(base):
        def compute_loss(self, x, y, y_pred, sample_weight):
            return 0.0 * keras.ops.sum(y_pred)

    model, callback = Own(), XBMCallback(capacity=32, warmup=2)
    model.compile(keras.optimizers.SGD(RATE))
    history = fit(model, x, y, callback, validation_data=(x[:12], y[:12]))
    simulated = Simulation(weights_at_first(), capacity=32, warmup=2)
    simulated.fit(x, y, epochs=3, validation=(x[:12], y[:12])).agrees(history, model, callback)


def test_clear_and_report(data):
    x, y = data
    model, callback = make(), XBMCallback(capacity=32, warmup=2)
    assert callback.report == {}
    with pytest.raises(RuntimeError, match="before fit"):
        callback.rows()
    fit(model, x, y, callback, epochs=1)
    assert set(callback.report) == set(xbm.REPORT)
    assert callback.report["fill"] == 1
    callback.memory.clear()
    assert len(callback.rows().labels) == 0
    assert int(callback.memory.step.numpy()) == 7


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"capacity": 0}, "capacity must be at least 1"),
        ({"dim": 0}, "dim must be at least 1"),
        ({"loss": "nonsense"}, "loss must be one of the names"),
        ({"dtype": "int8"}, "dtype must be 'float32'"),
        ({"warmup": -1}, "warmup must be at least 0"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        XBMCallback(**options)
