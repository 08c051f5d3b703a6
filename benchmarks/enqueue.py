"""The enqueue alone: its cost must not grow with the capacity."""

import torch

import xbm
from benchmarks import machine
from benchmarks.contenders import OURS, PAIRS, PairLists
from benchmarks.data import Case
from benchmarks.tables import Table, span
from benchmarks.timing import interleaved

WRITES = "two index_copy_"


class Enqueue:
    """`xbm.enqueue` into a full memory."""

    def __init__(self, case):
        namespace = xbm.backends.array_namespace(torch.empty(0))
        self.state = xbm.init(capacity=case.capacity, dim=case.dim, device=case.device, xp=namespace)
        for rows, labels in case.rows():
            self.state = xbm.enqueue(self.state, rows, labels)

    def __call__(self, x, labels):
        """Store a batch."""
        self.state = xbm.enqueue(self.state, x, labels)


class Writes:
    """Only the two writes that every ring buffer needs."""

    def __init__(self, case):
        self.rows, self.labels = (torch.cat(parts) for parts in zip(*case.rows(), strict=True))
        self.slots = torch.arange(case.batch, device=case.device)

    def __call__(self, x, labels):
        """Write rows and labels."""
        self.rows.index_copy_(0, self.slots, x)
        self.labels.index_copy_(0, self.slots, labels)


class PeersEnqueue(PairLists):
    """The enqueue of pytorch-metric-learning's CrossBatchMemory."""

    def __call__(self, x, labels):
        """Store a batch."""
        self.memory.add_to_memory(x, labels, len(labels))


CONTENDERS = {OURS: Enqueue, WRITES: Writes, PAIRS: PeersEnqueue}


def run(options):
    """Return the table of every memory size, all of them interleaved."""
    table = Table(
        f"The enqueue alone, B = {options.batch}, D = {options.dim}",
        ("M", *CONTENDERS),
        f"Fastest (median) of {10 * options.rounds} interleaved rounds. xbm also validates the batch, skips "
        "non-finite rows, and stores ids and steps.",
    )
    here = {name: build for name, build in CONTENDERS.items() if name != PAIRS or machine.installed(PAIRS)}
    cases = [Case(capacity, 0.0, options.batch, options.dim, device=options.device) for capacity in options.sizes]
    ready = {(case.capacity, name): build(case) for case in cases for name, build in here.items()}
    inputs, wait = cases[0].inputs, machine.waiting(options.device)  # batches do not depend on the capacity
    for contender in ready.values():
        contender(*inputs(0))
    found = interleaved(ready, inputs, rounds=10 * options.rounds, wait=wait)
    for capacity in options.sizes:
        times = {name: found[capacity, name] for name in here}
        cells = {name: f"{span(one.fastest)} ({span(one.median)})" for name, one in times.items()}
        figures = {"M": capacity} | {name: one._asdict() for name, one in times.items()}
        table.add(figures, f"{capacity:,}", *(cells.get(name, "- (not installed)") for name in CONTENDERS))
    return table
