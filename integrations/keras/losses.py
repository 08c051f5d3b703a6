"""Stateless in-batch pair losses for `compile`, with the core's formulas."""

import dataclasses
from typing import Any

import keras

from xbm import backends, losses, mining
from xbm.compensation import Compensation
from xbm.losses import LossLike, PairReduction
from xbm.mining import MinerLike
from xbm.objective import Objective


@keras.saving.register_keras_serializable(package="xbm")
class InBatchLoss(keras.losses.Loss):
    """A pair loss over the pairs of the batch, for `compile(loss=InBatchLoss())`.

    y_true are classes (B,) and y_pred embeddings (B, D). The loss is (1/B) sum_i L_i. An `XBMCallback(in_batch=False)`
    adds the memory loss to it. Labels remain integers; Keras' own losses convert them to float32, which cannot
    distinguish 2^24 and 2^24 + 1.

    Parameters
    ----------
    loss : str, PairLoss or callable
        The pair loss: a name in `xbm.losses.LOSSES` ("contrastive", "triplet", "nt-xent", ...), an object, or
        a function `(S, positive, negative) -> (B,)`.
    miner : str, Miner or list of them, optional
        Selects the pairs to use: a name in `xbm.mining.MINERS` ("hard-negatives", ...), an object, or a list of them.
        Each miner of a list selects from the pairs left by the previous one.
    reduction : {"mean", "mean-nonzero", "sum"}, optional
        Reduction of a loss given by name, see `xbm.losses.get`. The loss is always averaged over anchors.
    normalize : bool
        Whether to compare x / max(|x|, 1e-6), so that similarities are cosines in [-1, 1]; else x itself is compared.
    name : str, optional
        Name of the loss.

    Raises
    ------
    TypeError, ValueError
        If an option is invalid; the message states the accepted values.

    Examples
    --------
    >>> import keras
    >>> from xbm.integrations.keras import InBatchLoss
    >>> loss = InBatchLoss("contrastive")
    >>> round(float(loss([0, 0, 1], [[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]])), 3)
    0.467
    """

    def __init__(
        self,
        loss: LossLike = "contrastive",
        *,
        miner: MinerLike = None,
        reduction: PairReduction | None = None,
        normalize: bool = True,
        name: str = "in_batch_loss",
    ) -> None:
        super().__init__(name=name)
        self.options: dict[str, Any] = {"loss": loss, "miner": miner, "reduction": reduction, "normalize": normalize}
        self.objective = Objective(loss=loss, reduction=reduction, miner=miner, weight=0, normalize=normalize)

    def __call__(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> Any:
        """Return the scalar loss for labels (B,) and embeddings (B, D)."""
        if sample_weight is not None:
            raise ValueError(
                f"{type(self).__name__} compares pairs and takes no sample_weight or class_weight: omit it, or pass it "
                f"for the other outputs only"
            )
        embeddings, labels = keras.ops.convert_to_tensor(y_pred), keras.ops.convert_to_tensor(y_true)
        if len(labels.shape) == 2 and labels.shape[1] == 1:
            labels = labels[:, 0]
        xp, _ = backends.of(embeddings)
        device = backends.device_of(embeddings)
        empty = self.objective.init(capacity=1, dim=embeddings.shape[-1], device=device, xp=xp)
        return self.objective.evaluate(empty, embeddings, labels, gradient=True).loss

    call = __call__

    def get_config(self) -> dict[str, Any]:
        """Return the options, for `model.save`."""
        plain = {"loss": serialized(self.options["loss"]), "miner": serialized(self.options["miner"])}
        return self.options | plain | {"name": self.name}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "InBatchLoss":
        """Create a loss from the result of `get_config`."""
        made = {name: deserialized(config[name]) for name in ("loss", "miner")}
        return cls(**(config | made))


def serialized(choice: Any) -> Any:
    """Return an option as JSON: a plain value as it is, an object of `xbm` as the name of its class and its options."""
    if choice is None or isinstance(choice, str | bool | int | float):
        return choice
    if isinstance(choice, list | tuple):
        return [serialized(one) for one in choice]
    if not dataclasses.is_dataclass(choice) or isinstance(choice, type) or type(choice) not in _known().values():
        raise TypeError(
            f"{choice!r} cannot be saved with the model: compile again after loading, and load with compile=False"
        )
    return {"class": type(choice).__name__, "options": dataclasses.asdict(choice)}


def deserialized(saved: Any) -> Any:
    """Return an option from the result of `serialized`."""
    if isinstance(saved, list | tuple):
        return [deserialized(one) for one in saved]
    return _known()[saved["class"]](**saved["options"]) if isinstance(saved, dict) else saved


def _known() -> dict[str, type]:
    made = [*(losses.get(name) for name in losses.LOSSES), *(mining.get(name) for name in mining.MINERS)]
    kinds = {*map(type, made), mining.DistanceWeightedMiner, Compensation}
    return {kind.__name__: kind for kind in kinds}
