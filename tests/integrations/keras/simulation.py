"""Reference for `fit`: training a linear model in NumPy with the core; and the same model in Keras, in every form."""

import keras
import numpy as np

import xbm

DIM = 4
RATE = 0.05


class Simulation:
    """SGD on embeddings x W, over the core's loss and gradient."""

    def __init__(self, W, *, capacity, **options):
        self.W = np.array(W)
        self.objective = xbm.Objective(**options)
        self.state = self.objective.init(capacity=capacity, dim=self.W.shape[1])
        self.history = {}

    def fit(self, x, y, *, epochs, batch_size=8, ids=None, validation=None):
        for _ in range(epochs):
            seen = []
            for start in range(0, len(x), batch_size):
                rows = slice(start, start + batch_size)
                given = None if ids is None else ids[rows]
                self._embed_again(x)
                step = self.objective.step(self.state, x[rows] @ self.W, y[rows], ids=given)
                self.state = step.state
                self.W -= RATE * (x[rows].T @ step.gradient)
                seen.append((len(y[rows]), step))
            self._record("", seen, ids)
            if validation is not None:
                parts = [slice(start, start + batch_size) for start in range(0, len(validation[1]), batch_size)]
                seen = [self._evaluated(*(one[rows] for one in validation)) for rows in parts]
                self._record("val_", seen, ids)
        return self

    def _embed_again(self, x):
        """Make the round that is due, if one is; row i of x is sample i."""
        compensate = self.objective.compensate
        if compensate is not None and compensate.due(int(self.state.memory.step)):
            probes = compensate.probe(self.state.memory)
            self.state = self.objective.move(self.state, probes, x[probes.ids] @ self.W)

    def _evaluated(self, x, y):
        return len(y), self.objective.evaluate(self.state, x @ self.W, y, gradient=True)

    def _record(self, prefix, seen, ids):
        def mean(values):
            known = [(size, value) for (size, _), value in zip(seen, values, strict=True) if not np.isnan(value)]
            return sum(s * v for s, v in known) / sum(s for s, _ in known) if known else np.nan

        reports = [step.report._asdict() for _, step in seen]
        epoch = {
            "loss": mean([float(step.loss) for _, step in seen]),
            "memory_loss": mean([r["memory_loss"] for r in reports]),
            "memory_pairs": mean([r["pairs"] for r in reports]),
            "memory_fill": reports[-1]["fill"],
        }
        if ids is not None:
            epoch["memory_drift"] = mean([r["drift"] for r in reports])
        compensate = self.objective.compensate
        if compensate is not None and (compensate.probes or compensate.returning):
            epoch |= {f"memory_{name}": mean([r[name] for r in reports]) for name in ("drift_before", "drift_after")}
        for name, value in epoch.items():
            self.history.setdefault(prefix + name, []).append(float(value))

    def agrees(self, history, model, callback, *, rtol=1e-5, weights=1e-6):
        """Assert that a fit by Keras equals this one."""
        assert set(history.history) == set(self.history)
        for name, values in self.history.items():
            # A pair's weight may underflow on one library only.
            known = 5e-3 if name.endswith("pairs") else rtol
            np.testing.assert_allclose(history.history[name], values, rtol=known, atol=1e-6, err_msg=name)
        np.testing.assert_allclose(weight(model), self.W, rtol=0, atol=weights)
        self.remembers(callback.rows(), atol=weights)

    def remembers(self, rows, *, atol=1e-6):
        """Assert that a memory holds these rows."""
        expected = xbm.rows(self.state.memory)
        np.testing.assert_allclose(rows.embeddings, expected.embeddings, rtol=0, atol=atol)
        for name in ("labels", "ids", "stored_at"):
            np.testing.assert_array_equal(getattr(rows, name), getattr(expected, name), err_msg=name)


class Subclassed(keras.Model):
    def __init__(self):
        super().__init__()
        self.embedding = dense()

    def call(self, x):
        return self.embedding(x["image"] if isinstance(x, dict) else x)


def dense(name="embedding"):
    return keras.layers.Dense(DIM, use_bias=False, kernel_initializer=first_weights, name=name)


@keras.saving.register_keras_serializable(package="tests")
def first_weights(shape, dtype=None):
    """Initializer with the same weights on every backend."""
    values = np.random.default_rng(1).normal(size=tuple(int(n) for n in shape)) / np.sqrt(shape[0])
    return keras.ops.convert_to_tensor(values.astype("float32"), dtype=dtype)


def weights_at_first(features=6, dim=DIM):
    return (np.random.default_rng(1).normal(size=(features, dim)) / np.sqrt(features)).astype("float32")


def weight(model):
    """Return the model's initial weights as a NumPy array."""
    return keras.ops.convert_to_numpy(model.trainable_variables[0].value).astype("float32")


def make(kind="functional", *, compiled=True, **options):
    """Return x W as a Keras model of the given kind, compiled with plain SGD."""
    if kind == "functional":
        inputs = keras.Input((6,))
        model = keras.Model(inputs, dense()(inputs))
    elif kind == "sequential":
        model = keras.Sequential([keras.Input((6,)), dense()])
    elif kind == "sequential, lazy":
        model = keras.Sequential([dense()])
    else:
        model = Subclassed()
        if kind == "subclassed, built":
            model(np.zeros((1, 6), "float32"))
    if compiled:
        model.compile(keras.optimizers.SGD(RATE), **options)
    return model


KINDS = ["functional", "sequential", "sequential, lazy", "subclassed", "subclassed, built"]
