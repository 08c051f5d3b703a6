"""pytorch-metric-learning's losses and miners in the place of ours: only their distances are computed otherwise.

Nothing of it is imported before one of its objects is handed in.
"""

from typing import Any

__all__ = ["adapted"]


def adapted(loss: Any, miner: Any, *, dim: int) -> tuple[Any, Any]:
    """Return the loss and the miner of an `xbm.Objective`: theirs made ours, all others as they are.

    Parameters
    ----------
    loss, miner : object
        What `Objective` takes, or one of theirs. A loss and a miner that are both theirs become one loss, which gets
        the very pairs or triplets that the miner returns.
    dim : int
        D, the embeddings' size.

    Raises
    ------
    TypeError
        If one of theirs is no loss, or no miner, or needs more than the distances of pairs.

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
