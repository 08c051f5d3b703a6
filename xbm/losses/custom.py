"""A user's function as a loss."""

from collections.abc import Callable
from typing import TypeAlias

from xbm import backends
from xbm.backends import Array, array_namespace
from xbm.losses.base import Block, RowLoss

Function: TypeAlias = Callable[[Array, Array, Array], Array]
"""From S and the positive and negative pairs, each (B, m), to one value per anchor, (B,)."""


class Differentiated(RowLoss):
    """A function `(S, positive, negative) -> L_i`, with its pair weights from the library's automatic differentiation.

    It sees whole rows, (B, M) at once, empty slots and an anchor's own slot among them: columns that are neither
    positive nor negative. It runs eagerly only. Anchors without any pair count 0, whatever it says of them; where it
    has learned parameters, it must be finite there.

    Parameters
    ----------
    function : callable
        From similarities (B, m), and booleans (B, m) that tell positive and negative pairs, to (B,), one value per
        anchor. What it has learned parameters of gets its gradient as usual.

    Raises
    ------
    TypeError
        If it cannot be called.
    ValueError
        From `whole`, if it does not return (B,).
    NotImplementedError
        From `whole`, where the library has no automatic differentiation.

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
