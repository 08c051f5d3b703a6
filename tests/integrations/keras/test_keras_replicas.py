"""A TensorFlow strategy of replicas: in a file of its own, since devices are split before TensorFlow starts."""

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


@pytest.mark.parametrize("case", CASES)
def test_replicas_are_refused(case):
    model, fit = CASES[case]
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(model=model, fit=fit)], capture_output=True, text=True, timeout=300
    )
    assert run.returncode != 0
    assert "MirroredStrategy runs 2 replicas, each of which would see and store its own part" in run.stderr
