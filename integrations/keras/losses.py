"""Pair losses for `compile`: the core's formulas within the batch, without state."""

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
    """A pair loss over the pairs of the batch, for `compile(loss=InBatchLoss())`: classes y_true, embeddings y_pred.

    (1/B) sum_i L_i. With an `XBMCallback(in_batch=False)` beside it, the memory's loss is added. Labels stay the
    integers they are; a loss of Keras' own would make floats of them, and one class of 2^24 and 2^24 + 1.

    Parameters
    ----------
    loss : str, PairLoss or callable
        The pair loss: a name among `xbm.losses.LOSSES` ("contrastive", "triplet", "nt-xent", ...), an object, or
        a function `(S, positive, negative) -> (B,)`.
    miner : str, Miner or list of them, optional
        Choice of the pairs that count: a name among `xbm.mining.MINERS` ("hard-negatives", ...), an object, or a list
        of them, each choosing among the pairs that the one before left.
    reduction : {"mean", "mean-nonzero", "sum"}, optional
        Of a loss by name that has a choice, see `xbm.losses.get`. Anchors are always averaged.
    normalize : bool
        Compare x / max(|x|, 1e-6), so similarities are cosines in [-1, 1]; else x itself.
    name : str, optional
        Of the loss.

    Raises
    ------
    TypeError, ValueError
        If an option is out of range, saying what is accepted.

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
        """Return the loss, a scalar, of labels (B,) and embeddings (B, D)."""
        if sample_weight is not None:
            raise ValueError(
                f"{type(self).__name__} compares pairs and takes no sample_weight or class_weight: leave it out, or "
                f"give it to the other outputs alone"
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
        """Return a loss from what `get_config` gave."""
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
