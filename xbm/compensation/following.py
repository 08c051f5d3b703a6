"""The shift that follows each batch's mean: no forward pass and no ids."""

from __future__ import annotations

from xbm import backends
from xbm.backends import Array, device_of
from xbm.compensation.fitting import Map
from xbm.compensation.motion import Motion
from xbm.compensation.moving import count_of, moved
from xbm.memory_state import MemoryState
from xbm.ranks import ONE, Ranks

SAMPLE = 1024  # rows that the memory's mean is estimated from
TRUST_DECAY = 0.9  # of the running mean of a shift's gain, per call


def followed(
    memory: MemoryState, motion: Motion, rows: Array, *, window: int, normalize: bool, ranks: Ranks
) -> tuple[MemoryState, Motion]:
    """Shift every row towards the mean of a batch's rows (K, D), while such shifts help the batch after."""
    xp, _ = backends.of(rows)
    mean, n = _mean(rows, xp.all(xp.isfinite(rows), axis=1))
    m = memory.labels.shape[0]
    some = xp.arange(0, m, -(-m // SAMPLE), dtype=memory.count.dtype, device=device_of(rows))
    read = xp.astype(xp.take(memory.embeddings, some, axis=0), rows.dtype, copy=False)
    of_memory, m = _mean(read, some < count_of(memory, ranks.shard), ranks)
    apart = xp.where((n > 0) & (m > 0), mean - of_memory, xp.zeros_like(mean))
    # The distance without the last shift, and with it.
    shift = xp.astype(motion.shift, rows.dtype, copy=False)
    without = apart + xp.where(motion.trust > 0, shift, xp.zeros_like(shift))
    gain = xp.sum(without**2) - xp.sum((without - shift) ** 2)
    trust = TRUST_DECAY * motion.trust + (1 - TRUST_DECAY) * xp.astype(gain, xp.float32, copy=False)
    shift = apart * (n / xp.clip(n + window, min=1.0))
    known = (n > 0) & xp.all(xp.isfinite(shift))
    motion = motion._replace(
        shift=xp.where(known, xp.astype(shift, xp.float32, copy=False), motion.shift),
        trust=xp.where(known, trust, motion.trust),
    )
    by = Map(xp.zeros_like(shift), shift, None, xp.sum(apart**2), xp.sum(apart**2), known & (motion.trust > 0))
    return moved(memory, by, interval=1, normalize=normalize, shard=ranks.shard), motion


def _mean(rows: Array, some: Array, ranks: Ranks = ONE) -> tuple[Array, Array]:
    """Return the mean (D,) of the rows where `some` is True, 0 without any, and their number."""
    xp, _ = backends.of(rows)
    sums, n = xp.sum(xp.where(some[:, None], rows, 0.0), axis=0), xp.sum(xp.astype(some, rows.dtype))
    if ranks.sharded:
        each = ranks.each.gather(xp.concat([sums, n[None]])[None, :])
        summed = xp.sum(each, axis=0)
        sums, n = summed[:-1], summed[-1]
    return sums / xp.clip(n, min=1.0), n
