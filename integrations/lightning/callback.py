"""A callback that logs the figures of a module's memories and handles them under DDP and in checkpoints."""

import math
from collections.abc import Iterator
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from xbm import checks
from xbm.integrations.torch import XBM


class XBMCallback(Callback):
    """Logs the figures of a `LightningModule`'s memories and handles them under DDP and in checkpoints.

    The module creates one or more `XBM` in its `__init__`, or in `configure_model` if sharded, and calls them in
    `training_step`. Every `every` batches, the callback logs the figures of `xbm.report` as "xbm/fill",
    "xbm/memory_loss", .... With several memories, the names are "xbm/<attribute>/fill", .... Figures that are NaN are
    not logged. The callback excludes the memories' buffers from DDP, which would broadcast them from rank 0 at every
    step. The Trainer's checkpoint contains sharded memories as whole tensors, so it loads on any number of ranks.

    Parameters
    ----------
    every : int, optional
        Training batches between two logs, at least 1. Logging synchronises with the device. The default is the
        Trainer's `log_every_n_steps`.
    prefix : str
        Prefix of the names of the figures.

    Raises
    ------
    TypeError, ValueError
        If `every` is not an int of at least 1; in `fit`, if the module has no `XBM`, or if Lightning's
        `WeightAveraging` is used.

    Examples
    --------
    >>> from lightning.pytorch import Trainer
    >>> from xbm.integrations.lightning import XBMCallback
    >>> trainer = Trainer(accelerator="cpu", logger=False, callbacks=[XBMCallback(every=100)])
    """

    def __init__(self, *, every: int | None = None, prefix: str = "xbm") -> None:
        if every is not None:
            checks.whole_number("every", every, at_least=1)
        self.every, self.prefix = every, prefix

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Exclude the memories' buffers from DDP, before it wraps the module."""
        others = getattr(pl_module, "_ddp_params_and_buffers_to_ignore", ())
        if not isinstance(others, _Buffers):
            buffers = _Buffers(pl_module, tuple(others))
            DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(pl_module, buffers)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Raise an error if the module has no memory, or if weight averaging would overwrite it."""
        if not _memories(pl_module):
            raise ValueError(
                f"XBMCallback found no XBM in {type(pl_module).__name__}: create one in __init__ or configure_model, "
                f"such as self.xbm = XBM(dim=128, capacity=8192)"
            )
        if any(isinstance(one, WeightAveraging) for one in trainer.callbacks):  # type: ignore[attr-defined, unused-ignore]
            raise ValueError(
                "WeightAveraging replaces all buffers of the module, including the memory, by those of its average, "
                "whose memory is empty: average the encoder alone, with torch.optim.swa_utils.AveragedModel"
            )

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log the figures every `every` training batches."""
        every = self.every or trainer.log_every_n_steps  # type: ignore[attr-defined, unused-ignore]
        if every and (trainer.fit_loop.total_batch_idx + 1) % every == 0:
            pl_module.log_dict(self._figures(pl_module), on_step=True, on_epoch=False)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Gather sharded memories into whole tensors. This is a collective operation of all ranks."""
        state, prefixes = checkpoint["state_dict"], tuple(f"{name}." for name in _memories(pl_module))
        for key, value in state.items():
            if key.startswith(prefixes) and isinstance(value, DTensor):
                state[key] = value.full_tensor()

    def _figures(self, pl_module: LightningModule) -> dict[str, float]:
        """Return the figures that are not NaN, by their log names."""
        memories = _memories(pl_module)
        return {
            "/".join([self.prefix, name, figure] if len(memories) > 1 else [self.prefix, figure]): value
            for name, memory in memories.items()
            for figure, value in memory.report.items()
            if not math.isnan(value)
        }


class _Buffers:
    """Names that DDP must ignore: the memories' buffers and `others`. Evaluated lazily, when DDP wraps the module."""

    def __init__(self, pl_module: LightningModule, others: tuple[str, ...]) -> None:
        self.pl_module, self.others = pl_module, others

    def __iter__(self) -> Iterator[str]:
        yield from self.others
        for name, memory in _memories(self.pl_module).items():
            yield from (f"{name}.{buffer}" for buffer, _ in memory.named_buffers(recurse=False))


def _memories(pl_module: LightningModule) -> dict[str, XBM]:
    return {name: module for name, module in pl_module.named_modules() if isinstance(module, XBM)}
