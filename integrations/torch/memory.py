"""The state of an objective as the buffers of an `nn.Module`: how they are moved, saved, loaded and copied."""

import copy
from collections.abc import Callable, Mapping
from typing import Any, Self

import array_api_compat.torch as xp
import torch
import torch.distributed as dist

from xbm import backends, checks, memory
from xbm.integrations.torch.ranks import is_initialized
from xbm.memory_state import MemoryState, Rows, inconsistency
from xbm.objective import Objective
from xbm.ranks import Shard
from xbm.state import NAMES, PARTS, State, from_named, named

backends.of(torch.empty(0))  # looked up before a compiler looks


class Memory(torch.nn.Module):
    """Holds the `State` of an objective in buffers named as by `xbm.state.named`; no mathematics.

    A deep copy, such as the start of an average of weights, has no rows: its memory is empty at its first call in
    training mode. Until then its buffers are on the meta device and take no space.
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
        objective: Objective,
        dim: int,
        capacity: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.types.Device = None,
        shard: bool = False,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        checks.flag("shard", shard)
        checks.whole_number("capacity", capacity, at_least=1)
        if is_initialized() and dist.get_rank(group) < 0:
            raise ValueError("this process is not among the ranks of the group")
        self.group, self.shard, self._objective = group, Shard(), objective
        if shard:
            objective.check_mergeable()
            if not is_initialized():
                raise ValueError("shard=True spreads the memory over ranks: call torch.distributed.init_process_group")
            self.shard = Shard(dist.get_rank(group), dist.get_world_size(group))
            if capacity % self.shard.shards:
                raise ValueError(
                    f"capacity must be a multiple of the {self.shard.shards} ranks that hold equal shards of it, got "
                    f"{capacity}"
                )
        state = objective.init(capacity=capacity // self.shard.shards, dim=dim, dtype=dtype, device=device, xp=xp)
        for name, value in named(state).items():
            self.register_buffer(name, value)

    @property
    def objective(self) -> Objective:
        """The loss, the miners and all other options. It can be replaced by one that needs no further buffers."""
        return self._objective

    @objective.setter
    def objective(self, objective: Objective) -> None:
        if self.shard.shards > 1:
            objective.check_mergeable()
        wanted = named(objective.init(capacity=1, dim=1, xp=xp))
        if missing := [name for name in wanted if name not in self._buffers]:
            raise ValueError(
                f"this XBM has no buffers {', '.join(missing)}, which the new objective needs: make a new XBM, with "
                f"settle= or compensate= from the start"
            )
        for name in self._names():
            if name not in wanted:
                delattr(self, name)
        self._objective = objective
        self._replaced()

    @property
    def capacity(self) -> int:
        """M, the most rows the memory holds; of all ranks together if it is sharded."""
        return self.embeddings.shape[0] * self.shard.shards

    @property
    def dim(self) -> int:
        """D, the embeddings' size."""
        return self.embeddings.shape[1]

    def rows(self) -> Rows:
        """Return copies of the filled rows, oldest first: `embeddings` (n, D), `labels`, `ids`, `stored_at` (n,).

        If the memory is sharded, the rows of this rank.
        """
        return memory.rows(memory.of_shard(self._state().memory, self.shard))

    def clear(self) -> None:
        """Empty the memory and reset its motion. Steps and skipped rows keep their counts, and so does the warm-up."""
        self._keep(self.objective.clear(self._state()))

    def _state(self, device: torch.device | str = "cpu", *, begin: bool = True) -> State:
        """Return the state. If the memory has not begun, begin it on a device, or return an empty stand-in."""
        if self.embeddings.is_meta and torch.device(device).type != "meta":
            if not begin:
                return self._empty(1, device)
            self._begin(device)
        return from_named({name: getattr(self, name) for name in self._names()})

    def _empty(self, capacity: int, device: Any) -> State:
        return self.objective.init(capacity=capacity, dim=self.dim, dtype=self.embeddings.dtype, device=device, xp=xp)

    def _begin(self, device: Any) -> None:
        """Replace the buffers by those of an empty memory on a device."""
        with torch.inference_mode(False):
            empty = self._empty(self.embeddings.shape[0], device)
        for name, value in named(empty).items():
            setattr(self, name, value)
        self._renewed()

    def _renewed(self) -> None:
        """Respond to a new or a loaded memory: a hook for subclasses."""

    def _replaced(self) -> None:
        """Respond to a new objective: a hook for subclasses."""

    def _keep(self, state: State) -> None:
        """Copy into the buffers the values that were not written in place."""
        for name, value in named(state).items():
            buffer = getattr(self, name)
            if value is not buffer:
                buffer.copy_(value)

    def _names(self) -> tuple[str, ...]:
        """Return the names of the state's buffers."""
        return tuple(name for name in NAMES if name in self._buffers)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        """Let `.to(device)` move the memory; `.half()` and `.to(dtype)` leave its dtypes alone."""

        def keeping_dtype(tensor: torch.Tensor) -> torch.Tensor:
            try:
                moved = fn(tensor)
            except NotImplementedError:
                if not tensor.is_meta:
                    raise
                return tensor  # no data to move
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        if recurse:
            for child in self.children():
                child._apply(fn)
        begun = not self.embeddings.is_meta
        super()._apply(keeping_dtype, recurse=False)
        if not begun and not self.embeddings.is_meta:  # by `to_empty`, which leaves arbitrary values
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
        """Save the state, unless the memory has not begun."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name in self._names():
            if destination[prefix + name].is_meta:
                del destination[prefix + name]
            elif self.shard.shards > 1 and name in Rows._fields:
                from xbm.integrations.torch import sharding  # a second to import, and rarely needed

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
        """Load a memory of any capacity, its newest rows, completely or not at all.

        A warm-up or a motion that was not saved begins anew.
        """
        state_dict, fitted = dict(state_dict), {}
        saved = {name: state_dict.pop(prefix + name) for name in NAMES if prefix + name in state_dict}
        present = [prefix + name for name in MemoryState._fields if name in saved]
        if len(present) == len(MemoryState._fields):
            try:
                with torch.inference_mode(False):  # with assign=True they become the buffers
                    fitted = named(self._fitted(saved))
            except ValueError as problem:
                errors.append(f"The memory is unchanged. The saved one cannot be loaded: {problem}")
        if fitted:
            state_dict |= {prefix + name: value for name, value in fitted.items()}
            if not local_metadata.get("assign_to_params_buffers", False):
                self._state(fitted["embeddings"].device)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, errors)
        neither_begun = not present and self.embeddings.is_meta
        optional = NAMES if neither_begun else NAMES[len(MemoryState._fields) :]
        forgiven = {*present, *(prefix + name for name in optional)}
        missing_keys[:] = [key for key in missing_keys if key not in forgiven]
        if fitted:
            self._renewed()

    def _fitted(self, saved: Mapping[str, Any]) -> State:
        """Return a saved state in this memory's capacity and dtypes; raise a ValueError if it does not fit."""
        for name in self._names():
            if name in saved:
                _check_dense(name, saved[name])
        state = from_named(saved)
        fresh = self.objective.begin(self._fitted_memory(state.memory))
        _, *parts = zip(PARTS, state, fresh, strict=True)
        return State(fresh.memory, *(_fitted_part(*one) for one in parts))

    def _fitted_memory(self, saved: MemoryState) -> MemoryState:
        problem = inconsistency(saved)
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


def _fitted_part(prefix: str, saved: Any, fresh: Any) -> Any:
    """Return a saved part of a state beside the memory; the fresh part if there is none, None if none is needed."""
    if saved is None or fresh is None:
        return fresh
    for name, value, like in zip(fresh._fields, saved, fresh, strict=True):
        if value.shape != like.shape:
            raise ValueError(f"{prefix}{name} must have shape {tuple(like.shape)}, got {tuple(value.shape)}")
        if like.isfinite().all() and not value.isfinite().all():  # a value that begins as NaN can be NaN
            raise ValueError(f"{prefix}{name} is not finite")
    return type(fresh)(*(value.to(like.dtype) for value, like in zip(saved, fresh, strict=True)))


def _check_dense(name: str, value: Any) -> None:
    if not isinstance(value, torch.Tensor) or value.is_meta or value.layout != torch.strided:
        raise ValueError(f"{name} must be a dense tensor with values, got {type(value).__name__} {value!r:.60}")
