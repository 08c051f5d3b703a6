"""Drift compensation: a memory that moves with the network.

Rows go stale because the network moves, and most of that motion is common to all rows. So the motion of a few rows
predicts the motion of the rest:

- `Compensation.follow` shifts the memory after the mean of each batch's rows: no forward pass, no ids.
- `Compensation.move` fits an affine map to pairs of old and fresh rows of the same samples, such as a few rows embedded
  again every few calls or the samples that return with a batch, and moves every row by it.

Both are validated on held-out pairs: a shift is made only while such shifts bring the memory nearer to the *next*
batch, and a map only if it brings pairs nearer to their fresh rows when it is fitted to the other pairs.
"""

from xbm.compensation.compensation import Compensation
from xbm.compensation.motion import Motion, still
from xbm.compensation.rounds import Probes, Rounds

__all__ = ["Compensation", "Motion", "Probes", "Rounds", "still"]
