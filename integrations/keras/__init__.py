"""Cross-Batch Memory for Keras 3: a callback for `fit`, a layer for steps of one's own, a loss for `compile`."""

from xbm.integrations.keras.callback import XBMCallback
from xbm.integrations.keras.layer import XBM
from xbm.integrations.keras.losses import InBatchLoss

__all__ = ["XBM", "InBatchLoss", "XBMCallback"]
