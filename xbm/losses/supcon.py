"""Supervised contrastive loss."""

from dataclasses import dataclass

from xbm import checks
from xbm.backends import Array, array_namespace
from xbm.losses.base import LOSSES, Block, PairLoss
from xbm.losses.functions import inverse, share
from xbm.options import option
from xbm.reductions import LogSumExp, Results, Sum, Summaries


@LOSSES.register("supcon")
@dataclass(frozen=True)
class SupCon(PairLoss):
    r"""Supervised contrastive loss, with the mean over positives outside the logarithm.

    L_i = log sum_{P and N} exp(S / t) - (1/n_P) sum_P S / t; 0 without a positive.

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
    >>> objective = xbm.Objective(loss=xbm.SupCon(temperature=0.5), warmup=0)
    >>> result = objective.evaluate(objective.init(capacity=8, dim=2), anchors, np.asarray([0, 0, 1]))
    >>> round(float(result.loss), 4)
    0.3921

    References
    ----------
    Khosla et al., "Supervised Contrastive Learning", NeurIPS 2020, arXiv 2004.11362, equation 2.
    """

    temperature: float = option(0.1, checks.positive)

    def summarise(self, block: Block, r: Results) -> Summaries:
        """Return the log-sum-exp over all pairs, the sum over positives, and their number."""
        logits = block.S / self.temperature
        return {
            "all": LogSumExp.of(logits, block.P + block.N),
            "positive": Sum.of(block.P * logits),
            "n_positive": Sum.of(block.P),
        }

    def value(self, r: Results) -> Array:
        """Return L_i."""
        xp = array_namespace(r["all"])
        return xp.where(r["n_positive"] == 0, 0.0, r["all"] - r["positive"] * inverse(r["n_positive"]))

    def weights(self, block: Block, r: Results) -> Array:
        """Return (q - P / n_P) / t, where q is the softmax over all pairs."""
        xp = array_namespace(block.S)
        n = r["n_positive"][:, None]
        push = share(block.S / self.temperature, block.P + block.N, r["all"])
        return xp.where(n == 0, 0.0, push - block.P * inverse(n)) / self.temperature
