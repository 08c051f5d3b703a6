"""The PyTorch module: agreement with the core, and the expected behaviour of an nn.Module."""

import subprocess
import sys
from dataclasses import replace

import array_api_compat.torch as xp
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import xbm as core
from tests.pair_losses import LOSSES
from tests.strategies import capacities, histories, named
from xbm import metrics
from xbm.integrations.torch import XBM
from xbm.memory_state import MemoryState
from xbm.state import named as arrays

OPTIONS = [
    {},
    {"reduction": "sum", "weight": 0.3},
    {"in_batch": False, "copies": "keep"},
    {"normalize": False},
    {"dtype": torch.float64},
    {"dtype": torch.bfloat16},
    {"loss": "supcon"},
    {"loss": "batch-hard-triplet"},
    {"loss": "multi-similarity", "miner": "multi-similarity"},
    {"match": lambda a, b: (a[:, None] - b[None, :]).abs() <= 1, "ignore_label": 2},
    {"pair_weights": lambda a, b: (1.0 + b % 2)[None, :]},
]


def tensors(batch):
    """Return a drawn batch as the module's arguments."""
    given_ones = {"ids": batch.ids, "enqueue": batch.mask}
    keywords = {name: torch.tensor(value) for name, value in given_ones.items() if value is not None}
    return (torch.tensor(batch.x, requires_grad=True), torch.tensor(batch.labels)), keywords


def snapshot(module):
    """Return a copy of the module's state."""
    return {name: buffer.clone() for name, buffer in module.named_buffers()}


def assert_equal(module, before):
    """Assert that the module's state is bit-identical."""
    for name, buffer in module.named_buffers():
        assert torch.equal(torch.nan_to_num(buffer), torch.nan_to_num(before[name])), name


def numbers(seed, calls, size=6, dim=4, dtype=torch.float32):
    """Yield random batches with repeated samples."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(calls):
        x = torch.randn(size, dim, generator=generator, dtype=dtype)
        ids = torch.randint(3 * size, (size,), generator=generator)
        yield x, ids % 3, ids


@pytest.mark.parametrize("options", OPTIONS, ids=named)
@given(history=histories(), capacity=capacities)
def test_is_the_core_step_by_step(options, history, capacity):
    dim = history[0].x.shape[1]
    module = XBM(dim, capacity, warmup=1, **options)
    objective = module.objective
    state = objective.init(capacity=capacity, dim=dim, dtype=module.embeddings.dtype, xp=xp)
    for batch in history:
        (x, labels), keywords = tensors(batch)
        loss = module(x, labels, **keywords)
        loss.backward()
        result = objective.step(state, x.detach(), labels, **keywords)
        state = result.state
        assert torch.equal(torch.nan_to_num(loss.detach()), torch.nan_to_num(result.loss))
        assert torch.equal(torch.nan_to_num(x.grad), torch.nan_to_num(result.gradient))
        assert list(module.report.values()) == pytest.approx(result.report.stacked().tolist(), nan_ok=True)
        for name, value in arrays(state).items():
            assert torch.equal(getattr(module, name), value), name


@pytest.mark.parametrize("loss", [loss for loss in LOSSES if not isinstance(loss, core.Circle)], ids=repr)
@pytest.mark.parametrize("normalize", [True, False])
def test_gradient_is_autograds(loss, normalize):
    """The closed-form gradient equals autograd through the loss's value, with the memory constant.

    Circle loss is excluded, because it treats a part of its value as constant; see benchmarks/formulas.py.
    """
    if loss.needs_cosines and not normalize:
        with pytest.raises(ValueError, match="cosines"):
            XBM(4, 20, loss, normalize=False)
        return
    module = XBM(4, 20, loss, warmup=0, dtype=torch.float64, normalize=normalize)
    for x, labels, ids in numbers(0, 6, dtype=torch.float64):
        x.requires_grad_()
        cursor = int(module.cursor)
        module(x, labels, ids=ids).backward()
        closed, x.grad = x.grad, None
        z = torch.nn.functional.normalize(x) if normalize else x
        step = int(module.step) - 1
        same = labels[:, None] == labels[None]
        others = ~torch.eye(len(x), dtype=torch.bool)
        total = value_of(loss, z @ z.T, same & others, ~same & others, step)
        rows = slice(0, int(module.count))
        own = (cursor + torch.arange(len(x))) % module.capacity
        copies = (ids[:, None] == module.ids[None, rows]) & (module.stored_at[None, rows] < step)
        usable = (torch.arange(int(module.count))[None] != own[:, None]) & ~copies
        same = labels[:, None] == module.labels[None, rows]
        total = total + value_of(loss, z @ module.embeddings[rows].T, same & usable, ~same & usable, step)
        total.backward()
        torch.testing.assert_close(closed, x.grad, rtol=1e-9, atol=1e-12)


def value_of(loss, S, P, N, step=0):
    """Return the mean of L_i, computed such that autograd can differentiate it."""
    block = core.Block(S, P.double(), N.double(), torch.arange(S.shape[1]), torch.arange(S.shape[0]), step)
    value, _ = loss.whole(block)
    return value.sum() / len(S)


def test_gradcheck():
    """torch.autograd.gradcheck passes, with and without keys."""
    module = XBM(3, 8, warmup=0, dtype=torch.float64).eval()
    batches = list(numbers(3, 3, size=4, dim=3, dtype=torch.float64))
    module.train()
    for x, labels, _ in batches:
        module(x, labels)
    module.eval()
    x, labels, _ = batches[0]
    keys = batches[1][0].requires_grad_()
    assert torch.autograd.gradcheck(lambda x: module(x + 0.01, labels), (x.requires_grad_(),))
    assert torch.autograd.gradcheck(lambda x, k: module(x, labels, keys=k, key_labels=labels), (x, keys))


@given(history=histories(), capacity=capacities)
def test_evaluation_changes_no_bit(history, capacity):
    module = XBM(history[0].x.shape[1], capacity, warmup=1)
    for batch in history:
        (x, labels), keywords = tensors(batch)
        keywords.pop("enqueue", None)
        before = snapshot(module)
        module.eval()
        with_gradient = module(x, labels, **keywords)
        with torch.no_grad():
            without = module(x, labels, **keywords)
        assert torch.equal(with_gradient.detach(), without)
        assert_equal(module, before)
        module.train()
        module(x, labels, **keywords)


@given(
    calls=st.integers(1, 5),
    more=st.integers(1, 4),
    capacity=capacities,
    seed=st.integers(0, 1000),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
)
def test_resume_is_exact(calls, more, capacity, seed, dtype):
    module = XBM(4, capacity, warmup=2, dtype=dtype)
    batches = list(numbers(seed, calls + more))
    for x, labels, ids in batches[:calls]:
        module(x, labels, ids=ids)
    resumed = XBM(4, capacity, warmup=2, dtype=dtype)
    resumed.load_state_dict(module.state_dict())
    for x, labels, ids in batches[calls:]:
        assert torch.equal(module(x, labels, ids=ids), resumed(x, labels, ids=ids))
    for name in MemoryState._fields:
        assert torch.equal(getattr(module, name), getattr(resumed, name)), name


RESUMED = """
import sys, torch
from tests.integrations.test_torch import numbers
from xbm.integrations.torch import XBM
module = XBM(4, 16, warmup=2)
module.load_state_dict(torch.load(sys.argv[1], weights_only=True))
for x, labels, ids in list(numbers(5, 12))[7:]:
    print(float(module(x, labels, ids=ids)).hex())
"""


def test_resume_in_a_new_process(tmp_path):
    module, losses = XBM(4, 16, warmup=2), []
    for call, (x, labels, ids) in enumerate(numbers(5, 12)):
        if call == 7:
            torch.save(module.state_dict(), tmp_path / "memory.pt")
        losses.append(float(module(x, labels, ids=ids)).hex())
    command = [sys.executable, "-c", RESUMED, str(tmp_path / "memory.pt")]
    resumed = subprocess.run(command, capture_output=True, text=True, check=True)
    assert resumed.stdout.split() == losses[7:]


@given(calls=st.integers(0, 5), capacity=capacities, larger=capacities, seed=st.integers(0, 1000))
def test_capacity_may_change_on_load(calls, capacity, larger, seed):
    module = XBM(4, capacity, warmup=0)
    for x, labels, ids in numbers(seed, calls):
        module(x, labels, ids=ids)
    resumed = XBM(4, larger, warmup=0)
    resumed.load_state_dict(module.state_dict())
    kept = min(int(module.count), larger)
    for before, after in zip(module.rows(), resumed.rows(), strict=True):
        assert torch.equal(before[len(before) - kept :], after)
    assert int(resumed.step) == calls
    assert resumed.capacity == larger
    for x, labels, ids in numbers(seed + 1, 2):
        assert torch.isfinite(resumed(x, labels, ids=ids))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"embeddings": torch.zeros(8, 5)}, "rows of 5 dimensions, this one of 4"),
        ({"labels": torch.zeros(3, dtype=torch.int64)}, "labels must have shape"),
        ({"labels": torch.zeros(8)}, "labels must be integers, got torch.float32"),
        ({"embeddings": torch.zeros(8, 4, dtype=torch.int64)}, "embeddings must be floating point"),
        ({"embeddings": torch.full((8, 4), 1e300, dtype=torch.float64)}, "not finite in torch.float32"),
        ({"embeddings": torch.zeros(8, 4, device="meta")}, "embeddings must be a dense tensor with values"),
        ({"step": torch.tensor(-1)}, "step -1 and skipped 0 must be at least 0"),
        ({"count": 8}, "count must be a dense tensor with values, got int 8"),
        ({"cursor": torch.tensor(11)}, "cursor 11 and count 0 do not belong together in a ring of 8 slots"),
        ({"count": torch.tensor([1])}, "count must have shape \\(\\)"),
    ],
)
def test_unsound_checkpoints_are_refused(change, sentence):
    module = XBM(4, 8)
    x, labels, ids = next(numbers(0, 1))
    module(x, labels, ids=ids)
    before = snapshot(module)
    with pytest.raises(RuntimeError, match=sentence):
        module.load_state_dict(XBM(4, 8).state_dict() | change)
    assert_equal(module, before)


def test_a_checkpoint_without_memory_names_what_is_missing():
    with pytest.raises(RuntimeError, match=r"Missing key.*embeddings.*labels"):
        XBM(4, 8).load_state_dict({"embedding_memory": torch.zeros(8, 4)})


@pytest.mark.parametrize("lost", MemoryState._fields)
def test_a_checkpoint_is_loaded_whole_or_not_at_all(lost):
    saved, module = XBM(4, 8), XBM(4, 8)
    for one, seed in ((saved, 0), (module, 1)):
        x, labels, ids = next(numbers(seed, 1))
        one(x, labels, ids=ids)
    before = snapshot(module)
    partial = {name: value for name, value in saved.state_dict().items() if name != lost} | {"queue": torch.zeros(1)}
    with pytest.raises(RuntimeError, match=rf"Missing key.*{lost}(?s:.*)Unexpected key.*queue|queue(?s:.*){lost}"):
        module.load_state_dict(partial)
    assert_equal(module, before)
    assert module.load_state_dict(partial, strict=False).missing_keys == [lost]
    assert_equal(module, before)


def test_loading_keeps_the_dtypes():
    saved, module = XBM(4, 8), XBM(4, 8, dtype=torch.bfloat16)
    x, labels, ids = next(numbers(0, 1))
    saved(x, labels, ids=ids)
    state = saved.state_dict()
    module.load_state_dict(state | {"labels": state["labels"].int()}, assign=True)
    assert (module.embeddings.dtype, module.labels.dtype) == (torch.bfloat16, torch.int64)
    assert torch.equal(module.rows().ids, ids)


class Scaled(XBM):
    """A subclass with its own parameter."""

    def __init__(self, *options):
        super().__init__(*options)
        self.scale = torch.nn.Parameter(torch.zeros(1))
        self.head = torch.nn.Linear(1, 1)


@pytest.mark.parametrize("change", [{"labels": None}, {"labels": torch.zeros(3)}])
def test_what_a_subclass_adds_is_loaded_without_the_memory(change):
    saved, module = Scaled(4, 8), Scaled(4, 8)
    torch.nn.init.ones_(saved.scale)
    state = {name: value for name, value in (saved.state_dict() | change).items() if value is not None}
    with pytest.raises(RuntimeError) as refusal:
        module.load_state_dict(state)
    assert "Unexpected" not in str(refusal.value)
    assert "scale" not in str(refusal.value)
    assert module.scale.item() == 1


def test_training_goes_on_after_loading_in_inference_mode():
    module = XBM(4, 8)
    with torch.inference_mode():
        module.load_state_dict(XBM(4, 8).state_dict())
    x, labels, _ = next(numbers(0, 1))
    assert torch.isfinite(module(x, labels))


def test_memory_inside_a_model_is_saved_with_it_and_absent_from_the_encoder():
    model = torch.nn.ModuleDict({"encoder": torch.nn.Linear(4, 4), "xbm": XBM(4, 8)})
    assert {name.split(".")[0] for name in model.state_dict()} == {"encoder", "xbm"}
    assert not list(model["xbm"].parameters())
    assert set(model["encoder"].state_dict()) == {"weight", "bias"}
    resumed = torch.nn.ModuleDict({"encoder": torch.nn.Linear(4, 4), "xbm": XBM(4, 3)})
    resumed.load_state_dict(model.state_dict())


@pytest.mark.parametrize("cast", [lambda m: m.half(), lambda m: m.to(torch.float64), lambda m: m.bfloat16()])
def test_casting_the_module_keeps_the_memory(cast):
    module = XBM(4, 8)
    x, labels, ids = next(numbers(0, 1))
    module(x, labels, ids=ids)
    before = snapshot(module)
    assert cast(module) is module
    assert {name: b.dtype for name, b in module.named_buffers()} == {name: b.dtype for name, b in before.items()}
    assert_equal(module, before)


def test_moving_the_module_moves_the_memory():
    module = XBM(4, 8).to("meta")
    assert {buffer.device.type for buffer in module.buffers()} == {"meta"}
    assert module.embeddings.dtype == torch.float32


def test_autocast_recasts_nothing():
    module, plain = XBM(4, 32, warmup=0), XBM(4, 32, warmup=0)
    for x, labels, ids in numbers(1, 4):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = module(x, labels, ids=ids)
        assert loss.dtype == torch.float32
        assert torch.equal(loss, plain(x, labels, ids=ids))


def test_metrics_and_the_core_ignore_autocast():
    x, labels = torch.randn(50, 4), torch.arange(50) % 5
    objective = core.Objective(warmup=0)
    state = objective.init(capacity=8, dim=4, xp=xp)
    plain = metrics.retrieval(x, labels), objective.evaluate(state, x, labels, gradient=True).gradient
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under = metrics.retrieval(x, labels), objective.evaluate(state, x, labels, gradient=True).gradient
        assert torch.equal(metrics.neighbours(x, k=9), metrics.neighbours(x.double(), k=9))
    assert plain[0] == under[0]
    assert torch.equal(plain[1], under[1])


def test_half_precision_gradients_are_scaled_before_they_are_rounded():
    module = XBM(4, 8, warmup=0, weight=1e-9, in_batch=False)  # below the smallest number in half precision
    x, labels, _ = next(numbers(2, 1))
    half = x.half().requires_grad_()
    (module(half, labels * 0) * 2.0**30).backward()
    assert half.grad.dtype == torch.float16
    assert torch.count_nonzero(half.grad) == half.numel()
    assert torch.all(torch.isfinite(half.grad))


def test_two_forwards_before_one_backward():
    whole, split = XBM(4, 8, warmup=0), XBM(4, 8, warmup=0)
    batches = [(x.requires_grad_(), labels, ids) for x, labels, ids in numbers(4, 2)]
    (whole(*batches[0][:2]) + whole(*batches[1][:2])).backward()
    together = [x.grad.clone() for x, _, _ in batches]
    for x, _, _ in batches:
        x.grad = None
    for x, labels, _ in batches:
        split(x, labels).backward()
    for x, gradient in zip((x for x, _, _ in batches), together, strict=True):
        assert torch.equal(x.grad, gradient)


def test_the_memory_carries_no_graph():
    module = XBM(4, 8, warmup=0)
    x, labels, ids = next(numbers(0, 1))
    module(x.requires_grad_(), labels, ids=ids)
    assert not any(buffer.requires_grad or buffer.grad_fn for buffer in module.buffers())


def test_the_core_cuts_the_graph_itself_and_its_loss_has_the_closed_form():
    x, labels, ids = next(numbers(0, 1))
    x.requires_grad_()
    memory = core.enqueue(core.init(capacity=8, dim=4, xp=xp), x, labels, ids=ids)
    state = core.Objective(warmup=0).begin(memory)
    result = core.Objective(warmup=0).step(state, x, labels, ids=ids)
    assert not any(array.requires_grad for array in (*memory, *result.state.memory, result.gradient, *result.report))
    result.loss.backward()
    assert torch.equal(x.grad, result.gradient)
    assert not core.Objective(warmup=0).step(state, x.detach(), labels, ids=ids).loss.requires_grad


def test_a_device_is_never_waited_for():
    """The meta device has no values, so reading one fails."""
    x, labels = torch.randn(4, 8, device="meta"), torch.zeros(4, dtype=torch.int64, device="meta")
    objective = core.Objective(warmup=2)
    state = objective.init(capacity=64, dim=8, xp=xp, device="meta")
    for options in ({}, {"ids": labels, "enqueue": labels == 0}, {"keys": x}):
        state = objective.step(state, x, labels, **options).state
    assert objective.evaluate(state, x, labels, ids=labels, gradient=True).gradient.shape == x.shape
    with pytest.raises(RuntimeError, match="meta"):
        core.rows(state.memory)


def test_an_empty_batch_is_a_differentiable_zero():
    module = XBM(4, 8, warmup=0)
    x = torch.zeros(0, 4, requires_grad=True)
    loss = module(x, torch.zeros(0, dtype=torch.int64))
    loss.backward()
    assert loss == 0
    assert x.grad.shape == (0, 4)
    assert module.report["fill"] == 0
    assert int(module.step) == 1


def test_second_derivatives_are_refused():
    x, labels, _ = next(numbers(0, 1))
    loss = XBM(4, 8)(x.requires_grad_(), labels)
    with pytest.raises(RuntimeError, match="first derivatives only"):
        torch.autograd.grad(loss, x, create_graph=True)


def test_clear_keeps_the_step_dtype_and_device():
    module = XBM(4, 8, warmup=2, dtype=torch.bfloat16)
    for x, labels, ids in numbers(0, 3):
        module(x, labels, ids=ids)
    module.clear()
    assert len(module.rows().labels) == 0
    assert int(module.step) == 3
    assert module.embeddings.dtype == torch.bfloat16
    module(x, labels, ids=ids)
    assert len(module.rows().labels) == 6


def test_rows_are_the_newest_oldest_first_and_copies():
    module = XBM(4, 8)
    batches = list(numbers(0, 3))
    for x, labels, ids in batches:
        module(x, labels, ids=ids)
    rows = module.rows()
    assert torch.equal(rows.ids, torch.cat([ids for _, _, ids in batches])[-8:])
    assert rows.stored_at.tolist() == [1, 1, 2, 2, 2, 2, 2, 2]
    stored = torch.nn.functional.normalize(torch.cat([x for x, _, _ in batches])[-8:])
    torch.testing.assert_close(rows.embeddings, stored)
    rows.embeddings.zero_()
    assert torch.count_nonzero(module.embeddings)


def test_fill():
    module, encoder = XBM(4, 8, warmup=1), torch.nn.Linear(4, 4)
    loader = [(x, labels, ids) for x, labels, ids in numbers(0, 5)]
    assert module.fill(encoder, loader) == 12  # two batches of 6 fill 8 slots
    assert int(module.step) == 0
    rows = module.rows()
    assert rows.ids.tolist() == torch.cat([loader[0][2], loader[1][2]])[-8:].tolist()
    expected = torch.nn.functional.normalize(encoder(torch.cat([loader[0][0], loader[1][0]])[-8:]))
    torch.testing.assert_close(rows.embeddings, expected.detach())
    assert module.fill(encoder, [batch[:2] for batch in loader[:1]]) == 6
    assert module.rows().ids.tolist()[-6:] == [-1] * 6
    with pytest.raises(TypeError, match=r"loader must yield \(inputs, labels\)"):
        module.fill(encoder, [loader[0][0]])


def test_keys_get_their_gradient_and_are_what_is_stored():
    module = XBM(4, 8, warmup=0)
    (q, labels, _), (k, _, _) = numbers(0, 2)
    module(q.requires_grad_(), labels, keys=k.requires_grad_()).backward()
    torch.testing.assert_close(module.rows().embeddings, torch.nn.functional.normalize(k.detach()))
    assert torch.count_nonzero(k.grad)
    assert torch.count_nonzero(q.grad)


def test_report_is_a_read_only_mapping():
    module = XBM(4, 8)
    assert all(np.isnan(value) for value in module.report.values())
    x, labels, ids = next(numbers(0, 1))
    module(x, labels, ids=ids)
    assert list(module.report) == list(core.REPORT)
    assert module.report["fill"] == 0.75
    assert "fill=0.75" in repr(module.report)
    with pytest.raises(KeyError, match="the report has batch_loss"):
        module.report["filling"]
    with pytest.raises(TypeError):
        module.report["fill"] = 1.0


def test_report_is_blank_once_it_is_of_another_memory():
    module = XBM(4, 8)
    for blank in (module.clear, lambda: module.load_state_dict(XBM(4, 8).state_dict())):
        x, labels, _ = next(numbers(0, 1))
        module(x, labels)
        assert module.report["fill"] > 0
        blank()
        assert np.isnan(module.report["fill"])


def test_repr_shows_the_options():
    text = repr(XBM(4, 8, weight=0.5, dtype=torch.bfloat16))
    for option in ("dim=4", "capacity=8", "Contrastive", "weight=0.5", "torch.bfloat16", "copies='exclude'"):
        assert option in text
    for name in ("match", "pair_weights", "ignore_label"):
        assert name not in text
    text = repr(XBM(4, 8, match=torch.eq, pair_weights=torch.ne, ignore_label=-1))
    for option in ("match=<built-in method eq", "pair_weights=<built-in method ne", "ignore_label=-1"):
        assert option in text


@pytest.mark.parametrize("with_keys", [False, True], ids=["two views", "keys"])
def test_no_labels(with_keys):
    """Each sample is its own class, in training and in evaluation, as in the core."""
    module = XBM(4, 16, "supcon", warmup=1)
    state = module.objective.init(capacity=16, dim=4, xp=xp)
    for x, _, ids in numbers(0, 5):
        given = {"keys": x.flip(1)} if with_keys else {"ids": ids % 3}
        loss = module(x, **given)
        result = module.objective.step(state, x, **given)
        state = result.state
        assert torch.equal(loss, result.loss)
        assert loss > 0
    assert len(set(module.rows().labels.tolist())) == (16 if with_keys else 3)
    module.eval()
    assert torch.equal(module(x, **given), module.objective.evaluate(state, x, **given).loss)


@pytest.mark.parametrize(
    ("options", "error", "sentence"),
    [
        ({"capacity": 0}, ValueError, "capacity must be at least 1"),
        ({"dim": 2.0}, TypeError, "dim must be an int"),
        ({"loss": "contrastiv"}, ValueError, "loss must be one of the names .*'contrastive', .*got 'contrastiv'"),
        ({"loss": torch.nn.MSELoss}, TypeError, "a callable, or .*, got <class .*MSELoss"),
        ({"loss": core.Contrastive(), "reduction": "sum"}, ValueError, "reduction is an option of losses by name"),
        ({"reduction": "none"}, ValueError, "reduction must be 'mean', 'mean-nonzero' or 'sum', got 'none'"),
        ({"dtype": torch.int64}, TypeError, "dtype must be one of .*float32, .*bfloat16"),
        ({"dtype": "float32"}, TypeError, "dtype must be one of .*float32, .*bfloat16"),
        ({"warmup": -3}, ValueError, "warmup must be at least 0"),
        (
            {"miner": max},
            TypeError,
            "miner must be one of the names .*'margin', .*, a list of them or None",
        ),
    ],
)
def test_construction_refuses(options, error, sentence):
    with pytest.raises(error, match=sentence):
        XBM(**{"dim": 4, "capacity": 8} | options)


@pytest.mark.parametrize(
    ("change", "error", "sentence"),
    [
        ({"embeddings": torch.zeros(2, 5)}, ValueError, r"shape \(B, 4\), as the memory's rows have 4.*\(2, 5\)"),
        ({"embeddings": np.zeros((2, 4))}, TypeError, "embeddings must be an array of torch.*numpy.ndarray"),
        ({"labels": [0, 1]}, TypeError, "labels must be an array of torch, got list"),
        ({"labels": torch.zeros(2)}, TypeError, "labels must be integers, got torch.float32"),
        ({"labels": torch.zeros(2, 7, dtype=torch.int64)}, ValueError, "one-hot"),
        (
            {"labels": torch.zeros(2, dtype=torch.int64, device="meta")},
            ValueError,
            "on device meta, what they meet is on cpu",
        ),
        ({"ids": torch.zeros(3, dtype=torch.int64)}, ValueError, r"ids must have shape \(2,\)"),
        ({"enqueue": torch.ones(2)}, TypeError, "enqueue must be boolean"),
        ({"key_labels": torch.zeros(2, dtype=torch.int64)}, ValueError, "key_labels were given without keys"),
    ],
)
def test_calls_refuse_and_lose_nothing(change, error, sentence):
    module = XBM(4, 8)
    x, labels, ids = next(numbers(0, 1))
    module(x, labels, ids=ids)
    before = snapshot(module)
    good = {"embeddings": torch.ones(2, 4), "labels": torch.zeros(2, dtype=torch.int64)}
    with pytest.raises(error, match=sentence):
        module(**good | change)
    assert_equal(module, before)


@pytest.mark.parametrize(
    "change", [{"embeddings": np.zeros((2, 4))}, {"keys": [[0.0] * 4]}, {"enqueue": torch.ones(2)}]
)
def test_evaluation_refuses_as_training_does(change):
    good = {"embeddings": torch.ones(2, 4), "labels": torch.zeros(2, dtype=torch.int64)}
    sentences = []
    for module in (XBM(4, 8), XBM(4, 8).eval()):
        with pytest.raises(TypeError) as refusal:
            module(**good | change)
        sentences.append(str(refusal.value))
    assert sentences[0] == sentences[1]


class Raising(core.Contrastive):
    """A user loss that raises an error."""

    def value(self, r):
        raise RuntimeError("my mistake")


class Scalar(core.Contrastive):
    """A user loss that returns the wrong shape."""

    def value(self, r):
        return super().value(r).sum()


@pytest.mark.parametrize(("loss", "sentence"), [(Raising(), "my mistake"), (Scalar(), "must return a value of shape")])
def test_a_loss_that_fails_loses_nothing(loss, sentence):
    module = XBM(4, 8)
    for x, labels, _ in numbers(0, 2):
        module(x, labels)
    module.objective = replace(module.objective, loss=loss, warmup=0)
    before = snapshot(module)
    with pytest.raises((RuntimeError, ValueError), match=sentence):
        module(x, labels)
    assert_equal(module, before)


def test_raising_on_values_is_refused_under_a_compiler(monkeypatch):
    """As under a compiler: values are not available while tracing."""
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    x, labels, _ = next(numbers(0, 1))
    with pytest.raises(RuntimeError, match=r'on_nonfinite="raise" .* impossible under a compiler: use "skip"'):
        XBM(4, 8, on_nonfinite="raise")(x, labels)
    assert torch.isfinite(XBM(4, 8, warmup=0)(x, labels))


@pytest.mark.parametrize("where", ["embeddings", "keys"])
def test_nonfinite_rows_raise_if_asked_to(where):
    module = XBM(4, 8, on_nonfinite="raise")
    bad = torch.ones(2, 4)
    bad[1, 2] = torch.nan
    arguments = {"embeddings": torch.ones(2, 4), "labels": torch.zeros(2, dtype=torch.int64)} | {where: bad}
    before = snapshot(module)
    with pytest.raises(ValueError, match="1 of the embeddings"):
        module(**arguments)
    assert_equal(module, before)
