"""Synthetic batches and memories with a chosen share of active negatives, and a data set for retrieval."""

from dataclasses import dataclass
from math import ceil, sqrt
from statistics import NormalDist

import torch

CLASSES = 10_000  # about as many as in Stanford Online Products: a memory row is rarely a positive
INSTANCES = 4  # samples per class in a batch
MARGIN = 0.5  # a negative with a larger similarity is active in the contrastive loss
CHUNK = 4096  # rows generated at a time, so that temporaries do not hide the peak memory of a step


@dataclass(frozen=True)
class Case:
    """A full memory and a stream of batches, the same for every contender."""

    capacity: int  # M
    active: float  # target share of negatives with S > MARGIN, in [0, 1]
    batch: int = 64  # B
    dim: int = 128  # D
    loss: str = "contrastive"  # a key of xbm.losses.LOSSES
    device: str = "cpu"
    classes: int = CLASSES

    def rows(self):
        """Yield the M rows of the memory in chunks `(embeddings (n, D), labels (n,))`."""
        generator = torch.Generator().manual_seed(1)
        for start in range(0, self.capacity, CHUNK):
            n = min(CHUNK, self.capacity - start)
            labels = torch.randint(self.classes, (n,), generator=generator)
            yield self._embeddings(n, generator), labels.to(self.device)

    def inputs(self, number):
        """Return batch `number`: `(embeddings (B, D), labels (B,))`, 4 samples of each of B / 4 classes.

        If there are fewer classes, the batch has all of them, with more samples each.
        """
        generator = torch.Generator().manual_seed(number + 2)
        classes = torch.randperm(self.classes, generator=generator)[: ceil(self.batch / INSTANCES)]
        labels = classes.repeat_interleave(ceil(self.batch / len(classes)))[: self.batch]
        return self._embeddings(self.batch, generator), labels.to(self.device)

    def measured_active(self):
        """Return the share of active pairs among the negative pairs of the first batch and the memory."""
        anchors, labels = self.inputs(0)
        active = negatives = 0
        for rows, row_labels in self.rows():
            negative = labels[:, None] != row_labels
            active += int(((anchors @ rows.T > MARGIN) & negative).sum())
            negatives += int(negative.sum())
        return active / max(negatives, 1)

    def _embeddings(self, n, generator):
        """Return n rows of unit length that share a common component.

        S = c + (1 - c) u·v, where u and v are random unit vectors in the other D - 1 dimensions. u·v is approximately
        normal with standard deviation 1 / sqrt(D - 1), so c determines the share of pairs above the margin.
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
    """Return `(embeddings (n, D), labels (n,))` with 2 to 12 items per class, 5.3 on average, as in Online Products."""
    generator = torch.Generator().manual_seed(0)
    sizes = 2 + torch.binomial(torch.full((items,), 10.0), torch.tensor(0.335), generator=generator).long()
    labels = torch.arange(items).repeat_interleave(sizes)[:items]
    centres = torch.randn(int(labels[-1]) + 1, features, generator=generator)
    rows = centres[labels] + 2 * torch.randn(items, features, generator=generator)
    order = torch.randperm(items, generator=generator)
    return torch.nn.functional.normalize(rows)[order], labels[order]
