"""A memory's shards in a state dict: distributed tensors, which torch.distributed.checkpoint saves and loads."""

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor import Shard as OnAxis

from xbm.memory_state import MemoryState, Rows
from xbm.ranks import Shard


def spread(rows: torch.Tensor, group: dist.ProcessGroup | None) -> DTensor:
    """Return a rank's rows (m, ...) as its part of a distributed tensor (M, ...), which shares their memory."""
    mesh = DeviceMesh.from_group(group or dist.distributed_c10d._get_default_group(), rows.device.type)
    return DTensor.from_local(rows, mesh, [OnAxis(0)], run_check=False)


def local(saved: MemoryState, capacity: int, shard: Shard) -> MemoryState:
    """Return a rank's shard of a memory of a capacity (M, of all shards together), from its distributed tensors.

    Raises
    ------
    ValueError
        If it is distributed otherwise, or over another number of slots.
    """
    if saved.embeddings.shape[0] != capacity:
        raise ValueError(
            f"it is spread over ranks and holds {saved.embeddings.shape[0]} slots, this one {capacity}: load it "
            f"into the capacity that it was saved with"
        )
    return saved._replace(**{name: _local(getattr(saved, name), shard) for name in Rows._fields})


def _local(rows: torch.Tensor, shard: Shard) -> torch.Tensor:
    """Return this rank's rows of a distributed tensor."""
    if not isinstance(rows, DTensor) or rows.device_mesh.size() != shard.shards or rows.placements != (OnAxis(0),):
        raise ValueError(
            f"its rows must be spread over the {shard.shards} ranks in equal shards, or be plain tensors, got "
            f"{getattr(rows, 'placements', type(rows).__name__)}"
        )
    return rows.to_local()
