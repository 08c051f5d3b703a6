"""The public types, checked by mypy on user code."""

import json
from pathlib import Path

import pytest
from mypy import api

HEAD = """
from typing import assert_type

import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

import xbm
from xbm import metrics, sampling
from xbm.backends import Array
from xbm.integrations.torch import XBM
from xbm.losses import Side
from xbm.reductions import Results, Summaries

x, y = torch.randn(4, 8), torch.arange(4)
module = XBM(dim=8, capacity=64)
objective = xbm.Objective(loss="supcon", miner=xbm.MultiSimilarityMiner())
memory = xbm.init(capacity=64, dim=8)
state = objective.init(capacity=64, dim=8)
"""

PROMISES = """
assert_type(module(x, y, ids=y, keys=x), Tensor)
assert_type(module.forward(x, y, enqueue=y > 0), Tensor)
assert_type(module(x, ids=y), Tensor)
assert_type(module.report["fill"], float)
assert_type(module.fill(torch.nn.Linear(8, 8), DataLoader(TensorDataset(x, y))), int)
assert_type(module.embeddings, Tensor)
assert_type(module.capacity, int)
assert_type(module.rows(), xbm.Rows)
assert_type(module.half().to("cpu"), XBM)

assert_type(memory, xbm.MemoryState)
assert_type(xbm.enqueue(memory, x, y, on_nonfinite="raise"), xbm.MemoryState)
assert_type(xbm.rows(memory), xbm.Rows)
assert_type(objective.init(capacity=64, dim=8), xbm.State)
assert_type(objective.begin(memory), xbm.State)
assert_type(objective.step(state, x, y), xbm.Step)
assert_type(objective.step(state, x, y).state, xbm.State)
assert_type(objective.step(state, x, y).state.memory, xbm.MemoryState)
assert_type(objective.step(state, x, y).report, xbm.Report)
assert_type(xbm.drift.returning(memory, x, y), xbm.drift.Drift)
assert_type(xbm.drift.Probe(apart=[10]).record(0, x), dict[int, float])
assert_type(metrics.retrieval(x, y, k=[1, 10]).recall, dict[int, float])
DataLoader(TensorDataset(x, y), batch_sampler=sampling.PKSampler(y, classes=2, instances=1))


def pull(S: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
    return ((1 - S) * positive).sum(dim=1)


class Learned(torch.nn.Module):
    def forward(self, S: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
        return pull(S, positive, negative)


class Spread(xbm.PairLoss):
    needs_cosines = True

    def summarise(self, block: xbm.Block, r: Results) -> Summaries:
        return {"all": xbm.LogSumExp.of(block.S, block.N), "hardest": xbm.TopK.of(block.S, block.N, block)}

    def value(self, r: Results) -> Array:
        return r["all"]

    def weights(self, block: xbm.Block, r: Results) -> Array:
        return block.N * torch.exp(block.S - r["all"][:, None])


class Push(xbm.SidedPairLoss):
    negative_floor = 0.5

    def positive(self, S: Tensor, P: Tensor) -> Side:
        return Side(0 * P, {})

    def negative(self, S: Tensor, N: Tensor) -> Side:
        return Side(N, {"sum": xbm.Sum.of(N * S)})

    def value(self, r: Results) -> Tensor:
        return torch.as_tensor(r["sum"])

    def factors(self, r: Results) -> tuple[Tensor, Tensor]:
        return torch.zeros(4), torch.ones(4)


for loss in ("contrastive", xbm.Contrastive(reduction="sum"), Spread(), Push()):
    XBM(8, 64, loss, dtype=torch.bfloat16, device="cpu", copies="keep")
XBM(8, 64, pull, miner="multi-similarity", device=torch.device("cpu"))
XBM(8, 64, Learned())
XBM(8, 64, "contrastive", reduction="sum")
XBM(8, 64, objective=objective)
XBM(8, 64, warmup=2)
module.objective = objective
"""

MISTAKES = """
XBM(8)
XBM(8, "64")
XBM(8, 64, 0.1)
XBM(8, 64, lambda S: S)
XBM(8, 64, reduction="median")
XBM(8, 64, copies="drop")
XBM(8, 64, wieght=2.0)
XBM(8, 64, warmup="2")
XBM(8, 64, objective="supcon")
XBM(8, 64, on_nonfinite="ignore")
module()
module(x, y, id=y)
module(x, y.tolist())
module(x, y) + "loss"
module.report["fill"] = 0.0
xbm.init(capacity=64)
xbm.init(capacity=64, dim=8, xp="torch")
xbm.enqueue(x, y)
xbm.enqueue(module, x, y)
xbm.Objective("supcon")
xbm.Objective(copies=True)
xbm.Objective(warmup=1.5)
xbm.Contrastive(reduction="max")
objective.step(state, x, y).grad
objective.step(x, y, state=state)
objective.step(memory, x, y)
xbm.PairLoss()
"""


@pytest.fixture
def complaints(tmp_path, monkeypatch):
    """Return mypy's errors for a program, as {(line, error code)}, with this project's options and cache."""
    monkeypatch.chdir(Path(__file__).parents[1])

    def check(program):
        path = tmp_path / "program.py"
        path.write_text(HEAD + program)
        out, err, _ = api.run(["--output", "json", "--no-error-summary", str(path)])
        assert err == ""
        found = [json.loads(line) for line in out.splitlines()]
        assert {message["file"] for message in found} <= {str(path)}
        return found

    return check


def test_good_programs_pass_with_exact_types(complaints):
    assert complaints(PROMISES) == []


def test_each_mistake_is_reported(complaints):
    lines = (HEAD + MISTAKES).splitlines()
    first = lines.index("XBM(8)")
    found = {lines[message["line"] - 1] for message in complaints(MISTAKES) if message["severity"] == "error"}
    assert found == set(lines[first:])
