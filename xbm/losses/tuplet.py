"""Tuplet losses: each positive separately against all negatives."""

from abc import abstractmethod
from dataclasses import dataclass
from math import cos, radians, sin

from xbm import checks
from xbm.backends import Array, array_namespace
from xbm.losses.base import LOSSES, Block, PairLoss, Stage
from xbm.losses.functions import inverse, share, sigmoid, softplus
from xbm.options import number, option
from xbm.reductions import LogSumExp, Results, Sum, Summaries


class TupletLoss(PairLoss):
    """L_i = (1/n_P) sum_P log(1 + sum_N exp(s S_n - x_p)), where x_p is the positive's logit. It has two stages."""

    @property
    @abstractmethod
    def scale(self) -> float:
        """s, the scale of negatives, above 0."""

    @abstractmethod
    def positive_logit(self, S: Array) -> tuple[Array, Array | float]:
        """Return x_p for positives with similarity S, and d x_p / dS, each (B, m)."""

    @property
    def stages(self) -> tuple[Stage, ...]:
        """Return the stage of the negatives and the stage of the positives."""
        return self._negatives, self.summarise

    def _negatives(self, block: Block, r: Results) -> Summaries:
        """Return log sum_N exp(s S)."""
        return {"negative": LogSumExp.of(self.scale * block.S, block.N)}

    def summarise(self, block: Block, r: Results) -> Summaries:
        """Return the sums of the loss and of its slope a_p over positives, and n_P."""
        gap = r["negative"][:, None] - self.positive_logit(block.S)[0]
        return {
            "loss": Sum.of(block.P * softplus(gap)),
            "slope": Sum.of(block.P * sigmoid(gap)),
            "n_positive": Sum.of(block.P),
        }

    def value(self, r: Results) -> Array:
        """Return L_i."""
        return r["loss"] * inverse(r["n_positive"])

    def weights(self, block: Block, r: Results) -> Array:
        """Return mean(a) s q_N for negatives, where q_N is their softmax, and -a_p (dx_p/dS) / n_P for positives."""
        x, slope = self.positive_logit(block.S)
        f = inverse(r["n_positive"])
        push = share(self.scale * block.S, block.N, r["negative"]) * (self.scale * (f * r["slope"]))[:, None]
        return push - block.P * sigmoid(r["negative"][:, None] - x) * slope * f[:, None]


@LOSSES.register("nt-xent", "info-nce")
@LOSSES.register("n-pair", temperature=1.0)
@dataclass(frozen=True)
class NTXent(TupletLoss):
    r"""Normalised temperature-scaled cross entropy, or InfoNCE: each positive against all negatives.

    L_i = (1/n_P) sum_P -log(exp(S_p / t) / (exp(S_p / t) + sum_N exp(S_n / t))); 0 without a positive or a negative.
    With one positive per anchor it is MoCo's loss; with t = 1 it is the N-pair loss, ``"n-pair"``.

    Parameters
    ----------
    temperature : float
        t, above 0. A lower temperature gives more weight to the most similar negatives.

    Raises
    ------
    TypeError, ValueError
        If the temperature is not a finite number above 0.

    Examples
    --------
    >>> import numpy as np, xbm
    >>> anchors = np.asarray([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]])
    >>> objective = xbm.Objective(loss=xbm.NTXent(temperature=0.5), warmup=0)
    >>> result = objective.evaluate(objective.init(capacity=8, dim=2), anchors, np.asarray([0, 0, 1]))
    >>> round(float(result.loss), 4)
    0.3921

    References
    ----------
    van den Oord, Li, Vinyals, "Representation Learning with Contrastive Predictive Coding", arXiv 1807.03748;
    Chen et al., "A Simple Framework for Contrastive Learning of Visual Representations", ICML 2020, arXiv
    2002.05709; Sohn, "Improved Deep Metric Learning with Multi-class N-pair Loss Objective", NIPS 2016.
    The default temperature is from He et al., "Momentum Contrast", CVPR 2020, arXiv 1911.05722.
    """

    temperature: float = option(0.07, checks.positive)

    @property
    def scale(self) -> float:
        """1 / t."""
        return 1 / self.temperature

    def positive_logit(self, S: Array) -> tuple[Array, float]:
        """Return S / t and 1 / t."""
        return self.scale * S, self.scale


@LOSSES.register("tuplet-margin")
@dataclass(frozen=True)
class TupletMargin(TupletLoss):
    r"""Tuplet margin loss: each positive, with its angle reduced by a slack, against all negatives.

    L_i = (1/n_P) sum_P log(1 + sum_N exp(s (S_n - cos(theta_p - beta)))), with S_p = cos(theta_p).

    Parameters
    ----------
    margin : float
        beta, slack in degrees, subtracted from the angle of a positive; closer positives get less weight.
    scale : float
        s, above 0. A larger scale gives more weight to the most similar negatives.

    Raises
    ------
    TypeError, ValueError
        If a parameter is not a finite number, or the scale is not above 0.

    Examples
    --------
    >>> import numpy as np, xbm
    >>> anchors = np.asarray([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]])
    >>> objective = xbm.Objective(loss=xbm.TupletMargin(), warmup=0)
    >>> result = objective.evaluate(objective.init(capacity=8, dim=2), anchors, np.asarray([0, 0, 1]))
    >>> round(float(result.loss), 4)  # mostly the second anchor, which is closer to the other class
    2.6268

    References
    ----------
    Yu, Tao, "Deep Metric Learning with Tuplet Margin Loss", ICCV 2019.
    """

    margin: float = option(5.73, number())
    scale: float = option(64.0, checks.positive)
    needs_cosines = True

    def positive_logit(self, S: Array) -> tuple[Array, Array]:
        """Return s cos(theta - beta) and its derivative s sin(theta - beta) / sin(theta), kept finite at theta = 0."""
        xp = array_namespace(S)
        beta = radians(self.margin)
        squared = 1.0 - S * S
        sine = xp.sqrt(xp.clip(squared, min=1e-6))
        slope = cos(beta) - sin(beta) * xp.where(squared > 1e-6, S / sine, 0.0)
        return self.scale * (cos(beta) * S + sin(beta) * sine), self.scale * slope
