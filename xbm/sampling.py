"""Batches of P classes with K instances each, as metric learning wants them: every anchor has its positives.

A batch is a function of the seed and its index alone. A run resumes at any batch without a saved sampler.
"""

from collections.abc import Iterator
from itertools import count
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from xbm import checks

ORDER, INSTANCES = 0, 1  # what a random stream is for


class PKSampler:
    """Indices of P distinct classes x K instances for each batch; a `batch_sampler` for a data loader.

    Classes: an epoch is a permutation of all C of them, cut into ceil(C / P) batches, so each class comes once
    before any returns. Where P does not divide C, the epoch's last batch is filled up with the classes that came
    first in it, so every batch holds P distinct classes and none is left out.

    Instances: K drawn without replacement where a class has that many, in random order. Repeats come only where it
    has fewer, and as evenly as can be: of s instances each comes floor(K / s) or ceil(K / s) times. Draws of
    different batches are independent.

    Parameters
    ----------
    labels : (n,) integer
        Class of each sample of the data set: anything `numpy.asarray` takes, such as a list, an array or a tensor
        on the CPU.
    classes : int
        P, at least 1 and at most the number of classes C.
    instances : int
        K, at least 1.
    seed : int
        At least 0. With one NumPy version the same seed gives the same batches in every process and on every machine.
    batches : int, optional
        Number of batches in all; endless if left out.
    start : int
        Index of the first batch to yield, to resume after `start` training steps.

    Attributes
    ----------
    batches_per_epoch : int
        ceil(C / P).

    Raises
    ------
    TypeError, ValueError
        If labels are no integers, not 1-D, or none, have fewer than P classes, or an option is out of range.

    Examples
    --------
    >>> import numpy as np
    >>> from xbm.sampling import PKSampler
    >>> labels = np.asarray([0, 0, 0, 1, 1, 2, 2, 2])
    >>> sampler = PKSampler(labels, classes=2, instances=2, batches=3)
    >>> [labels[batch].tolist() for batch in sampler]
    [[2, 2, 0, 0], [1, 1, 2, 2], [1, 1, 2, 2]]
    >>> resumed = PKSampler(labels, classes=2, instances=2, batches=3, start=2)
    >>> len(resumed), list(resumed) == list(sampler)[2:]
    (1, True)
    """

    def __init__(
        self,
        labels: ArrayLike,
        *,
        classes: int,
        instances: int,
        seed: int = 0,
        batches: int | None = None,
        start: int = 0,
    ) -> None:
        checks.whole_number("classes", classes, at_least=1)
        checks.whole_number("instances", instances, at_least=1)
        checks.whole_number("seed", seed, at_least=0)
        checks.whole_number("start", start, at_least=0)
        if batches is not None:
            checks.whole_number("batches", batches, at_least=1)
            if start > batches:
                raise ValueError(f"start must be at most batches = {batches}, got {start}")
        self.classes, self.instances, self.seed = classes, instances, seed
        self.batches, self.start = batches, start

        labels = _checked(labels)
        self._by_class = np.argsort(labels, kind="stable")
        self._first, self._size = _runs(labels[self._by_class])
        if self._size.size < classes:
            raise ValueError(f"classes must be at most {self._size.size}, the classes among the labels, got {classes}")
        self.batches_per_epoch = -(-self._size.size // classes)
        self._epoch: tuple[int | None, Any] = None, None

    def batch(self, t: int) -> NDArray[np.int64]:
        """Return batch t as (P * K,) int64 indices, the K instances of a class side by side.

        Any t >= 0 may be asked for in any order: `start` and `batches` bound only the iteration.
        """
        checks.whole_number("t", t, at_least=0)
        P, K = self.classes, self.instances
        epoch, nth = divmod(t, self.batches_per_epoch)
        chosen = self._order(epoch)[nth * P : (nth + 1) * P, None]
        size, position = self._size[chosen], np.arange(K)

        # Floyd's draw of K out of `size`, for all classes at once: number i comes from 0 .. last_i, or is last_i
        # itself where that one is taken.
        last = np.maximum(size - K + position, 0)
        random = self._random(INSTANCES, t)
        pick = random.integers(0, last, endpoint=True)
        repeated = (pick[:, -1:] + position) % size
        for i in range(1, K):
            taken = (pick[:, :i] == pick[:, i : i + 1]).any(axis=1)
            pick[:, i] = np.where(taken, last[:, i], pick[:, i])
        pick = random.permuted(np.where(size < K, repeated, pick), axis=1)  # Floyd's draw leaves them half in order
        return self._by_class[(self._first[chosen] + pick).ravel()]

    def __iter__(self) -> Iterator[list[int]]:
        """Yield batches `start`, `start` + 1, ... as lists of int; each iteration begins anew at `start`."""
        for t in count(self.start) if self.batches is None else range(self.start, self.batches):
            yield self.batch(t).tolist()

    def __len__(self) -> int:
        """Return how many batches an iteration yields."""
        if self.batches is None:
            raise TypeError("an endless PKSampler has no length: give batches")
        return self.batches - self.start

    def _order(self, epoch: int) -> NDArray[np.int64]:
        """Return an epoch's classes in their order, with those that fill up its last batch."""
        known, order = self._epoch
        if known != epoch:
            order = self._random(ORDER, epoch).permutation(self._size.size)
            missing = self.batches_per_epoch * self.classes - order.size
            order = np.concatenate([order, order[:missing]])
            self._epoch = epoch, order
        return order

    def _random(self, purpose: int, index: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, purpose, index])


def _runs(ordered: NDArray[Any]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return where each run of equal values begins in an ordered array, and its length."""
    first = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]]))
    return first, np.diff(first, append=ordered.size)


def _checked(labels: ArrayLike) -> NDArray[Any]:
    """Return labels as a NumPy array, refusing anything but at least one integer for each sample."""
    labels = np.asarray(labels)
    if labels.ndim != 1 or labels.size == 0:
        raise ValueError(f"labels must have shape (n,) with n at least 1, got {labels.shape}")
    if labels.dtype.kind not in "iu":
        raise TypeError(f"labels must be integers, got {labels.dtype} of shape {labels.shape}")
    return labels
