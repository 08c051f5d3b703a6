"""Metrics of retrieval within a set, compared with faiss' flat search to the same depth.

Run as a program, this module measures one of the two in a fresh process: it takes arguments as JSON and prints the peak
memory in bytes.
"""

import json
import sys

import torch

from benchmarks import machine
from benchmarks.data import products_like
from benchmarks.tables import Table, both, megabytes, span
from benchmarks.timing import interleaved
from xbm import metrics

OURS, FAISS = "xbm.metrics.retrieval", "faiss IndexFlatIP"
CUTOFFS = ((1,), (1, 10, 100, 1000))
WARM = 1024  # rows of the warm-up search


class Ours:
    """`xbm.metrics.retrieval`."""

    def __init__(self, x, labels, k):
        self.x, self.labels, self.k = x, labels, k

    def __call__(self):
        """Compute the metrics and store them in `found`."""
        self.found = metrics.retrieval(self.x, self.labels, k=self.k)


class Faiss:
    """faiss' search alone, on normalised rows. It searches one neighbour more, because a query finds itself."""

    def __init__(self, x, labels, k):
        self.rows, self.labels = x.cpu().numpy(), labels.cpu()
        self.depth = depth(labels, k) + 1

    def __call__(self):
        """Build the index and search it."""
        import faiss

        index = faiss.IndexFlatIP(self.rows.shape[1])
        index.add(self.rows)
        _, self.nearest = index.search(self.rows, self.depth)

    def recall(self):
        """Return R@1 of the neighbours found."""
        nearest, queries = torch.from_numpy(self.nearest), torch.arange(len(self.labels))
        first = torch.where(nearest[:, 0] == queries, nearest[:, 1], nearest[:, 0])
        return float((self.labels[first] == self.labels).double().mean())


CONTENDERS = {OURS: Ours, FAISS: Faiss}


def run(options):
    """Return the table of every depth."""
    table = Table(
        f"Retrieval within {options.items:,} x {options.features}",
        ("K", "depth", OURS, FAISS, "multiple", f"peak of {OURS}", f"peak of {FAISS}"),
        f"Fastest (median) of {options.searches} interleaved rounds; 5.3 items per class; depth = max(K, R). faiss-cpu "
        "searches only. Peak: total memory of a separate process, including libraries and data.",
    )
    x, labels = (one.to(options.device) for one in products_like(options.items, options.features))
    here = [name for name in CONTENDERS if name != FAISS or machine.installed("faiss-cpu")]
    for k in CUTOFFS:
        _add(table, x, labels, tuple(one for one in k if one < options.items), here, options)
    return table


def _add(table, x, labels, k, here, options):
    for name in here:
        CONTENDERS[name](x[:WARM], labels[:WARM], k)()
    ready = {name: CONTENDERS[name](x, labels, k) for name in here}
    times = interleaved(ready, lambda _: (), rounds=options.searches, wait=machine.waiting(options.device))
    recall = ready[OURS].found.recall[1]
    if FAISS in ready and abs(recall - ready[FAISS].recall()) > 1e-3:
        raise ValueError(f"{OURS} and {FAISS} must agree on R@1, got {recall} and {ready[FAISS].recall()}")

    size = {"items": options.items, "features": options.features, "k": k, "device": options.device}
    peaks = {name: machine.apart("benchmarks.retrieval", options.threads, name=name, **size) for name in here}
    figures = {"k": k, "depth": depth(labels, k), "recall_at_1": recall, "peak": peaks}
    spans = {name: f"{span(one.fastest)} ({span(one.median)})" for name, one in times.items()}
    table.add(
        figures | {name: one._asdict() for name, one in times.items()},
        ", ".join(map(str, k)),
        str(figures["depth"]),
        *(spans.get(name, "- (not installed)") for name in CONTENDERS),
        both(times[OURS].times(times[FAISS])) if FAISS in times else "-",
        *(megabytes(peaks.get(name, "not installed")) for name in CONTENDERS),
    )


def depth(labels, k):
    """Return the number of neighbours the metrics need: the largest K or the largest R, whichever is greater."""
    return min(max(max(k), int(labels.bincount().max()) - 1), len(labels) - 1)


if __name__ == "__main__":
    arguments = json.loads(sys.argv[1])
    machine.use_threads(arguments["threads"])
    size = (arguments["items"], arguments["features"])
    x, labels = (one.to(arguments["device"]) for one in products_like(*size))
    CONTENDERS[arguments["name"]](x, labels, tuple(arguments["k"]))()
    print(machine.highest(arguments["device"]))
