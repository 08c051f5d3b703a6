"""Batches of P classes with K instances each, so that every anchor has K - 1 positives.

A batch depends only on the seed and its index, so a run can resume at any batch without saving the sampler.
"""

from collections.abc import Iterator
from itertools import count
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from xbm import checks

ORDER, INSTANCES = 0, 1  # purposes of the random streams


class PKSampler:
    """Sampler of batches with P distinct classes and K instances each; a `batch_sampler` for a data loader.

    Classes: an epoch is a permutation of all C classes, cut into ceil(C / P) batches, so every class occurs once
    before any class repeats. If P does not divide C, the epoch's last batch is completed with the first classes of the
    epoch, so every batch has P distinct classes.

    Instances: K are drawn without replacement, in random order, if the class has at least K. A smaller class of s
    instances repeats them as evenly as possible: each occurs floor(K / s) or ceil(K / s) times. The draws of different
    batches are independent.

    Parameters
    ----------
    labels : (n,) integer
        Class of each sample of the data set: anything `numpy.asarray` accepts, such as a list, an array or a CPU
        tensor.
    classes : int
        P, at least 1 and at most the number of classes C.
    instances : int
        K, at least 1.
    seed : int
        At least 0. With the same NumPy version, a seed gives the same batches in every process and on every machine.
    batches : int, optional
        Total number of batches; by default, the sampler is infinite.
    start : int
        Index of the first batch to yield, to resume after `start` training steps.

    Attributes
    ----------
    batches_per_epoch : int
        ceil(C / P).

    Raises
    ------
    TypeError, ValueError
        If labels are not integers, not 1-D, empty, or have fewer than P classes, or an option is out of range.

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
            raise ValueError(
                f"classes must be at most the number of classes in labels, {self._size.size}, got {classes}"
            )
        self.batches_per_epoch = -(-self._size.size // classes)
        self._epoch: tuple[int | None, Any] = None, None

    def batch(self, t: int) -> NDArray[np.int64]:
        """Return batch t as (P * K,) int64 indices, with the K instances of a class next to each other.

        t may be any index >= 0, in any order; `start` and `batches` limit only the iteration.
        """
        checks.whole_number("t", t, at_least=0)
        P, K = self.classes, self.instances
        epoch, nth = divmod(t, self.batches_per_epoch)
        chosen = self._order(epoch)[nth * P : (nth + 1) * P, None]
        size, position = self._size[chosen], np.arange(K)

        # Floyd's algorithm draws K of `size` without replacement, here for all classes at once: draw i is uniform in
        # 0 .. last_i, and becomes last_i if the drawn number is taken.
        last = np.maximum(size - K + position, 0)
        random = self._random(INSTANCES, t)
        pick = random.integers(0, last, endpoint=True)
        repeated = (pick[:, -1:] + position) % size
        for i in range(1, K):
            taken = (pick[:, :i] == pick[:, i : i + 1]).any(axis=1)
            pick[:, i] = np.where(taken, last[:, i], pick[:, i])
        pick = random.permuted(np.where(size < K, repeated, pick), axis=1)  # Floyd's order is not uniform
        return self._by_class[(self._first[chosen] + pick).ravel()]

    def __iter__(self) -> Iterator[list[int]]:
        """Yield batches `start`, `start` + 1, ... as lists of int; each iteration restarts at `start`."""
        for t in count(self.start) if self.batches is None else range(self.start, self.batches):
            yield self.batch(t).tolist()

    def __len__(self) -> int:
        """Return the number of batches in an iteration."""
        if self.batches is None:
            raise TypeError("an infinite PKSampler has no length: give batches")
        return self.batches - self.start

    def _order(self, epoch: int) -> NDArray[np.int64]:
        """Return the order of an epoch's classes, including the repeated classes that complete its last batch."""
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
    """Return the start and the length of each run of equal values in a sorted array."""
    first = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]]))
    return first, np.diff(first, append=ordered.size)


def _checked(labels: ArrayLike) -> NDArray[Any]:
    """Return labels as a NumPy array; raise an error unless they are at least one integer, 1-D."""
    labels = np.asarray(labels)
    if labels.ndim != 1 or labels.size == 0:
        raise ValueError(f"labels must have shape (n,) with n at least 1, got {labels.shape}")
    if labels.dtype.kind not in "iu":
        raise TypeError(f"labels must be integers, got {labels.dtype} of shape {labels.shape}")
    return labels
