"""Atomic checkpoints of a run on any number of ranks, based on `torch.distributed.checkpoint`.

A checkpoint folder holds `checkpoint.json` and a subfolder with one safetensors file per rank. The JSON lists the files
and their CRC-32. It is replaced last, atomically; until then, the previous checkpoint stays valid.
"""

import dataclasses
import json
import os
import re
import shutil
import uuid
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from xbm.integrations.torch.files import crc32, crc32_of, flush

NAME, FORMAT, VALUE = "checkpoint.json", "xbm checkpoint 1", "a value"
SHARDS = re.compile(r"shards-[0-9a-f]{32}")  # names of the subfolders

T = TypeVar("T")
Places = dict[str, tuple[Any, Any]]  # name -> (container, key): a dict or list, and a key of it


def save(folder: str | os.PathLike[str], state: dict[str, Any]) -> None:
    """Write a checkpoint, atomically replacing an existing one. All ranks must call this function.

    If the run is killed during the call, the folder holds either the previous or the new checkpoint. All ranks must
    share a file system. A single process may call it without a process group.

    Parameters
    ----------
    folder : path
        Created if it does not exist. Existing `checkpoint.json` and `shards-...` are replaced; other files are kept.
    state : dict
        Nested dicts and lists of dense tensors, DTensors and JSON values (None, bool, int, float, str and lists of
        them). Each rank writes its part of a DTensor. For all other entries, the value of the lowest rank that has the
        entry is written.

    Raises
    ------
    TypeError, ValueError
        If the state holds anything else, or the ranks' tensors differ in shape or dtype. Nothing is written.
    RuntimeError
        If a rank cannot write its file. The previous checkpoint is kept.

    Examples
    --------
    >>> import tempfile
    >>> import torch
    >>> from xbm.integrations.torch import XBM, checkpoint
    >>> xbm, fresh = XBM(dim=2, capacity=4), XBM(dim=2, capacity=4)
    >>> _ = xbm(torch.eye(2), torch.tensor([7, 8]))
    >>> state = {"xbm": fresh.state_dict(), "epoch": 0}
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     checkpoint.save(folder, {"xbm": xbm.state_dict(), "epoch": 3})
    ...     checkpoint.load(folder, state)
    >>> fresh.load_state_dict(state["xbm"])
    <All keys matched successfully>
    >>> fresh.rows().labels.tolist(), state["epoch"]
    ([7, 8], 3)
    """
    folder = Path(folder)
    tensors, places = _agreed(lambda: _parts(state))
    own = {name: container[key] for name, (container, key) in places.items()}
    names, kinds, values = zip(*_gathered((uuid.uuid4().hex, _kinds(tensors, own), own)), strict=True)
    _refuse_differences(kinds)
    merged = {name: value for each in reversed(values) for name, value in each.items()}
    writer = _Writer(folder, f"shards-{names[0]}", merged)
    with _told(f"{folder} was not written"):
        state_dict_saver.save(tensors, storage_writer=writer, planner=_Planner(dedup_save_to_lowest_rank=True))


def load(folder: str | os.PathLike[str], state: dict[str, Any]) -> None:
    """Load a checkpoint, written by any number of ranks, into a state. All ranks must call this function.

    Tensors are filled in place; other values are replaced. Reading executes no code. Top-level entries of the
    checkpoint that are not in the state are ignored; within an entry, all names, shapes and dtypes must match.

    Parameters
    ----------
    folder : path
    state : dict
        As for `save`. A DTensor gets its part of the saved tensor, a plain tensor gets all of it, no matter how it was
        saved.

    Raises
    ------
    FileNotFoundError
        If there is no checkpoint.
    TypeError, ValueError
        If the checkpoint is damaged, has another format, or does not match the state. The state is unchanged on all
        ranks.
    RuntimeError
        If reading fails after these checks, for example because of a disk error. The state may be partially loaded.
    """
    folder = Path(folder)
    content = _gathered(_agreed(lambda: _content(folder)))[0]
    shards = folder / content["shards"]
    _agreed(lambda: _refuse_damage(shards, content["files"]))
    tensors, places = _agreed(lambda: _fitting(state, shards, content["values"]))
    with _told(f"{shards} was not read to its end"):
        state_dict_loader.load(tensors, storage_reader=HuggingFaceStorageReader(str(shards)))
    for name, (container, key) in places.items():
        container[key] = content["values"][name]


class _Writer(HuggingFaceStorageWriter):
    """Writer that replaces the JSON once the files of all ranks are on disk."""

    def __init__(self, folder: Path, shards: str, values: dict[str, Any]) -> None:
        super().__init__(str(folder / shards), save_distributed=True)
        self.folder, self.shards, self.values = folder, folder / shards, values

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this rank's file; return its name and CRC-32."""
        written = super().write_data(plan, planner).value()
        names = {one.storage_data.relative_path for one in written}
        sums = {name: crc32(self.shards / name) for name in names}
        result: Future[list[WriteResult]] = Future()
        result.set_result([dataclasses.replace(one, storage_data=sums) for one in written])
        return result

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """On rank 0, replace the previous checkpoint, after all ranks have written their files."""
        files = {name: crc for rank in results for one in rank for name, crc in one.storage_data.items()}
        content = {"format": FORMAT, "shards": self.shards.name, "files": files, "values": self.values}
        with (self.shards / NAME).open("w") as file:
            json.dump({"content": content, "crc32": crc32_of(content)}, file)
            file.flush()
            os.fsync(file.fileno())
        for one in (self.shards, self.folder, self.folder.parent):
            flush(one)
        os.replace(self.shards / NAME, self.folder / NAME)
        flush(self.folder)
        for one in self.folder.iterdir():
            if SHARDS.fullmatch(one.name) and one != self.shards:
                shutil.rmtree(one, ignore_errors=True)


class _Planner(DefaultSavePlanner):
    """Planner that saves dense copies: safetensors rejects strided tensors and tensors that share storage."""

    def transform_object(self, write_item: WriteItem, object: torch.Tensor) -> torch.Tensor:
        """Return a contiguous copy of a tensor on the CPU."""
        return object.to("cpu", copy=True, memory_format=torch.contiguous_format)


def _parts(state: dict[str, Any]) -> tuple[dict[str, torch.Tensor], Places]:
    """Return the state's tensors by name, and the places of its other values."""
    tensors: dict[str, torch.Tensor] = {}
    places: Places = {}
    for name, container, key in _leaves(state):
        value = container[key]
        if name in tensors or name in places:
            raise ValueError(f"names in the state must be unique, got {name!r} twice")
        if _is_plain(value):
            places[name] = container, key
        elif isinstance(value, torch.Tensor) and value.layout == torch.strided and not value.is_meta:
            tensors[name] = value.detach()
        else:
            raise TypeError(
                f"{name} must be a dense tensor with values, a DTensor, or a JSON value (None, bool, int, float, "
                f"str, lists of them), got {type(value).__name__} {value!r:.60}"
            )
    return tensors, places


def _leaves(container: dict[Any, Any] | list[Any], prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yield (name, container, key) of each leaf."""
    for key, value in container.items() if isinstance(container, dict) else enumerate(container):
        if isinstance(value, dict) or (isinstance(value, list) and not _is_plain(value)):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", container, key


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(_is_plain(one) for one in value)
    return value is None or isinstance(value, (bool, int, float, str))


def _kinds(tensors: Mapping[str, torch.Tensor], values: Iterable[str]) -> dict[str, str]:
    """Return a description of each entry: shape and dtype, or `VALUE`."""
    return {name: _kind(one.shape, one.dtype) for name, one in tensors.items()} | dict.fromkeys(values, VALUE)


def _kind(shape: torch.Size, dtype: torch.dtype) -> str:
    return f"{tuple(shape)} {dtype}"


def _refuse_differences(kinds: Iterable[dict[str, str]]) -> None:
    """Raise an error if entries with the same name differ between ranks."""
    known: dict[str, tuple[int, str]] = {}
    for rank, own in enumerate(kinds):
        for name, kind in own.items():
            first, other = known.setdefault(name, (rank, kind))
            if kind != other:
                raise ValueError(
                    f"{name} must be the same on all ranks, got {other} on rank {first} and {kind} on rank {rank}"
                )


def _content(folder: Path) -> dict[str, Any]:
    """Return the content of the JSON file, after verifying its checksum."""
    try:
        whole = json.loads((folder / NAME).read_bytes())
        content = whole["content"]
        sound = whole["crc32"] == crc32_of(content) and content["format"] == FORMAT
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(f"there is no checkpoint at {folder}: {NAME} not found") from None
    except (ValueError, KeyError, TypeError):
        sound = False
    if not sound:
        raise ValueError(f"{folder / NAME} is damaged, or its format is not {FORMAT!r}")
    return content


def _refuse_damage(shards: Path, files: dict[str, int]) -> None:
    """Raise an error if files are missing, added or changed; each rank verifies a part of them."""
    present = {path.name for path in shards.glob("*.safetensors")}
    if present != set(files):
        raise ValueError(f"{shards} must hold the files {sorted(files)}, got {sorted(present)}")
    rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    for name in sorted(files)[rank::size]:
        if crc32(shards / name) != files[name]:
            raise ValueError(f"{shards / name} is damaged: its CRC-32 differs from the one in {NAME}")


def _fitting(state: dict[str, Any], shards: Path, values: dict[str, Any]) -> tuple[dict[str, torch.Tensor], Places]:
    """Return the state's tensors and places; raise an error if the checkpoint does not match them."""
    tensors, places = _parts(state)
    saved = HuggingFaceStorageReader(str(shards)).read_metadata().state_dict_metadata
    there = dict.fromkeys(values, VALUE)
    there |= {n: _kind(t.size, t.properties.dtype) for n, t in saved.items() if isinstance(t, TensorStorageMetadata)}
    here = _kinds(tensors, places)
    entries = tuple(f"{key}." for key in state)
    asked = here | {name: "missing" for name in there if name not in here and f"{name}.".startswith(entries)}
    problems = [
        f"{name} is {there.get(name, 'missing')} in the checkpoint, {kind} in the state"
        for name, kind in asked.items()
        if there.get(name) != kind
    ]
    if problems:
        more = f"; and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise ValueError(f"{shards.parent} does not match the state: {'; '.join(problems[:3])}{more}")
    return tensors, places


def _agreed(function: Callable[[], T]) -> T:
    """Return the result of a function; if it raises on any rank, raise on all ranks."""
    result, own = None, None
    try:
        result = function()
    except Exception as error:
        own = error
    for rank, problem in enumerate(_gathered(own)):
        if problem is not None:
            problem.add_note(f"on rank {rank}")
            raise own or problem
    return cast(T, result)


def _gathered(value: T) -> list[T]:
    """Return the values of all ranks."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


@contextmanager
def _told(what: str) -> Iterator[None]:
    """Convert a CheckpointException into a RuntimeError that names the failing rank and its error."""
    with warnings.catch_warnings():
        # A single process is supported.
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        try:
            yield
        except CheckpointException as error:
            rank, (problem, _) = min(error.failures.items())
            raise RuntimeError(f"{what}: rank {rank}: {type(problem).__name__}: {problem}") from error
