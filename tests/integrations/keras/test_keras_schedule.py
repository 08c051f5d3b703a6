"""The schedule of the memory term under Keras: options of the callback, and of a layer and its configuration."""

import numpy as np

from xbm.integrations.keras import XBM, XBMCallback

OPTIONS = {"settle": 4.0, "ramp": 4, "weight": 0.5}


def test_options_reach_the_objective_and_the_configuration():
    callback, layer = XBMCallback(**OPTIONS, ids="id"), XBM(capacity=32, warmup=1, **OPTIONS)
    copied = XBM.from_config(layer.get_config())
    for one in (callback, layer, copied):
        assert {name: getattr(one.objective, name) for name in OPTIONS} == OPTIONS
    x, labels = np.random.default_rng(0).normal(size=(8, 3)).astype("float32"), np.arange(8) % 3
    for _ in range(3):
        layer(x, labels, np.arange(8), training=True)
    assert int(layer.state().warmup.counted) == 2
    assert layer.report["memory_loss"] > 0
