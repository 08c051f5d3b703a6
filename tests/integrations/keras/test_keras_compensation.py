"""Drift compensation: the memory moves exactly as in the core, and nothing else changes."""

import keras
import numpy as np
import pytest

import xbm
from tests.integrations.keras.simulation import DIM, RATE, Simulation, dense, make, weights_at_first
from xbm.compensation import Motion
from xbm.integrations.keras import XBM, XBMCallback
from xbm.state import named

FIT = {"batch_size": 8, "shuffle": False, "verbose": 0}
IDS = np.arange(50)
CAPACITY = 64
FOLLOW = xbm.Compensation(window=8)
MAPS = xbm.Compensation(window=8, probes=12, every=3, ridge=0.3)


def with_ids(x):
    return {"image": x, "id": IDS}


def tidal(data):
    """Add a slow drift that can be followed; otherwise the motion of batches of 8 is only noise."""
    x, y = data
    return x + np.outer(2 * np.sin(IDS / 8), [1, -1, 1, 0, 0, 1]).astype("float32"), y


def motion_of(memory):
    return Motion(*(np.array(keras.ops.convert_to_numpy(value)) for value in memory.state().motion))


def assert_same_motion(one, other, **tolerance):
    for name in Motion._fields:
        np.testing.assert_allclose(getattr(one, name), getattr(other, name), err_msg=name, **tolerance)


@pytest.mark.parametrize("compensate", [FOLLOW, MAPS], ids=["follow", "maps"])
def test_is_the_core(compensate, data):
    """Validation does not move the memory; with map fits there are two more logs."""
    x, y = tidal(data)
    given = {"data": {"image": x}} if compensate.probes else {}
    model = make("subclassed")
    callback = XBMCallback(capacity=CAPACITY, warmup=2, ids="id", compensate=compensate, **given)
    validation = ({"image": x[:12], "id": np.full(12, -1)}, y[:12])
    history = model.fit(with_ids(x), y, epochs=3, callbacks=[callback], validation_data=validation, **FIT)
    simulated = Simulation(weights_at_first(), capacity=CAPACITY, warmup=2, compensate=compensate)
    simulated.fit(x, y, epochs=3, ids=IDS, validation=(x[:12], y[:12]))
    simulated.agrees(history, model, callback, rtol=1e-4, weights=1e-5)
    assert_same_motion(motion_of(callback.memory), simulated.state.motion, rtol=1e-3, atol=1e-5)
    assert simulated.state.motion.trust > 0
    if compensate is MAPS:
        before, after = (history.history[f"memory_drift_{when}"] for when in ("before", "after"))
        assert all(0 < mean < was for mean, was in zip(after, before, strict=True))


class Draws(keras.layers.Layer):
    """A layer that changes all state a call may change: a seed, a counter and the model's losses."""

    def __init__(self):
        super().__init__()
        self.seeds = keras.random.SeedGenerator(0)

    def build(self, shape):
        self.calls = self.add_weight(shape=(), initializer="zeros", trainable=False)

    def call(self, x):
        self.calls.assign(self.calls + 1)
        self.add_loss(keras.ops.mean(x))
        return x + 0 * keras.random.normal(keras.ops.shape(x), seed=self.seeds)


def about_to_move(model, x, y, ids, **options):
    """Return a callback before a batch with a due round, with a memory after 7 steps."""
    simulated = Simulation(weights_at_first(), capacity=CAPACITY).fit(x, y, epochs=1, ids=ids)
    callback = XBMCallback(
        capacity=CAPACITY, ids="id", compensate=xbm.Compensation(probes=12, every=7, ridge=0.3), **options
    )
    callback.attach(model).load_own_variables(named(simulated.state))
    callback.set_model(model)
    return callback, simulated


@pytest.mark.parametrize("compile_options", [{}, {"run_eagerly": True}], ids=str)
def test_a_round_moves_the_memory_and_nothing_else(compile_options, data):
    """Rows come from the named layer, with batch statistics; unknown samples get no rows."""
    x, y = data
    inputs = keras.Input((6,))
    norm = keras.layers.BatchNormalization(center=False, scale=False, name="norm")
    model = keras.Model(inputs, keras.layers.Dense(3)(norm(Draws()(dense()(inputs)))))
    model.compile(keras.optimizers.SGD(RATE, momentum=0.9), **compile_options)
    model.optimizer.build(model.trainable_variables)
    asked = []

    def inputs_of(ids):
        asked.append(ids)
        return x[ids]

    ids = np.where(IDS % 6 == 1, -1, IDS)
    callback, simulated = about_to_move(model, x, y, ids, data=inputs_of, embeddings="norm")
    others = [*model.variables, *model.optimizer.variables, callback.memory.figures, callback.memory.sums]
    before = [np.array(keras.ops.convert_to_numpy(one.value)) for one in others]
    losses = len(model.losses)
    callback.on_train_batch_begin(0)
    callback.on_train_batch_begin(1)
    assert len(asked) == 1
    assert len(model.losses) <= losses
    for variable, value in zip(others, before, strict=True):
        np.testing.assert_array_equal(keras.ops.convert_to_numpy(variable.value), value, err_msg=variable.path)

    objective = callback.objective
    state = objective.begin(simulated.state.memory)
    probes = objective.compensate.probe(state.memory)
    known = probes.ids >= 0
    assert 8 <= known.sum() < 12
    assert set(asked[0]) == set(probes.ids[known])
    z = x[asked[0]] @ weights_at_first()
    z = (z - z.mean(axis=0)) / np.sqrt(z.var(axis=0) + 1e-3)
    simulated.state = objective.move(state, probes, z)
    simulated.remembers(callback.rows(), atol=1e-5)
    assert_same_motion(motion_of(callback.memory), simulated.state.motion, rtol=1e-4, atol=1e-5)
    assert simulated.state.motion.rejected == 0
    callback.on_train_batch_begin(0)  # of another epoch: steps are read anew, and no training came between
    assert len(asked) == 2
    callback.on_train_end()


def test_resumes_exactly(data, tmp_path):
    """A file without a motion resets the motion, and a file with a motion loads without compensation."""
    x, y = tidal(data)
    path = str(tmp_path / "model.weights.h5")
    options = {"compensate": MAPS, "data": {"image": x}}

    def attached(**options):
        model, callback = make("subclassed, built"), XBMCallback(capacity=CAPACITY, warmup=2, ids="id", **options)
        callback.attach(model)
        return model, callback

    def fit(model, callback):
        return model.fit(with_ids(x), y, callbacks=[callback], **FIT).history

    model, callback = attached(**options)
    fit(model, callback)
    model.save_weights(path)
    (again, resumed), (plain, without) = attached(**options), attached()
    for one in (again, plain):
        one.load_weights(path)
    np.testing.assert_equal(fit(again, resumed), fit(model, callback))
    np.testing.assert_array_equal(resumed.rows().embeddings, callback.rows().embeddings)
    assert_same_motion(motion_of(resumed.memory), motion_of(callback.memory), rtol=0)

    assert without.memory.state().motion is None
    plain.save_weights(path)
    model.load_weights(path)
    resumed.memory.clear()
    for one in (callback, resumed):
        assert motion_of(one.memory).trust == 0
        assert np.isnan(motion_of(one.memory).before)


def test_the_layer_moves_its_memory(data):
    x, y = tidal(data)
    layer = XBM(capacity=CAPACITY, warmup=2, passthrough=True, compensate=FOLLOW)
    assert XBM.from_config(layer.get_config()).objective == layer.objective
    image, label = keras.Input((6,), name="image"), keras.Input((), dtype="int32", name="label")
    model = keras.Model({"image": image, "label": label}, layer(dense()(image), label))
    model.compile(keras.optimizers.SGD(RATE))
    model.fit({"image": x, "label": y.astype("int32")}, **FIT)
    simulated = Simulation(weights_at_first(), capacity=CAPACITY, warmup=2, compensate=FOLLOW).fit(x, y, epochs=1)
    simulated.remembers(layer.rows(), atol=1e-5)
    assert_same_motion(motion_of(layer), simulated.state.motion, rtol=1e-3, atol=1e-5)
    layer.clear()
    assert motion_of(layer).trust == 0


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"data": np.zeros((50, 6))}, ValueError, r"data is for Compensation\(probes=\.\.\.\)"),
        ({"compensate": MAPS, "ids": "id"}, ValueError, "pass both or neither"),
        ({"compensate": MAPS, "data": np.zeros((50, 6))}, ValueError, "pass ids="),
        ({"compensate": MAPS, "ids": "id", "data": [1, 2]}, TypeError, r"callable as data\(ids\), got int"),
        ({"compensate": MAPS, "ids": "id", "data": (IDS, IDS[1:])}, ValueError, r"one length.*\(50,\), \(49,\)"),
    ],
    ids=["no probes", "no data", "no ids", "no arrays", "lengths"],
)
def test_what_is_missing_for_rounds_is_refused(options, error, message):
    with pytest.raises(error, match=message):
        XBMCallback(capacity=CAPACITY, **options)


def test_the_layer_refuses_rounds():
    with pytest.raises(ValueError, match=r"use the XBMCallback, or call xbm\.Objective\.move"):
        XBM(compensate=MAPS)


@pytest.mark.parametrize(
    ("by", "ids", "message"),
    [
        (lambda x: {"image": x[:20]}, IDS, "it has 20 rows, and ids reach"),
        (lambda x: lambda ids: {"image": x[ids][:-1]}, IDS, rf"of the 12 samples.*shape \(11, {DIM}\)"),
        (lambda x: {"image": x}, np.full(50, -1), "the memory rows have none"),
    ],
    ids=["beyond", "another number", "unknown"],
)
def test_what_cannot_be_embedded_is_refused(by, ids, message, data):
    x, y = data
    callback, _ = about_to_move(make("subclassed, built"), x, y, ids, data=by(x))
    before = callback.rows().embeddings
    with pytest.raises(ValueError, match=message):
        callback.on_train_batch_begin(0)
    np.testing.assert_array_equal(callback.rows().embeddings, before)
    callback.on_train_end()


def test_several_steps_at_once_leave_no_room_for_rounds(data):
    x, y = data
    model = make("subclassed", steps_per_execution=3)
    callback = XBMCallback(capacity=CAPACITY, ids="id", compensate=MAPS, data={"image": x})
    with pytest.raises(ValueError, match="steps_per_execution=3"):
        model.fit(with_ids(x), y, callbacks=[callback], **FIT)
