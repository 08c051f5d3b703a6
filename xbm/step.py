"""The result of a call: the loss of both terms, its gradient, and the figures."""

from __future__ import annotations

from typing import Any, NamedTuple

from xbm import backends
from xbm.backends import Array, device_of
from xbm.batch import Batch
from xbm.compensation import Motion
from xbm.drift import Drift
from xbm.ranks import Ranks, total
from xbm.report import Report
from xbm.state import State
from xbm.terms import Term


class Step(NamedTuple):
    """Result of one call."""

    loss: Array  #: () float32, or float64 if an input is; differentiable in x and keys if the library can
    gradient: Array | None  #: (B, D) dL/dx in x's dtype; None if not asked for
    key_gradient: Array | None  #: (K, D) dL/dkeys in the keys' dtype; None without keys
    state: State  #: after the call
    report: Report  #: figures of the call


def joined(
    state: State,
    batch: Batch,
    in_batch: Term,
    in_memory: Term,
    weight: Any,
    moved: Drift | None,
    motion: Motion | None,
    ranks: Ranks,
    *,
    gradient: bool,
) -> Step:
    """Return the result of a call: (1/B) sum_i (L_i^batch + weight L_i^memory), with its gradient if asked for.

    `moved` and `motion` are what a training call has measured; None otherwise.
    """
    xp, ops = backends.of(batch.z)
    B = ops.length(batch.z)
    B = max(B, 1) if isinstance(B, int) else xp.astype(xp.clip(B, min=1), batch.z.dtype)
    batch_loss, memory_loss = xp.sum(in_batch.value) / B, weight * xp.sum(in_memory.value) / B

    loss, gradients = batch_loss + memory_loss, []
    if gradient:
        of_anchors = ranks.queries.sum_own(in_batch.gradient + weight * in_memory.gradient) * ranks.scale / B
        of_keys = in_batch.of_keys * ranks.scale / B
        if batch.keys is None:
            known = [(batch.queries, of_anchors + of_keys)]
        else:
            known = [(batch.queries, of_anchors), (batch.keys, of_keys)]
        wide = [(side.x, side.to_input(dz)) for side, dz in known]
        loss = ops.attach_gradient(loss, *wide)
        gradients = [xp.astype(dx, x.dtype, copy=False) for x, dx in wide]
    dx, dk = (*gradients, None, None)[:2]

    unknown = xp.full((), xp.nan, dtype=xp.float32, device=device_of(batch.z))
    memory = state.memory
    report = Report(
        batch_loss=batch_loss,
        memory_loss=memory_loss,
        fill=xp.astype(memory.count, xp.float32) / (memory.labels.shape[0] * ranks.shard.shards),
        pairs=total(ranks.each, in_memory.pairs)[0] if gradient else unknown,
        drift=moved.distance if moved else unknown,
        drift_age=moved.age if moved else unknown,
        skipped=memory.skipped,
        drift_before=motion.before if motion else unknown,
        drift_after=motion.after if motion else unknown,
        rejected=motion.rejected if motion else unknown,
    )
    return Step(loss, dx, dk, state, report.rounded())
