"""Several devices. Each test is a separate process, because devices are configured before a backend starts."""

import os
import subprocess
import sys

import pytest

SCRIPT = """
import keras, numpy as np, tensorflow as tf
from xbm.integrations.keras import XBM, XBMCallback

cpu = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
x, y = np.zeros((8, 4), "float32"), np.arange(8)
with strategy.scope():
    {model}
    model.compile("sgd")
{fit}
"""

CASES = {
    "callback": (
        "model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])",
        "model.fit(x, y, verbose=0, callbacks=[XBMCallback(capacity=8)])",
    ),
    "layer": (
        "a, b = keras.Input((4,)), keras.Input((), dtype='int64'); "
        "model = keras.Model([a, b], XBM(capacity=8, passthrough=True)(keras.layers.Dense(2)(a), b))",
        "model.fit([x, y], verbose=0)",
    ),
}


@pytest.mark.not_on("torch", "jax", reason="distribution strategies exist in TensorFlow only")
@pytest.mark.parametrize("case", CASES)
def test_replicas_are_refused(case):
    model, fit = CASES[case]
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(model=model, fit=fit)], capture_output=True, text=True, timeout=300
    )
    assert run.returncode != 0
    assert "expected 1 replica, got 2 with MirroredStrategy" in run.stderr


PARALLEL = """
import keras, numpy as np
from tests.integrations.keras.simulation import Simulation, make, weights_at_first
from xbm.integrations.keras import XBMCallback

assert len(keras.distribution.list_devices()) == 2
keras.distribution.set_distribution(keras.distribution.DataParallel())
x, y = np.random.default_rng(0).normal(size=(48, 6)).astype("float32"), np.arange(48) % 5
model, callback = make(), XBMCallback(capacity=32, warmup=2)
history = model.fit(x, y, batch_size=8, epochs=2, shuffle=False, verbose=0, callbacks=[callback])
Simulation(weights_at_first(), capacity=32, warmup=2).fit(x, y, epochs=2).agrees(history, model, callback)
try:
    model.fit(x, y + 2**40, batch_size=8, verbose=0, callbacks=[callback])
except ValueError as refused:
    assert "labels must fit into" in str(refused)
else:
    raise AssertionError("labels were cut off")
"""


@pytest.mark.not_on("torch", "tensorflow", reason="keras.distribution.DataParallel is tested on JAX only")
def test_data_parallel_sees_the_whole_batch():
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    run = subprocess.run([sys.executable, "-c", PARALLEL], capture_output=True, text=True, timeout=300, env=environment)
    assert run.returncode == 0, run.stderr
