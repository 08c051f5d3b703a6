"""How the rows of a batch are stored: normalised or not, beside or in place of older copies, finite or not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypedDict

from xbm import checks, memory, placing
from xbm.backends import Array
from xbm.batch import Batch
from xbm.memory_state import MemoryState
from xbm.options import Options, choice, option
from xbm.ranks import Ranks


@dataclass(frozen=True, kw_only=True)
class Storage(Options):
    """How the rows of a batch are compared and stored."""

    normalize: bool = option(
        True,
        checks.flag,
        """Compare and store x / max(|x|, 1e-6), so that similarities are cosines in [-1, 1]; else x itself.""",
    )
    copies: Literal["exclude", "keep", "replace"] = option(
        "exclude",
        choice("exclude", "keep", "replace"),
        """Treatment of older rows of an anchor's own sample, with ids: excluded from its pairs; kept; or replaced by
        the new row, so that the memory holds one row per sample (see `xbm.enqueue`).""",
    )
    on_nonfinite: Literal["skip", "raise"] = option(
        "skip",
        choice("skip", "raise"),
        """Treatment of rows with NaN or infinity: not stored, but counted in the report; or an error, which
        synchronises the device and cannot be compiled.""",
    )

    def placed(self, state: MemoryState, batch: Batch, ranks: Ranks) -> tuple[Array, Array, placing.Placement]:
        """Return the rows of a batch to store, the rows left out as not finite, and the places of the rows."""
        keep, bad = memory.storable(state, batch.stored, mask=batch.enqueue, on_nonfinite=self.on_nonfinite)
        replaced = batch.ids if self.copies == "replace" else None
        return keep, bad, placing.place(state, keep, replace=replaced, shard=ranks.shard, spread=ranks.keys)


class StorageOptions(TypedDict, total=False):
    """The options of a `Storage`, for type checkers."""

    normalize: bool
    copies: Literal["exclude", "keep", "replace"]
    on_nonfinite: Literal["skip", "raise"]
