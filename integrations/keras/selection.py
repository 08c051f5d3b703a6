"""Selection of embeddings, labels and ids from a model's outputs and data."""

from collections.abc import Callable
from typing import Any, TypeAlias

import keras

Field: TypeAlias = str | Callable[[Any, Any], Any] | None
"""A key of y or x, the name of an output, a function `(x, y) -> (B,)`, or None."""


class Outputs:
    """Finds the embeddings (B, D): the only output, a named output or layer, or the result of a function of y_pred."""

    def __init__(self, model: keras.Model, name: str | Callable[[Any], Any] | None) -> None:
        self.model, self.name = model, name
        named = isinstance(name, str)
        self.layer = next((layer for layer in model.layers if named and layer.name == name), None)
        self.seen: list[Any] = []

    def watch(self) -> None:
        """Record the outputs of the named layer."""
        if self.layer is None:
            return
        call = self.layer.call

        def noted(*arguments: Any, **keywords: Any) -> Any:
            output = call(*arguments, **keywords)
            self.seen[:] = [output]
            return output

        self.layer.call = noted

    def unwatch(self) -> None:
        """Undo `watch`."""
        self.seen.clear()
        if self.layer is not None and "call" in vars(self.layer):
            del self.layer.call

    def of(self, y_pred: Any) -> Any:
        """Return the embeddings of a forward pass whose output is y_pred."""
        if callable(self.name):
            return self.name(y_pred)
        if self.name is None:
            outputs = keras.tree.flatten(y_pred)
            if len(outputs) != 1:
                raise ValueError(
                    f"the model has {len(outputs)} outputs ({self._known(y_pred)}): select the embeddings with "
                    f"embeddings=, the name of an output or layer"
                )
            return outputs[0]
        if isinstance(y_pred, dict) and self.name in y_pred:
            return y_pred[self.name]
        names = getattr(self.model, "output_names", None) or []
        if isinstance(y_pred, (list, tuple)) and len(names) == len(y_pred) and self.name in names:
            return y_pred[names.index(self.name)]
        if self.layer is None:
            raise ValueError(
                f"embeddings= must name an output ({self._known(y_pred)}) or a layer "
                f"({', '.join(layer.name for layer in self.model.layers)}) of the model, got {self.name!r}"
            )
        if not self.seen:
            raise RuntimeError(
                f"embeddings={self.name!r} names a layer that the model's forward pass did not call: call it, or name "
                f"another layer"
            )
        return self.seen.pop()

    def dim(self) -> int | None:
        """Return D if the model's output shape is known before it runs, else None."""
        model = self.model
        if self.layer is not None and getattr(self.layer, "_inbound_nodes", None):
            return self.layer.output.shape[-1]
        try:
            if isinstance(model, keras.Sequential):
                y_pred = model.outputs
            else:
                y_pred = model.output if hasattr(model, "outputs") else _outputs_by_shape(model)
        except AttributeError:  # a Sequential model that is not built yet
            return None
        return None if y_pred is None else self.of(y_pred).shape[-1]

    def _known(self, y_pred: Any) -> str:
        names = list(y_pred) if isinstance(y_pred, dict) else getattr(self.model, "output_names", None)
        return ", ".join(map(str, names or ["unnamed"]))


def _outputs_by_shape(model: keras.Model) -> Any:
    """Return the symbolic outputs of a built subclassed model, for inputs of the shape it was built with."""
    config: dict[str, Any] = (model.get_build_config() if model.built else None) or {}
    shapes = config.get("input_shape") or config.get("shapes_dict")
    if not shapes:
        return None
    symbols = _symbols(shapes)
    try:
        if "input_shape" in config:
            return model.compute_output_spec(symbols)
        return model.compute_output_spec(**{name.removesuffix("_shape"): symbols[name] for name in symbols})
    except Exception:  # the model's code may fail on symbolic inputs; the first batch determines D then
        return None


def _symbols(shapes: Any) -> Any:
    """Convert nested dicts and lists of shapes to symbolic tensors."""
    if isinstance(shapes, dict):
        return {name: _symbols(shape) for name, shape in shapes.items()}
    if all(size is None or isinstance(size, int) for size in shapes):
        return keras.KerasTensor(tuple(shapes))
    return [_symbols(shape) for shape in shapes]


def integers(name: str, field: Field, x: Any, y: Any, output_names: list[str]) -> Any:
    """Return the labels or ids (B,) of a batch."""
    if callable(field):
        found = field(x, y)
    elif field is None:
        leaves = keras.tree.flatten(y)
        if len(leaves) != 1:
            raise ValueError(f"{name}= must select one of the {len(leaves)} parts of y ({_keys(y)}) as the {name}")
        found = leaves[0]
    elif isinstance(y, dict) and field in y:
        found = y[field]
    elif isinstance(x, dict) and field in x:
        found = x[field]
    elif has(y, field, output_names):
        found = y[output_names.index(field)]
    else:
        raise ValueError(
            f"{name}={field!r} must be a key of y ({_keys(y)}) or of x ({_keys(x)}), or an output that has a part "
            f"of y: pass dicts to fit, or a function (x, y) -> (B,) as {name}="
        )
    if found is None:
        raise ValueError(f"{name} must be integers of shape (B,), got None: pass y to fit, or name a key of x")
    return found[:, 0] if len(found.shape) == 2 and found.shape[1] == 1 else found


def has(y: Any, name: str, output_names: list[str]) -> bool:
    """Return whether y has a part for the output `name`."""
    if isinstance(y, (list, tuple)):
        return len(y) == len(output_names) and name in output_names
    return isinstance(y, dict) and name in y


def _keys(structure: Any) -> str:
    return ", ".join(map(str, structure)) if isinstance(structure, dict) else type(structure).__name__
