"""Rounds of drift compensation: the user's encoder embeds rows of the memory again."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.module import register_module_forward_pre_hook

from xbm import checks
from xbm.backends.torch import is_compiling
from xbm.batch import Group
from xbm.compensation import Compensation, Probes
from xbm.compensation.rounds import check_known
from xbm.integrations.torch.ranks import ProcessSpread, Together
from xbm.memory_state import MemoryState
from xbm.objective import Objective
from xbm.ranks import ONE, Ranks
from xbm.state import State

Embed = Callable[[torch.Tensor], torch.Tensor]
"""From ids (n,) on the CPU to embeddings (n, D)."""


def moved(objective: Objective, compensation: Compensation, state: State, embed: Embed, *, group: Group) -> State:
    """Embed some rows again, and move the memory by the map fitted to them.

    With several ranks, each embeds a part of the rows. If one of them raises, none moves its memory, and all raise.
    """
    together = group if isinstance(group, Together) else None
    ranks, n, part = ONE, compensation.probes, slice(None)
    if together is not None:
        each = ProcessSpread(together, [1] * together.size)
        ranks = Ranks(each=each, rank=together.rank, size=together.size, sharded=together.sharded)
        n = -(-n // ranks.size) if ranks.sharded else n
    probes = compensation.probe(state.memory, n=n, shard=ranks.shard)
    sizes = [len(one) for one in torch.tensor_split(probes.slots, ranks.size)]
    if not ranks.sharded:
        start = sum(sizes[: ranks.rank])
        part = slice(start, start + sizes[ranks.rank])
    try:
        fresh, valid = _embedded(embed, state.memory, Probes(*(one[part] for one in probes)))
    except Exception:
        group.share(1)  # so that the other ranks raise, too
        raise
    failed = group.share(0)
    if any(failed):
        raise RuntimeError(f"rank {failed.index(1)} could not embed its rows again, so no memory was moved")
    if together is not None and not ranks.sharded:
        spread = ProcessSpread(together, sizes)
        fresh, valid = spread.gather(fresh), spread.gather(valid)
    return objective.move(state, probes, fresh, valid, ranks=ranks)


def _embedded(embed: Embed, memory: MemoryState, probes: Probes) -> tuple[torch.Tensor, torch.Tensor]:
    """Return fresh embeddings (p, D) of some rows, and which (p,) there are: those with a known sample.

    Their dtype is the memory's, but at least float32, on every rank.
    """
    ids = probes.ids.cpu()
    known = ids >= 0
    device, dtype = memory.embeddings.device, torch.promote_types(memory.embeddings.dtype, torch.float32)
    fresh = torch.zeros(len(ids), memory.embeddings.shape[1], dtype=dtype, device=device)
    check_known(filled=bool(probes.filled.any()), known=bool(known.any()))
    if known.any():
        with torch.no_grad(), unchanged_statistics(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", r"Using `torch.compile\(module\)` when there are global hooks")
            found = embed(ids[known])
        checks.embeddings("the result of embed", found, memory.embeddings)
        if len(found) != int(known.sum()):
            raise ValueError(f"embed must return a row for each of the {int(known.sum())} ids, got {len(found)}")
        fresh[known.to(device)] = found.to(dtype)
    return fresh, known.to(device)


@contextmanager
def unchanged_statistics() -> Iterator[None]:
    """Let each batch norm that is called meanwhile update copies of its running statistics, dropped at the end.

    The modules keep their mode: in training, they normalise by the batch. The original buffers are not written to, so a
    graph that waits for its backward pass stays valid. A module that `torch.compile(module)` returned is covered; one
    that was compiled in place by `module.compile()` is not.
    """
    seen: set[torch.nn.Module] = set()
    kept: list[tuple[torch.nn.Module, dict[str, torch.Tensor | None]]] = []

    def swap(module: torch.nn.Module, inputs: Any) -> None:
        if is_compiling():  # the compiled module itself was seen before
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
