"""Losses on an anchor's ranking of the rows, with smooth ranks."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import NamedTuple

from xbm import backends, checks
from xbm.backends import Array, array_namespace
from xbm.losses.base import Block, PairLoss, Stage
from xbm.losses.functions import inverse, sigmoid
from xbm.reductions import Results, Sum, Summaries, TopK


class Ranks(NamedTuple):
    """Smooth ranks of K positives of each anchor, from 1: among the positives, and among all."""

    among_positives: Array  # (B, K) G = 1 + sum of sigmoids of the other positives
    among_all: Array  # (B, K) R = G + sum of sigmoids of the negatives
    weight: Array  # (B, K) share of each positive in the anchor's K, 0 beyond the last positive
    n: Array  # (B, 1) positives of the anchor, all of them


class RankingLoss(PairLoss):
    """A loss of the ranks of an anchor's K most similar positives.

    A row j is before a positive p by sigmoid((S_j - S_p) / t), so p's rank is 1 plus the sum of that over the other
    rows, (B, K) sums for all. Two stages: the positives, then their ranks.
    """

    positives: int
    temperature: float

    @property
    def width(self) -> int:
        """K: a block of sigmoids for each positive."""
        return self.positives

    def _checked(self) -> None:
        checks.whole_number("positives", self.positives, at_least=1)
        object.__setattr__(self, "temperature", checks.positive("temperature", self.temperature))

    @abstractmethod
    def of_ranks(self, ranks: Ranks) -> tuple[Array, Array, Array]:
        """Return `(L_i (B,), dL_i/dG, dL_i/dR)`, the slopes (B, K) and 0 beyond the last positive."""

    @property
    def stages(self) -> tuple[Stage, ...]:
        """Return the positives' stage, then the ranks'."""
        return self._positives, self.summarise

    def _positives(self, block: Block, r: Results) -> Summaries:
        """Return the K most similar positives, and n_P."""
        top = TopK.of(block.S, block.P, block, k=self.positives)
        return {"top": top, "n_positive": Sum.of(backends.of(block.P)[1].is_positive(block.P))}

    def summarise(self, block: Block, r: Results) -> Summaries:
        """Return the sums of sigmoids and of their slopes over either side, (B, K) each."""
        xp = array_namespace(block.S)
        before, slope, itself = self._before(block, r)
        summaries: Summaries = {"weight": Sum.of(xp.where(itself, block.P[:, :, None], 0.0))}
        return summaries | {
            name: Sum((pairs[:, None, :] @ one)[:, 0, :])
            for name, pairs, one in (
                ("positives", block.P, before),
                ("negatives", block.N, before),
                ("positive_slopes", block.P, slope),
                ("negative_slopes", block.N, slope),
            )
        }

    def value(self, r: Results) -> Array:
        """Return L_i."""
        return self.of_ranks(self._ranks(r))[0]

    def weights(self, block: Block, r: Results) -> Array:
        """Return what moving each row does to the ranks, and what moving a positive does to its own."""
        xp = array_namespace(block.S)
        _, of_G, of_R = self.of_ranks(self._ranks(r))
        _, slope, itself = self._before(block, r)
        of_positive = of_G + of_R
        own = -(of_positive * r["positive_slopes"] + of_R * r["negative_slopes"])
        pull, push = ((slope @ one[:, :, None])[:, :, 0] for one in (of_positive, of_R))
        return block.P * pull + block.N * push + xp.sum(xp.where(itself, own[:, None, :], 0.0), axis=2)

    def _before(self, block: Block, r: Results) -> tuple[Array, Array, Array]:
        """Return (B, m, K) each: sigmoids, their slopes in S_j, and which row is the positive itself: both 0 there."""
        xp = array_namespace(block.S)
        slot = r["top"].slot[:, None, :]
        itself = block.slots[None, :, None] == slot
        apart = block.S[:, :, None] - r["top"].similarity[:, None, :]
        before = sigmoid(xp.where(itself | (slot < 0), -xp.inf, apart / self.temperature))
        return before, before * (1.0 - before) / self.temperature, itself

    def _ranks(self, r: Results) -> Ranks:
        G, weight = 1.0 + r["positives"], r["weight"]
        share = weight * inverse(array_namespace(G).sum(weight, axis=1))[:, None]
        return Ranks(G, G + r["negatives"], share, r["n_positive"][:, None])


@dataclass(frozen=True)
class SmoothAP(RankingLoss):
    r"""Smooth average precision: one minus the precision at the ranks of the positives, with smooth ranks.

    L_i = 1 - (1/K) sum_P G_p / R_p, with R_p = 1 + sum_{j != p} sigmoid((S_j - S_p) / t) the rank of a positive among
    all rows, and G_p the same among positives; 0 without a positive.

    Parameters
    ----------
    temperature : float
        t, above 0 (cosine): differences in similarity below it count as ties.
    positives : int
        K, the most positives that an anchor's mean is over, the most similar ones; exact where it has no more. Time
        and memory grow with it: K sigmoids for each pair.

    Raises
    ------
    TypeError, ValueError
        If the temperature is no finite number above 0 or `positives` no int of at least 1.

    Examples
    --------
    >>> import numpy as np, xbm
    >>> anchors = np.asarray([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]])
    >>> objective = xbm.Objective(loss=xbm.SmoothAP(), warmup=0)
    >>> result = objective.evaluate(objective.init(capacity=8, dim=2), anchors, np.asarray([0, 0, 1]))
    >>> round(float(result.loss), 4)  # precision 1, and 1/2
    0.1667

    References
    ----------
    Brown, Xie, Kalogeiton, Zisserman, "Smooth-AP: Smoothing the Path Towards Large-Scale Image Retrieval", ECCV 2020,
    arXiv 2007.12163.
    """

    temperature: float = 0.01
    positives: int = 16

    def __post_init__(self) -> None:
        self._checked()

    def of_ranks(self, ranks: Ranks) -> tuple[Array, Array, Array]:
        """Return 1 - mean G / R and its slopes."""
        xp = array_namespace(ranks.among_all)
        G, R, share = ranks.among_positives, ranks.among_all, ranks.weight
        return xp.sum(share - share * G / R, axis=1), -share / R, share * G / (R * R)


@dataclass(frozen=True)
class RecallAtK(RankingLoss):
    r"""Recall@k surrogate: one minus the share of positives among the k nearest, smooth in the ranks, averaged over k.

    L_i = 1 - mean_k (1 / min(k, n_P)) sum_P sigmoid((k - R_p) / t_k), with R_p as in `SmoothAP`; 0 without a positive.
    It keeps above 0: a positive of rank k counts half for recall@k. Pair weights count in the ranks.

    Parameters
    ----------
    k : tuple of int
        Neighbours that recall is taken at.
    rank_temperature : float
        t_k, above 0, of the ranks.
    temperature : float
        t, above 0, of the similarities (cosine).
    positives : int
        The most positives of an anchor that are ranked, the most similar ones. Those left out are of a higher rank
        than it, so with the largest k or more they count little. Time and memory grow with it.

    Raises
    ------
    TypeError, ValueError
        If a temperature is no finite number above 0, or a k or `positives` no int of at least 1.

    Examples
    --------
    >>> import numpy as np, xbm
    >>> anchors = np.asarray([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]])
    >>> objective = xbm.Objective(loss=xbm.RecallAtK(k=(1,), rank_temperature=0.1), warmup=0)
    >>> result = objective.evaluate(objective.init(capacity=8, dim=2), anchors, np.asarray([0, 0, 1]))
    >>> round(float(result.loss), 3)  # a positive of rank 1 counts half, one of rank 2 nothing
    0.5

    References
    ----------
    Patel, Tolias, Matas, "Recall@k Surrogate Loss with Large Batches and Similarity Mixup", CVPR 2022, arXiv
    2108.11179.
    """

    k: tuple[int, ...] = (1, 2, 4, 8, 16)
    rank_temperature: float = 1.0
    temperature: float = 0.01
    positives: int = 16

    def __post_init__(self) -> None:
        self._checked()
        object.__setattr__(self, "rank_temperature", checks.positive("rank_temperature", self.rank_temperature))
        if not isinstance(self.k, tuple | list) or not self.k:
            raise TypeError(f"k must be a tuple of ints such as (1, 2, 4), got {self.k!r}")
        for one in self.k:
            checks.whole_number("k", one, at_least=1)
        object.__setattr__(self, "k", tuple(self.k))

    def of_ranks(self, ranks: Ranks) -> tuple[Array, Array, Array]:
        """Return 1 - mean_k sum sigmoid(...) / min(k, n_P) and its slope; G does not matter."""
        xp = array_namespace(ranks.among_all)
        R, ranked = ranks.among_all, xp.clip(ranks.n, max=float(self.positives))
        value, slope = xp.sum(ranks.weight, axis=1), xp.zeros_like(R)
        for k in self.k:
            share = ranks.weight * ranked * inverse(xp.clip(ranks.n, max=float(k))) / len(self.k)
            within = sigmoid((k - R) / self.rank_temperature)
            value = value - xp.sum(share * within, axis=1)
            slope = slope + share * within * (1.0 - within) / self.rank_temperature
        return value, xp.zeros_like(R), slope
