"""Slow reference implementation of the memory and the step: a deque, and loops over pairs from the definitions."""

from collections import deque
from typing import NamedTuple

import numpy as np


class Row(NamedTuple):
    """One stored row."""

    z: np.ndarray
    label: int
    id: int
    stored_at: int
    anchor: int | None  # index in the current batch, if the current call stored the row


class Memory:
    """A first-in-first-out memory as a deque, with the counters of the real one."""

    def __init__(self, capacity):
        self.rows = deque(maxlen=capacity)
        self.step = self.skipped = 0

    def enqueue(self, z, labels, ids=None, mask=None, *, age=0, mark=False):
        """Append a batch row by row."""
        for i in range(len(z)):
            if mask is not None and not mask[i]:
                continue
            if not np.all(np.isfinite(z[i])):
                self.skipped += 1
                continue
            sample = -1 if ids is None else max(int(ids[i]), -1)
            self.rows.append(Row(z[i], int(labels[i]), sample, self.step - age, i if mark else None))

    def end_call(self):
        """Count a call; the rows of its batch become ordinary rows."""
        self.step += 1
        self.rows = deque((row._replace(anchor=None) for row in self.rows), maxlen=self.rows.maxlen)


class KeyedMemory(Memory):
    """The same with one row per id, which is updated in its slot, or appended."""

    def enqueue(self, z, labels, ids=None, mask=None, *, age=0, mark=False):
        """Use the last row of each id and every row without id; update stored ids, then append the others."""
        batch = Memory(None)
        batch.step = self.step
        batch.enqueue(z, labels, ids, mask, age=age, mark=mark)
        self.skipped += batch.skipped
        kept = list(batch.rows)
        new = [row for i, row in enumerate(kept) if row.id < 0 or row.id not in [later.id for later in kept[i + 1 :]]]
        place = {row.id: i for i, row in enumerate(self.rows) if row.id >= 0}
        for row in new:
            if row.id in place:
                self.rows[place[row.id]] = row
        self.rows.extend(row for row in new if row.id not in place)


def normalize(x):
    """Return the rows of x divided by max(length, 1e-6), in float64."""
    x = np.asarray(x, np.float64)
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-6)


def contrastive(similarities, positive, negative, *, reduction="mean", pos_margin=1.0, neg_margin=0.5):
    """Return L_i of one anchor, from lists of similarities and of positive and negative flags."""
    pull = [pos_margin - s for s, p in zip(similarities, positive, strict=True) if p]
    push = [s - neg_margin for s, n in zip(similarities, negative, strict=True) if n and s > neg_margin]
    pull_sum, push_sum = sum(max(h, 0.0) for h in pull), sum(push)
    if reduction == "sum":
        return pull_sum + push_sum
    return pull_sum / max(len(pull), 1) + push_sum / max(len(push), 1)


def batch_term(z, labels, keys=None, key_labels=None, loss=contrastive):
    """Return the mean over anchors of the in-batch loss, or of the loss against keys."""
    within = keys is None
    keys, key_labels = (z, labels) if within else (keys, key_labels)
    total = 0.0
    for i in range(len(z)):
        others = [j for j in range(len(keys)) if not (within and i == j)]
        same = [labels[i] == key_labels[j] for j in others]
        total += loss([z[i] @ keys[j] for j in others], same, [not s for s in same])
    return total / max(len(z), 1)


def memory_term(memory, z, labels, ids=None, *, copies="exclude", own=True, loss=contrastive):
    """Return the mean over anchors of the loss against the memory, without own rows and older copies."""
    total = 0.0
    for i in range(len(z)):
        similarities, same = [], []
        for row in memory.rows:
            if own and row.anchor == i:
                continue
            sample = -1 if ids is None else int(ids[i])
            if copies == "exclude" and sample >= 0 and row.id == sample and row.stored_at < memory.step:
                continue
            similarities.append(z[i] @ row.z)
            same.append(labels[i] == row.label)
        total += loss(similarities, same, [not s for s in same])
    return total / max(len(z), 1)


def gradient(function, x, step=1e-6):
    """Return the derivative of a scalar function by central differences."""
    result = np.zeros_like(x)
    for index in np.ndindex(x.shape):
        up, down = x.copy(), x.copy()
        up[index] += step
        down[index] -= step
        result[index] = (function(up) - function(down)) / (2 * step)
    return result
