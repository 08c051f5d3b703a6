"""Negatives sampled by distance."""

from __future__ import annotations

from dataclasses import dataclass

from xbm import checks
from xbm.backends import array_namespace
from xbm.losses import Block
from xbm.mining.top import TopMiner
from xbm.noise import gumbel
from xbm.options import option, whole
from xbm.reductions import Results, Summaries, TopK


@dataclass(frozen=True)
class DistanceWeightedMiner(TopMiner):
    r"""Negatives drawn uniformly over distances, and all positives.

    Of the anchor's negatives, k are drawn without replacement, with probabilities proportional to 1 / q(d). Here q(d) =
    d^(D-2) (1 - d^2/4)^((D-3)/2) is the density of the distance d = sqrt(2 - 2 S) between random points of a sphere.
    The draw is a function of the seed, the step, the anchor and the slot, so it is the same for any block size, device
    and array library.

    Parameters
    ----------
    dim : int
        D, the embeddings' size, at least 2.
    k : int
        Negatives drawn for each anchor, at least 1.
    cutoff : float
        Distance, in (0, 2): nearer negatives are drawn as if they were at this distance.
    beyond : float
        Distance, in (0, 2]: farther negatives are not drawn.
    seed : int
        Seed of the draws, at least 0.

    Raises
    ------
    TypeError, ValueError
        If an option is out of range, and at a call with embeddings of another size.

    Examples
    --------
    >>> import numpy as np, xbm
    >>> objective = xbm.Objective(loss=xbm.Margin(), miner=xbm.DistanceWeightedMiner(dim=8), warmup=0)
    >>> rng = np.random.default_rng(0)
    >>> result = objective.step(objective.init(capacity=64, dim=8), rng.normal(size=(16, 8)), rng.integers(4, size=16))
    >>> bool(result.loss > 0)
    True

    References
    ----------
    Wu, Manmatha, Smola, Kraehenbuehl, "Sampling Matters in Deep Embedding Learning", ICCV 2017, arXiv 1706.07567.
    """

    dim: int
    k: int = option(4, whole(at_least=1))
    cutoff: float = option(0.5, checks.positive)
    beyond: float = option(1.4, checks.positive)
    seed: int = option(0, whole(at_least=0))
    side = "N"
    needs_cosines = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.derive(dim=checks.whole_number("dim", self.dim, at_least=2))
        if not self.cutoff < self.beyond <= 2:
            raise ValueError(
                f"cutoff must be below beyond, and beyond at most 2, got cutoff={self.cutoff} and beyond={self.beyond}"
            )

    @property
    def width(self) -> int:
        """K comparisons, or the integers of the draw."""
        return max(self.k, 4)

    def refuse(self, dim: int) -> None:
        """Raise a ValueError for another size than `dim`, whose distances have another density."""
        if dim != self.dim:
            raise ValueError(f"{self!r} is made for embeddings of size {self.dim}, got {dim}")

    def summarise(self, block: Block, r: Results) -> Summaries:
        """Return the k negatives drawn: those with the largest log(1 / q) plus Gumbel noise."""
        xp = array_namespace(block.S)
        S = xp.clip(block.S, max=1 - self.cutoff**2 / 2)
        log_weight = -(self.dim - 2) / 2 * xp.log(2.0 - 2.0 * S)
        if self.dim != 3:
            log_weight = log_weight - (self.dim - 3) / 2 * xp.log(xp.clip((1.0 + S) / 2.0, min=1e-6))
        noise = gumbel(self.seed, block.step, block.anchors, block.slots, dtype=S.dtype)
        reachable = xp.where(block.S < 1 - self.beyond**2 / 2, 0.0, block.N)  # keeps a NaN
        return {"top": TopK.of(log_weight + noise, reachable, block, k=self.k)}
