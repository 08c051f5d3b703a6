"""Shards of a memory in a state dict, as DTensors, which torch.distributed.checkpoint can save and load."""

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor import Shard as OnAxis

from xbm.memory_state import MemoryState, Rows
from xbm.ranks import Shard


def spread(rows: torch.Tensor, group: dist.ProcessGroup | None) -> DTensor:
    """Return a DTensor (M, ...) whose local part is this rank's rows (m, ...), without a copy."""
    mesh = DeviceMesh.from_group(group or dist.distributed_c10d._get_default_group(), rows.device.type)
    return DTensor.from_local(rows, mesh, [OnAxis(0)], run_check=False)


def local(saved: MemoryState, capacity: int, shard: Shard) -> MemoryState:
    """Return a rank's shard of a memory saved as DTensors; `capacity` is M, the total over all shards.

    Raises
    ------
    ValueError
        If the memory has another number of shards or another capacity.
    """
    if saved.embeddings.shape[0] != capacity:
        raise ValueError(
            f"a sharded memory must be loaded with the capacity it was saved with, got capacity {capacity} for "
            f"{saved.embeddings.shape[0]} saved slots"
        )
    return saved._replace(**{name: _local(getattr(saved, name), shard) for name in Rows._fields})


def _local(rows: torch.Tensor, shard: Shard) -> torch.Tensor:
    """Return this rank's rows of a DTensor."""
    if not isinstance(rows, DTensor) or rows.device_mesh.size() != shard.shards or rows.placements != (OnAxis(0),):
        raise ValueError(
            f"its rows must be DTensors in equal shards on {shard.shards} ranks, or plain tensors, got "
            f"{getattr(rows, 'placements', type(rows).__name__)}"
        )
    return rows.to_local()
