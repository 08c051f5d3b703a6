"""Copies of a module, weight averaging, export and activation checkpointing neither carry nor disturb the memory."""

import copy
import io

import pytest
import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint

from tests.integrations.test_torch import numbers, snapshot
from xbm.integrations.torch import XBM
from xbm.memory_state import MemoryState


class Model(torch.nn.Module):
    """An encoder that contains its XBM, as in Lightning modules."""

    def __init__(self):
        super().__init__()
        self.encoder = torch.nn.Linear(4, 3)
        self.xbm = XBM(3, 1000, warmup=1)

    def forward(self, x, labels):
        return self.xbm(self.encoder(x), labels)


def trained(model, calls=4):
    for x, labels, _ in numbers(0, calls):
        model(x.requires_grad_(), labels).backward()
    return model


def test_a_deep_copy_leaves_the_rows_behind():
    module = trained(XBM(4, 8, weight=0.5, warmup=2, dtype=torch.bfloat16))
    before = snapshot(module)
    twin = copy.deepcopy(module)
    assert all(getattr(twin, name).is_meta for name in MemoryState._fields)
    assert repr(twin) == repr(module)
    fresh = XBM(4, 8, weight=0.5, warmup=2, dtype=torch.bfloat16)
    for x, labels, ids in numbers(1, 5):
        assert torch.equal(twin(x, labels, ids=ids), fresh(x, labels, ids=ids))
    assert int(twin.step) == 5
    for name, buffer in module.named_buffers():
        assert torch.equal(torch.nan_to_num(buffer), torch.nan_to_num(before[name])), name


@pytest.mark.parametrize("use", ["rows", "clear", "fill", "load"])
def test_a_copys_memory_begins_with_its_first_use(use):
    twin = copy.deepcopy(trained(XBM(4, 8, warmup=0)))
    x, labels, _ = next(numbers(2, 1))
    if use == "load":
        source = trained(XBM(4, 8, warmup=0))
        twin.load_state_dict(source.state_dict())
        assert torch.equal(twin.embeddings, source.embeddings)
        return
    {
        "rows": lambda: twin.rows(),
        "clear": lambda: twin.clear(),
        "fill": lambda: twin.fill(lambda x: x, [(x, labels)]),
    }[use]()
    assert len(twin.rows().labels) == (len(x) if use == "fill" else 0)
    assert int(twin.step) == 0


def test_an_average_of_weights_carries_no_memory():
    model = Model()
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for x, labels, _ in numbers(0, 4):
        model(x, labels).backward()
        optimizer.step()
        average.update_parameters(model)
    assert int(model.xbm.count) == 24
    assert all(getattr(average.module.xbm, name).is_meta for name in MemoryState._fields)
    assert not torch.equal(average.module.encoder.weight, model.encoder.weight)
    saved = average.state_dict()
    assert not [name for name in saved if name.endswith(MemoryState._fields)]
    AveragedModel(model).load_state_dict(saved)
    average.to(torch.float64)
    assert average.module.encoder.weight.dtype == torch.float64


def test_a_copy_with_a_memory_again_is_saved_and_loaded_whole():
    twin = trained(copy.deepcopy(XBM(4, 8)))
    other = XBM(4, 8)
    other.load_state_dict(twin.state_dict())
    assert torch.equal(other.embeddings, twin.embeddings)


def test_pickling_keeps_the_rows():
    """Unlike a deep copy, a module sent to another process keeps its memory."""
    module = trained(XBM(4, 8))
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    again = torch.load(file, weights_only=False)
    assert torch.equal(again.embeddings, module.embeddings)


def test_an_exported_encoder_holds_no_memory():
    model = trained(Model())
    exported = torch.export.export(model.encoder, (torch.randn(2, 4),))
    assert {name.split(".")[0] for name in exported.state_dict} == {"weight", "bias"}


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpointed_encoder_trains_as_any_other(reentrant):
    """Activation checkpointing runs the encoder twice, and the XBM outside once."""
    encoder, losses = torch.nn.Linear(4, 3), {}
    for how in ("plain", "checkpointed"):
        module, losses[how] = XBM(3, 40, warmup=1), []
        for x, labels, _ in numbers(0, 4):
            x.requires_grad_()
            z = encoder(x) if how == "plain" else checkpoint(encoder, x, use_reentrant=reentrant)
            loss = module(z, labels)
            loss.backward()
            losses[how].append((loss.item(), x.grad.tolist()))
        assert int(module.step) == 4
    assert losses["plain"] == losses["checkpointed"]


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpointed_xbm_is_refused(reentrant):
    model = Model()
    x, labels, _ = next(numbers(0, 1))
    loss = checkpoint(model, x.requires_grad_(), labels, use_reentrant=reentrant)
    with pytest.raises(RuntimeError, match="Checkpoint the encoder"):
        loss.backward()
    assert int(model.xbm.step) == 1


def test_evaluating_a_copy_allocates_nothing_and_disturbs_no_training_after_it():
    """As in Lightning's sanity check: in inference mode, before the first training step."""
    twin, fresh = copy.deepcopy(trained(XBM(4, 8, warmup=0))), XBM(4, 8, warmup=0)
    x, labels, _ = next(numbers(2, 1))
    twin.eval()
    fresh.eval()
    with torch.inference_mode():
        assert torch.equal(twin(x, labels), fresh(x, labels))
    assert twin.embeddings.is_meta
    assert twin.report["fill"] != twin.report["fill"]
    twin.train()
    fresh.train()
    with torch.inference_mode():
        assert torch.equal(twin(x, labels), fresh(x, labels))
    assert torch.equal(twin(x, labels), fresh(x, labels))


@pytest.mark.parametrize("make", [lambda: XBM(4, 8, device="meta"), lambda: copy.deepcopy(trained(XBM(4, 8)))])
def test_a_memory_made_from_nothing_is_empty(make):
    module = make().to_empty(device="cpu")
    assert [int(getattr(module, name)) for name in ("cursor", "count", "step", "skipped")] == [0, 0, 0, 0]
    trained(module)
    assert module.report["fill"] == 1.0


def test_a_module_built_without_space_begins_where_it_is_called():
    module = trained(XBM(4, 8, device="meta"))
    assert int(module.step) == 4
    assert module.report["fill"] == 1.0
