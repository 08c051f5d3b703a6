"""Selection of embeddings, labels and ids, and that labels and ids stay exact integers."""

import keras
import numpy as np
import pytest

import xbm
from tests.integrations.keras.simulation import DIM, RATE, Simulation, dense, make, weights_at_first
from xbm.integrations.keras import XBM, InBatchLoss, XBMCallback

FIT = {"batch_size": 8, "shuffle": False, "verbose": 0}


def classifier(outputs):
    """Return a model with an embedding and a classification, whose gradient does not reach the embedding."""
    inputs = keras.Input((6,), name="image")
    embedding = dense()(inputs)
    frozen = keras.layers.Dense(5, name="logits", trainable=False)
    model = keras.Model(inputs, outputs(embedding, frozen(embedding)))
    return model


def simulated(x, y, **options):
    simulation = Simulation(weights_at_first(), **({"capacity": 32, "warmup": 2} | options))
    return simulation.fit(x, y, epochs=2)


CHOICES = {
    "an output of a dict": (lambda e, c: {"embedding": e, "logits": c}, "embedding"),
    "an output of a list": (lambda e, c: [e, c], "embedding"),
    "a layer before the output": (lambda e, c: c, "embedding"),
    "a function of the outputs": (lambda e, c: [c, e], lambda y_pred: y_pred[1]),
}


@pytest.mark.parametrize("choice", CHOICES)
def test_which_output_is_the_embedding(choice, data):
    x, y = data
    outputs, name = CHOICES[choice]
    model = classifier(outputs)
    model.compile(keras.optimizers.SGD(RATE))
    callback = XBMCallback(capacity=32, warmup=2, embeddings=name)
    history = model.fit(x, y, epochs=2, callbacks=[callback], **FIT)
    simulated(x, y).agrees(history, model, callback)
    assert not any("call" in vars(layer) for layer in model.layers)


def test_a_layer_of_a_subclassed_model(data):
    x, y = data

    class Classifier(keras.Model):
        def __init__(self):
            super().__init__()
            self.embedding, self.head = dense(), keras.layers.Dense(5, trainable=False)

        def call(self, x):
            return self.head(self.embedding(x))

    model = Classifier()
    model.compile(keras.optimizers.SGD(RATE))
    callback = XBMCallback(capacity=32, warmup=2, embeddings="embedding", dim=DIM)
    history = model.fit(x, y, epochs=2, callbacks=[callback], **FIT)
    simulated(x, y).agrees(history, model, callback)


@pytest.mark.parametrize("labels", [None, "logits"])
def test_a_classifier_and_a_memory(labels, data):
    """Two outputs: loss and metric of `compile` on one, the memory on the other."""
    x, y = data
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model = classifier(lambda e, c: {"embedding": e, "logits": c})
    model.compile(keras.optimizers.SGD(RATE), loss={"logits": loss}, metrics={"logits": ["accuracy"]})
    before = model.evaluate(x[:8], {"embedding": y[:8], "logits": y[:8]}, verbose=0, return_dict=True)
    callback = XBMCallback(capacity=32, warmup=2, embeddings="embedding", labels=labels)
    targets = {"embedding": y + 10, "logits": y}
    history = model.fit(x[:8], {name: part[:8] for name, part in targets.items()}, callbacks=[callback], **FIT)
    in_batch = (
        xbm.Objective().evaluate(xbm.Objective().init(capacity=1, dim=DIM), x[:8] @ weights_at_first(), y[:8]).loss
    )
    assert history.history["loss"][0] == pytest.approx(before["loss"] + float(in_batch), rel=1e-5)
    history = model.fit(x, targets, epochs=2, callbacks=[callback], **FIT)
    assert set(history.history) == {"loss", "logits_accuracy", "memory_loss", "memory_pairs", "memory_fill"}
    assert callback.rows().labels.tolist() == targets["embedding" if labels is None else labels][-32:].tolist()


LABELS = {
    "y": (None, lambda x, y: (x, y)),
    "y in a column": (None, lambda x, y: (x, y[:, None])),
    "a key of y": ("class", lambda x, y: (x, {"class": y, "colour": y * 0})),
    "the only key of y": (None, lambda x, y: (x, {"class": y})),
    "a key of x": ("class", lambda x, y: ({"image": x, "class": y}, None)),
    "a function": (lambda x, y: y["fine"] // 10, lambda x, y: (x, {"fine": y * 10 + 3, "colour": y})),
}


@pytest.mark.parametrize("choice", LABELS)
def test_which_data_are_the_labels(choice, data):
    labels, given = LABELS[choice]
    x, y = data
    model = make("subclassed")
    callback = XBMCallback(capacity=32, warmup=2, labels=labels)
    inputs, targets = given(x, y)
    history = model.fit(inputs, targets, epochs=2, callbacks=[callback], **FIT)
    simulated(x, y).agrees(history, model, callback)


def test_data_from_a_generator(data):
    x, y = data

    class Batches(keras.utils.PyDataset):
        def __len__(self):
            return 7

        def __getitem__(self, i):
            return x[8 * i : 8 * i + 8], y[8 * i : 8 * i + 8]

    model, callback = make(), XBMCallback(capacity=32, warmup=2)
    history = model.fit(Batches(), epochs=2, shuffle=False, verbose=0, callbacks=[callback])
    simulated(x, y).agrees(history, model, callback)


REFUSED = {
    "one-hot": (lambda x, y: (x, np.eye(5, dtype="int64")[y]), {}, "take the argmax of one-hot"),
    "floats": (lambda x, y: (x, y.astype("float32")), {}, "labels must be integers, got"),
    "no y": (lambda x, y: (x, None), {}, "labels must be integers"),
    "many": (lambda x, y: (x, {"a": y, "b": y}), {}, r"one of the 2 parts of y \(a, b\) as the labels"),
    "unknown": (lambda x, y: (x, {"a": y, "b": y}), {"labels": "c"}, r"labels='c' must be a key of y \(a, b\)"),
    "ids": (lambda x, y: (x, y), {"ids": "id"}, "ids='id' must be a key"),
    "a layer": (lambda x, y: (x, y), {"embeddings": "nonsense"}, "must name an output .* got 'nonsense'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_data_are_refused(case, data):
    given, options, message = REFUSED[case]
    inputs, targets = given(*data)
    with pytest.raises((ValueError, TypeError), match=message):
        make().fit(inputs, targets, callbacks=[XBMCallback(capacity=8, **options)], **FIT)


def test_several_outputs_need_a_name(data):
    model = classifier(lambda e, c: [e, c])
    model.compile("sgd")
    with pytest.raises(ValueError, match=r"the model has 2 outputs \(embedding, logits\)"):
        model.fit(*data, callbacks=[XBMCallback(capacity=8)], **FIT)


def stored(labels, x):
    callback = XBMCallback(capacity=64, warmup=0, ids="id")
    make("subclassed").fit({"image": x, "id": labels + 1}, labels, callbacks=[callback], **FIT)
    rows = callback.rows()
    assert rows.ids.tolist() == (labels + 1).tolist()
    return rows.labels


@pytest.mark.parametrize("dtype", ["int64", "int32"])
def test_integers_beyond_24_bits_are_exact(dtype, data):
    """Labels that float32 would merge: 2^24 and 2^24 + 1."""
    x, _ = data
    labels = (2**24 + np.arange(50)).astype(dtype)
    assert stored(labels, x).tolist() == labels.tolist()


@pytest.mark.not_on("jax", reason="int32 without jax_enable_x64: an error is raised")
def test_integers_beyond_32_bits_are_exact(data):
    x, _ = data
    labels = 2**40 + np.arange(50)
    assert stored(labels, x).tolist() == labels.tolist()
    loss = InBatchLoss()
    assert float(loss(labels[:2] * 0 + 2**40 + np.arange(2), x[:2])) == float(loss(np.arange(2), x[:2]))


@pytest.mark.not_on("torch", "tensorflow", reason="labels and ids are int64")
@pytest.mark.parametrize("ahead", [False, True], ids=["on the host", "moved ahead"])
@pytest.mark.parametrize("where", ["labels", "ids", "validation"])
def test_integers_too_large_are_refused(where, ahead, data, monkeypatch):
    """JAX silently truncates 2^40 + 5 to 5; on an accelerator, this happens before the step."""
    import jax

    if ahead:
        monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    x, y = data
    ids, large = np.arange(50), 2**40 + y
    inputs, labels, validation = {"image": x, "id": ids}, y, ({"image": x, "id": ids}, y)
    if where == "labels":
        labels = large
    elif where == "ids":
        inputs = {"image": x, "id": large}
    else:
        validation = ({"image": x, "id": ids}, large)
    callback = XBMCallback(capacity=8, ids="id")
    what = "ids" if where == "ids" else "labels"
    with pytest.raises(ValueError, match=f"{what} must fit into int32, .* got 1099511627776 to 1099511627780"):
        make("subclassed").fit(inputs, labels, validation_data=validation, callbacks=[callback], **FIT)
    with pytest.raises(ValueError, match="labels must fit into int32"):
        XBM(capacity=8)(x, large)
    history = make("subclassed").fit({"image": x, "id": ids}, y, callbacks=[callback], **FIT)
    assert np.isfinite(history.history["loss"][0])
