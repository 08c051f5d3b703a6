"""The losses that tests run over: the library's, some mined, and two of other forms that prove the engine general."""

from xbm import (
    BatchHardTriplet,
    Contrastive,
    LogSumExp,
    MultiSimilarity,
    MultiSimilarityMiner,
    PairLoss,
    RowLoss,
    Sum,
    SupCon,
    TopK,
)
from xbm.backends import array_namespace
from xbm.losses.functions import softplus
from xbm.mining import Mined, mined


class NTXent(PairLoss):
    """mean_p sp(LSE_N(S/t) - S_p/t): two stages; said to be of cosines."""

    needs_cosines = True

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
            "loss": Sum.of(block.P * softplus(gap)),
            "active": Sum.of(block.P * xp.exp(gap - softplus(gap))),
            "n": Sum.of(block.P),
        }

    def value(self, r):
        return r["loss"] / _at_least_one(r["n"])

    def weights(self, block, r):
        xp = array_namespace(block.S)
        gap = r["neg"][:, None] - block.S / self.temperature
        pull = block.P * xp.exp(gap - softplus(gap))
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


class AllTriplets(RowLoss):
    """sum_P sum_N sp(S_n - S_p): whole rows, and no summaries."""

    def __repr__(self):
        return type(self).__name__

    def whole(self, block):
        xp = array_namespace(block.S)
        gap = block.S[:, None, :] - block.S[:, :, None]  # (B, p, n)
        triplet = block.P[:, :, None] * block.N[:, None, :]
        slope = triplet / (1.0 + xp.exp(-gap))
        return xp.sum(triplet * softplus(gap), axis=(1, 2)), xp.sum(slope, axis=1) - xp.sum(slope, axis=2)


LOSSES = [
    Contrastive(),
    Contrastive(reduction="sum"),
    Contrastive(pos_margin=0.8, neg_margin=0.3),
    MultiSimilarity(),
    MultiSimilarity(alpha=2, beta=10, base=1),
    BatchHardTriplet(),
    BatchHardTriplet(margin=0.0, soft=True),
    SupCon(),
    SupCon(temperature=0.5),
    Mined(MultiSimilarity(), MultiSimilarityMiner(epsilon=0.1414213)),
    Mined(Contrastive(), MultiSimilarityMiner(epsilon=0.2718281)),
    NTXent(),
    Mined(NTXent(), MultiSimilarityMiner(epsilon=0.1414213)),
    HardestNegatives(),
    AllTriplets(),
    mined(AllTriplets(), MultiSimilarityMiner(epsilon=0.1414213)),
]


def _at_least_one(n):
    return array_namespace(n).maximum(n, 1.0)
