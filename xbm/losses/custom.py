"""User-defined functions as losses."""

from collections.abc import Callable
from typing import TypeAlias

from xbm import backends
from xbm.backends import Array, array_namespace
from xbm.losses.base import Block, RowLoss

Function: TypeAlias = Callable[[Array, Array, Array], Array]
"""A function of S and the positive and negative pairs, each (B, m), that returns one value per anchor, (B,)."""


class Differentiated(RowLoss):
    """A loss defined by a function `(S, positive, negative) -> L_i`, differentiated by the library's autodiff.

    The function gets whole rows, (B, M) at once. They include empty slots and the anchor's own slot, which are neither
    positive nor negative. The loss runs eagerly only. The value for anchors without pairs is replaced by 0; if the
    function has learned parameters, this value must still be finite.

    Parameters
    ----------
    function : callable
        Maps similarities (B, m), and booleans (B, m) of positive and of negative pairs, to one value per anchor, (B,).
        Its learned parameters get their gradients as usual.

    Raises
    ------
    TypeError
        If `function` is not callable.
    ValueError
        From `whole`, if the function does not return shape (B,).
    NotImplementedError
        From `whole`, if the library has no automatic differentiation.

    Examples
    --------
    >>> import torch, xbm
    >>> def pull(S, positive, negative):
    ...     return ((1 - S) ** 2 * positive).sum(dim=1)
    >>> from xbm.integrations.torch import XBM
    >>> module = XBM(dim=8, capacity=64, loss=pull, warmup=0)
    """

    def __init__(self, function: Function) -> None:
        if not callable(function):
            raise TypeError(f"the loss must be callable as loss(S, positive, negative), got {function!r}")
        self.function = function

    def __repr__(self) -> str:
        return getattr(self.function, "__qualname__", None) or repr(self.function)

    def whole(self, block: Block) -> tuple[Array, Array]:
        """Return `(L_i (B,), dL_i/dS_ij (B, m))`."""
        xp, ops = backends.of(block.S)
        positive, negative = block.P > 0, block.N > 0
        value, W = ops.value_and_gradient(lambda S: self._value(S, positive, negative), block.S)
        some = xp.any(positive | negative, axis=1)
        return xp.where(some, value, 0.0), xp.where(some[:, None], W, 0.0)

    def _value(self, S: Array, positive: Array, negative: Array) -> Array:
        value = self.function(S, positive, negative)
        shape = getattr(value, "shape", None)
        if shape is None or tuple(shape) != (S.shape[0],):
            got = type(value).__name__ if shape is None else f"shape {tuple(shape)}"
            raise ValueError(f"{self!r} must return one value per anchor, shape ({S.shape[0]},), got {got}")
        return array_namespace(S).astype(value, S.dtype, copy=False)
