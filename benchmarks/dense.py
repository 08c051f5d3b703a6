"""The straightforward step: the loss over the whole (B, M) array of similarities, differentiated by autograd."""

import torch
from torch.nn import functional

from benchmarks.formulas import LOSSES
from xbm import losses


class DenseAutograd:
    """A ring buffer in a tensor, a loss function of (S, P, N), and `backward`."""

    bytes_per_pair = 32

    def __init__(self, case):
        self.loss, self.function = losses.get(case.loss), LOSSES[case.loss]
        self.V = torch.zeros(case.capacity, case.dim, device=case.device)
        self.labels = torch.zeros(case.capacity, dtype=torch.int64, device=case.device)
        self.cursor = 0
        for rows, labels in case.rows():
            self.enqueue(functional.normalize(rows), labels)

    def enqueue(self, rows, labels):
        """Write rows into the ring buffer and return their slots."""
        slots = (self.cursor + torch.arange(len(labels), device=labels.device)) % len(self.labels)
        self.V[slots], self.labels[slots] = rows, labels
        self.cursor = (self.cursor + len(labels)) % len(self.labels)
        return slots

    def __call__(self, x, labels):
        """Return the step's loss and its gradient (B, D)."""
        x = x.detach().requires_grad_()
        z = functional.normalize(x)
        own = self.enqueue(z.detach(), labels)
        loss = self._mean(z @ z.T, labels, torch.arange(len(labels), device=labels.device), labels)
        loss = loss + self._mean(z @ self.V.T, labels, own, self.labels)
        loss.backward()
        return loss.detach(), x.grad

    def _mean(self, S, labels, own, candidates):
        P = labels[:, None] == candidates
        N = ~P
        P[torch.arange(len(labels), device=labels.device), own] = False
        return self.function(S, P, N, self.loss).mean()
