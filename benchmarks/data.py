"""Batches and memories with a known share of active negatives, and a set to search."""

from dataclasses import dataclass
from math import ceil, sqrt
from statistics import NormalDist

import torch

CLASSES = 10_000  # about as many as Stanford Online Products has: a memory row is rarely a positive
INSTANCES = 4  # of each class in a batch
MARGIN = 0.5  # above it a negative is active in the contrastive loss
CHUNK = 4096  # rows made at a time: a whole memory's temporaries would hide a step's


@dataclass(frozen=True)
class Case:
    """A full memory and the batches that come: the same for every contender."""

    capacity: int  # M
    active: float  # share of negatives with S > MARGIN that is aimed at, in [0, 1]
    batch: int = 64  # B
    dim: int = 128  # D
    loss: str = "contrastive"  # a name among xbm.losses.LOSSES
    device: str = "cpu"
    classes: int = CLASSES

    def rows(self):
        """Yield M rows in chunks `(embeddings (n, D), labels (n,))`."""
        generator = torch.Generator().manual_seed(1)
        for start in range(0, self.capacity, CHUNK):
            n = min(CHUNK, self.capacity - start)
            labels = torch.randint(self.classes, (n,), generator=generator)
            yield self._embeddings(n, generator), labels.to(self.device)

    def inputs(self, number):
        """Return the batch of some number: `(embeddings (B, D), labels (B,))`, B / 4 classes of 4, or all."""
        generator = torch.Generator().manual_seed(number + 2)
        classes = torch.randperm(self.classes, generator=generator)[: ceil(self.batch / INSTANCES)]
        labels = classes.repeat_interleave(ceil(self.batch / len(classes)))[: self.batch]
        return self._embeddings(self.batch, generator), labels.to(self.device)

    def measured_active(self):
        """Return the share of active negatives of the first batch among the memory's rows."""
        anchors, labels = self.inputs(0)
        active = negatives = 0
        for rows, row_labels in self.rows():
            negative = labels[:, None] != row_labels
            active += int(((anchors @ rows.T > MARGIN) & negative).sum())
            negatives += int(negative.sum())
        return active / max(negatives, 1)

    def _embeddings(self, n, generator):
        """Return n rows of unit length, with a component in common.

        S = c + (1 - c) u v with random directions u and v of the other D - 1 dimensions, whose product is about
        normal with a deviation of 1 / sqrt(D - 1): c decides how many exceed the margin.
        """
        common = _common(self.active, self.dim)
        noise = torch.nn.functional.normalize(torch.randn(n, self.dim - 1, generator=generator))
        rows = torch.cat([torch.full((n, 1), sqrt(common)), sqrt(1 - common) * noise], dim=1)
        return rows.to(self.device)


def _common(active, dim):
    if active in (0, 1):
        return 0.9 * active
    deviation = NormalDist().inv_cdf(1 - active) / sqrt(dim - 1)
    return max(0.0, (MARGIN - deviation) / (1 - deviation))


def products_like(items, features):
    """Return `(embeddings (n, D), labels (n,))` of classes of 2 to 12 items, 5.3 on average, as in Online Products."""
    generator = torch.Generator().manual_seed(0)
    sizes = 2 + torch.binomial(torch.full((items,), 10.0), torch.tensor(0.335), generator=generator).long()
    labels = torch.arange(items).repeat_interleave(sizes)[:items]
    centres = torch.randn(int(labels[-1]) + 1, features, generator=generator)
    rows = centres[labels] + 2 * torch.randn(items, features, generator=generator)
    order = torch.randperm(items, generator=generator)
    return torch.nn.functional.normalize(rows)[order], labels[order]
