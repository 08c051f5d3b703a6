"""Cross-Batch Memory: the embeddings of past iterations as extra positives and hard negatives.

The core is backend-neutral and returns losses with closed-form gradients; `xbm.integrations` has an adapter for
each framework. Importing `xbm` imports no framework.
"""

from xbm import compensation, drift
from xbm.compensation import Compensation, Motion
from xbm.integers import as_integers
from xbm.losses import (
    NCA,
    BatchHardTriplet,
    BinomialDeviance,
    Block,
    Circle,
    Contrastive,
    LiftedStructure,
    Margin,
    MultiSimilarity,
    NTXent,
    PairLoss,
    RecallAtK,
    RowLoss,
    SemiHardTriplet,
    Side,
    SidedPairLoss,
    SmoothAP,
    SupCon,
    Triplet,
    TupletMargin,
)
from xbm.memory import advance, clear, enqueue, init, resize, rows
from xbm.memory_state import MemoryState, Rows
from xbm.mining import (
    DistanceWeightedMiner,
    EasyPositiveMiner,
    HardNegativeMiner,
    MarginMiner,
    Miner,
    MultiSimilarityMiner,
    SemiHardMiner,
)
from xbm.objective import Objective
from xbm.reductions import LogSumExp, Sum, TopK
from xbm.relation import LogQ
from xbm.report import Report
from xbm.schedule import WarmUp
from xbm.state import State
from xbm.step import Step

__version__ = "0.1.0"

REPORT = Report._fields
"""Names of a call's figures, in the order of `Report`."""

__all__ = [
    "NCA",
    "REPORT",
    "BatchHardTriplet",
    "BinomialDeviance",
    "Block",
    "Circle",
    "Compensation",
    "Contrastive",
    "DistanceWeightedMiner",
    "EasyPositiveMiner",
    "HardNegativeMiner",
    "LiftedStructure",
    "LogQ",
    "LogSumExp",
    "Margin",
    "MarginMiner",
    "MemoryState",
    "Miner",
    "Motion",
    "MultiSimilarity",
    "MultiSimilarityMiner",
    "NTXent",
    "Objective",
    "PairLoss",
    "RecallAtK",
    "Report",
    "RowLoss",
    "Rows",
    "SemiHardMiner",
    "SemiHardTriplet",
    "Side",
    "SidedPairLoss",
    "SmoothAP",
    "State",
    "Step",
    "Sum",
    "SupCon",
    "TopK",
    "Triplet",
    "TupletMargin",
    "WarmUp",
    "advance",
    "as_integers",
    "clear",
    "compensation",
    "drift",
    "enqueue",
    "init",
    "resize",
    "rows",
]
