"""Neighbourhood components analysis, also called the soft nearest neighbour loss."""

from dataclasses import dataclass

from xbm import checks
from xbm.backends import Array, array_namespace
from xbm.losses.base import LOSSES, Block, PairLoss
from xbm.losses.functions import share
from xbm.options import option
from xbm.reductions import LogSumExp, Results, Summaries


@LOSSES.register("nca")
@dataclass(frozen=True)
class NCA(PairLoss):
    r"""Neighbourhood components analysis: log-probability that a neighbour, sampled by similarity, is a positive.

    L_i = -log(sum_P exp(S / t) / sum_{P and N} exp(S / t)); 0 without a positive. A single close positive makes the
    loss small, whereas `SupCon` pulls all positives closer.

    Parameters
    ----------
    temperature : float
        t, above 0. A lower temperature gives more weight to the most similar rows.

    Raises
    ------
    TypeError, ValueError
        If the temperature is not a finite number above 0.

    Examples
    --------
    >>> import numpy as np, xbm
    >>> anchors = np.asarray([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]])
    >>> objective = xbm.Objective(loss=xbm.NCA(temperature=0.5), warmup=0)
    >>> result = objective.evaluate(objective.init(capacity=8, dim=2), anchors, np.asarray([0, 0, 1]))
    >>> round(float(result.loss), 4)
    0.3921

    References
    ----------
    Goldberger, Roweis, Hinton, Salakhutdinov, "Neighbourhood Components Analysis", NIPS 2004; with a temperature as in
    Frosst, Papernot, Hinton, "Analyzing and Improving Representations with the Soft Nearest Neighbor Loss", ICML 2019,
    arXiv 1902.01889; on similarities instead of distances.
    """

    temperature: float = option(0.1, checks.positive)

    def summarise(self, block: Block, r: Results) -> Summaries:
        """Return the log-sum-exp over all pairs, and over positives."""
        logits = block.S / self.temperature
        return {"all": LogSumExp.of(logits, block.P + block.N), "positive": LogSumExp.of(logits, block.P)}

    def value(self, r: Results) -> Array:
        """Return L_i."""
        xp = array_namespace(r["all"])
        some = r["positive"] != -xp.inf  # True for NaN, which must propagate
        return xp.where(some, r["all"] - xp.where(some, r["positive"], 0.0), 0.0)

    def weights(self, block: Block, r: Results) -> Array:
        """Return (q - q_P) / t, where q is the softmax over all pairs and q_P the softmax over positives."""
        xp = array_namespace(block.S)
        logits = block.S / self.temperature
        pull = share(logits, block.P, r["positive"])
        push = share(logits, block.P + block.N, r["all"])
        return xp.where(r["positive"][:, None] != -xp.inf, push - pull, 0.0) / self.temperature
