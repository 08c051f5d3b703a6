"""What a callback changes of a model while it fits, and changes back."""

from collections.abc import Callable
from functools import wraps
from typing import Any

import keras

from xbm.integrations.keras.metric import MemoryMetric

MEMORY = "xbm_memory"
"""The attribute of a model that holds its memory."""

_WRAPPED = ("compute_loss", "train_step", "test_step")


class Attachment:
    """The memory's loss within a model's own: wraps `compute_loss`, and tells training from evaluation.

    The steps are wrapped for that, and because a compiled step of before would go on unchanged: JAX knows one by
    the method it was made of.
    """

    def __init__(self, model: keras.Model, term: Callable[..., Any]) -> None:
        self.model, self.term = model, term
        self.training: bool | None = None  # None outside the model's steps
        self.terms = 0  # computed so far
        self.replaced: dict[str, Any] = {}
        self.ours: dict[str, Any] = {}

    @property
    def active(self) -> bool:
        """Whether the model is changed."""
        return bool(self.ours)

    def on(self) -> None:
        """Change the model."""
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
        """Change the model back."""
        for name, replacement in self.ours.items():
            if vars(self.model).get(name) is not replacement:
                continue  # wrapped once more by someone else: it passes through from now on
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
        """Return a step during which it is known whether it trains, and which must have computed the term."""

        @wraps(step)
        def told(*arguments: Any) -> Any:
            before, self.training = self.terms, training
            try:
                result = step(*arguments)
            finally:
                self.training = None
            if self.active and self.terms == before:
                raise RuntimeError(
                    f"{type(self.model).__name__}.{step.__name__} does not call self.compute_loss, where the memory's "
                    f"loss would be added: call it, or use the XBM layer in that step"
                )
            return result

        return told


def _called(compute_loss: Callable[..., Any], x: Any, y: Any, y_pred: Any, sample_weight: Any, training: bool) -> Any:
    """Call a model's own compute_loss, which may be of before Keras 3.3, without `training`."""
    code = getattr(getattr(compute_loss, "__func__", compute_loss), "__code__", None)
    if code is not None and "training" not in code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]:
        return compute_loss(x, y, y_pred, sample_weight)
    return compute_loss(x, y, y_pred, sample_weight, training=training)


def place(model: keras.Model, memory: MemoryMetric) -> None:
    """Make a memory an attribute of a model, which tracks and saves it, in the place of one that is there."""
    previous = getattr(model, MEMORY, None)
    if previous is memory:
        return
    # A built subclassed model takes no more state; Keras' own layers open it in the same way for theirs.
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
