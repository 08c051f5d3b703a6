"""Ranking losses: smooth approximations of retrieval metrics."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, NamedTuple

from xbm import backends, checks
from xbm.backends import Array, array_namespace
from xbm.losses.base import LOSSES, Block, PairLoss, Stage
from xbm.losses.functions import inverse, sigmoid
from xbm.options import option, whole
from xbm.reductions import Results, Sum, Summaries, TopK


def _ks(name: str, value: Any) -> tuple[int, ...]:
    if not isinstance(value, tuple | list) or not value:
        raise TypeError(f"{name} must be a tuple of ints such as (1, 2, 4), got {value!r}")
    return tuple(checks.whole_number(name, one, at_least=1) for one in value)


class Ranks(NamedTuple):
    """Smooth ranks of each anchor's K positives, starting at 1, among the positives and among all rows."""

    among_positives: Array  #: (B, K) G = 1 + sum of sigmoids of the other positives
    among_all: Array  #: (B, K) R = G + sum of sigmoids of the negatives
    weight: Array  #: (B, K) normalised weight of each positive, 0 beyond the last positive
    n: Array  #: (B, 1) total number of positives of the anchor


class RankingLoss(PairLoss):
    """A loss that depends on the ranks of an anchor's K most similar positives.

    sigmoid((S_j - S_p) / t) approximates whether row j ranks before the positive p. The rank of p is 1 plus the sum of
    these values over all other rows. There are two stages: the first selects the positives, the second computes their
    ranks, (B, K) sums.
    """

    positives: int
    temperature: float

    @property
    def width(self) -> int:
        """K, because a block has one sigmoid per row and positive."""
        return self.positives

    @abstractmethod
    def of_ranks(self, ranks: Ranks) -> tuple[Array, Array, Array]:
        """Return `(L_i (B,), dL_i/dG, dL_i/dR)`; the derivatives are (B, K), and 0 beyond the last positive."""

    @property
    def stages(self) -> tuple[Stage, ...]:
        """Return the stage of the positives and the stage of the ranks."""
        return self._positives, self.summarise

    def _positives(self, block: Block, r: Results) -> Summaries:
        """Return the K most similar positives, and n_P."""
        top = TopK.of(block.S, block.P, block, k=self.positives)
        return {"top": top, "n_positive": Sum.of(backends.of(block.P)[1].is_positive(block.P))}

    def summarise(self, block: Block, r: Results) -> Summaries:
        """Return the sums of sigmoids and of their slopes over positives and over negatives, (B, K) each."""
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
        """Return dL_i/dS_ij: the effect of each row on the positives' ranks, and of each positive on its own rank."""
        xp = array_namespace(block.S)
        _, of_G, of_R = self.of_ranks(self._ranks(r))
        _, slope, itself = self._before(block, r)
        of_positive = of_G + of_R
        own = -(of_positive * r["positive_slopes"] + of_R * r["negative_slopes"])
        pull, push = ((slope @ one[:, :, None])[:, :, 0] for one in (of_positive, of_R))
        return block.P * pull + block.N * push + xp.sum(xp.where(itself, own[:, None, :], 0.0), axis=2)

    def _before(self, block: Block, r: Results) -> tuple[Array, Array, Array]:
        """Return the sigmoids, their slopes in S_j, and a mask of the positive itself, where both are 0; (B, m, K)."""
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


@LOSSES.register("smooth-ap")
@dataclass(frozen=True)
class SmoothAP(RankingLoss):
    r"""Smooth average precision: one minus the mean precision at the smooth ranks of the positives.

    L_i = 1 - (1/K) sum_P G_p / R_p, where R_p = 1 + sum_{j != p} sigmoid((S_j - S_p) / t) is the rank of a positive
    among all rows, and G_p its rank among positives; 0 without a positive.

    Parameters
    ----------
    temperature : float
        t, above 0 (cosine). Similarities that differ by less count approximately as ties.
    positives : int
        K, maximum number of positives per anchor; the most similar ones are used. The loss is exact for anchors with
        at most K positives. Time and memory are proportional to K, with K sigmoids per pair.

    Raises
    ------
    TypeError, ValueError
        If the temperature is not a finite number above 0, or `positives` is not an int of at least 1.

    Examples
    --------
    >>> import numpy as np, xbm
    >>> anchors = np.asarray([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]])
    >>> objective = xbm.Objective(loss=xbm.SmoothAP(), warmup=0)
    >>> result = objective.evaluate(objective.init(capacity=8, dim=2), anchors, np.asarray([0, 0, 1]))
    >>> round(float(result.loss), 4)  # the anchors with a positive have precision 1 and 1/2
    0.1667

    References
    ----------
    Brown, Xie, Kalogeiton, Zisserman, "Smooth-AP: Smoothing the Path Towards Large-Scale Image Retrieval", ECCV 2020,
    arXiv 2007.12163.
    """

    temperature: float = option(0.01, checks.positive)
    positives: int = option(16, whole(at_least=1))

    def of_ranks(self, ranks: Ranks) -> tuple[Array, Array, Array]:
        """Return 1 - mean G / R and its derivatives."""
        xp = array_namespace(ranks.among_all)
        G, R, share = ranks.among_positives, ranks.among_all, ranks.weight
        return xp.sum(share - share * G / R, axis=1), -share / R, share * G / (R * R)


@LOSSES.register("recall-at-k")
@dataclass(frozen=True)
class RecallAtK(RankingLoss):
    r"""Recall@k surrogate: one minus the smooth share of positives among the k nearest rows, averaged over k.

    L_i = 1 - mean_k (1 / min(k, n_P)) sum_P sigmoid((k - R_p) / t_k), with R_p as in `SmoothAP`; 0 without a positive.
    The minimum is above 0, because a positive at rank k counts as half for recall@k. Pair weights affect the ranks.

    Parameters
    ----------
    k : tuple of int
        The values of k over which recall@k is averaged.
    rank_temperature : float
        t_k, temperature of the ranks, above 0.
    temperature : float
        t, temperature of the similarities (cosine), above 0.
    positives : int
        Maximum number of positives per anchor; the most similar ones are ranked. The others have larger ranks than
        this, so they contribute little if it is at least the largest k. Time and memory are proportional to it.

    Raises
    ------
    TypeError, ValueError
        If a temperature is not a finite number above 0, or a k or `positives` is not an int of at least 1.

    Examples
    --------
    >>> import numpy as np, xbm
    >>> anchors = np.asarray([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]])
    >>> objective = xbm.Objective(loss=xbm.RecallAtK(k=(1,), rank_temperature=0.1), warmup=0)
    >>> result = objective.evaluate(objective.init(capacity=8, dim=2), anchors, np.asarray([0, 0, 1]))
    >>> round(float(result.loss), 3)  # a positive at rank 1 counts half, at rank 2 nothing
    0.5

    References
    ----------
    Patel, Tolias, Matas, "Recall@k Surrogate Loss with Large Batches and Similarity Mixup", CVPR 2022, arXiv
    2108.11179.
    """

    k: tuple[int, ...] = option((1, 2, 4, 8, 16), _ks)
    rank_temperature: float = option(1.0, checks.positive)
    temperature: float = option(0.01, checks.positive)
    positives: int = option(16, whole(at_least=1))

    def of_ranks(self, ranks: Ranks) -> tuple[Array, Array, Array]:
        """Return 1 - mean_k sum sigmoid(...) / min(k, n_P) and its derivatives; it does not depend on G."""
        xp = array_namespace(ranks.among_all)
        R, ranked = ranks.among_all, xp.clip(ranks.n, max=float(self.positives))
        value, slope = xp.sum(ranks.weight, axis=1), xp.zeros_like(R)
        for k in self.k:
            share = ranks.weight * ranked * inverse(xp.clip(ranks.n, max=float(k))) / len(self.k)
            within = sigmoid((k - R) / self.rank_temperature)
            value = value - xp.sum(share * within, axis=1)
            slope = slope + share * within * (1.0 - within) / self.rank_temperature
        return value, xp.zeros_like(R), slope
