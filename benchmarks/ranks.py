"""Distributed training: the cost of a step for each rank, compared with the same step in one process.

The total batch size is the same for any number of ranks, so the figures show the savings and costs of distribution.
"""

import json
import os
import tempfile
from datetime import timedelta
from functools import partial
from math import prod
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import machine
from benchmarks.data import Case
from benchmarks.tables import Table, both, megabytes, span
from benchmarks.timing import Times, interleaved
from xbm import PairLoss, losses
from xbm.integrations.torch import XBM
from xbm.memory_state import Rows

ACTIVE = 0.1  # share of negatives above the contrastive loss's margin
PATIENCE = timedelta(minutes=5)  # longest wait for another rank, such as while it generates a memory's rows


class Form(NamedTuple):
    """The number of ranks that share a memory, and whether it is sharded."""

    ranks: int
    sharded: bool

    @property
    def name(self):
        """Name of the form in tables."""
        return "one process" if self.ranks == 1 else "sharded" if self.sharded else "replicated"

    def left_out(self, case):
        """Return the reason why this form cannot run a case, or None."""
        if self.sharded and not isinstance(losses.get(case.loss), PairLoss):
            return f"{case.loss} needs whole rows"
        if self.sharded and case.capacity % self.ranks:
            return "capacity not divisible by ranks"
        if case.device == "cuda" and self.ranks > torch.cuda.device_count():
            return f"needs {self.ranks} GPUs of {torch.cuda.device_count()}"
        return None


ONE = Form(1, False)


def run(options):
    """Return the table of every memory size, number of ranks and form. The forms of one size are interleaved."""
    table = Table(
        f"Distributed training with {options.loss} loss, B = {options.batch} over all ranks, D = {options.dim}",
        ("M", "ranks", "memory", "rows", "bytes", "products", "sent", "step", "multiple"),
        "Maximum over ranks: memory rows and their bytes, multiplications in matrix products as a share of one "
        "process's, and bytes sent per step. Step: forward and backward on all ranks, until the last rank is ready; "
        f"fastest (median) of {options.rounds} interleaved rounds. Multiple: relative to one process. "
        f"{ACTIVE:.0%} of the negatives above 0.5. The memory is full, every call stores its batch, all losses agree.",
    )
    forms = [ONE, *(Form(n, sharded) for n in options.ranks if n > 1 for sharded in (False, True))]
    cases = [Case(M, ACTIVE, options.batch, options.dim, options.loss, options.device) for M in options.sizes]
    for case, found in zip(cases, measured(cases, forms, options), strict=True):
        unit = found[ONE]
        for form in forms:
            figures = {"M": case.capacity, "ranks": form.ranks, "memory": form.name}
            if form in found:
                figures |= found[form]
                cells = _cells(found[form], unit)
            else:
                figures["left_out"] = form.left_out(case)
                cells = (f"- ({figures['left_out']})", *[""] * 5)
            table.add(figures, f"{case.capacity:,}", str(form.ranks), form.name, *cells)
    return table


def _cells(one, unit):
    times, share = _times(one), one["products"] / unit["products"]
    return (
        f"{one['rows']:,}",
        megabytes(one["bytes"]),
        f"{share:.3f}",
        f"{one['sent']:,}",
        f"{span(times.fastest)} ({span(times.median)})",
        both(times.times(_times(unit))),
    )


def _times(figures):
    return Times(figures["fastest"], figures["median"])


def measured(cases, forms, options):
    """Start the processes and return, for each case, {form: figures} of the forms that can run it.

    Raises
    ------
    ValueError
        If the forms disagree in the loss.
    """
    todo = [(case, [form for form in forms if not form.left_out(case)]) for case in cases]
    size = max(form.ranks for _, ready in todo for form in ready)
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "store").touch()
        arguments = (size, folder, todo, options.rounds, options.threads)
        torch.multiprocessing.spawn(_work, arguments, nprocs=size)
        found = [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(size)]
    return [agreed(case, ready, [one[i] for one in found]) for i, (case, ready) in enumerate(todo)]


def agreed(case, forms, found):
    """Check that all forms and ranks agree in the loss; return {form: figures}, the maximum over ranks."""
    loss, figures = found[0][0]["loss"], {}
    for i, form in enumerate(forms):
        of_ranks = [rank[i] for rank in found[: form.ranks]]
        if not all(abs(one["loss"] - loss) <= 1e-4 * abs(loss) for one in of_ranks):
            raise ValueError(
                f"{form} must have the loss of one process, {loss}, at M = {case.capacity}, got {of_ranks}"
            )
        figures[form] = {name: max(one[name] for one in of_ranks) for name in of_ranks[0]}
    return figures


def _work(rank, size, folder, todo, rounds, threads):
    """Run one rank: measure all cases and write the figures into the folder."""
    os.environ |= {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}
    machine.use_threads(threads)
    device = todo[0][0].device
    if device == "cuda":
        torch.cuda.set_device(rank)
    store = f"file://{folder}/store"
    backend = "nccl" if device == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=store, rank=rank, world_size=size, timeout=PATIENCE)
    groups = {n: dist.new_group(range(n)) for n in sorted({form.ranks for _, forms in todo for form in forms})}
    found = [_figures(rank, groups, case, forms, rounds) for case, forms in todo]
    Path(folder, f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def _figures(rank, groups, case, forms, rounds):
    """Return a rank's figures for each form; None for forms with fewer ranks."""
    parts = {form: Part(case, groups[form.ranks], form.sharded) for form in forms if rank < form.ranks}
    found = {form: part.counted(*case.inputs(0)) for form, part in parts.items()}
    times = interleaved(
        {form: parts.get(form, _idle) for form in forms},
        lambda number: case.inputs(number + 1),
        rounds=rounds,
        wait=partial(_wait, machine.waiting(case.device)),
    )
    return [found[form] | times[form]._asdict() if form in found else None for form in forms]


def _idle(x, labels):
    """Do nothing: the step of a rank outside the group."""


def _wait(for_device):
    """Wait for the device, then for all ranks."""
    for_device()
    dist.barrier()


class Part:
    """One rank's part of a group's steps."""

    def __init__(self, case, group, sharded):
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self.xbm = XBM(case.dim, case.capacity, case.loss, warmup=0, device=case.device, shard=sharded, group=group)
        self.xbm.fill(torch.nn.Identity(), (self.own(*chunk) for chunk in case.rows()))

    def own(self, *whole):
        """Return this rank's rows of each array."""
        n = len(whole[0])
        return tuple(one[self.rank * n // self.size : (self.rank + 1) * n // self.size] for one in whole)

    def __call__(self, x, labels):
        """Take this rank's part of a step; return the loss over all ranks."""
        x, labels = self.own(x, labels)
        loss = self.xbm(x.requires_grad_(), labels)
        loss.backward()
        return loss.detach()

    def counted(self, x, labels):
        """Take a step; return the figures other than times."""
        with Counter(self.rank) as counter:
            loss = float(self(x, labels))
        held = [getattr(self.xbm, name) for name in Rows._fields]
        rows, size = len(held[0]), sum(one.nbytes for one in held)
        return {"loss": loss, "rows": rows, "bytes": size, "products": counter.products, "sent": counter.sent}


class Counter(TorchDispatchMode):
    """Counts the bytes that a rank sends to others, and the multiplications in its matrix products."""

    def __init__(self, rank):
        super().__init__()
        self.rank, self.sent, self.products = rank, 0, 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        """Count an operation and execute it."""
        if function.namespace == "c10d":
            self.sent += self._leaving(function, *arguments)
        elif function is torch.ops.aten.mm.default:
            a, b = arguments
            self.products += prod(a.shape) * b.shape[1]
        return function(*arguments, **(options or {}))

    def _leaving(self, function, found, x, group, *splits):
        """Return the number of bytes of a collective's input that are sent to other ranks."""
        if function is torch.ops.c10d.allgather_.default:
            return x[0].nbytes * (len(found[0]) - 1)
        if function is torch.ops.c10d.alltoall_base_.default:
            to_each = splits[1]
            return x.nbytes - x[: to_each[self.rank]].nbytes
        raise NotImplementedError(f"cannot count the bytes sent by {function}: expected allgather_ or alltoall_base_")
