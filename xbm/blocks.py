"""Block size of a walk over the memory."""

from xbm import backends
from xbm.backends import Array

DEVICE = 2**22  # elements per block on accelerators, where kernel launches dominate the cost of small blocks
MOST = 16  # maximum number of blocks if a compiler unrolls the walk


def rows_at_a_time(x: Array, rows: int, *, width: int, host: int) -> int:
    """Return the block size in rows, for a walk over `rows` rows that computes `width` numbers per row on x's device.

    On the CPU, a block has about `host` numbers.
    """
    _, ops = backends.of(x)
    if ops.unrolls(x):
        return -(-rows // MOST)
    return max(1, (host if ops.on_host(x) else DEVICE) // width)
