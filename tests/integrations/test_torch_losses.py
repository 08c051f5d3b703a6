"""Functions as losses, and losses with learned parameters."""

import copy

import pytest
import torch

import xbm as core
from tests.integrations.test_torch import numbers, value_of
from xbm.integrations.torch import XBM


def contrastive(S, positive, negative):
    """Contrastive loss with per-anchor means, as a user would write it."""
    active = negative & (S > 0.5)
    pull = ((1 - S) * positive).sum(dim=1) / positive.sum(dim=1).clamp(min=1)
    push = ((S - 0.5) * active).sum(dim=1) / active.sum(dim=1).clamp(min=1)
    return pull + push


class Learned(torch.nn.Module):
    """A loss with a learned margin and scale."""

    def __init__(self):
        super().__init__()
        self.margin = torch.nn.Parameter(torch.tensor(0.3))
        self.scale = torch.nn.Parameter(torch.tensor(2.0))

    def forward(self, S, positive, negative):
        z = self.scale * (S - self.margin)
        return (torch.nn.functional.softplus(z) * negative + torch.nn.functional.softplus(-z) * positive).sum(dim=1)


class LearnedTemperature(core.PairLoss, torch.nn.Module):
    """A PairLoss with a learned parameter."""

    def __init__(self):
        torch.nn.Module.__init__(self)
        self.temperature = torch.nn.Parameter(torch.tensor(0.5))

    def summarise(self, block, r):
        return {"all": core.LogSumExp.of(block.S / self.temperature, block.P + block.N)}

    def value(self, r):
        return torch.where(r["all"] > -torch.inf, r["all"], 0.0)

    def weights(self, block, r):
        pair = block.P + block.N
        shown = torch.where(pair > 0, block.S / self.temperature - r["all"][:, None], -torch.inf)
        return pair * shown.exp() / self.temperature


@pytest.mark.parametrize("miner", [None, "multi-similarity"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_function_is_the_loss_it_computes(miner, dtype):
    ours, theirs = (XBM(4, 20, loss, miner=miner, warmup=1, dtype=dtype) for loss in ("contrastive", contrastive))
    for x, labels, ids in numbers(0, 6, dtype=dtype):
        found = []
        for module in (ours, theirs):
            leaf = x.clone().requires_grad_()
            loss = module(leaf, labels, ids=ids)
            loss.backward()
            found.append((loss.detach(), leaf.grad, module.report["pairs"]))
        (loss, gradient, _), (same_loss, same_gradient, _) = found
        torch.testing.assert_close(same_loss, loss)
        torch.testing.assert_close(same_gradient, gradient)
        assert found[0][2] == found[1][2]


@pytest.mark.parametrize("make", [Learned, LearnedTemperature])
def test_learned_parameters_get_the_gradient_that_autograd_gives_them(make):
    module = XBM(4, 20, make(), warmup=1, dtype=torch.float64).double()
    parameters = dict(module.named_parameters())
    assert {name.split(".")[0] for name in parameters} == {"loss"}
    for call, (x, labels, ids) in enumerate(numbers(0, 4, dtype=torch.float64)):
        x.requires_grad_()
        cursor = int(module.cursor)
        module.zero_grad()
        module(x, labels, ids=ids).backward()
        closed = [x.grad, *(p.grad.clone() for p in parameters.values())]

        x.grad = None
        module.zero_grad()
        z = torch.nn.functional.normalize(x)
        same, others = labels[:, None] == labels[None], ~torch.eye(len(x), dtype=torch.bool)
        total = mean_of(module.loss, z @ z.T, same & others, ~same & others)
        if call >= 1:
            rows = slice(0, int(module.count))
            own = (cursor + torch.arange(len(x))) % module.capacity
            copies = (ids[:, None] == module.ids[None, rows]) & (module.stored_at[None, rows] < call)
            usable = (torch.arange(int(module.count))[None] != own[:, None]) & ~copies
            same = labels[:, None] == module.labels[None, rows]
            total = total + mean_of(module.loss, z @ module.embeddings[rows].T, same & usable, ~same & usable)
        total.backward()
        for ours, autograds in zip(closed, [x.grad, *(p.grad for p in parameters.values())], strict=True):
            torch.testing.assert_close(ours, autograds, rtol=1e-9, atol=1e-12)


def mean_of(loss, S, P, N):
    """Return the mean of L_i, differentiable by autograd."""
    if isinstance(loss, core.PairLoss):
        return value_of(loss, S, P, N)
    return torch.where((P | N).any(dim=1), loss(S, P, N), 0.0).sum() / len(S)


class Table(torch.nn.Module):
    """A relation and weights from lookup tables."""

    def __init__(self):
        super().__init__()
        self.register_buffer("table", torch.eye(5, dtype=torch.bool).roll(1, 0))

    def forward(self, labels, row_labels):
        return self.table[labels][:, row_labels]


@pytest.mark.parametrize("name", ["match", "pair_weights"])
def test_tables_of_pairs_are_moved_and_saved(name):
    module = XBM(8, 32, warmup=0, **{name: Table()})
    assert f"{name}.table" in module.state_dict()
    assert getattr(module.to("meta"), name).table.device.type == "meta"
    assert getattr(copy.deepcopy(XBM(8, 32, **{name: Table()})), name).table.device.type == "cpu"


def test_learned_parameters_are_moved_saved_and_trained():
    module = XBM(4, 20, Learned(), warmup=0)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    for x, labels, _ in numbers(0, 3):
        module(x, labels).backward()
        optimizer.step()
    assert float(module.loss.margin.detach()) != pytest.approx(0.3)
    again = XBM(4, 20, Learned(), warmup=0)
    again.load_state_dict(module.state_dict())
    assert torch.equal(again.loss.margin, module.loss.margin)
    assert module.double().loss.margin.dtype == torch.float64


def test_no_graph_is_kept_beyond_the_loss():
    module = XBM(4, 20, Learned(), warmup=0)
    for x, labels, _ in numbers(0, 2):
        module(x, labels)
        assert not any(buffer.requires_grad for buffer in module.buffers())
        assert not module(x, labels, enqueue=torch.zeros(len(x), dtype=torch.bool)).is_leaf
        with torch.no_grad():
            assert not module(x, labels).requires_grad


def test_anchors_without_pairs_count_nothing_whatever_the_function_says():
    def undefined(S, positive, negative):
        return (S * positive).sum(dim=1) / positive.sum(dim=1)

    module = XBM(4, 20, undefined, warmup=0)
    x = torch.randn(1, 4, requires_grad=True)
    loss = module(x, torch.tensor([0]))
    loss.backward()
    assert float(loss.detach()) == 0
    assert torch.equal(x.grad, torch.zeros_like(x))


def test_a_constant_function_has_no_gradient():
    module = XBM(4, 20, lambda S, positive, negative: torch.ones(len(S)), warmup=0, in_batch=False)
    for x, labels, _ in numbers(0, 2):
        x.requires_grad_()
        loss = module(x, labels)
        loss.backward()
        assert torch.equal(x.grad, torch.zeros_like(x))
    assert float(loss.detach()) == 1


@pytest.mark.parametrize(
    ("loss", "error", "sentence"),
    [
        (
            lambda S, positive, negative: S.sum(),
            ValueError,
            r"one value per anchor, shape \(6,\), got shape",
        ),
        (lambda S, positive, negative: 1.0, ValueError, "one value per anchor.* got float"),
        (lambda S: S.sum(dim=1), TypeError, "positional argument"),
    ],
)
def test_functions_that_do_not_fit_lose_nothing(loss, error, sentence):
    module = XBM(4, 8, loss, warmup=0)
    x, labels, _ = next(numbers(0, 1))
    with pytest.raises(error, match=sentence):
        module(x, labels)
    assert int(module.count) == int(module.step) == 0


def test_a_library_without_autodiff_says_so():
    import numpy as np

    objective = core.Objective(loss=contrastive)
    with pytest.raises(
        NotImplementedError, match="a function as a loss needs automatic differentiation, which numpy lacks"
    ):
        objective.step(objective.init(capacity=4, dim=2), np.ones((2, 2), np.float32), np.asarray([0, 1]))
