"""The contenders of a whole step: xbm, dense autograd, pytorch-metric-learning, and the two matrix products.

The two products are a lower bound for a dense step. A contender is built from a `Case` with a full memory, and called
with a batch, which it stores. `bytes_per_pair` approximates the bytes a call needs per pair of an anchor and a memory
row; contenders that would exceed the available memory are skipped and named.
"""

import torch

from benchmarks import dense, machine
from benchmarks.formulas import BY_THREE
from benchmarks.timing import clocked
from xbm.integrations.torch import XBM


class Products:
    """The two products X V^T and W V only."""

    bytes_per_pair = 8

    def __init__(self, case):
        self.V = torch.cat([rows for rows, _ in case.rows()])
        self.W = torch.rand(case.batch, case.capacity, device=case.device)

    def __call__(self, x, labels):
        """Compute both products."""
        return x @ self.V.T, self.W @ self.V


class Ours:
    """`xbm.integrations.torch.XBM`: `xbm(x, labels)` and `backward`."""

    bytes_per_pair = 0  # it works in blocks

    def __init__(self, case, miner=None):
        self.xbm = XBM(case.dim, case.capacity, case.loss, miner=miner, warmup=0, device=case.device)
        self.xbm.fill(torch.nn.Identity(), case.rows())

    def __call__(self, x, labels):
        """Return the step's loss and its gradient (B, D)."""
        x = x.detach().requires_grad_()
        loss = self.xbm(x, labels)
        loss.backward()
        return loss.detach(), x.grad


class PairLists:
    """pytorch-metric-learning's CrossBatchMemory with its equivalent loss. It has no in-batch term."""

    bytes_per_pair = 40

    def __init__(self, case):
        from pytorch_metric_learning import losses

        loss, miner = _peer(case.loss)
        self.memory = losses.CrossBatchMemory(loss, case.dim, memory_size=case.capacity, miner=miner).to(case.device)
        for rows, labels in case.rows():
            self.memory.add_to_memory(rows, labels, len(labels))

    def __call__(self, x, labels):
        """Return the loss and its gradient (B, D)."""
        x = x.detach().requires_grad_()
        loss = self.memory(x, labels)
        loss.backward()
        return loss.detach(), x.grad


PRODUCTS, OURS, DENSE, PAIRS = "products", "xbm", "dense autograd", "pytorch-metric-learning"
PEERS = ("contrastive", "multi-similarity", "supcon", "batch-hard-triplet")
STEPS = {PRODUCTS: Products, OURS: Ours, DENSE: dense.DenseAutograd, PAIRS: PairLists}


def left_out(name, case):
    """Return the reason why a contender cannot run a case, or None."""
    if name == PAIRS and not machine.installed(name):
        return "not installed"
    if name == PAIRS and case.loss not in PEERS:
        return f"{case.loss} not compared"
    per_pair = STEPS[name].bytes_per_pair * (case.capacity if name == DENSE and case.loss in BY_THREE else 1)
    needed = case.batch * case.capacity * per_pair
    free = machine.available(case.device)
    if needed > free:
        return f"needs {needed / 1e9:.0f} GB of {free / 1e9:.0f}"
    return None


def line_up(case, *, limit):
    """Return `(contenders, reasons)`, two dicts by name: the contenders that run a case, and why the others cannot.

    The contenders are warmed up. A contender whose call takes longer than `limit` seconds is skipped.

    Raises
    ------
    ValueError
        If dense autograd and xbm disagree in loss or gradient.
    """
    reasons = {name: left_out(name, case) for name in STEPS}
    ready = {name: build(case) for name, build in STEPS.items() if reasons[name] is None}
    if OURS in ready and DENSE in ready:
        _agree(*(ready[name](*case.inputs(0)) for name in (OURS, DENSE)))
    for name, contender in list(ready.items()):
        seconds = min(clocked(contender, case.inputs(1), wait=machine.waiting(case.device)) for _ in range(2))
        if seconds > limit:
            reasons[name] = f"{seconds:.0f} s a call"
            del ready[name]
    return ready, {name: reason for name, reason in reasons.items() if reason}


def _agree(ours, other):
    """Raise an error if the losses or gradients differ by more than rounding errors."""
    for what, a, b in zip(("loss", "gradient"), ours, other, strict=True):
        if not torch.linalg.vector_norm(a - b) <= 1e-3 * torch.linalg.vector_norm(b):
            raise ValueError(f"{OURS} and {DENSE} must agree to a relative 1e-3, got {what} {a} and {b}")


def _peer(name):
    """Return the `(loss, miner)` of pytorch-metric-learning that equals a loss of xbm, with the same constants."""
    from pytorch_metric_learning import distances, losses, miners

    cosine = distances.CosineSimilarity()
    return {
        "contrastive": lambda: (losses.ContrastiveLoss(pos_margin=1, neg_margin=0.5, distance=cosine), None),
        "multi-similarity": lambda: (losses.MultiSimilarityLoss(alpha=2, beta=50, base=0.5), None),
        "supcon": lambda: (losses.SupConLoss(temperature=0.1), None),
        "batch-hard-triplet": lambda: (
            losses.TripletMarginLoss(margin=0.2, distance=cosine),
            miners.BatchHardMiner(distance=cosine),
        ),
    }[name]()
