"""Real processes: a pool of ranks that talk by gloo on the loopback, started once for many tests."""

import atexit
import multiprocessing
import os
import pickle
import tempfile
import traceback
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from pathlib import Path

SECONDS = 60  # that anything may take: a rank that waits for another longer than this is stuck


@contextmanager
def pool(size, *, seconds=SECONDS):
    """Start `size` ranks of one process group, and end them, whatever they are doing, when the block ends."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        pipes, ranks = [], []
        try:
            for rank in range(size):
                ours, theirs = context.Pipe()
                arguments = (rank, size, f"{folder}/store", seconds, theirs)
                ranks.append(context.Process(target=_work, args=arguments, daemon=True))
                ranks[-1].start()
                theirs.close()
                pipes.append(ours)
            yield Pool(pipes, seconds)
        finally:
            for rank in ranks:
                rank.kill()
            for rank in ranks:
                rank.join()
            for pipe in pipes:
                pipe.close()


def shared(size):
    """Return ranks that all tests of this process share, started when first asked for, and anew once they are lost."""
    if size in _shared and _shared[size][0].lost:
        _shared.pop(size)[1].close()
    if size not in _shared:
        stack = ExitStack()
        atexit.register(stack.close)
        _shared[size] = stack.enter_context(pool(size, seconds=30)), stack
    return _shared[size][0]


_shared = {}


class Pool:
    """Ranks that are waiting for something to do."""

    def __init__(self, pipes, seconds):
        self.pipes, self.seconds, self.lost = pipes, seconds, False

    @property
    def size(self):
        """How many there are."""
        return len(self.pipes)

    def run(self, function, *arguments):
        """Return what `function(*arguments)` returns on each rank, in rank order.

        The function is found by name in its module, so it stands at the top of a test's file.

        Raises
        ------
        AssertionError
            If it raises on any rank, or takes too long.
        """
        for pipe in self.pipes:
            pipe.send((function, arguments))
        found, self.lost = [], True
        for rank, pipe in enumerate(self.pipes):
            # Twice: the first to wait is the process group, whose error says what was waited for.
            assert pipe.poll(2 * self.seconds), f"rank {rank} of {self.size} has not answered: {function.__name__}"
            found.append(answer(pipe))
        self.lost = False
        problems = [f"rank {rank}: {problem}" for rank, (_, problem) in enumerate(found) if problem]
        assert not problems, "\n".join(problems)
        return [result for result, _ in found]


def answer(pipe):
    """Return what a rank has sent, `(result, problem)`."""
    return pickle.loads(pipe.recv_bytes())


def _work(rank, size, store, seconds, pipe):
    """Do what comes through the pipe, as one rank of a process group."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    Path(store).touch()
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=size, timeout=timedelta(seconds=seconds)
    )
    while True:
        try:
            function, arguments = pipe.recv()
        except EOFError:
            return
        try:
            result = function(*arguments), None
        except BaseException:  # told to the test, which fails
            result = None, traceback.format_exc()
        pipe.send_bytes(pickle.dumps(result))  # whole: a pipe would hand tensors over by reference
