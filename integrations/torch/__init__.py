"""Cross-Batch Memory for PyTorch: `XBM`, an `nn.Module`."""

from xbm.integrations.torch.module import XBM

__all__ = ["XBM"]
