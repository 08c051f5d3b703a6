"""Fill a memory from a loader, as the paper does at the end of the warm-up."""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, NoReturn, Protocol

import torch

from xbm.batch import Group
from xbm.objective import Objective
from xbm.state import State


class Filled(Protocol):
    """What `fill` needs of an `XBM`."""

    objective: Objective

    @property
    def capacity(self) -> int:
        """Rows of the memory."""

    def _state(self) -> State: ...

    def _keep(self, state: State) -> None: ...

    def _group(self, state: State, mode: Any) -> Group: ...


def fill(xbm: Filled, encoder: Callable[[Any], torch.Tensor], loader: Iterable[Sequence[Any]]) -> int:
    """Store embeddings of a loader's batches until `capacity` rows were offered; return their number on all ranks."""
    memory, offered, batches = xbm._state().memory, 0, iter(loader)
    dim, device = memory.embeddings.shape[1], memory.embeddings.device
    while offered < xbm.capacity:
        group, batch = xbm._group(xbm._state(), "fill"), next(batches, None)
        if all(group.share(batch is None)):
            break
        try:
            x, labels, ids = _encoded(encoder, batch, dim, device)
        except Exception as error:
            group.meet(partial(_raise, error))  # so that the other ranks raise, too
            raise
        xbm._keep(xbm.objective.store(xbm._state(), x, labels, ids=ids, group=group))
        offered += sum(group.share(labels.shape[0]))
    return offered


def _encoded(
    encoder: Callable[[Any], torch.Tensor], batch: Sequence[Any] | None, dim: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Return a batch as embeddings, labels and ids; no rows if this rank's loader has ended before another's."""
    if batch is None:
        return torch.empty(0, dim, device=device), torch.empty(0, dtype=torch.int64, device=device), None
    if not isinstance(batch, (tuple, list)) or len(batch) not in (2, 3):
        raise TypeError(f"loader must yield (inputs, labels) or (inputs, labels, ids), got {type(batch).__name__}")
    inputs, labels, ids = (*(one.to(device) if hasattr(one, "to") else one for one in batch), None)[:3]
    with torch.no_grad():
        return encoder(inputs), labels, ids


def _raise(error: Exception) -> NoReturn:
    raise error
