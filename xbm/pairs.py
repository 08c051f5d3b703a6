"""Which pairs of a row are positive, which negative, and which neither.

Pairs are weights, not booleans: 1 for a pair, 0 for none. What changes them later (a miner, soft labels, an
age decay) multiplies.
"""

from array_api_compat import array_namespace, device


def batch_pairs(labels, key_labels=None, *, dtype):
    """Return `(P, N)` of a batch, each (B, B), or (B, K) against K keys.

    Within a batch i = j is no pair, by index. Against keys nothing is excluded: key i is query i's candidate.
    """
    xp = array_namespace(labels)
    within = key_labels is None
    same = labels[:, None] == (labels if within else key_labels)[None, :]
    usable = xp.ones_like(same)
    if within:
        order = xp.arange(labels.shape[0], device=device(labels))
        usable = order[:, None] != order[None, :]
    return xp.astype(same & usable, dtype), xp.astype(~same & usable, dtype)


def memory_pairs(slots, rows, *, labels, count, step, own=None, ids=None, dtype):
    """Return `(P, N)` of B anchors against a block of m memory rows, each (B, m).

    An empty slot and the anchor's own slot are no pair. With ids, neither is an older copy of the anchor: a row of
    the anchor's id that was stored before `step`. Two views of one id in the same call stay positives.

    Parameters
    ----------
    slots : (m,) integer
        The block's slots.
    rows : (labels (m,), ids (m,), stored_at (m,))
        What the memory holds there.
    labels : (B,) integer
        Classes of the anchors.
    own : (B,) integer, optional
        Slot of each anchor, -1 = none. Left out where no anchor has one.
    count : () integer
        Filled slots; they are slots 0 .. count - 1.
    ids : (B,) integer, optional
        Samples of the anchors, negative = none. Without ids copies are kept.
    step : () integer
        Index of the call.
    """
    xp = array_namespace(labels)
    row_labels, row_ids, stored_at = rows
    same = labels[:, None] == row_labels[None, :]
    usable = (slots < count)[None, :]
    if own is not None:
        usable = usable & (slots[None, :] != own[:, None])
    if ids is not None:
        comparable = (ids >= 0)[:, None] & (stored_at < step)[None, :]
        usable = usable & ~(comparable & (ids[:, None] == row_ids[None, :]))
    return xp.astype(same & usable, dtype), xp.astype(~same & usable, dtype)
