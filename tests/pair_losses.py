"""Losses and a miner that the library does not have yet, in the form it prescribes: they prove the engine general.

Between them they use every reduction, several stages, and every way to combine a miner with a loss.
"""

from array_api_compat import array_namespace

from xbm import Contrastive, LogSumExp, Mined, Miner, PairLoss, Sum, TopK


class MultiSimilarity(PairLoss):
    """sp(LSE_P(-a(S-l)))/a + sp(LSE_N(b(S-l)))/b."""

    def __repr__(self):
        return type(self).__name__

    def __init__(self, alpha=2.0, beta=10.0, base=0.5):
        self.alpha, self.beta, self.base = alpha, beta, base

    def summarise(self, block, r):
        return {
            "pos": LogSumExp.of(-self.alpha * (block.S - self.base), block.P),
            "neg": LogSumExp.of(self.beta * (block.S - self.base), block.N),
        }

    def value(self, r):
        return _softplus(r["pos"]) / self.alpha + _softplus(r["neg"]) / self.beta

    def weights(self, block, r):
        xp = array_namespace(block.S)
        pos = xp.exp(-self.alpha * (block.S - self.base) - _softplus(r["pos"])[:, None])
        neg = xp.exp(self.beta * (block.S - self.base) - _softplus(r["neg"])[:, None])
        return block.N * neg - block.P * pos


class Similar(Miner):
    """Multi-similarity's: keep n if S_n > min_P - eps, p if S_p < max_N + eps."""

    def __repr__(self):
        return type(self).__name__

    def __init__(self, eps=0.1):
        self.eps = eps

    def summarise(self, block, r):
        return {"hardest": TopK.of(-block.S, block.P, block), "nearest": TopK.of(block.S, block.N, block)}

    def select(self, block, r):
        xp = array_namespace(block.S)
        least, most = -r["hardest"].score, r["nearest"].score
        return block._replace(
            P=xp.where(most + self.eps > block.S, block.P, 0.0), N=xp.where(least - self.eps < block.S, block.N, 0.0)
        )


class BatchHard(PairLoss):
    """sp(max_N - min_P + m) over rows that have both."""

    needs_cosines = True

    def __repr__(self):
        return type(self).__name__

    def __init__(self, margin=0.2):
        self.margin = margin

    def summarise(self, block, r):
        return {"pos": TopK.of(-block.S, block.P, block), "neg": TopK.of(block.S, block.N, block)}

    def value(self, r):
        return _softplus(self._gap(r)[:, 0])

    def weights(self, block, r):
        xp = array_namespace(block.S)
        gap = self._gap(r)
        pull, push = (xp.astype(block.slots[None, :] == r[side].slot, block.S.dtype) for side in ("pos", "neg"))
        return (push - pull) * xp.exp(gap - _softplus(gap))

    def _gap(self, r):
        xp = array_namespace(r["pos"].score)
        both = (r["pos"].slot >= 0) & (r["neg"].slot >= 0)
        return xp.where(both, r["neg"].similarity - r["pos"].similarity + self.margin, -xp.inf)


class NTXent(PairLoss):
    """mean_p sp(LSE_N(S/t) - S_p/t): two stages."""

    def __repr__(self):
        return type(self).__name__

    def __init__(self, temperature=0.2):
        self.temperature = temperature

    @property
    def stages(self):
        return self.negatives, self.summarise

    def negatives(self, block, r):
        return {"neg": LogSumExp.of(block.S / self.temperature, block.N)}

    def summarise(self, block, r):
        gap = r["neg"][:, None] - block.S / self.temperature
        xp = array_namespace(block.S)
        return {
            "loss": Sum.of(block.P * _softplus(gap)),
            "active": Sum.of(block.P * xp.exp(gap - _softplus(gap))),
            "n": Sum.of(block.P),
        }

    def value(self, r):
        return r["loss"] / _at_least_one(r["n"])

    def weights(self, block, r):
        xp = array_namespace(block.S)
        gap = r["neg"][:, None] - block.S / self.temperature
        pull = block.P * xp.exp(gap - _softplus(gap))
        push = block.N * xp.exp(-xp.where(block.N > 0, gap, 0.0)) * r["active"][:, None]
        return (push - pull) / (self.temperature * _at_least_one(r["n"])[:, None])


class HardestNegatives(PairLoss):
    """Mean of the k most similar negatives: TopK with k > 1."""

    def __repr__(self):
        return type(self).__name__

    def __init__(self, k=3):
        self.k = k

    def summarise(self, block, r):
        return {"top": TopK.of(block.S, block.N, block, k=self.k)}

    def value(self, r):
        xp = array_namespace(r["top"].score)
        return xp.sum(xp.where(r["top"].slot >= 0, r["top"].similarity, 0.0), axis=1) / self.k

    def weights(self, block, r):
        xp = array_namespace(block.S)
        chosen = xp.any(block.slots[None, :, None] == r["top"].slot[:, None, :], axis=2)
        return xp.astype(chosen, block.S.dtype) / self.k


LOSSES = [
    Contrastive(),
    Contrastive(reduction="sum"),
    Contrastive(pos_margin=0.8, neg_margin=0.3),
    MultiSimilarity(),
    Mined(MultiSimilarity(), Similar()),
    Mined(Contrastive(), Similar()),
    BatchHard(),
    NTXent(),
    Mined(NTXent(), Similar()),
    HardestNegatives(),
]


def _softplus(x):
    xp = array_namespace(x)
    return xp.logaddexp(x, xp.zeros_like(x))


def _at_least_one(n):
    return array_namespace(n).maximum(n, 1.0)
