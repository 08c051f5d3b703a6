"""Saving, loading and resuming."""

import re

import keras
import numpy as np
import pytest

from tests.integrations.keras.simulation import DIM, Simulation, make, weight, weights_at_first
from xbm.integrations.keras import InBatchLoss, XBMCallback
from xbm.state import named

FIT = {"batch_size": 8, "shuffle": False, "verbose": 0}


def trained(data, *, epochs=1, kind="functional", **options):
    model, callback = make(kind, loss=InBatchLoss()), XBMCallback(**({"capacity": 32, "warmup": 2} | options))
    model.fit(*data, epochs=epochs, callbacks=[callback], **FIT)
    return model, callback


def assert_same_rows(one, other):
    for name in one._fields:
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name), err_msg=name)


def test_a_checkpoint_loads_as_the_plain_model(data, tmp_path):
    x, y = data
    path = str(tmp_path / "model.keras")
    model = make(loss=InBatchLoss())
    checkpoint = keras.callbacks.ModelCheckpoint(path)
    model.fit(x, y, epochs=2, callbacks=[XBMCallback(capacity=32), checkpoint], **FIT)
    loaded = keras.models.load_model(path)
    np.testing.assert_array_equal(loaded.predict(x, verbose=0), model.predict(x, verbose=0))
    assert not hasattr(loaded, "xbm_memory")
    assert isinstance(loaded.loss, InBatchLoss)
    assert len(loaded.weights) == 1
    assert not hasattr(keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(model)), "xbm_memory")


@pytest.mark.parametrize("kind", ["functional", "sequential", "subclassed, built"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_carry_the_memory(kind, dtype, data, tmp_path):
    x, y = data
    path = str(tmp_path / "model.weights.h5")
    model, callback = trained(data, kind=kind, dtype=dtype)
    model.save_weights(path)
    other, fresh = make(kind, loss=InBatchLoss()), XBMCallback(capacity=32, warmup=2, dtype=dtype)
    fresh.attach(other)
    other.load_weights(path)
    assert_same_rows(fresh.rows(), callback.rows())
    again = other.fit(x, y, callbacks=[fresh], **FIT)
    expected = model.fit(x, y, callbacks=[callback], **FIT)
    assert again.history == expected.history
    plain = make(kind, loss=InBatchLoss())
    plain.load_weights(path)


@pytest.mark.parametrize("capacity", [5, 32, 40])
def test_the_capacity_may_change(capacity, data, tmp_path):
    path = str(tmp_path / "model.weights.h5")
    model, callback = trained(data)
    model.save_weights(path)
    other, fresh = make(loss=InBatchLoss()), XBMCallback(capacity=capacity)
    fresh.attach(other)
    other.load_weights(path)
    assert_same_rows(fresh.rows(), type(fresh.rows())(*(column[-capacity:] for column in callback.rows())))
    assert int(keras.ops.convert_to_numpy(fresh.memory.step.value)) == 7


def test_a_file_without_a_memory_loads_as_an_empty_one(data, tmp_path):
    path = str(tmp_path / "model.weights.h5")
    make(loss=InBatchLoss()).save_weights(path)
    model, callback = trained(data)
    model.load_weights(path)
    assert len(callback.rows().labels) == 0
    assert int(keras.ops.convert_to_numpy(callback.memory.step.value)) == 0


def test_a_memory_that_does_not_fit_is_refused(data, tmp_path):
    _, callback = trained(data)
    store = {}
    callback.memory.save_own_variables(store)
    before = callback.rows()
    other = {**store, "embeddings": store["embeddings"][:, :2]}
    for damaged, message in [
        (other, "rows of 2 dimensions, this one of 4"),
        ({**store, "count": np.asarray(99)}, "do not belong together"),
        ({name: store[name] for name in ("embeddings", "labels")}, "has no count, cursor, ids"),
        ({**store, "embeddings": store["embeddings"] * np.inf}, "not finite"),
    ]:
        with pytest.raises(ValueError, match=message):
            callback.memory.load_own_variables(damaged)
        assert_same_rows(callback.rows(), before)


class Crash(keras.callbacks.Callback):
    def on_epoch_begin(self, epoch, logs=None):
        if epoch == 2:
            raise KeyboardInterrupt


@pytest.mark.parametrize("order", [1, -1], ids=["before", "after"])
def test_backup_and_restore_is_uninterrupted(order, data, tmp_path):
    x, y = data
    uninterrupted = make().fit(x, y, epochs=4, callbacks=[XBMCallback(capacity=32, warmup=2)], **FIT)

    def callbacks(memory):
        return [memory, keras.callbacks.BackupAndRestore(str(tmp_path))][::order]

    with pytest.raises(KeyboardInterrupt):
        make().fit(x, y, epochs=4, callbacks=[*callbacks(XBMCallback(capacity=32, warmup=2)), Crash()], **FIT)
    resumed = make().fit(x, y, epochs=4, callbacks=callbacks(XBMCallback(capacity=32, warmup=2)), **FIT)
    for name, values in uninterrupted.history.items():
        assert resumed.history[name] == values[2:], name


def test_a_memory_of_another_backend_loads(data):
    """Files hold NumPy arrays, possibly int64 from another backend."""
    x, y = data
    simulated = Simulation(weights_at_first(), capacity=32, warmup=2).fit(x, y, epochs=1)
    model, callback = make(), XBMCallback(capacity=32, warmup=2)
    callback.attach(model).load_own_variables(named(simulated.state))
    model.set_weights([simulated.W])
    history = model.fit(x, y, epochs=2, callbacks=[callback], **FIT)
    simulated.fit(x, y, epochs=2)
    np.testing.assert_allclose(history.history["loss"], simulated.history["loss"][1:], rtol=1e-5)
    np.testing.assert_allclose(weight(model), simulated.W, rtol=0, atol=1e-6)


@pytest.mark.not_on("torch", reason="Keras exports a SavedModel from TensorFlow and JAX only")
@pytest.mark.not_on("jax", reason="a SavedModel from JAX needs jax2tf, which this JAX lacks")
def test_a_saved_model_has_no_memory(data, tmp_path):
    import tensorflow as tf

    model, _ = trained(data, capacity=4096)
    model.export(str(tmp_path / "export"), verbose=False)
    served = tf.saved_model.load(str(tmp_path / "export"))
    np.testing.assert_allclose(served.serve(data[0]), model.predict(data[0], verbose=0), rtol=1e-6)
    assert sum(file.stat().st_size for file in tmp_path.rglob("variables.data*")) < 4096 * DIM


@pytest.mark.not_on("torch", reason="writes in place, eagerly")
@pytest.mark.not_on("tensorflow", reason="writes into variables with scatter")
def test_no_copy_of_the_memory_in_the_compiled_step(data):
    """The compiled JAX train step, with a memory far larger than the batch; without donation there would be copies."""
    import jax

    capacity = 4099
    compiled = {}

    class Look(keras.callbacks.Callback):
        def on_train_begin(self, logs=None):
            model = self.model
            state = model._get_jax_state(
                trainable_variables=True,
                non_trainable_variables=True,
                optimizer_variables=True,
                metrics_variables=True,
            )
            for donated in (0, ()):
                step = jax.jit(model.train_step, donate_argnums=donated)
                compiled[donated] = step.lower(state, (data[0][:8], data[1][:8])).compile().as_text()

    make().fit(*data, callbacks=[XBMCallback(capacity=capacity, warmup=0), Look()], **FIT)

    def copies(text, shape):
        return [line for line in text.splitlines() if re.search(rf"= {re.escape(shape)}\S* copy(-start)?\(", line)]

    for shape in (f"f32[{capacity},{DIM}]", f"s32[{capacity}]"):  # rows; labels, ids and steps
        assert copies(compiled[0], shape) == []
        assert copies(compiled[()], shape) != []
