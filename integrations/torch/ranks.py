"""The ranks of a torch.distributed process group, as the core's step meets them."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NoReturn

import torch
import torch.distributed as dist

from xbm.ranks import Ranks, Spread

if TYPE_CHECKING:
    from xbm.batch import Batch

TOLD = 400  # characters of a refusal that the other ranks are told
PARTS = {"labels": "anchors", "stored_labels": "rows", "ids": "anchors", "enqueue": "rows", "float64": "either"}
"""What all ranks give that bring any of these, or none of them."""


def is_initialized() -> bool:
    """Tell whether there is a process group."""
    return dist.is_available() and dist.is_initialized()


class Together:
    """The ranks that a memory is shared by, or spread over.

    Parameters
    ----------
    group : ProcessGroup or None
        All ranks if None.
    device : torch.device
        Where arrays are exchanged.
    sharded : bool
        Whether each rank holds a part of the memory.
    facts : dict of str to int or () integer tensor
        What must be the same on all ranks, by the name that an error gives it.
    broadcast : (1,) bool tensor
        Whether this rank's buffers were replaced by those of another.
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
        """Return this rank's batch and the ranks of the call; raise on all ranks if one refuses, or they disagree."""
        batch, refusal = None, None
        try:
            batch = read()
        except Exception as error:  # told to the others, then raised
            refusal = error
        table = self._table(
            {"refused": refusal is not None, **_of_batch(batch), **self.facts, "broadcast": self.broadcast}
        )
        if batch is None or any(table["refused"]):
            self._refuse(refusal, table["refused"])
        self._compare(table)
        batch = self._alike(batch, table)
        queries, keys, each = (ProcessSpread(self, n) for n in (table["anchors"], table["rows"], [1] * self.size))
        return batch, Ranks(queries, keys, each, self.rank, self.size, self.sharded, float(self.size))

    def share(self, number: int) -> list[int]:
        """Return the number that each rank gives."""
        return self._table({"number": number})["number"]

    def all_gather(self, x: torch.Tensor, what: str) -> torch.Tensor:
        """Return x (n, ...) of all ranks, (ranks, n, ...), all of one shape."""
        found = [torch.empty_like(x) for _ in range(self.size)]
        with self._naming(what):
            dist.all_gather(found, x.contiguous(), group=self.group)
        return torch.stack(found)

    def all_to_all(self, x: torch.Tensor, sizes: list[int], what: str) -> torch.Tensor:
        """Return (ranks, n, ...), what each rank has for this one, from what it has for all, (N, ...)."""
        n = sizes[self.rank]
        found = x.new_empty((self.size * n, *x.shape[1:]))
        with self._naming(what):
            dist.all_to_all_single(found, x.contiguous(), [n] * self.size, sizes, group=self.group)
        return found.view(self.size, n, *x.shape[1:])

    def _table(self, numbers: Mapping[str, int | torch.Tensor]) -> dict[str, list[int]]:
        """Return each rank's integers by their names. The only place where a device waits."""
        on_host = {name: one for name, one in numbers.items() if not isinstance(one, torch.Tensor)}
        there = {name: one for name, one in numbers.items() if isinstance(one, torch.Tensor)}
        mine = [torch.tensor([*on_host.values()], dtype=torch.int64).to(self.device)]
        mine += [one.to(self.device, torch.int64).reshape(1) for one in there.values()]
        found = self.all_gather(torch.cat(mine), "tell each other what they bring").T.tolist()
        return dict(zip([*on_host, *there], found, strict=True))

    def _refuse(self, own: Exception | None, refused: list[int]) -> NoReturn:
        """Raise this rank's refusal, or an error that tells of the first rank's."""
        text = "" if own is None else f"{type(own).__name__}: {own}"
        letters = bytearray(text.encode()[:TOLD].ljust(TOLD, b"\0"))
        told = self.all_gather(torch.frombuffer(letters, dtype=torch.uint8).to(self.device), "tell what they refuse")
        if own is not None:
            raise own
        first = refused.index(1)
        text = bytes(told[first].tolist()).rstrip(b"\0").decode(errors="replace")
        raise RuntimeError(f"rank {first} refused its batch, so nothing was stored on any rank. {text}")

    def _compare(self, table: dict[str, list[int]]) -> None:
        """Refuse memories that differ."""
        for name in self.facts:
            if len(set(table[name])) > 1:
                raise ValueError(
                    f"the memories of all ranks must have the same {name}, got {', '.join(map(str, table[name]))} in "
                    f"rank order"
                )
        if any(table["broadcast"]):
            raise RuntimeError(
                "the memory's buffers were broadcast: DistributedDataParallel does that at every step with a module "
                "that it wraps. Keep XBM outside of it, or put its buffers on DDP's list of what to ignore"
            )

    def _alike(self, batch: "Batch", table: dict[str, list[int]]) -> "Batch":
        """Return the batch with what all ranks give: one that brings no rows gives what the others give."""
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
        """Return a batch that brings no rows with or without one of its parts."""
        if name == "float64":
            wide = torch.float64 if given else torch.float32
            return batch._replace(z=batch.z.to(wide), stored=batch.stored.to(wide))
        dtype = torch.bool if name == "enqueue" else torch.int64
        part: dict[str, Any] = {name: torch.empty(0, dtype=dtype, device=self.device) if given else None}
        return batch._replace(**part)

    @contextmanager
    def _naming(self, what: str) -> Iterator[None]:
        """Say of an error in a collective which it was."""
        try:
            yield
        except RuntimeError as error:  # also of backends, and timeouts
            raise RuntimeError(
                f"XBM's {self.size} ranks could not {what} (this is rank {self.rank}): one of them has raised an "
                f"error, died, hangs, or does not call XBM as often as the others. {error}"
            ) from error


def _of_batch(batch: "Batch | None") -> dict[str, int | torch.Tensor]:
    """Return what a rank tells of its batch: how many rows, and what was given with them."""
    if batch is None:
        return dict.fromkeys(("anchors", "rows", "either", "keys", *PARTS), 0)
    given = {name: getattr(batch, name, None) is not None for name in ("keys", *PARTS)}
    n, k, wide = len(batch.z), len(batch.stored), batch.z.dtype == torch.float64
    return {"anchors": n, "rows": k, "either": n + k, **given, "float64": wide}


class ProcessSpread(Spread):
    """Rows of which each rank has some."""

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
        """Return (ranks, n, ...), what each rank says of this rank's rows."""
        return self.ranks.all_to_all(x, self.sizes, "exchange what they found")
