"""The losses for parametrised tests, each with its formula: the library's, some with miners, and two custom ones."""

from dataclasses import dataclass
from functools import partial

import xbm
from tests import formulas
from xbm import (
    NCA,
    BatchHardTriplet,
    BinomialDeviance,
    Circle,
    Contrastive,
    EasyPositiveMiner,
    HardNegativeMiner,
    LiftedStructure,
    Margin,
    MarginMiner,
    MultiSimilarity,
    MultiSimilarityMiner,
    NTXent,
    PairLoss,
    RecallAtK,
    RowLoss,
    SemiHardMiner,
    SemiHardTriplet,
    SmoothAP,
    SupCon,
    TopK,
    Triplet,
    TupletMargin,
)
from xbm.backends import array_namespace
from xbm.losses.functions import softplus
from xbm.mining import DistanceWeightedMiner, Mined, mined


@dataclass(frozen=True)
class HardestNegatives(PairLoss):
    """Mean of the k most similar negatives: TopK with k > 1."""

    k: int = 3

    def summarise(self, block, r):
        return {"top": TopK.of(block.S, block.N, block, k=self.k)}

    def value(self, r):
        xp = array_namespace(r["top"].score)
        return xp.sum(xp.where(r["top"].slot >= 0, r["top"].similarity, 0.0), axis=1) / self.k

    def weights(self, block, r):
        xp = array_namespace(block.S)
        return xp.astype(r["top"].holds(block.slots), block.S.dtype) / self.k


@dataclass(frozen=True)
class SoftTriplets(RowLoss):
    """sum_P sum_N sp(S_n - S_p): a loss over whole rows, without reductions."""

    def whole(self, block):
        xp = array_namespace(block.S)
        gap = block.S[:, None, :] - block.S[:, :, None]  # (B, p, n)
        triplet = block.P[:, :, None] * block.N[:, None, :]
        slope = triplet / (1.0 + xp.exp(-gap))
        return xp.sum(triplet * softplus(gap), axis=(1, 2)), xp.sum(slope, axis=1) - xp.sum(slope, axis=2)


FORMULAS = {
    Contrastive(): formulas.contrastive,
    Contrastive(reduction="sum"): formulas.contrastive_sum,
    Contrastive(pos_margin=0.8, neg_margin=0.3): partial(formulas.contrastive, pos_margin=0.8, neg_margin=0.3),
    Margin(): formulas.margin,
    Margin(alpha=0.1, beta=0.9): partial(formulas.margin, alpha=0.1, beta=0.9),
    BinomialDeviance(): formulas.binomial_deviance,
    BinomialDeviance(alpha=3, beta=7, base=0.2): partial(formulas.binomial_deviance, alpha=3, beta=7, base=0.2),
    MultiSimilarity(): formulas.multi_similarity,
    MultiSimilarity(alpha=2, beta=10, base=1): partial(formulas.multi_similarity, beta=10, base=1),
    BatchHardTriplet(): formulas.batch_hard_triplet,
    BatchHardTriplet(margin=0.0, soft=True): partial(formulas.batch_hard_triplet, m=0.0, soft=True),
    Triplet(): formulas.triplet,
    Triplet(margin=0.5671): partial(formulas.triplet, m=0.5671),
    Triplet(reduction="sum"): formulas.triplet_sum,
    SemiHardTriplet(): formulas.semi_hard_triplet,
    SemiHardTriplet(margin=0.5671): partial(formulas.semi_hard_triplet, m=0.5671),
    NTXent(): formulas.nt_xent,
    NTXent(temperature=0.5): partial(formulas.nt_xent, t=0.5),
    SupCon(): formulas.supcon,
    SupCon(temperature=0.5): partial(formulas.supcon, t=0.5),
    NCA(): formulas.nca,
    NCA(temperature=0.5): partial(formulas.nca, t=0.5),
    LiftedStructure(): formulas.lifted_structure,
    LiftedStructure(pos_margin=0.2, neg_margin=0.7, gamma=5): partial(
        formulas.lifted_structure, pos_margin=0.2, neg_margin=0.7, gamma=5
    ),
    Circle(): formulas.circle,
    Circle(margin=0.25, gamma=6): partial(formulas.circle, m=0.25, gamma=6),
    TupletMargin(): formulas.tuplet_margin,
    TupletMargin(margin=20, scale=4): partial(formulas.tuplet_margin, degrees=20, scale=4),
    SmoothAP(): formulas.smooth_ap,
    SmoothAP(temperature=0.1): partial(formulas.smooth_ap, t=0.1),
    RecallAtK(): formulas.recall_at_k,
    RecallAtK(k=(1, 3), temperature=0.2, rank_temperature=0.5): partial(
        formulas.recall_at_k, ks=(1, 3), t=0.2, t_rank=0.5
    ),
}
"""Losses and their formulas, valid for distinct similarities away from thresholds."""

OTHERS = [
    Contrastive(reduction="mean-nonzero"),
    Margin(reduction="mean-nonzero"),
    Margin(reduction="sum"),
    Triplet(reduction="mean-nonzero"),
    SemiHardTriplet(reduction="sum"),
    SmoothAP(positives=2, temperature=0.1),
    RecallAtK(k=(1, 2), positives=2, temperature=0.1),
    HardestNegatives(),
    SoftTriplets(),
]

MINERS = [
    MarginMiner(pos_margin=0.41, neg_margin=-0.23),
    MultiSimilarityMiner(epsilon=0.1414213),
    HardNegativeMiner(k=2),
    SemiHardMiner(margin=0.5671),
    EasyPositiveMiner(),
    EasyPositiveMiner(k=2),
    DistanceWeightedMiner(dim=16, k=2, beyond=1.9),
]

MINED = [
    Mined(MultiSimilarity(), MultiSimilarityMiner(epsilon=0.1414213)),
    Mined(NTXent(temperature=0.2), HardNegativeMiner(k=2)),
    mined(Contrastive(), EasyPositiveMiner(), SemiHardMiner(margin=0.5671)),
    Mined(SmoothAP(temperature=0.1), MultiSimilarityMiner(epsilon=0.1414213)),
    Mined(Margin(), DistanceWeightedMiner(dim=16, k=2, beyond=1.9)),
    mined(SoftTriplets(), MultiSimilarityMiner(epsilon=0.1414213)),
    mined(Triplet(), HardNegativeMiner(k=2)),
]

LOSSES = [*FORMULAS, *OTHERS, *MINED]

BY_NAME = [
    *({"loss": name} for name in xbm.losses.LOSSES),
    *({"miner": name} for name in xbm.mining.MINERS),
    {"loss": "margin", "miner": DistanceWeightedMiner(dim=4, k=2)},
]
"""Options of `Objective` that cover every loss and every miner."""
