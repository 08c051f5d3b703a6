"""How many of the memory's rows a walk visits at a time."""

from xbm import backends
from xbm.backends import Array

DEVICE = 2**22  # numbers in a block, where a launch costs more than its work
MOST = 16  # blocks, for a compiler that unrolls the walk


def rows_at_a_time(x: Array, rows: int, *, width: int, host: int) -> int:
    """Return how many of so many rows make a block, where each takes `width` numbers beside x.

    On a CPU a block has about `host` numbers.
    """
    _, ops = backends.of(x)
    if ops.unrolls(x):
        return -(-rows // MOST)
    return max(1, (host if ops.on_host(x) else DEVICE) // width)
