"""Agreement between ranks: what must be equal on all of them before a call."""

from collections.abc import Mapping
from dataclasses import is_dataclass
from typing import Any, Literal
from zlib import crc32

import torch
import torch.distributed as dist

from xbm.batch import ALONE, Group
from xbm.integrations.torch.memory import Memory
from xbm.integrations.torch.ranks import Together, is_initialized
from xbm.losses import Differentiated, RowLoss
from xbm.memory_state import MemoryState
from xbm.mining import Miner
from xbm.objective import Objective

MODES = ("evaluate", "train", "fill")


def group_of(
    module: Memory, memory: MemoryState, mode: Literal["evaluate", "train", "fill"], *, broadcast: torch.Tensor
) -> Group:
    """Return the group that a call is made with.

    Parameters
    ----------
    module : Memory
    memory : MemoryState
        Its memory before the call.
    mode : {"evaluate", "train", "fill"}
    broadcast : (1,) bool
        Whether another rank's buffers have replaced this rank's.
    """
    rank, size = (dist.get_rank(module.group), dist.get_world_size(module.group)) if is_initialized() else (0, 1)
    sharded = module.shard.shards > 1
    if sharded and module.shard != (rank, size):
        raise RuntimeError(
            f"this memory is shard {module.shard.index} of {module.shard.shards}, and this process is rank {rank} of "
            f"{size}: make a new XBM in the process group that uses it, and load the state into it"
        )
    if size == 1 or (mode == "evaluate" and not sharded):
        return ALONE
    facts: dict[str, int | torch.Tensor] = {
        "capacity": module.capacity,
        "dim": module.dim,
        "shard": module.shard.shards,
        "mode (0 evaluation, 1 training, 2 fill)": MODES.index(mode),
        "options (a checksum: compare what print(xbm) shows)": checksum(module.objective, memory.embeddings.dtype),
    }
    facts |= {name: getattr(memory, name) for name in ("step", "cursor", "count")}
    return Together(module.group, memory.embeddings.device, sharded=sharded, facts=facts, broadcast=broadcast)


def checksum(objective: Objective, dtype: torch.dtype) -> int:
    """Return a checksum of all options and the dtype; of a function its name counts."""
    return crc32(repr((shown(objective.values()), str(dtype))).encode())


def shown(value: Any) -> Any:
    """Return an option's value without addresses of objects: a function as its name, a loss as its options."""
    if isinstance(value, Mapping):
        return {name: shown(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [shown(one) for one in value]
    if isinstance(value, Differentiated):
        return shown(value.function)
    if is_dataclass(value) and not callable(value):
        return repr(value)
    if isinstance(value, RowLoss | Miner):
        return type(value).__name__
    return getattr(value, "__qualname__", type(value).__name__) if callable(value) else value
