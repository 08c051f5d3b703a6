"""Lightning: the Trainer fits, validates, saves and resumes a module with a memory."""

import copy
import math
import os
from unittest import mock

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import EMAWeightAveraging
from lightning.pytorch.loggers import Logger
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from tests.processes import pool
from xbm.integrations.lightning import XBMCallback
from xbm.integrations.torch import XBM

SAMPLES, BATCH = 48, 8
BATCHES = SAMPLES // BATCH


class Embedder(pl.LightningModule):
    """A module with an encoder and a memory."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.encoder = torch.nn.Linear(6, 4)
        self.xbm = XBM(4, 20, warmup=2)
        self.losses = []

    def training_step(self, batch, batch_idx):
        x, labels, ids = batch
        loss = self.xbm(self.encoder(x), labels, ids=ids)
        self.losses.append(loss.detach().item())
        return loss

    def validation_step(self, batch, batch_idx):
        x, labels, ids = batch
        self.log("val_loss", self.xbm(self.encoder(x), labels, ids=ids))

    test_step = validation_step

    def predict_step(self, batch, batch_idx):
        x, labels, ids = batch
        return self.xbm(self.encoder(x), labels, ids=ids)

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.02)


class Concatenated(DistributedSampler):
    """Batch sampler that concatenates, for each batch, the parts of several ranks' samplers."""

    def __init__(self, data, ranks):
        super().__init__(data, num_replicas=1, rank=0)
        self.ranks = ranks

    def __iter__(self):
        order = torch.tensor(list(super().__iter__()))
        return iter(order.view(-1, BATCH // self.ranks, self.ranks).mT.flatten().tolist())


class Sharded(Embedder):
    """The same with a memory that is sharded if there are several ranks."""

    def __init__(self):
        super().__init__()
        self.xbm = None

    def configure_model(self):
        if self.xbm is None:
            self.xbm = XBM(4, 20, warmup=2, shard=True)


def samples(ranks=1):
    """Return a loader with a new order per epoch: one rank's part, or the concatenation of several ranks' parts."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.arange(SAMPLES)
    data = TensorDataset(torch.randn(SAMPLES, 6, generator=generator), ids % 5, ids)
    if dist.is_initialized():
        return DataLoader(data, BATCH // dist.get_world_size(), sampler=DistributedSampler(data))
    return DataLoader(data, BATCH, sampler=Concatenated(data, ranks))


def trainer(folder, *callbacks, epochs=2, logger=False, **options):
    """Return a quiet Trainer on the CPU."""
    options = {"accelerator": "cpu", "devices": 1, "log_every_n_steps": 1, "num_sanity_val_steps": 1, **options}
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    return pl.Trainer(
        max_epochs=epochs, logger=logger, callbacks=list(callbacks), default_root_dir=folder, **options, **quiet
    )


def fit(module, folder, *callbacks, ckpt_path=None, ranks=1, **options):
    """Train and validate a module; return the Trainer."""
    fitted = trainer(folder, *callbacks, **options)
    fitted.fit(module, samples(ranks), samples(), ckpt_path=ckpt_path)
    return fitted


class Lines(Logger):
    """A logger that records the values by step."""

    name, version = "lines", 0

    def __init__(self):
        super().__init__()
        self.given = {}

    def log_hyperparams(self, *args, **kwargs):
        pass

    def log_metrics(self, metrics, step=None):
        figures = {name: value for name, value in metrics.items() if name.startswith("memory/")}
        if figures:
            self.given[step] = figures


class Reports(pl.Callback):
    """The figures after each step."""

    def __init__(self):
        self.found = []

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.found.append({name: dict(one.report) for name, one in pl_module.named_modules() if isinstance(one, XBM)})


@pytest.mark.parametrize("every", [None, 3])
def test_figures_are_those_of_the_report(every, tmp_path):
    lines, reports = Lines(), Reports()
    options = {"logger": lines, "log_every_n_steps": 2 if every is None else 1}
    fit(Embedder(), tmp_path, XBMCallback(every=every, prefix="memory"), reports, **options)
    read = every or 2
    for step, given in lines.given.items():
        report = reports.found[step - (step + 1) % read]["xbm"]
        numbers = {f"memory/{name}": value for name, value in report.items() if not math.isnan(value)}
        assert numbers.items() <= given.items()  # the log also has the last drift that was a number
        assert not any(math.isnan(value) for value in given.values())
    assert set(range(read - 1, 2 * BATCHES, read)) <= set(lines.given)
    assert "memory/drift" not in lines.given[read - 1]
    assert "memory/drift" in lines.given[2 * BATCHES - 1]


def test_each_of_several_memories_has_its_figures(tmp_path):
    class TwoMemories(Embedder):
        def __init__(self):
            super().__init__()
            self.heads = torch.nn.ModuleDict({"coarse": XBM(4, 10, warmup=0)})

        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) + self.heads["coarse"](self.encoder(batch[0]), batch[1] % 2)

    lines, module = Lines(), TwoMemories()
    fit(module, tmp_path, XBMCallback(prefix="memory"), logger=lines, epochs=1)
    given = lines.given[BATCHES - 1]
    assert given["memory/xbm/pairs"] == module.xbm.report["pairs"]
    assert given["memory/heads.coarse/pairs"] == module.heads["coarse"].report["pairs"]


class Untouched(pl.Callback):
    """Checks that an evaluation does not change the module's buffers."""

    def __init__(self):
        self.seen = []

    def on_validation_start(self, trainer, pl_module):
        self.before = copy.deepcopy(dict(pl_module.xbm.state_dict()))

    def on_validation_end(self, trainer, pl_module):
        for name, value in pl_module.xbm.state_dict().items():
            assert torch.equal(value, self.before[name]), name
        self.seen.append((trainer.state.stage, int(pl_module.xbm.count) > 0))

    on_test_start = on_predict_start = on_validation_start
    on_test_end = on_predict_end = on_validation_end


def test_evaluation_changes_no_bit(tmp_path):
    module, untouched = Embedder(), Untouched()
    runs = fit(module, tmp_path, XBMCallback(), untouched, val_check_interval=2)
    for run in (runs.validate, runs.test, runs.predict):
        run(module, samples())
    stages = [str(stage.value) for stage, _ in untouched.seen]
    assert stages == ["sanity_check", *["validate"] * 7, "test", "predict"]
    assert [filled for _, filled in untouched.seen] == [False] + [True] * 9
    assert int(module.xbm.step) == len(module.losses) == 2 * BATCHES


def test_resume_is_exact(tmp_path):
    whole, first, second = Embedder(), Embedder(), Embedder()
    fit(whole, tmp_path, XBMCallback(), epochs=4)
    fit(first, tmp_path, XBMCallback()).save_checkpoint(tmp_path / "half.ckpt")
    fit(second, tmp_path, XBMCallback(), epochs=4, ckpt_path=tmp_path / "half.ckpt")
    assert first.losses + second.losses == whole.losses
    for one, other in zip(second.xbm.rows(), whole.xbm.rows(), strict=True):
        assert torch.equal(one, other)


def fit_on_rank(folder, kind):
    """Run, stop and resume; return the losses and the whole final memory."""
    with mock.patch.object(
        dist, "is_initialized", return_value=False
    ):  # modules are created before the Trainer starts the process group
        first, second = kind(), kind()
    with mock.patch.dict(os.environ, {"LOCAL_RANK": str(dist.get_rank())}):  # as a launcher would set it
        ddp = {"devices": dist.get_world_size(), "strategy": "ddp"}
        fit(first, folder, XBMCallback(), **ddp).save_checkpoint(folder / "half.ckpt")
        fit(second, folder, XBMCallback(), epochs=4, ckpt_path=folder / "half.ckpt", **ddp)
    state = second.xbm.state_dict()
    whole = {name: value.full_tensor() if hasattr(value, "full_tensor") else value for name, value in state.items()}
    return first.losses + second.losses, whole


@pytest.fixture(scope="module")
def ranks():
    with pool(2) as started:
        yield started


@pytest.mark.parametrize("kind", [Embedder, Sharded])
def test_two_processes_are_one(kind, ranks, tmp_path):
    alone, last = Embedder(), Embedder()
    fit(alone, tmp_path, XBMCallback(), epochs=4, ranks=2)
    first, second = ranks.run(fit_on_rank, tmp_path, kind)
    assert first[0] == second[0] == pytest.approx(alone.losses, rel=1e-4)
    for name, value in alone.xbm.state_dict().items():
        assert torch.equal(first[1][name], second[1][name]), name
        torch.testing.assert_close(first[1][name], value)
    fit(last, tmp_path, XBMCallback(), epochs=4, ranks=2, ckpt_path=tmp_path / "half.ckpt")
    assert last.losses == pytest.approx(alone.losses[2 * BATCHES :], rel=1e-4)


def test_a_module_without_memory_is_refused(tmp_path):
    module = Embedder()
    module.xbm = torch.nn.Identity()
    with pytest.raises(ValueError, match="no XBM in Embedder"):
        fit(module, tmp_path, XBMCallback())


def test_an_average_of_the_whole_module_is_refused(tmp_path):
    with pytest.raises(ValueError, match="average the encoder alone"):
        fit(Embedder(), tmp_path, XBMCallback(), EMAWeightAveraging())


@pytest.mark.parametrize("every", [0, 2.5])
def test_an_interval_that_is_none_is_refused(every):
    with pytest.raises((TypeError, ValueError), match="every must be"):
        XBMCallback(every=every)
