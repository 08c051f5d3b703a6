"""The weight of the memory in Keras: the core's options, in the callback and in a layer's configuration."""

import numpy as np

from xbm.integrations.keras import XBM, XBMCallback

OPTIONS = {"settle": 4.0, "ramp": 4, "balance": 0.5, "max_age": 3, "half_life": 2.0}


def test_options_reach_the_objective_and_the_configuration():
    callback, layer = XBMCallback(**OPTIONS, ids="id"), XBM(capacity=32, warmup=1, **OPTIONS)
    copied = XBM.from_config(layer.get_config())
    for one in (callback, layer, copied):
        assert {name: getattr(one.objective, name) for name in OPTIONS} == OPTIONS
    x, labels = np.random.default_rng(0).normal(size=(8, 3)).astype("float32"), np.arange(8) % 3
    for _ in range(3):
        layer(x, labels, np.arange(8), training=True)
    assert int(layer.motion().settled) == 2
    assert layer.report["memory_loss"] > 0
