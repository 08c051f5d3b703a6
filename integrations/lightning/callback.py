"""The callback: logs the figures of a module's memories, and keeps them right under DDP and in checkpoints."""

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
    """Logs what the memories of a `LightningModule` do, and sees to them under DDP and in checkpoints.

    The module makes one or more `XBM` in its `__init__`, or sharded ones in `configure_model`, and calls them in
    `training_step`. Every so many batches the callback logs the figures of `xbm.report` as "xbm/fill",
    "xbm/memory_loss", ..., or, of a module with several memories, as "xbm/<attribute>/fill", ...; figures that are NaN
    are left out. DDP is told to leave the memories alone, instead of sending them from rank 0 to all others at every
    step. In the Trainer's checkpoint a sharded memory is whole, so that it loads on any number of ranks.

    Parameters
    ----------
    every : int, optional
        Training batches from one reading to the next, at least 1; the device waits at a reading. The Trainer's
        `log_every_n_steps` if left out.
    prefix : str
        What the names of the figures begin with.

    Raises
    ------
    TypeError, ValueError
        If `every` is not a whole number of at least 1; in `fit`, if the module has no `XBM`, or if Lightning's
        `WeightAveraging` is to average it.

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
        """Tell DDP, before it wraps the module, what to leave alone."""
        others = getattr(pl_module, "_ddp_params_and_buffers_to_ignore", ())
        if not isinstance(others, _Buffers):
            buffers = _Buffers(pl_module, tuple(others))
            DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(pl_module, buffers)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse to fit what has no memory, or would lose it."""
        if not _memories(pl_module):
            raise ValueError(
                f"XBMCallback found no XBM in {type(pl_module).__name__}: make one in its __init__ or configure_model, "
                f"as in self.xbm = XBM(dim=128, capacity=8192)"
            )
        if any(isinstance(one, WeightAveraging) for one in trainer.callbacks):  # type: ignore[attr-defined, unused-ignore]
            raise ValueError(
                "WeightAveraging swaps all buffers of the module with those of its average, which has no memory: "
                "average the encoder alone, by torch.optim.swa_utils.AveragedModel"
            )

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log the figures of every so many training batches."""
        every = self.every or trainer.log_every_n_steps  # type: ignore[attr-defined, unused-ignore]
        if every and (trainer.fit_loop.total_batch_idx + 1) % every == 0:
            pl_module.log_dict(self._figures(pl_module), on_step=True, on_epoch=False)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Put the parts of sharded memories together, in which all ranks take part."""
        state, prefixes = checkpoint["state_dict"], tuple(f"{name}." for name in _memories(pl_module))
        for key, value in state.items():
            if key.startswith(prefixes) and isinstance(value, DTensor):
                state[key] = value.full_tensor()

    def _figures(self, pl_module: LightningModule) -> dict[str, float]:
        """Return the figures that are numbers, by the names they are logged as."""
        memories = _memories(pl_module)
        return {
            "/".join([self.prefix, name, figure] if len(memories) > 1 else [self.prefix, figure]): value
            for name, memory in memories.items()
            for figure, value in memory.report.items()
            if not math.isnan(value)
        }


class _Buffers:
    """Names of the memories' buffers, and of what else DDP leaves alone, looked up when it asks: as it wraps."""

    def __init__(self, pl_module: LightningModule, others: tuple[str, ...]) -> None:
        self.pl_module, self.others = pl_module, others

    def __iter__(self) -> Iterator[str]:
        yield from self.others
        for name, memory in _memories(self.pl_module).items():
            yield from (f"{name}.{buffer}" for buffer, _ in memory.named_buffers(recurse=False))


def _memories(pl_module: LightningModule) -> dict[str, XBM]:
    return {name: module for name, module in pl_module.named_modules() if isinstance(module, XBM)}
