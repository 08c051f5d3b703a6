"""Rounds of drift compensation: rows of the memory embedded anew by the user's encoder."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.module import register_module_forward_pre_hook

from xbm import checks
from xbm.backends.torch import is_compiling
from xbm.compensation import Compensation, Motion
from xbm.integrations.torch.ranks import ProcessSpread, Together
from xbm.memory import MemoryState
from xbm.ranks import ONE, Group, Ranks

Embed = Callable[[torch.Tensor], torch.Tensor]
"""From ids (n,) on the CPU to embeddings (n, D)."""


def round_of(
    compensation: Compensation,
    state: MemoryState,
    motion: Motion,
    embed: Embed,
    *,
    normalize: bool,
    group: Group,
) -> tuple[MemoryState, Motion]:
    """Embed some rows anew, and move the memory by what they tell.

    Of several ranks each embeds a part of the rows. If one cannot, none moves, and all raise.
    """
    together = group if isinstance(group, Together) else None
    ranks, n, part = ONE, compensation.probes, slice(None)
    if together is not None:
        each = ProcessSpread(together, [1] * together.size)
        ranks = Ranks(each=each, rank=together.rank, size=together.size, sharded=together.sharded)
        n = -(-n // ranks.size) if ranks.sharded else n
    slots, filled = compensation.slots(state, n=n, shard=ranks.shard)
    sizes = [len(one) for one in torch.tensor_split(slots, ranks.size)]
    if not ranks.sharded:
        start = sum(sizes[: ranks.rank])
        part = slice(start, start + sizes[ranks.rank])
    try:
        fresh, valid = _embedded(embed, state, slots[part], filled[part])
    except Exception:
        group.share(1)  # tells the other ranks
        raise
    failed = group.share(0)
    if any(failed):
        raise RuntimeError(f"rank {failed.index(1)} could not embed its rows anew, so no memory was moved")
    if together is not None and not ranks.sharded:
        spread = ProcessSpread(together, sizes)
        fresh, valid = spread.gather(fresh), spread.gather(valid)
    return compensation.move(state, motion, slots, fresh, valid, normalize=normalize, ranks=ranks)


def _embedded(
    embed: Embed, state: MemoryState, slots: torch.Tensor, filled: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return fresh rows (p, D) of some slots, and which (p,) there are: those whose sample is known.

    Their dtype is the memory's, at least float32, on every rank.
    """
    ids = torch.where(filled, state.ids[slots], -1).cpu()
    known = ids >= 0
    device, dtype = state.embeddings.device, torch.promote_types(state.embeddings.dtype, torch.float32)
    fresh = torch.zeros(len(ids), state.embeddings.shape[1], dtype=dtype, device=device)
    if known.any():
        with torch.no_grad(), unchanged_statistics(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", r"Using `torch.compile\(module\)` when there are global hooks")
            found = embed(ids[known])
        checks.embeddings("what embed returns", found, state.embeddings)
        if len(found) != int(known.sum()):
            raise ValueError(f"embed must return a row for each of the {int(known.sum())} ids, got {len(found)}")
        fresh[known.to(device)] = found.to(dtype)
    elif filled.any():
        raise ValueError(
            "the memory knows no samples to embed anew: give every batch its ids, as in xbm(embeddings, labels, "
            "ids=ids), or compensate without probes"
        )
    return fresh, known.to(device)


@contextmanager
def unchanged_statistics() -> Iterator[None]:
    """Give whatever batch norm is called meanwhile copies of its running statistics, and take them away at the end.

    The modules are in the mode they are in: in training, they normalise by the batch. What a graph that waits for its
    backward pass has saved of them is not written into. A module that was compiled in place, by `module.compile()`, is
    not seen; one that `torch.compile(module)` returned is.
    """
    seen: set[torch.nn.Module] = set()
    kept: list[tuple[torch.nn.Module, dict[str, torch.Tensor | None]]] = []

    def swap(module: torch.nn.Module, inputs: Any) -> None:
        if is_compiling():  # a compiled module has come by as a whole before
            return
        for one in () if module in seen else module.modules():
            if isinstance(one, _NormBase) and one not in seen:
                kept.append((one, dict(one._buffers)))
                one._buffers.update((name, None if b is None else b.clone()) for name, b in kept[-1][1].items())
            seen.add(one)

    handle = register_module_forward_pre_hook(swap)
    try:
        yield
    finally:
        handle.remove()
        for module, buffers in kept:
            module._buffers.update(buffers)
