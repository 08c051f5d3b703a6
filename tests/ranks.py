"""Simulated ranks: threads that exchange arrays of any library."""

import threading
from concurrent.futures import ThreadPoolExecutor

from xbm.backends import array_namespace
from xbm.ranks import Ranks, Spread

SECONDS = 60


class Meeting:
    """A barrier at which all threads exchange values."""

    def __init__(self, size):
        self.barrier, self.said = threading.Barrier(size, timeout=SECONDS), [None] * size

    def share(self, rank, what):
        """Return the values of all ranks, in rank order."""
        self.said[rank] = what
        self.barrier.wait()
        everything = list(self.said)
        self.barrier.wait()
        return everything


class Threads:
    """The group, seen from one of the threads."""

    def __init__(self, meeting, rank, size, *, sharded=False):
        self.meeting, self.rank, self.size, self.sharded = meeting, rank, size, sharded

    def meet(self, read):
        batch = read()
        queries, keys = (
            ThreadSpread(self.meeting, self.rank, self.meeting.share(self.rank, n))
            for n in (batch.z.shape[0], batch.stored.shape[0])
        )
        each = ThreadSpread(self.meeting, self.rank, [1] * self.size)
        return batch, Ranks(queries, keys, each, self.rank, self.size, self.sharded)

    def share(self, number):
        return self.meeting.share(self.rank, number)


class ThreadSpread(Spread):
    """Rows that are distributed over the threads."""

    def __init__(self, meeting, rank, sizes):
        self.meeting, self.rank, self.sizes = meeting, rank, sizes
        self.bounds = [sum(sizes[:i]) for i in range(len(sizes) + 1)]

    def gather(self, x):
        assert x.shape[0] == self.sizes[self.rank]
        return array_namespace(x).concat(self.meeting.share(self.rank, x), axis=0)

    def own(self, x):
        assert x.shape[0] == self.bounds[-1]
        return x[self.bounds[self.rank] : self.bounds[self.rank + 1], ...]

    def exchange(self, x):
        assert x.shape[0] == self.bounds[-1]
        return array_namespace(x).stack([self.own(one) for one in self.meeting.share(self.rank, x)])


def together(size, work):
    """Run `work(rank, meeting)` in `size` threads and return the results."""
    meeting = Meeting(size)

    def run(rank):
        try:
            return work(rank, meeting)
        except BaseException:
            meeting.barrier.abort()
            raise

    with ThreadPoolExecutor(size) as threads:
        futures = [threads.submit(run, rank) for rank in range(size)]
    problems = [future.exception() for future in futures if future.exception()]
    for problem in sorted(problems, key=lambda one: isinstance(one, threading.BrokenBarrierError)):
        raise problem
    return [future.result() for future in futures]
