"""Cross-Batch Memory in Lightning: a callback for modules that hold an `XBM`."""

from xbm.integrations.lightning.callback import XBMCallback

__all__ = ["XBMCallback"]
