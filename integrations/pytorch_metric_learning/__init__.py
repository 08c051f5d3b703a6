"""Adapters for the losses and miners of pytorch-metric-learning. They get distances computed from our similarities.

pytorch-metric-learning is imported only when one of its objects is passed. In this package, "their" refers to
pytorch-metric-learning.
"""

from typing import Any

__all__ = ["adapted"]


def adapted(loss: Any, miner: Any, *, dim: int) -> tuple[Any, Any]:
    """Return a loss and a miner for `xbm.Objective`; adapt those of pytorch-metric-learning, pass others unchanged.

    Parameters
    ----------
    loss, miner : object
        Anything `Objective` accepts, or a loss or miner of pytorch-metric-learning. If both are from there, they become
        one loss, which gets exactly the pairs or triplets that the miner returns.
    dim : int
        D, the embedding dimension.

    Raises
    ------
    TypeError
        If an object of pytorch-metric-learning is not a loss or not a miner, or needs more than distances of pairs.

    Examples
    --------
    >>> from xbm.integrations.torch import XBM
    >>> from pytorch_metric_learning import losses, miners
    >>> module = XBM(dim=8, capacity=64, loss=losses.CircleLoss(), miner=miners.MultiSimilarityMiner())
    """
    if _is_theirs(miner):
        from xbm.integrations.pytorch_metric_learning.miner import TheirMiner

        miner = TheirMiner(miner, dim=dim)
    if not _is_theirs(loss):
        return loss, miner
    from xbm.integrations.pytorch_metric_learning.loss import joined

    return joined(loss, miner, dim=dim)


def _is_theirs(one: Any) -> bool:
    return any(kind.__module__.split(".")[0] == "pytorch_metric_learning" for kind in type(one).__mro__)
