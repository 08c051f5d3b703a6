"""Distributed runs under torchrun: how the processes join, stay in step, and exit together.

Rank 0 prints, writes files and measures; the other ranks only train. In a single process, the functions that a run
calls do nothing.
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

TIMEOUT = timedelta(minutes=30)  # longest wait for another rank; the work that rank 0 does alone takes less
REFUSED = 1000  # code of a user error in `agree`, larger than any signal number


def size():
    """Return the number of ranks."""
    return dist.get_world_size() if is_initialized() else 1


def first():
    """Return whether this is rank 0."""
    return not is_initialized() or dist.get_rank() == 0


@contextmanager
def joined():
    """Join the process group given by the environment variables, and leave it after the block.

    Raises
    ------
    LostError
        If another rank died, or did not respond within TIMEOUT.
    """
    with _noticing():
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=TIMEOUT)
        try:
            yield
        finally:
            # The launcher sends SIGTERM as soon as one rank has exited with an error; this rank is exiting already.
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            dist.destroy_process_group()


def agree(number=0):
    """Wait for all ranks and return the largest of their numbers, such as a signal number.

    Raises
    ------
    ToldError
        If another rank stopped because of a user error.
    LostError
        As for `joined`.
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
    """Stop all other ranks at their next `agree`, with this rank's error message."""
    dist.all_reduce(torch.tensor(REFUSED), dist.ReduceOp.MAX)
    _reasons(reason)


def _reasons(reason):
    """Gather the error messages of all ranks into one text; a rank without an error passes None."""
    reasons = [None] * size()
    dist.all_gather_object(reasons, reason)
    return "; ".join(f"rank {rank}: {one}" for rank, one in enumerate(reasons) if one)


def part(rows):
    """Return this rank's part of a batch: contiguous rows, in rank order."""
    return np.array_split(rows, size())[dist.get_rank()] if is_initialized() else rows


def averaging(encoder):
    """Wrap the encoder in DDP, which averages its gradients over the ranks. Training must call the wrapper."""
    if not is_initialized():
        return encoder
    # A separate group, because DDP never releases its group. If it held the default group, one of that group's threads
    # could still run when Python exits after the last `agree`, and would abort the process.
    parallel = torch.nn.parallel.DistributedDataParallel(encoder, process_group=dist.new_group())
    parallel.register_comm_hook(None, _averaged)
    return parallel


def _averaged(_, bucket):
    """Average a bucket of gradients, summing in rank order.

    The summation order of an all-reduce depends on the bucket's contents, which differ in the first step of a process.
    A resumed run would therefore not reproduce an uninterrupted one bit for bit.
    """
    own = bucket.buffer()
    each = [torch.empty_like(own) for _ in range(size())]
    work = dist.all_gather(each, own, async_op=True)
    return work.get_future().then(lambda _: sum(each) / len(each))


def take_device(name):
    """Select this rank's own GPU as device "cuda".

    Raises
    ------
    InputError
        If this rank has no GPU, or if `name` is a single GPU for all ranks.
    """
    if not is_initialized() or not name.startswith("cuda"):
        return
    if name != "cuda":
        raise InputError(f"--device {name} is a single GPU for {size()} processes: use --device cuda, one GPU each")
    local = int(os.environ["LOCAL_RANK"])
    if local >= torch.cuda.device_count():
        raise InputError(
            f"local process {local} needs device cuda:{local}, but there are {torch.cuda.device_count()} GPUs: "
            "start fewer processes"
        )
    torch.cuda.set_device(local)


def launcher():
    """Return the first words of the command that starts such a run: torchrun and its options, or nothing."""
    return ["torchrun", "--nproc-per-node", os.environ["LOCAL_WORLD_SIZE"], "-m"] if is_initialized() else []


@contextmanager
def _noticing():
    """Convert the errors by which a collective reports a lost rank into `LostError`."""
    try:
        yield
    except RuntimeError as error:
        # Gloo raises plain RuntimeErrors, whose messages name its source files.
        if isinstance(error, dist.DistError) or "gloo" in str(error):
            rank, of = (os.environ.get(name, "?") for name in ("RANK", "WORLD_SIZE"))
            raise LostError(
                f"rank {rank} of {of} stops, because another rank died or did not respond for {TIMEOUT}. Continue from "
                f"the last checkpoint with --resume. {error}"
            ) from error
        raise
