"""Real processes: a pool of gloo ranks on the loopback interface, shared by many tests."""

import atexit
import multiprocessing
import os
import pickle
import tempfile
import traceback
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from pathlib import Path

SECONDS = 60  # timeout of every operation; a rank that waits longer is stuck


@contextmanager
def pool(size, *, seconds=SECONDS):
    """Start `size` ranks of one process group; kill them at the end of the block."""
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
    """Return the pool shared by all tests of this process; start it on first use, and again if it died."""
    if size in _shared and _shared[size][0].lost:
        _shared.pop(size)[1].close()
    if size not in _shared:
        stack = ExitStack()
        atexit.register(stack.close)
        _shared[size] = stack.enter_context(pool(size, seconds=30)), stack
    return _shared[size][0]


_shared = {}


class Pool:
    """A pool of ranks that wait for work."""

    def __init__(self, pipes, seconds):
        self.pipes, self.seconds, self.lost = pipes, seconds, False

    @property
    def size(self):
        """Number of ranks."""
        return len(self.pipes)

    def run(self, function, *arguments):
        """Return what `function(*arguments)` returns on each rank, in rank order.

        The function is pickled by name, so it must be defined at module level.

        Raises
        ------
        AssertionError
            If it raises on any rank, or takes too long.
        """
        for pipe in self.pipes:
            pipe.send((function, arguments))
        found, self.lost = [], True
        for rank, pipe in enumerate(self.pipes):
            # Twice the timeout, so that the process group times out first; its error names the operation.
            assert pipe.poll(2 * self.seconds), f"rank {rank} of {self.size} has not answered: {function.__name__}"
            found.append(answer(pipe))
        self.lost = False
        problems = [f"rank {rank}: {problem}" for rank, (_, problem) in enumerate(found) if problem]
        assert not problems, "\n".join(problems)
        return [result for result, _ in found]


def answer(pipe):
    """Receive `(result, problem)` from a rank."""
    return pickle.loads(pipe.recv_bytes())


def _work(rank, size, store, seconds, pipe):
    """Main function of a rank: execute the functions that arrive through the pipe."""
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
        except BaseException:  # reported to the test, which fails
            result = None, traceback.format_exc()
        pipe.send_bytes(pickle.dumps(result))  # pickled here, because a pipe would share tensors by reference
