"""The layer: the memory and its loss for training steps and graphs of one's own."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, Literal

import keras
from keras.src.backend.common.stateless_scope import get_stateless_scope

from xbm import backends, checks, losses
from xbm.compensation import Compensation
from xbm.integrations.keras import host
from xbm.integrations.keras.graph import refuse_replicas, strategy
from xbm.integrations.keras.losses import deserialized, serialized
from xbm.integrations.keras.memory import Memory, row_dtype
from xbm.losses import LossLike, PairReduction
from xbm.memory import Rows
from xbm.mining import MinerLike
from xbm.objective import REPORT, Objective
from xbm.pairs import OfLabels


@keras.saving.register_keras_serializable(package="xbm")
class XBM(Memory, keras.layers.Layer):
    """In-batch loss plus memory loss of embeddings (B, D) and labels (B,); with `training=True` it stores its batch.

    L = (1/B) sum_i (L_i^batch + weight L_i^memory). The memory is among the layer's non-trainable variables. Make it a
    part of a subclassed or functional model (of a Sequential one Keras does not see it).

    Parameters
    ----------
    capacity : int
        M, the most rows the memory holds; about M x (4 D + 24) bytes in float32.
    loss, miner, weight, warmup, settle, ramp, balance, max_age, half_life
        See `XBMCallback`.
    reduction, in_batch, normalize, dtype, copies, on_nonfinite
        See `XBMCallback`.
    match, pair_weights, ignore_label
        See `XBMCallback`. A layer with a function is not saved with its model; its weights are.
    compensate : Compensation, optional
        How the memory follows the network, see `xbm.Compensation`; without `probes`, which a layer cannot embed.
    passthrough : bool
        Add the loss to the model's losses and return the embeddings as they are: for a functional graph, whose model
        is then compiled with no loss, or another.
    name : str, optional
        Of the layer.

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
        loss: LossLike = "contrastive",
        *,
        miner: MinerLike = None,
        weight: float = 1.0,
        warmup: int = 1000,
        settle: float | None = None,
        ramp: int = 0,
        balance: float | None = None,
        max_age: int | None = None,
        half_life: float | None = None,
        reduction: PairReduction | None = None,
        in_batch: bool = True,
        normalize: bool = True,
        dtype: str = "float32",
        copies: Literal["exclude", "keep", "replace"] = "exclude",
        match: OfLabels | None = None,
        pair_weights: OfLabels | None = None,
        ignore_label: int | None = None,
        on_nonfinite: Literal["skip", "raise"] = "skip",
        compensate: Compensation | None = None,
        passthrough: bool = False,
        name: str | None = None,
    ) -> None:
        # Embeddings come in the dtype they have: the core computes in float32 whatever the policy says.
        keras.layers.Layer.__init__(self, name=name, autocast=False, dtype="float32")
        checks.whole_number("capacity", capacity, at_least=1)
        checks.flag("passthrough", passthrough)
        self.capacity, self.row_dtype, self.passthrough = capacity, row_dtype(dtype), passthrough
        self.has_stored = False  # in some step, which may yet forget it
        self.loss, self.miner, self.reduction = loss, miner, reduction
        self.match: Any = match
        self.pair_weights: Any = pair_weights
        self.objective = Objective(
            loss=losses.get(loss, reduction),
            miner=miner,
            weight=weight,
            warmup=warmup,
            settle=settle,
            ramp=ramp,
            balance=balance,
            max_age=max_age,
            half_life=half_life,
            in_batch=in_batch,
            normalize=normalize,
            copies=copies,
            match=match,
            pair_weights=pair_weights,
            ignore_label=ignore_label,
            on_nonfinite=on_nonfinite,
            compensate=compensate,
        )
        if compensate is not None and compensate.probes > 0:
            raise ValueError(
                "the layer cannot embed the rows of Compensation(probes=...): use the XBMCallback, or call "
                "xbm.Compensation.move between steps"
            )
        self.moves = self.objective.needs_motion

    def build(self, embeddings_shape: Any, labels_shape: Any = None, ids_shape: Any = None) -> None:
        """Make the variables."""
        self.figures = keras.Variable(
            "zeros", shape=(len(REPORT),), dtype="float32", trainable=False, autocast=False, name="figures"
        )
        if not self.begun:
            self.begin(embeddings_shape[-1])

    def __call__(self, embeddings: Any, labels: Any = None, ids: Any = None, **keywords: Any) -> Any:
        """Refuse what JAX would cut off, then call the layer."""
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
            Classes of the anchors. Left out, each sample is a class of its own: those of equal ids are, and query i
            with key i.
        ids : (B,) integer, optional
            Samples of the anchors (and keys), >= 0, negative = none: keeps a sample's older rows out of its pairs, and
            measures drift.
        keys : (K, D) floating point, optional
            Rows to store and to compare with instead of the embeddings: two towers, or a momentum encoder. Queries meet
            no queries. Key i is a candidate of query i, in the batch and in the memory; with ids, older keys of the
            query's id are not.
        key_labels : (K,) integer, optional
            Classes of the keys; those of the anchors if left out. Needed where K is not B.
        training : bool, optional
            Whether to store the batch and count the call; as the model is called, if left out.

        Returns
        -------
        () float32, or float64 if an input is; with `passthrough`, the embeddings

        Raises
        ------
        TypeError, ValueError
            If an input does not fit; nothing has been stored or counted then.
        RuntimeError
            Where the step would lose the memory: under a TensorFlow strategy of several replicas, and in a JAX step
            that does not hand the layer's variables in.
        """
        refuse_replicas(strategy())
        before, given = self.state(), {"ids": ids, "keys": keys, "key_labels": key_labels, "motion": self.motion()}
        if training:
            self._refuse_loss_of_state(embeddings)
            self.has_stored = True
            result = self.objective.step(before, embeddings, labels, **given)
            self.keep(before, result.state, result.motion)
            self.figures.assign(result.report)
        else:
            result = self.objective.evaluate(before, embeddings, labels, **given, gradient=True)
        if not self.passthrough:
            return result.loss
        self.add_loss(result.loss)
        return embeddings

    def compute_output_spec(self, embeddings: Any, *others: Any, **keywords: Any) -> Any:
        """Return the shape and dtype of what `call` returns."""
        return keras.KerasTensor(*((embeddings.shape, embeddings.dtype) if self.passthrough else ((), "float32")))

    @property
    def report(self) -> Mapping[str, float]:
        """The last training call's figures, {name: float}, as in `xbm.REPORT`; empty before the layer is built."""
        if not self.built:
            return {}
        self._refuse_forgotten()
        return dict(zip(REPORT, keras.ops.convert_to_numpy(self.figures.value).tolist(), strict=True))

    def rows(self) -> Rows:
        """Return the filled rows, oldest first: `embeddings` (n, D), `labels`, `ids`, `stored_at` (n,), of NumPy."""
        self._refuse_forgotten()
        return super().rows()

    def get_config(self) -> dict[str, Any]:
        """Return the options."""
        o = self.objective
        return {
            "name": self.name,
            "capacity": self.capacity,
            "loss": serialized(self.loss),
            "miner": serialized(self.miner),
            "weight": o.weight,
            "warmup": o.warmup,
            "settle": o.settle,
            "ramp": o.ramp,
            "balance": o.balance,
            "max_age": o.max_age,
            "half_life": o.half_life,
            "reduction": self.reduction,
            "in_batch": o.in_batch,
            "normalize": o.normalize,
            "dtype": self.row_dtype,
            "copies": o.copies,
            "match": serialized(self.match),
            "pair_weights": serialized(self.pair_weights),
            "ignore_label": o.ignore_label,
            "on_nonfinite": o.on_nonfinite,
            "compensate": None if o.compensate is None else asdict(o.compensate),
            "passthrough": self.passthrough,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "XBM":
        """Return a layer from what `get_config` gave."""
        made = {name: deserialized(config[name]) for name in ("loss", "miner")}
        if config.get("compensate") is not None:
            made["compensate"] = Compensation(**config["compensate"])
        return cls(**(config | made))

    def _refuse_forgotten(self) -> None:
        """Refuse to show a memory that a JAX step stored into and then dropped."""
        if self.has_stored and int(keras.ops.convert_to_numpy(self.step.value)) == 0:
            raise RuntimeError(
                f"{self.name!r} was called in training, but its variables are as before: a JAX step must return the "
                f"non_trainable_variables that stateless_call gives it, and assign them to the model at the end"
            )

    def _refuse_loss_of_state(self, embeddings: Any) -> None:
        """On JAX, refuse a step that does not carry the layer's variables: what it stored would be lost."""
        if keras.backend.backend() != "jax":
            return
        scope, (_, ops) = get_stateless_scope(), backends.of(embeddings)
        carried = None if scope is None else scope.get_current_value(self.step)
        if carried is None and (scope is not None or ops.is_compiling(embeddings)):
            raise RuntimeError(
                f"{self.name!r} was called in a JAX step that its variables are not a part of, so what it stores would "
                f"be lost: call the model by model.stateless_call(trainable_variables, non_trainable_variables, ...), "
                f"keep the non_trainable_variables it returns, and make the layer a part of a subclassed or functional "
                f"model"
            )
