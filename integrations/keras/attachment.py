"""The changes that the callback makes to a model during fit, and their removal."""

from collections.abc import Callable
from functools import wraps
from typing import Any

import keras

from xbm.integrations.keras.metric import MemoryMetric

MEMORY = "xbm_memory"
"""Name of the model's attribute that holds the memory."""

_WRAPPED = ("compute_loss", "train_step", "test_step")


class Attachment:
    """Adds the memory loss to a model's loss, by wrapping `compute_loss`, `train_step` and `test_step`.

    The steps are wrapped to distinguish training from evaluation. The wrapping also forces a new compilation: JAX
    caches compiled steps by their method, and would otherwise reuse a step without the memory.
    """

    def __init__(self, model: keras.Model, term: Callable[..., Any]) -> None:
        self.model, self.term = model, term
        self.training: bool | None = None  # None outside the model's steps
        self.terms = 0  # number of memory losses computed
        self.replaced: dict[str, Any] = {}
        self.ours: dict[str, Any] = {}

    @property
    def active(self) -> bool:
        """Whether the model is currently wrapped."""
        return bool(self.ours)

    def on(self) -> None:
        """Wrap the model's methods."""
        original = self.model.compute_loss
        has_loss = type(self.model).compute_loss is not keras.Model.compute_loss or "compute_loss" in vars(self.model)

        @wraps(original)
        def compute_loss(
            x: Any = None, y: Any = None, y_pred: Any = None, sample_weight: Any = None, training: bool = True
        ) -> Any:
            if not self.active:
                return _called(original, x, y, y_pred, sample_weight, training)
            if self.training is not None:
                training = self.training
            loss = None
            if has_loss or self.model.loss is not None or self.model.losses:
                loss = _called(original, x, y, y_pred, sample_weight, training)
            memory_loss = self.term(x, y, y_pred, training=training)
            self.terms += 1
            if loss is None:
                return keras.ops.cast(memory_loss, keras.config.floatx())
            return loss + keras.ops.cast(memory_loss, loss.dtype)

        self._replace("compute_loss", compute_loss)
        self._replace("train_step", self._told(self.model.train_step, training=True))
        self._replace("test_step", self._told(self.model.test_step, training=False))
        self.model.train_function = self.model.test_function = None

    def off(self) -> None:
        """Restore the model's methods."""
        for name, replacement in self.ours.items():
            if vars(self.model).get(name) is not replacement:
                continue  # wrapped again by other code: our wrapper stays inside it, inactive
            if name in self.replaced:
                setattr(self.model, name, self.replaced[name])
            else:
                delattr(self.model, name)
        if self.active:
            self.model.train_function = self.model.test_function = None
        self.ours, self.replaced = {}, {}

    def _replace(self, name: str, replacement: Any) -> None:
        if name in vars(self.model):
            self.replaced[name] = vars(self.model)[name]
        self.ours[name] = replacement
        setattr(self.model, name, replacement)

    def _told(self, step: Callable[..., Any], *, training: bool) -> Callable[..., Any]:
        """Wrap a step: record whether it trains, and raise an error if it did not compute the memory loss."""

        @wraps(step)
        def told(*arguments: Any) -> Any:
            before, self.training = self.terms, training
            try:
                result = step(*arguments)
            finally:
                self.training = None
            if self.active and self.terms == before:
                raise RuntimeError(
                    f"{type(self.model).__name__}.{step.__name__} does not call self.compute_loss, to which the "
                    f"callback adds the memory loss: call it in the step, or use the XBM layer instead"
                )
            return result

        return told


def _called(compute_loss: Callable[..., Any], x: Any, y: Any, y_pred: Any, sample_weight: Any, training: bool) -> Any:
    """Call a model's compute_loss. Overrides written for Keras before 3.3 have no `training` argument."""
    code = getattr(getattr(compute_loss, "__func__", compute_loss), "__code__", None)
    if code is not None and "training" not in code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]:
        return compute_loss(x, y, y_pred, sample_weight)
    return compute_loss(x, y, y_pred, sample_weight, training=training)


def place(model: keras.Model, memory: MemoryMetric) -> None:
    """Set the memory as an attribute of the model, which then tracks and saves it; replace a previous memory."""
    previous = getattr(model, MEMORY, None)
    if previous is memory:
        return
    # A built subclassed model does not accept new state. Unlock its tracker, as Keras' own layers do.
    tracker: Any = getattr(model, "_tracker", None)
    locked = getattr(tracker, "locked", False)
    if locked:
        tracker.unlock()
    try:
        if previous is not None:
            if previous.attachment is not None:
                previous.attachment.off()
                previous.attachment = None
            if tracker is not None:
                tracker.untrack(previous)
        setattr(model, MEMORY, memory)
    finally:
        if locked:
            tracker.lock()
