"""Several processes of one run, as torchrun starts them: how they join, keep in step, and end together.

Rank 0 speaks, writes and measures; the others only train with it. One process alone needs none of this, and every
function here then does nothing.
"""

import os
import signal
from contextlib import contextmanager
from datetime import timedelta

import numpy as np
import torch
from torch import distributed as dist

from xbm.experiments.errors import InputError, LostError, ToldError
from xbm.integrations.torch.ranks import is_initialized

TIMEOUT = timedelta(minutes=30)  # that a rank waits for another: what rank 0 does alone takes less
REFUSED = 1000  # more than the number of any signal


def size():
    """Return how many ranks there are."""
    return dist.get_world_size() if is_initialized() else 1


def first():
    """Return whether this is rank 0."""
    return not is_initialized() or dist.get_rank() == 0


@contextmanager
def joined():
    """Belong to the process group that the environment tells of.

    Raises
    ------
    LostError
        If another rank is gone, or has kept this one waiting for longer than TIMEOUT.
    """
    with _noticing():
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=TIMEOUT)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # which the launcher sends once one has left: all are leaving
            dist.destroy_process_group()


def agree(number=0):
    """Wait for all ranks and return the largest of their numbers, such as that of a signal.

    Raises
    ------
    ToldError
        If another rank refuses to go on.
    LostError
        As `joined`.
    """
    if not is_initialized():
        return number
    with _noticing():
        most = torch.tensor(number)
        dist.all_reduce(most, dist.ReduceOp.MAX)
        if most == REFUSED:
            raise ToldError(_reasons(None))
    return int(most)


def refuse(reason):
    """Let the others end, each in its next `agree`, with this rank's reason, a sentence."""
    dist.all_reduce(torch.tensor(REFUSED), dist.ReduceOp.MAX)
    _reasons(reason)


def _reasons(reason):
    """Return why which ranks refuse; a rank that does not has the reason None."""
    reasons = [None] * size()
    dist.all_gather_object(reasons, reason)
    return "; ".join(f"rank {rank}: {one}" for rank, one in enumerate(reasons) if one)


def part(rows):
    """Return this rank's rows of a batch: the parts follow one another in rank order."""
    return np.array_split(rows, size())[dist.get_rank()] if is_initialized() else rows


def averaging(encoder):
    """Return the encoder with gradients that are averaged over the ranks, to be called for them."""
    if not is_initialized():
        return encoder
    # A group of its own, for DDP never lets go of one: a thread of the common group that is still at work when Python
    # ends, after the last `agree`, would abort the process.
    parallel = torch.nn.parallel.DistributedDataParallel(encoder, process_group=dist.new_group())
    parallel.register_comm_hook(None, _averaged)
    return parallel


def _averaged(_, bucket):
    """Average a bucket of gradients, summed in rank order.

    The order of an all-reduce depends on what else is in the bucket, and that is different in a run's first step: a
    resumed run would not repeat what an uninterrupted one does.
    """
    own = bucket.buffer()
    each = [torch.empty_like(own) for _ in range(size())]
    work = dist.all_gather(each, own, async_op=True)
    return work.get_future().then(lambda _: sum(each) / len(each))


def take_device(name):
    """Let "cuda" mean this rank's own GPU.

    Raises
    ------
    InputError
        If it has none, or all ranks were given the same.
    """
    if not is_initialized() or not name.startswith("cuda"):
        return
    if name != "cuda":
        raise InputError(f"--device {name} is one GPU for {size()} processes: --device cuda gives each its own")
    local = int(os.environ["LOCAL_RANK"])
    if local >= torch.cuda.device_count():
        raise InputError(f"there is no device cuda:{local} here for process {local + 1}")
    torch.cuda.set_device(local)


def launcher():
    """Return the command's first words, by which a run like this is started."""
    return ["torchrun", "--nproc-per-node", os.environ["LOCAL_WORLD_SIZE"], "-m"] if is_initialized() else []


@contextmanager
def _noticing():
    """Tell the errors by which a collective reports a lost rank from others."""
    try:
        yield
    except RuntimeError as error:
        # Gloo's errors have no class of their own, but name its sources.
        if isinstance(error, dist.DistError) or "gloo" in str(error):
            rank, of = (os.environ.get(name, "?") for name in ("RANK", "WORLD_SIZE"))
            raise LostError(
                f"rank {rank} of {of} ends, for another one is gone or has been silent for {TIMEOUT}; --resume goes on "
                f"from the last checkpoint. {error}"
            ) from error
        raise
