"""The ranks of a torch.distributed process group, as the core's step uses them."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NoReturn

import torch
import torch.distributed as dist

from xbm.ranks import Ranks, Spread

if TYPE_CHECKING:
    from xbm.batch import Batch

MESSAGE = 400  # characters of an error that are sent to the other ranks
PARTS = {"labels": "anchors", "stored_labels": "rows", "ids": "anchors", "enqueue": "rows", "float64": "either"}
"""Fields that all non-empty ranks must pass, or none, by the count that says whether a rank is empty."""


def is_initialized() -> bool:
    """Return whether there is a process group."""
    return dist.is_available() and dist.is_initialized()


class Together:
    """The ranks that share a memory, replicated or sharded.

    Parameters
    ----------
    group : ProcessGroup or None
        The group; None for all ranks.
    device : torch.device
        Device of the exchanged arrays.
    sharded : bool
        Whether each rank holds a part of the memory.
    facts : dict of str to int or () integer tensor
        Numbers that must be equal on all ranks, by their names in an error.
    broadcast : (1,) bool tensor
        Whether another rank's buffers have replaced this rank's.
    """

    def __init__(
        self,
        group: dist.ProcessGroup | None,
        device: torch.device,
        *,
        sharded: bool,
        facts: dict[str, int | torch.Tensor],
        broadcast: torch.Tensor,
    ) -> None:
        self.group, self.device, self.sharded, self.facts, self.broadcast = group, device, sharded, facts, broadcast
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)

    def meet(self, read: Callable[[], "Batch"]) -> tuple["Batch", Ranks]:
        """Return this rank's batch and the ranks of the call; raise on all ranks if `read` raises or ranks disagree."""
        batch, failure = None, None
        try:
            batch = read()
        except Exception as error:  # sent to the other ranks, then raised
            failure = error
        table = self._table(
            {"failed": failure is not None, **_of_batch(batch), **self.facts, "broadcast": self.broadcast}
        )
        if batch is None or any(table["failed"]):
            self._raise(failure, table["failed"])
        self._compare(table)
        batch = self._alike(batch, table)
        queries, keys, each = (ProcessSpread(self, n) for n in (table["anchors"], table["rows"], [1] * self.size))
        return batch, Ranks(queries, keys, each, self.rank, self.size, self.sharded, float(self.size))

    def share(self, number: int) -> list[int]:
        """Return the numbers of all ranks, in rank order."""
        return self._table({"number": number})["number"]

    def all_gather(self, x: torch.Tensor, what: str) -> torch.Tensor:
        """Return x (n, ...) of all ranks, (ranks, n, ...), all of one shape."""
        found = [torch.empty_like(x) for _ in range(self.size)]
        with self._naming(what):
            dist.all_gather(found, x.contiguous(), group=self.group)
        return torch.stack(found)

    def all_to_all(self, x: torch.Tensor, sizes: list[int], what: str) -> torch.Tensor:
        """Return (ranks, n, ...), each rank's values for this rank, from this rank's values for all, (N, ...)."""
        n = sizes[self.rank]
        found = x.new_empty((self.size * n, *x.shape[1:]))
        with self._naming(what):
            dist.all_to_all_single(found, x.contiguous(), [n] * self.size, sizes, group=self.group)
        return found.view(self.size, n, *x.shape[1:])

    def _table(self, numbers: Mapping[str, int | torch.Tensor]) -> dict[str, list[int]]:
        """Return the integers of all ranks by name. This is the only place that synchronises the device."""
        on_host = {name: one for name, one in numbers.items() if not isinstance(one, torch.Tensor)}
        there = {name: one for name, one in numbers.items() if isinstance(one, torch.Tensor)}
        mine = [torch.tensor([*on_host.values()], dtype=torch.int64).to(self.device)]
        mine += [one.to(self.device, torch.int64).reshape(1) for one in there.values()]
        found = self.all_gather(torch.cat(mine), "compare their batches").T.tolist()
        return dict(zip([*on_host, *there], found, strict=True))

    def _raise(self, own: Exception | None, failed: list[int]) -> NoReturn:
        """Raise this rank's error, or one that quotes the first failed rank's."""
        text = "" if own is None else f"{type(own).__name__}: {own}"
        letters = bytearray(text.encode()[:MESSAGE].ljust(MESSAGE, b"\0"))
        texts = self.all_gather(torch.frombuffer(letters, dtype=torch.uint8).to(self.device), "share their errors")
        if own is not None:
            raise own
        first = failed.index(1)
        text = bytes(texts[first].tolist()).rstrip(b"\0").decode(errors="replace")
        raise RuntimeError(f"rank {first} raised an error for its batch, so no rank stored anything. {text}")

    def _compare(self, table: dict[str, list[int]]) -> None:
        """Raise if the memories of the ranks differ."""
        for name in self.facts:
            if len(set(table[name])) > 1:
                raise ValueError(
                    f"the memories of all ranks must have the same {name}, got {', '.join(map(str, table[name]))} in "
                    f"rank order"
                )
        if any(table["broadcast"]):
            raise RuntimeError(
                "the memory's buffers were broadcast: DistributedDataParallel does so at every step for a module that "
                "it wraps. Keep XBM outside of DDP, or put its buffers on DDP's list of buffers to ignore"
            )

    def _alike(self, batch: "Batch", table: dict[str, list[int]]) -> "Batch":
        """Return the batch with the fields that all ranks pass: an empty rank gets the fields of the others."""
        if len(set(table["keys"])) > 1:
            raise ValueError(f"keys must come from all {self.size} ranks or none, got {table['keys']} in rank order")
        for name, of in PARTS.items():
            bring = [rank for rank, n in enumerate(table[of]) if n] or [0]
            given = [rank for rank in bring if table[name][rank]]
            if given and given != bring:
                raise ValueError(f"{name} must come from all {self.size} ranks or none, got it from {given} alone")
            if self.rank not in bring:
                batch = self._with(batch, name, bool(given))
        return batch

    def _with(self, batch: "Batch", name: str, given: bool) -> "Batch":
        """Return an empty batch with or without one of its fields."""
        if name == "float64":
            wide = torch.float64 if given else torch.float32
            return batch._replace(z=batch.z.to(wide), stored=batch.stored.to(wide))
        dtype = torch.bool if name == "enqueue" else torch.int64
        part: dict[str, Any] = {name: torch.empty(0, dtype=dtype, device=self.device) if given else None}
        return batch._replace(**part)

    @contextmanager
    def _naming(self, what: str) -> Iterator[None]:
        """Add the name of the exchange to an error in a collective."""
        try:
            yield
        except RuntimeError as error:  # also of backends, and timeouts
            raise RuntimeError(
                f"XBM's {self.size} ranks could not {what} (this is rank {self.rank}): one of them has raised an "
                f"error, has died, hangs, or calls XBM less often than the others. {error}"
            ) from error


def _of_batch(batch: "Batch | None") -> dict[str, int | torch.Tensor]:
    """Return the header of a rank's batch: its numbers of rows, and the fields it has."""
    if batch is None:
        return dict.fromkeys(("anchors", "rows", "either", "keys", *PARTS), 0)
    given = {name: getattr(batch, name, None) is not None for name in ("keys", *PARTS)}
    n, k, wide = len(batch.z), len(batch.stored), batch.z.dtype == torch.float64
    return {"anchors": n, "rows": k, "either": n + k, **given, "float64": wide}


class ProcessSpread(Spread):
    """Rows that are spread over the ranks of a process group."""

    def __init__(self, ranks: Together, sizes: list[int]) -> None:
        self.ranks, self.sizes = ranks, sizes
        start = sum(sizes[: ranks.rank])
        self.mine = slice(start, start + sizes[ranks.rank])

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        """Return all ranks' rows (N, ...) from this rank's (n, ...)."""
        most = max(self.sizes)
        if x.shape[0] < most:
            x = torch.cat([x, x.new_zeros((most - x.shape[0], *x.shape[1:]))])
        found = self.ranks.all_gather(x, "gather their batches")
        return torch.cat([rows[:n] for rows, n in zip(found, self.sizes, strict=True)])

    def own(self, x: torch.Tensor) -> torch.Tensor:
        """Return this rank's rows (n, ...) of all (N, ...)."""
        return x[self.mine]

    def exchange(self, x: torch.Tensor) -> torch.Tensor:
        """Return (ranks, n, ...), each rank's values for this rank's rows."""
        return self.ranks.all_to_all(x, self.sizes, "exchange their results")
