"""Errors on several ranks, and the interaction with DDP, other process groups and copies."""

import copy
import os
import pickle
import time
from datetime import timedelta

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from tests.processes import answer, pool, shared
from xbm import Objective
from xbm.integrations.torch import XBM
from xbm.memory_state import MemoryState

DIM, CAPACITY = 4, 16


@pytest.fixture(scope="module")
def ranks():
    return shared(2)


def batch(seed, n=6):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, DIM, generator=generator), torch.randint(3, (n,), generator=generator)


def own_batch(step, n=6):
    """Return this rank's part of a step's batch."""
    return batch(10 * step + dist.get_rank(), n)


def held(module):
    return {name: getattr(module, name).clone() for name in MemoryState._fields}


def refusal(call):
    """Return the type and message of the error raised by a call."""
    try:
        call()
    except Exception as error:
        return type(error).__name__, str(error)
    return None


def refused_on_one(fault, options):
    """Make two valid calls, one that is invalid on rank 1, and a valid one; return the errors and the state."""
    module = XBM(DIM, CAPACITY, warmup=0, **options)
    for step in range(2):
        module(*own_batch(step))
    before = held(module)
    x, labels = own_batch(2)
    more = {}
    if dist.get_rank() == 1:
        x, labels, more = FAULTS[fault](x, labels)
    raised = refusal(lambda: module(x, labels, **more))
    same = all(torch.equal(value, before[name]) for name, value in held(module).items())
    module(*own_batch(3))
    return raised, same, held(module)


def _nan(x, labels):
    x[2, 1] = torch.nan
    return x, labels, {}


FAULTS = {
    "dtype": lambda x, labels: (x, labels.float(), {}),
    "size": lambda x, labels: (x[:, :3], labels, {}),
    "lengths": lambda x, labels: (x, labels[:-1], {}),
    "ids": lambda x, labels: (x, labels, {"ids": labels}),
    "float64": lambda x, labels: (x.double(), labels, {}),
    "nan": _nan,
}


@pytest.mark.parametrize(
    ("fault", "own", "others"),
    [
        (
            "dtype",
            "labels must be integers",
            "rank 1 raised an error for its batch, so no rank stored anything. TypeError: labels",
        ),
        ("size", "embeddings must have shape", "rank 1 raised an error for its batch"),
        ("lengths", "labels must have shape", "rank 1 raised an error for its batch"),
        ("ids", "ids must come from all 2 ranks or none, got it from [1] alone", "ids must come from all 2 ranks"),
        (
            "float64",
            "float64 must come from all 2 ranks or none, got it from [1]",
            "float64 must come from all 2 ranks",
        ),
        ("nan", "1 of the embeddings (12, 4) are not finite", "1 of the embeddings (12, 4) are not finite"),
    ],
)
def test_what_one_rank_refuses_all_refuse(ranks, fault, own, others):
    found = ranks.run(refused_on_one, fault, {"on_nonfinite": "raise"})
    for (raised, same, _), expected in zip(found, (others, own), strict=True):
        assert expected in raised[1]
        assert same
    one, other = (memory for *_, memory in found)
    assert all(torch.equal(one[name], other[name]) for name in one)  # and training continues


def test_rows_that_are_not_finite_are_skipped_on_all(ranks):
    for raised, _, memory in ranks.run(refused_on_one, "nan", {}):
        assert raised is None
        assert memory["skipped"] == 1
        assert memory["embeddings"].isfinite().all()


OTHERS = {
    "capacity": {"capacity": 2 * CAPACITY},
    "dim": {"dim": 2 * DIM},
    "shard": {"shard": True},
    "loss": {"loss": "supcon"},
    "dtype": {"dtype": torch.bfloat16},
    "mode": {"shard": True},
}


def differing(change):
    """Change one rank's memory; return the error of the first call."""
    options = {"capacity": CAPACITY, "dim": DIM, "warmup": 0, "match": lambda a, b: a[:, None] == b[None, :]}
    module = XBM(**options | (OTHERS.get(change, {}) if dist.get_rank() == 1 or change == "mode" else {}))
    if change == "mode":  # for a sharded memory, evaluation is collective
        module.train(dist.get_rank() == 0)
    if dist.get_rank() == 1 and change == "step":
        module.step += 3
    return refusal(lambda: module(torch.randn(5, module.dim), torch.arange(5)))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("capacity", "the same capacity, got 16, 32 in rank order"),
        ("dim", "the same dim, got 4, 8 in rank order"),
        ("step", "the same step, got 0, 3 in rank order"),
        ("shard", "the same shard, got 1, 2 in rank order"),
        ("loss", "the same options"),
        ("dtype", "the same options"),
        ("mode", "the same mode (0 evaluation, 1 training, 2 fill), got 1, 0"),
    ],
)
def test_memories_that_differ_are_found_at_the_first_step(ranks, change, told):
    for kind, text in ranks.run(differing, change):
        assert kind == "ValueError"
        assert told in text


def encoder():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(DIM, 8), torch.nn.Tanh(), torch.nn.Linear(8, DIM)).double()


def trained(sharded=False, steps=5):
    """Train an encoder under DDP with a separate XBM; return its weights."""
    network = encoder()
    wrapped = DistributedDataParallel(network)
    module = XBM(DIM, CAPACITY, warmup=1, dtype=torch.float64, shard=sharded)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.5)
    for step in range(steps):
        x, labels = own_batch(step, n=2 + 3 * dist.get_rank())
        optimizer.zero_grad()
        module(wrapped(x.double()), labels).backward()
        optimizer.step()
    return [parameter.detach() for parameter in network.parameters()]


@pytest.mark.parametrize("sharded", [False, True])
def test_ddp_trains_as_one_process_does(ranks, sharded):
    network, module = encoder(), XBM(DIM, CAPACITY, warmup=1, dtype=torch.float64)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.5)
    for step in range(5):
        parts = [batch(10 * step + rank, n=2 + 3 * rank) for rank in range(2)]
        x, labels = (torch.cat(both) for both in zip(*parts, strict=True))
        optimizer.zero_grad()
        module(network(x.double()), labels).backward()
        optimizer.step()
    for weights in ranks.run(trained, sharded):
        for one, other in zip(weights, network.parameters(), strict=True):
            torch.testing.assert_close(one, other.detach(), rtol=1e-9, atol=1e-12)


class Both(torch.nn.Module):
    """An encoder and a memory, wrapped together in DDP."""

    def __init__(self, ignored):
        super().__init__()
        self.encoder, self.xbm = torch.nn.Linear(DIM, DIM), XBM(DIM, CAPACITY, warmup=0, shard=True)
        if ignored:
            names = [f"xbm.{name}" for name, _ in self.xbm.named_buffers()]
            DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(self, names)

    def forward(self, x, labels):
        return self.xbm(self.encoder(x), labels)


def inside_ddp(ignored):
    wrapped = DistributedDataParallel(Both(ignored))
    raised = refusal(lambda: [wrapped(*own_batch(step)).backward() for step in range(3)])
    return raised, held(wrapped.module.xbm)


def test_a_memory_that_ddp_would_broadcast_is_refused(ranks):
    for raised, memory in ranks.run(inside_ddp, False):
        assert "the memory's buffers were broadcast" in raised[1]
        assert memory["count"] == 0
    (ok, one), (_, other) = ranks.run(inside_ddp, True)
    assert ok is None
    assert one["count"] == CAPACITY
    assert not torch.equal(one["embeddings"], other["embeddings"])  # each rank keeps its own shard


def with_an_empty_rank(kind, sharded):
    """Let rank 1 pass no rows, and only the required arguments; return the results."""
    module = XBM(DIM, CAPACITY, warmup=0, dtype=torch.float64, shard=sharded)
    if dist.get_rank() == 0:
        calls = [whole_call(kind, step) for step in range(2)]
    else:
        keys = {"keys": torch.empty(0, DIM)} if "keys" in kind else {}
        calls = [(torch.empty(0, DIM), torch.empty(0, dtype=torch.int64), keys)] * 2
    losses = [module(x, labels, **more).item() for x, labels, more in calls]
    return losses, list(module.report.values()), held(module)


def whole_call(kind, step):
    x, labels = batch(step)
    parts = {"ids": labels + 3, "keys": batch(step + 10)[0].double(), "enqueue": labels > 0}
    return x.double(), None if "no labels" in kind else labels, {name: parts[name] for name in parts if name in kind}


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("kind", [["ids"], ["keys"], ["keys", "ids", "no labels"], ["keys", "enqueue"]], ids="-".join)
def test_a_rank_without_rows_need_bring_no_more(ranks, kind, sharded):
    module = XBM(DIM, CAPACITY, warmup=0, dtype=torch.float64)
    expected = [module(x, labels, **more).item() for x, labels, more in (whole_call(kind, step) for step in range(2))]
    found = ranks.run(with_an_empty_rank, kind, sharded)
    for losses, report, _ in found:
        assert losses == pytest.approx(expected, rel=1e-9)
        assert report == pytest.approx(list(module.report.values()), rel=1e-5, nan_ok=True)
    labels = [memory["labels"] for *_, memory in found]
    assert torch.equal(torch.cat(labels) if sharded else labels[1], module.labels)


def more_ranks_than_rows(loss):
    module = XBM(DIM, 1, loss, warmup=0, dtype=torch.float64)
    if dist.is_initialized():
        calls = [own_batch(step) for step in range(2)]
    else:
        calls = [[torch.cat(both) for both in zip(batch(10 * s), batch(10 * s + 1), strict=True)] for s in range(2)]
    return [module(x, labels).item() for x, labels in calls]


@pytest.mark.parametrize("loss", ["contrastive", "triplet"])
def test_more_ranks_than_rows(ranks, loss):
    expected = more_ranks_than_rows(loss)
    for found in ranks.run(more_ranks_than_rows, loss):
        assert found == pytest.approx(expected, rel=1e-9)


def unlike_gradients():
    """Evaluate a sharded memory where only one rank requires a gradient."""
    module = XBM(DIM, CAPACITY, warmup=0, shard=True)
    x, labels = own_batch(0)
    module(x, labels)
    x.requires_grad_(dist.get_rank() == 0)
    return module.eval()(x, labels).item()


def test_one_rank_alone_may_want_a_gradient(ranks):
    one, other = ranks.run(unlike_gradients)
    assert one == other


def elsewhere():
    """Return a shard, pickled."""
    module = XBM(DIM, CAPACITY, warmup=0, shard=True)
    module(*own_batch(0))
    twin = copy.deepcopy(module).eval()
    return pickle.dumps(module), twin(*own_batch(0)).item(), refusal(lambda: module.fill(broken, [own_batch(0)]))


def broken(x):
    if dist.get_rank() == 1:
        raise ArithmeticError("no embedding today")
    return x


def test_a_shard_is_refused_elsewhere_and_fill_tells_of_a_broken_encoder(ranks):
    (one, _, told), (_, _, raised) = ranks.run(elsewhere)
    with pytest.raises(
        RuntimeError, match="this memory is shard 0 of 2, and this process is rank 0 of 1: make a new XBM"
    ):
        pickle.loads(one)(*batch(0))
    assert raised == ("ArithmeticError", "no embedding today")
    assert "rank 1 raised an error for its batch" in told[1]
    assert "no embedding today" in told[1]


def evaluated_alone():
    module = XBM(DIM, CAPACITY, warmup=0)
    module(*own_batch(0))
    before = held(module)
    module.eval()
    loss = module(*batch(3)).item() if dist.get_rank() == 0 else None
    return loss, all(torch.equal(value, before[name]) for name, value in held(module).items())


def test_one_rank_may_evaluate_alone(ranks):
    (loss, same), _ = ranks.run(evaluated_alone)
    assert loss > 0
    assert same


def evaluated_together():
    module = XBM(DIM, CAPACITY, warmup=0, dtype=torch.float64, shard=True)
    module(*own_batch(0))
    before = held(module)
    loss = module.eval()(*own_batch(1))
    return loss.item(), all(torch.equal(value, before[name]) for name, value in held(module).items())


def test_a_sharded_memory_is_evaluated_by_all(ranks):
    module = XBM(DIM, CAPACITY, warmup=0, dtype=torch.float64)
    parts = [[batch(10 * step + rank) for rank in range(2)] for step in range(2)]
    first, second = ([torch.cat(both) for both in zip(*one, strict=True)] for one in parts)
    module(*first)
    expected = module.eval()(*second).item()
    for loss, same in ranks.run(evaluated_together):
        assert loss == pytest.approx(expected, rel=1e-9)
        assert same


def filled(sharded):
    module = XBM(DIM, CAPACITY, warmup=0, shard=sharded)
    loader = [(*own_batch(step, n=2), torch.arange(2)) for step in range(1 + 2 * dist.get_rank())]  # unequal lengths
    offered = module.fill(lambda x: x, loader)
    return offered, module.labels, module.ids, int(module.count), int(module.step)


def test_filling_from_loaders_of_unequal_lengths(ranks):
    expected = torch.cat([batch(0, 2)[1], batch(1, 2)[1], batch(11, 2)[1], batch(21, 2)[1]])
    for offered, labels, ids, count, step in ranks.run(filled, False):
        assert (offered, count, step) == (8, 8, 0)
        torch.testing.assert_close(labels[:8], expected)
        assert ids[:8].tolist() == [0, 1] * 4
    found = ranks.run(filled, True)
    torch.testing.assert_close(torch.cat([labels for _, labels, *_ in found])[:8], expected)


def own_groups():
    """Let each rank train with a process group that holds only itself."""
    groups = [dist.new_group([rank]) for rank in range(dist.get_world_size())]
    with pytest.raises(ValueError, match="not among the ranks of the group"):
        XBM(DIM, CAPACITY, group=groups[1 - dist.get_rank()])
    module = XBM(DIM, CAPACITY, warmup=0, group=groups[dist.get_rank()])
    twin = copy.deepcopy(module)
    for one in (module, twin):
        one(*own_batch(0))
    return module.labels[:6], int(module.count), twin.group is module.group, int(twin.count)


def test_a_group_of_ones_own(ranks):
    for rank, (labels, count, same, copied) in enumerate(ranks.run(own_groups)):
        assert count == copied == 6
        assert same
        torch.testing.assert_close(labels, batch(rank)[1])


def learned():
    """Return the gradient of the loss's parameter."""
    torch.manual_seed(0)

    class Scaled(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = torch.nn.Parameter(torch.tensor(2.0, dtype=torch.float64))

        def forward(self, S, positive, negative):
            return ((self.scale * S - 1) ** 2 * positive + S.relu() * negative).sum(dim=1)

    module = XBM(DIM, CAPACITY, Scaled(), warmup=0, dtype=torch.float64)
    if dist.is_initialized():
        x, labels = own_batch(0)
    else:
        x, labels = (torch.cat(both) for both in zip(batch(0), batch(1), strict=True))
    module(x, labels).backward()
    return module.loss.scale.grad.item()


def test_a_losss_own_parameters_get_the_same_gradient_on_all(ranks):
    expected = learned()
    assert ranks.run(learned) == pytest.approx([expected] * 2, rel=1e-12)


def left(seconds):
    """Let rank 1 exit or hang; return the error of rank 0."""
    group = dist.new_group(timeout=timedelta(seconds=3))  # for calls only; starting may take longer
    module = XBM(DIM, CAPACITY, group=group)
    module(*own_batch(0))
    if dist.get_rank() == 1:
        if seconds is None:
            os._exit(1)
        time.sleep(seconds)
        return None
    return refusal(lambda: module(*own_batch(1)))


@pytest.mark.parametrize("seconds", [None, 8], ids=["dies", "hangs"])
def test_a_rank_that_leaves_is_an_error_that_names_xbm(seconds):
    with pool(2) as ranks:
        for pipe in ranks.pipes:
            pipe.send((left, (seconds,)))
        assert ranks.pipes[0].poll(60)
        (kind, text), problem = answer(ranks.pipes[0])
    assert problem is None
    assert kind == "RuntimeError"
    assert "XBM's 2 ranks could not compare their batches (this is rank 0): one of them has raised" in text


def states():
    """Return the whole state dict of a sharded memory, and the results of loading plain ones of two capacities."""
    module = XBM(DIM, CAPACITY, warmup=0, shard=True)
    for step in range(2):
        module(*own_batch(step))
    state = module.state_dict()
    whole = {name: value.full_tensor() if hasattr(value, "full_tensor") else value for name, value in state.items()}
    again = XBM(DIM, CAPACITY, warmup=0, shard=True)
    again.load_state_dict(whole)
    smaller = XBM(DIM, 8, warmup=0, shard=True)
    smaller.load_state_dict(whole)
    refused = refusal(lambda: smaller.load_state_dict(state))
    return {
        "whole": whole,
        "again": all(torch.equal(one, getattr(module, name)) for name, one in held(again).items()),
        "smaller": smaller.rows().labels,
        "refused": refused[1],
        "types": {name: type(value).__name__ for name, value in state.items()},
        "rows": module.rows().labels,
    }


def test_a_shards_state(ranks):
    found = ranks.run(states)
    module = XBM(DIM, CAPACITY, warmup=0)
    for step in range(2):
        module(*(torch.cat(both) for both in zip(batch(10 * step), batch(10 * step + 1), strict=True)))
    for one in found:
        torch.testing.assert_close(one["whole"]["embeddings"], module.embeddings)
        assert torch.equal(one["whole"]["labels"], module.labels)
        assert one["again"]
        assert "with the capacity it was saved with, got capacity 8 for 16 saved slots" in one["refused"]
        assert {one["types"][name] for name in ("embeddings", "labels", "ids", "stored_at")} == {"DTensor"}
        plain = XBM(DIM, CAPACITY)
        plain.load_state_dict(one["whole"])  # in one process
        assert torch.equal(plain.rows().labels, module.rows().labels)
    newest = torch.cat([one["smaller"] for one in found])
    assert torch.equal(newest, module.rows().labels[-8:])
    assert sorted(np.concatenate([one["rows"] for one in found])) == sorted(module.labels.tolist())


def constructed():
    return [
        refusal(lambda: XBM(DIM, 15, shard=True)),
        refusal(lambda: XBM(DIM, CAPACITY, "triplet", shard=True)),
        refusal(lambda: setattr(XBM(DIM, CAPACITY, shard=True), "objective", Objective(loss="triplet"))),
        refusal(lambda: XBM(DIM, CAPACITY, miner="margin", loss=lambda S, P, N: S.sum(1), shard=True)),
    ]


def test_what_cannot_be_sharded_is_refused(ranks):
    for odd, triplet, replaced, function in ranks.run(constructed):
        assert "capacity must be a multiple of the 2 ranks" in odd[1]
        assert "Triplet(margin=0.2, reduction='mean') needs whole rows" in triplet[1]
        assert replaced == triplet
        assert "<lambda>" in function[1]
    with pytest.raises(ValueError, match="init_process_group"):
        XBM(DIM, CAPACITY, shard=True)
