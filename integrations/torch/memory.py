"""The memory as an `nn.Module`: its buffers, and how they are moved, saved, loaded and copied."""

import copy
from collections.abc import Callable, Mapping
from typing import Any, Self

import array_api_compat.torch as xp
import torch
import torch.distributed as dist

from xbm import backends, checks, compensation, memory
from xbm.compensation import Motion
from xbm.integrations.torch.ranks import is_initialized
from xbm.memory import MemoryState, Rows
from xbm.ranks import Shard

MOTION = tuple(f"motion_{name}" for name in Motion._fields)
"""Names of the buffers of a memory that moves, beside those of `MemoryState`."""

backends.of(torch.empty(0))  # looked up before a compiler looks


class Memory(torch.nn.Module):
    """Holds a `MemoryState` in buffers of the fields' names; no mathematics.

    Where it moves, its `Motion` is in buffers beside them: `motion_shift`, ...

    A deep copy, such as an average of weights starts from, leaves the rows behind: its memory begins anew, empty, at
    its first call in training mode. Until then its buffers lie on the meta device and take no space.
    """

    embeddings: torch.Tensor
    labels: torch.Tensor
    ids: torch.Tensor
    stored_at: torch.Tensor
    cursor: torch.Tensor
    count: torch.Tensor
    step: torch.Tensor
    skipped: torch.Tensor

    def __init__(
        self,
        dim: int,
        capacity: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.types.Device = None,
        moves: bool = False,
        shard: bool = False,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        checks.flag("shard", shard)
        checks.whole_number("capacity", capacity, at_least=1)
        if is_initialized() and dist.get_rank(group) < 0:
            raise ValueError("this process is not among the ranks of the group")
        self.group, self.shard, self.moves = group, Shard(), moves
        if shard:
            if not is_initialized():
                raise ValueError("shard=True spreads the memory over ranks: call torch.distributed.init_process_group")
            self.shard = Shard(dist.get_rank(group), dist.get_world_size(group))
            if capacity % self.shard.shards:
                raise ValueError(
                    f"capacity must be a multiple of the {self.shard.shards} ranks that hold equal shards of it, got "
                    f"{capacity}"
                )
        state = _empty(dim, capacity // self.shard.shards, dtype, device)
        for name, value in _named(state, self._still(state)).items():
            self.register_buffer(name, value)

    @property
    def capacity(self) -> int:
        """M, the most rows the memory holds, on all ranks together if it is sharded."""
        return self.embeddings.shape[0] * self.shard.shards

    @property
    def dim(self) -> int:
        """D, the embeddings' size."""
        return self.embeddings.shape[1]

    def rows(self) -> Rows:
        """Return copies of the filled rows, oldest first: `embeddings` (n, D), `labels`, `ids`, `stored_at` (n,).

        Of a sharded memory those of this rank.
        """
        return memory.rows(memory.of_shard(self._state(), self.shard))

    def clear(self) -> None:
        """Empty the memory, which is then still. Steps and skipped rows count on: a warm-up that is over stays over."""
        state = memory.clear(self._state())
        motion = self._motion(state)
        self._keep(state, motion and compensation.clear(state, motion))

    def _state(self, device: torch.device | str = "cpu", *, begin: bool = True) -> MemoryState:
        """Return the memory; one that has not begun yet begins on a device, or an empty one stands in for it."""
        if self.embeddings.is_meta and torch.device(device).type != "meta":
            if not begin:
                return _empty(self.dim, 1, self.embeddings.dtype, device)
            self._begin(device)
        return MemoryState(*(getattr(self, name) for name in MemoryState._fields))

    def _motion(self, state: MemoryState) -> Motion | None:
        """Return how the memory of this state moves; None if it does not."""
        if not self.moves or self.embeddings.is_meta:  # then an empty one stands in for it
            return self._still(state)
        return Motion(*(getattr(self, name) for name in MOTION))

    def _still(self, state: MemoryState) -> Motion | None:
        """Return the motion of a memory that has not moved; None if it never does."""
        return compensation.init(state) if self.moves else None

    def _begin(self, device: Any) -> None:
        """Put an empty memory on a device in the place of what is there."""
        with torch.inference_mode(False):
            empty = _empty(self.dim, self.embeddings.shape[0], self.embeddings.dtype, device)
            still = self._still(empty)
        for name, value in _named(empty, still).items():
            setattr(self, name, value)
        self._renewed()

    def _renewed(self) -> None:
        """Do what is to be done once the memory is another one, begun or loaded."""

    def _keep(self, state: MemoryState, motion: Motion | None = None) -> None:
        """Copy into the buffers what was not written there in place."""
        for name, value in _named(state, motion).items():
            buffer = getattr(self, name)
            if value is not buffer:
                buffer.copy_(value)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        """Let `.to(device)` move the memory, and keep its own dtypes through `.half()` and `.to(dtype)`."""

        def keeping_dtype(tensor: torch.Tensor) -> torch.Tensor:
            try:
                moved = fn(tensor)
            except NotImplementedError:
                if not tensor.is_meta:
                    raise
                return tensor  # nothing to move yet
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        if recurse:
            for child in self.children():
                child._apply(fn)
        begun = not self.embeddings.is_meta
        super()._apply(keeping_dtype, recurse=False)
        if not begun and not self.embeddings.is_meta:  # by `to_empty`: what stands there is of no use
            self._begin(self.embeddings.device)
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Return a copy without the rows."""
        twin = memo[id(self)] = self.__class__.__new__(self.__class__)
        memo[id(self.group)] = self.group  # cannot be copied
        for name in self._names():
            buffer = getattr(self, name)
            memo[id(buffer)] = torch.empty_like(buffer, device="meta")
        twin.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return twin

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        """Save the memory, unless it has not begun."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name in self._names():
            if destination[prefix + name].is_meta:
                del destination[prefix + name]
            elif self.shard.shards > 1 and name in Rows._fields:
                from xbm.integrations.torch import sharding  # a second to import, for the few who need it

                destination[prefix + name] = sharding.spread(destination[prefix + name], self.group)

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Mapping[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        errors: list[str],
    ) -> None:
        """Take a memory of any capacity, its newest rows, and its motion, and take it whole or not at all.

        One that was saved without its motion is still.
        """
        state_dict, fitted = dict(state_dict), {}
        present = [prefix + name for name in MemoryState._fields if prefix + name in state_dict]
        saved = [state_dict.pop(key) for key in present]
        motion = [state_dict.pop(prefix + name, None) for name in MOTION]
        if len(present) == len(MemoryState._fields):
            try:
                with torch.inference_mode(False):  # they may be assigned
                    state = self._fitted(MemoryState(*saved))
                    fitted = _named(state, self._fitted_motion(motion, state))
            except ValueError as problem:
                errors.append(f"The memory was left as it is. The saved one cannot be loaded: {problem}")
        if fitted:
            state_dict |= {prefix + name: value for name, value in fitted.items()}
            if not local_metadata.get("assign_to_params_buffers", False):
                self._state(fitted["embeddings"].device)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, errors)
        none = not present and self.embeddings.is_meta  # saved by one that has not begun, and loaded by another
        forgiven = [*present, *(prefix + name for name in (self._names() if none else MOTION))]
        missing_keys[:] = [key for key in missing_keys if key not in forgiven]
        if fitted:
            self._renewed()

    def _fitted(self, saved: MemoryState) -> MemoryState:
        """Return a saved memory in this one's capacity and dtypes, or raise a ValueError that says why not."""
        for name, value in saved._asdict().items():
            _refuse_other_than_dense(name, value)
        problem = memory.inconsistency(saved)
        if problem:
            raise ValueError(problem)
        if saved.embeddings.shape[1] != self.dim:
            raise ValueError(f"it holds rows of {saved.embeddings.shape[1]} dimensions, this one of {self.dim}")
        if hasattr(saved.embeddings, "device_mesh"):
            from xbm.integrations.torch import sharding

            fitted = sharding.local(saved, self.capacity, self.shard)
        else:
            fitted = saved if saved.labels.shape[0] == self.capacity else memory.resize(saved, self.capacity)
            if self.shard.shards > 1:
                m = self.embeddings.shape[0]
                own = slice(self.shard.first(m), self.shard.first(m) + m)
                fitted = fitted._replace(**{name: getattr(fitted, name)[own] for name in Rows._fields})
        fitted = MemoryState(*(one.to(getattr(self, name).dtype) for name, one in fitted._asdict().items()))
        if not torch.isfinite(fitted.embeddings).all():
            raise ValueError(
                f"some of its rows, in {saved.embeddings.dtype}, are not finite in {self.embeddings.dtype}"
            )
        return fitted

    def _fitted_motion(self, saved: list[Any], state: MemoryState) -> Motion | None:
        """Return a saved motion; of a memory that has not moved if none is there whole; or raise as `_fitted` does."""
        still = self._still(state)
        if still is None or any(value is None for value in saved):
            return still
        for name, value, its in zip(MOTION, saved, still, strict=True):
            _refuse_other_than_dense(name, value)
            if value.shape != its.shape:
                raise ValueError(f"{name} must have shape {tuple(its.shape)}, got {tuple(value.shape)}")
        motion = Motion(*(value.to(its.dtype) for value, its in zip(saved, still, strict=True)))
        if not (motion.shift.isfinite().all() and motion.trust.isfinite()):
            raise ValueError("its motion is not finite")
        return motion

    def _names(self) -> tuple[str, ...]:
        """Return the names of the memory's buffers."""
        return MemoryState._fields + (MOTION if self.moves else ())


def _named(state: MemoryState, motion: Motion | None) -> dict[str, torch.Tensor]:
    """Return the values of a memory's buffers by their names; a motion's if there is one."""
    return dict(zip(MemoryState._fields + MOTION, (*state, *(motion or ())), strict=False))


def _refuse_other_than_dense(name: str, value: Any) -> None:
    if not isinstance(value, torch.Tensor) or value.is_meta or value.layout != torch.strided:
        raise ValueError(f"{name} must be a dense tensor with values, got {type(value).__name__} {value!r:.60}")


def _empty(dim: int, capacity: int, dtype: torch.dtype, device: torch.types.Device) -> MemoryState:
    return memory.init(capacity=capacity, dim=dim, dtype=dtype, device=device, xp=xp)
