"""Cross-Batch Memory: the embeddings of past iterations as extra positives and hard negatives.

The core is backend-neutral and returns losses with closed-form gradients; `xbm.integrations` has an adapter for
each framework. Importing `xbm` imports no framework.
"""

from xbm import drift
from xbm.integers import as_integers
from xbm.losses import (
    BatchHardTriplet,
    Block,
    Contrastive,
    MultiSimilarity,
    PairLoss,
    RowLoss,
    Side,
    SidedPairLoss,
    SupCon,
)
from xbm.memory import MemoryState, Rows, advance, clear, enqueue, init, resize, rows
from xbm.mining import Miner, MultiSimilarityMiner
from xbm.objective import REPORT, Objective, Step
from xbm.reductions import LogSumExp, Sum, TopK

__version__ = "0.1.0"

__all__ = [
    "REPORT",
    "BatchHardTriplet",
    "Block",
    "Contrastive",
    "LogSumExp",
    "MemoryState",
    "Miner",
    "MultiSimilarity",
    "MultiSimilarityMiner",
    "Objective",
    "PairLoss",
    "RowLoss",
    "Rows",
    "Side",
    "SidedPairLoss",
    "Step",
    "Sum",
    "SupCon",
    "TopK",
    "advance",
    "as_integers",
    "clear",
    "drift",
    "enqueue",
    "init",
    "resize",
    "rows",
]
