"""Miners: which pairs of a row count, each in a file of its own."""

from xbm.mining.base import MINERS, Miner, MinerLike, each, get
from xbm.mining.distance_weighted import DistanceWeightedMiner
from xbm.mining.margin import MarginMiner
from xbm.mining.mined import Mined, MinedRows, mined
from xbm.mining.multi_similarity import MultiSimilarityMiner
from xbm.mining.semi_hard import SemiHardMiner
from xbm.mining.top import EasyPositiveMiner, HardNegativeMiner, TopMiner
from xbm.registry import import_all

__all__ = [
    "MINERS",
    "DistanceWeightedMiner",
    "EasyPositiveMiner",
    "HardNegativeMiner",
    "MarginMiner",
    "Mined",
    "MinedRows",
    "Miner",
    "MinerLike",
    "MultiSimilarityMiner",
    "SemiHardMiner",
    "TopMiner",
    "each",
    "get",
    "mined",
]

import_all(__name__, __path__)  # a file beside these registers its miners by being there
