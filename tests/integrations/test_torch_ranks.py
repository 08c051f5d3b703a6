"""The PyTorch module on real ranks: every rank's memory and results equal those of one process."""

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.pair_losses import BY_NAME
from tests.processes import shared
from tests.strategies import named
from xbm import PairLoss
from xbm.integrations.torch import XBM
from xbm.memory_state import MemoryState

DIM, CAPACITY = 4, 16
TOLERANCE = {"rtol": 1e-9, "atol": 1e-12}


@pytest.fixture(scope="module", params=[2, 4])
def ranks(request):
    return shared(request.param)


@st.composite
def histories(draw, ranks):
    """Draw the ranks' inputs for a few steps: any sizes, with or without ids, masks and keys."""
    kinds = draw(st.sets(st.sampled_from(["ids", "enqueue", "keys", "no labels"])))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))

    def batch():
        n = draw(st.sampled_from([0, 1, 3, 5]))
        x, labels = rng.normal(size=(n, DIM)), rng.integers(3, size=n)
        more = {"ids": rng.integers(-1, 30, size=n), "enqueue": rng.random(n) < 0.8, "keys": rng.normal(size=(n, DIM))}
        given_ones = {name: more[name] for name in more if name in kinds}
        if "no labels" in kinds and kinds & {"ids", "keys"}:
            return x, None, given_ones
        return x, labels, given_ones

    return [[batch() for _ in range(ranks)] for _ in range(draw(st.integers(2, 5)))]


def tensors(call):
    """Return a call's arguments as tensors, and the ones that require a gradient."""
    x, labels, more = call
    x = torch.tensor(x, requires_grad=True)
    more = {name: torch.tensor(value, requires_grad=name == "keys") for name, value in more.items()}
    return (x, None if labels is None else torch.tensor(labels), more), [
        x,
        *(more[name] for name in more if name == "keys"),
    ]


def taken(history, options):
    """Take the steps on this rank; return each step's loss, gradients and report, and the memory."""
    module, found = XBM(DIM, CAPACITY, warmup=1, dtype=torch.float64, **options), []
    for calls in history:
        (x, labels, more), leaves = tensors(calls[dist.get_rank()] if dist.is_initialized() else calls)
        loss = module(x, labels, **more)
        loss.backward()
        report = dict(module.report)
        found.append((loss.item(), [leaf.grad.numpy() for leaf in leaves], report))
    return found, {name: getattr(module, name).numpy() for name in MemoryState._fields}


def concatenated(calls):
    """Return the concatenated input of one process."""
    xs, labels, more = zip(*calls, strict=True)
    labels = None if labels[0] is None else np.concatenate(labels)
    return np.concatenate(xs), labels, {name: np.concatenate([one[name] for one in more]) for name in more[0]}


def check(ranks, history, options, *, sharded):
    """Compare the ranks' results with one process on the concatenated batches."""
    many = ranks.run(taken, history, options | ({"shard": True} if sharded else {}))
    steps, memory = taken([concatenated(calls) for calls in history], options)
    for i, (loss, gradients, report) in enumerate(steps):
        for found, _ in many:
            np.testing.assert_allclose(found[i][0], loss, **TOLERANCE)
            for name, figure in report.items():
                if not (sharded and name.startswith("drift")):
                    np.testing.assert_allclose(found[i][2][name], figure, rtol=1e-5, err_msg=name)
        assert len({found[i][0] for found, _ in many}) == 1  # bit-identical
        for k, gradient in enumerate(
            gradients
        ):  # each rank's gradient is multiplied by the number of ranks, by which DDP divides
            whole = np.concatenate([found[i][1][k] for found, _ in many]) / ranks.size
            np.testing.assert_allclose(whole, gradient, **TOLERANCE)
    for name, value in memory.items():
        held = [state[name] for _, state in many]
        if sharded and value.shape:
            held = [np.concatenate(held)]
        for one in held:
            np.testing.assert_array_equal(one, held[0], err_msg=name)
            np.testing.assert_allclose(one, value, **(TOLERANCE if name == "embeddings" else {"rtol": 0}), err_msg=name)


@pytest.mark.parametrize("sharded", [False, True], ids=["replicated", "sharded"])
@settings(max_examples=10)
@given(data=st.data())
def test_ranks_are_one_process(ranks, sharded, data):
    history = data.draw(histories(ranks.size))
    options = data.draw(
        st.sampled_from(
            [{}, {"copies": "replace"}, {"loss": "multi-similarity", "miner": "hard-negatives"}, {"in_batch": False}]
        )
    )
    check(ranks, history, options, sharded=sharded)


@pytest.mark.parametrize("options", BY_NAME, ids=named)
def test_every_loss_and_miner(options):
    """Losses that merge by blocks also work sharded; the others raise an error that names them."""
    rng, two = np.random.default_rng(0), shared(2)

    def batch():
        x, labels = rng.normal(size=(6, DIM)), rng.integers(3, size=6)
        return x, labels, {}

    history = [[batch(), batch()] for _ in range(3)]
    check(two, history, options, sharded=False)
    criterion = XBM(DIM, CAPACITY, **options).objective.criterion
    if isinstance(criterion, PairLoss):
        check(two, history, options, sharded=True)
    else:
        (problem, _) = two.run(refusal_of_a_shard, options)
        assert repr(criterion) in problem
        assert "whole rows" in problem


def refusal_of_a_shard(options):
    with pytest.raises(ValueError, match="shard=False") as refusal:
        XBM(DIM, CAPACITY, shard=True, **options)
    return str(refusal.value)
