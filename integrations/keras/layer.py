"""The layer: the memory and its loss for custom training steps and functional graphs."""

from collections.abc import Mapping
from typing import Any, Unpack

import keras
from keras.src.backend.common.stateless_scope import get_stateless_scope

from xbm import backends, checks
from xbm.integrations.keras import host
from xbm.integrations.keras.graph import refuse_replicas, strategy
from xbm.integrations.keras.losses import deserialized, serialized
from xbm.integrations.keras.memory import Memory, row_dtype
from xbm.losses import LossLike
from xbm.memory_state import Rows
from xbm.objective import Objective, Options, objective_of
from xbm.options import accepts
from xbm.report import REPORT


@accepts(Objective)
@keras.saving.register_keras_serializable(package="xbm")
class XBM(Memory, keras.layers.Layer):
    """In-batch loss plus memory loss of embeddings (B, D) and labels (B,); with `training=True` it stores its batch.

    L = (1/B) sum_i (L_i^batch + weight L_i^memory). The memory is among the layer's non-trainable variables. Use the
    layer in a subclassed or functional model; Keras does not see it as an attribute of a Sequential model.

    Parameters
    ----------
    capacity : int
        M, the most rows the memory holds; about M x (4 D + 24) bytes in float32.
    loss : str, PairLoss or callable
        Pair loss of both terms: a name among `xbm.losses.LOSSES` ("contrastive", "triplet", "nt-xent", ...), a loss, or
        a function `(S, positive, negative) -> (B,)`. A layer with functions cannot be saved with its model; its weights
        can.
    objective : Objective, optional
        The loss and all options in one object, in place of `loss` and the options below.
    dtype : str
        Dtype of the stored rows: "float32", "bfloat16", "float16" or "float64".
    passthrough : bool
        Add the loss to the model's losses and return the embeddings: for a functional graph, whose model is then
        compiled with no loss, or another one.
    name : str, optional
        Name of the layer.
    {options}

    Raises
    ------
    TypeError, ValueError
        If an option is out of range, saying what is accepted.

    Examples
    --------
    >>> import keras, numpy as np
    >>> from xbm.integrations.keras import XBM
    >>> layer = XBM(capacity=256, warmup=2)
    >>> for _ in range(4):
    ...     x, labels = np.random.rand(16, 8).astype("float32"), np.arange(16) % 5
    ...     loss = layer(x, labels, training=True)
    >>> layer.rows().embeddings.shape
    (64, 8)

    References
    ----------
    Wang, Zhang, Huang, Scott, "Cross-Batch Memory for Embedding Learning", CVPR 2020, arXiv 1912.06798.
    """

    def __init__(
        self,
        capacity: int = 8192,
        loss: LossLike | None = None,
        *,
        objective: Objective | None = None,
        dtype: str = "float32",
        passthrough: bool = False,
        name: str | None = None,
        **options: Unpack[Options],
    ) -> None:
        # No autocast: the core computes in float32 from embeddings of any dtype, whatever the policy.
        keras.layers.Layer.__init__(self, name=name, autocast=False, dtype="float32")
        checks.whole_number("capacity", capacity, at_least=1)
        checks.flag("passthrough", passthrough)
        self.capacity, self.row_dtype, self.passthrough = capacity, row_dtype(dtype), passthrough
        self.has_stored = False  # in a step, which can still drop it
        self.objective = objective_of(objective, loss, options)
        if self.objective.compensate is not None and self.objective.compensate.probes > 0:
            raise ValueError(
                "the layer cannot embed the rows of Compensation(probes=...): use the XBMCallback, or call "
                "xbm.Objective.move between steps"
            )

    def build(self, embeddings_shape: Any, labels_shape: Any = None, ids_shape: Any = None) -> None:
        """Make the variables."""
        self.figures = keras.Variable(
            "zeros", shape=(len(REPORT),), dtype="float32", trainable=False, autocast=False, name="figures"
        )
        if not self.begun:
            self.begin(embeddings_shape[-1])

    def __call__(self, embeddings: Any, labels: Any = None, ids: Any = None, **keywords: Any) -> Any:
        """Raise on integers that JAX would truncate, then call the layer."""
        host.refuse_large("labels", labels)
        host.refuse_large("ids", ids)
        host.refuse_large("key_labels", keywords.get("key_labels"))
        return super().__call__(embeddings, labels, ids, **keywords)

    def call(
        self,
        embeddings: Any,
        labels: Any = None,
        ids: Any = None,
        keys: Any = None,
        key_labels: Any = None,
        training: bool | None = None,
    ) -> Any:
        """Return the loss, or the embeddings; in training store the batch first.

        Parameters
        ----------
        embeddings : (B, D) floating point
            Anchors, not normalised.
        labels : (B,) integer, optional
            Classes of the anchors. If left out, samples with equal ids are one class, query i and key i are one class,
            and any other sample is a class of its own.
        ids : (B,) integer, optional
            Samples of the anchors (and of the keys), >= 0, negative = none: excludes a sample's older rows from its
            pairs, and measures drift.
        keys : (K, D) floating point, optional
            Rows to store and compare with instead of the embeddings: two towers, or a momentum encoder. Queries are not
            compared with queries. Key i is a candidate of query i, in the batch and in the memory; with ids, older keys
            with the query's id are not.
        key_labels : (K,) integer, optional
            Classes of the keys; the labels of the anchors if left out. Required if K is not B.
        training : bool, optional
            Whether to store the batch and count the call; the mode of the model's call if left out.

        Returns
        -------
        () float32, or float64 if an input is; with `passthrough`, the embeddings

        Raises
        ------
        TypeError, ValueError
            If an input does not fit; nothing is stored or counted then.
        RuntimeError
            If the step would lose the memory: under a TensorFlow strategy with several replicas, and in a JAX step that
            the layer's variables are not passed to.
        """
        refuse_replicas(strategy())
        before, given = self.state(), {"ids": ids, "keys": keys, "key_labels": key_labels}
        if training:
            self._refuse_loss_of_state(embeddings)
            self.has_stored = True
            result = self.objective.step(before, embeddings, labels, **given)
            self.keep(before, result.state)
            self.figures.assign(result.report.stacked())
        else:
            result = self.objective.evaluate(before, embeddings, labels, **given, gradient=True)
        if not self.passthrough:
            return result.loss
        self.add_loss(result.loss)
        return embeddings

    def compute_output_spec(self, embeddings: Any, *others: Any, **keywords: Any) -> Any:
        """Return the shape and dtype of the result of `call`."""
        return keras.KerasTensor(*((embeddings.shape, embeddings.dtype) if self.passthrough else ((), "float32")))

    @property
    def report(self) -> Mapping[str, float]:
        """Figures of the last training call, {name: float}, see `xbm.Report`; empty before the layer is built."""
        if not self.built:
            return {}
        self._refuse_forgotten()
        return dict(zip(REPORT, keras.ops.convert_to_numpy(self.figures.value).tolist(), strict=True))

    def rows(self) -> Rows:
        """Return the filled rows as NumPy arrays, oldest first: `embeddings` (n, D), `labels`, `ids`, `stored_at`."""
        self._refuse_forgotten()
        return super().rows()

    def get_config(self) -> dict[str, Any]:
        """Return the options."""
        own = {"name": self.name, "capacity": self.capacity, "dtype": self.row_dtype, "passthrough": self.passthrough}
        return own | {name: serialized(value) for name, value in self.objective.values().items()}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "XBM":
        """Return a layer from the result of `get_config`."""
        return cls(**{name: deserialized(value) for name, value in config.items()})

    def _refuse_forgotten(self) -> None:
        """Raise if a JAX step stored into the memory and then dropped it."""
        if self.has_stored and int(keras.ops.convert_to_numpy(self.step.value)) == 0:
            raise RuntimeError(
                f"{self.name!r} was called in training, but its variables are unchanged: a JAX step must return the "
                f"non_trainable_variables that stateless_call returns, and assign them to the model at the end"
            )

    def _refuse_loss_of_state(self, embeddings: Any) -> None:
        """On JAX, raise in a step that does not carry the layer's variables: its rows would be lost."""
        if keras.backend.backend() != "jax":
            return
        scope, (_, ops) = get_stateless_scope(), backends.of(embeddings)
        carried = None if scope is None else scope.get_current_value(self.step)
        if carried is None and (scope is not None or ops.is_compiling(embeddings)):
            raise RuntimeError(
                f"{self.name!r} was called in a JAX step without its variables, so the rows that it stores would be "
                f"lost: make the layer a part of a subclassed or functional model, call the model by "
                f"model.stateless_call(trainable_variables, non_trainable_variables, ...), and keep the "
                f"non_trainable_variables that it returns"
            )
