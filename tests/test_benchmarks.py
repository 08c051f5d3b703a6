"""The benchmark command runs end to end on tiny sizes, and its contenders are comparable. No timings are checked."""

import json

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from benchmarks import contenders, dense, drift, machine, ranks
from benchmarks import losses as every_loss
from benchmarks.__main__ import BENCHMARKS, main
from benchmarks.data import Case, products_like
from benchmarks.tables import Table, megabytes, span
from benchmarks.timing import Times, interleaved
from xbm import Compensation, losses
from xbm.experiments.engines.torch import as_input
from xbm.experiments.training import Batches

TINY = (
    "--rounds 2 --sizes 64,128 --batch 8 --dim 16 --active 0.1 --peak-sizes 256 --peak-batch 16 "
    "--items 60 --features 8 --searches 1 --ranks 2"
)


@pytest.fixture
def alone(monkeypatch):
    """Pretend that no peer is installed."""
    monkeypatch.setattr(machine, "installed", lambda package: False)


@pytest.mark.usefixtures("alone")
def test_one_command_prints_every_table_and_names_absent_peers(tmp_path):
    path = tmp_path / "figures.json"
    done = CliRunner().invoke(main, f"{TINY} --json {path}", catch_exceptions=False)
    assert done.exit_code == 0
    found = json.loads(path.read_text())
    assert list(found) == ["machine", *BENCHMARKS]
    for name in BENCHMARKS:
        assert found[name]["title"] in done.output
    assert done.output.count("not installed") >= 2 + 2 + 1 + 2
    assert [row["M"] for row in found["step"]["figures"]] == [64, 128]
    for row in found["step"]["figures"]:
        assert 0 < row["xbm"]["fastest"] <= row["xbm"]["median"]
        assert row["left_out"] == {"pytorch-metric-learning": "not installed"}
    assert [row["xbm"] >= 0 for row in found["memory"]["figures"]] == [True]
    assert 0 < found["retrieval"]["figures"][0]["recall_at_1"] <= 1
    check_ranks(found["ranks"]["figures"])


def check_ranks(figures):
    """Two ranks share the products, and the rows if sharded; the bytes sent do not depend on the capacity."""
    by = {(row["memory"], row["M"]): row for row in figures}
    for form, share in (("one process", 1), ("replicated", 1), ("sharded", 2)):
        small, large = by[form, 64], by[form, 128]
        assert (small["rows"], large["rows"]) == (64 // share, 128 // share)
        assert small["sent"] == large["sent"]
        assert large["bytes"] == large["rows"] * (4 * 16 + 3 * 8)
    of_one, both = by["one process", 128], [by[form, 128] for form in ("replicated", "sharded")]
    assert of_one["sent"] == 0
    for row in both:
        of_rows = 4 * (2 * 4 * 16 + 4 * 4 * 4 + 8)  # 4 anchors and gradients, sums of both terms and back, labels
        assert 0 < row["sent"] - of_rows < 200  # the ranks' exchange of shapes and options
        assert 0.4 < row["products"] / of_one["products"] < 0.7


@pytest.mark.usefixtures("alone")
def test_a_named_benchmark_is_printed_alone_and_as_markdown():
    done = CliRunner().invoke(main, f"enqueue --markdown {TINY}", catch_exceptions=False)
    assert "### The enqueue alone, B = 8, D = 16\n\n| M | xbm |" in done.output
    assert done.output.count("###") == 1


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--sizes", "64,many"], "expected comma-separated ints of at least 1, got '64,many'"),
        (["--active", "2"], "expected comma-separated floats of at least 0 and at most 1, got '2'"),
        (["--sizes", "32"], "the batch must be at most the capacity, got B = 64 and M = 32"),
        (["--loss", "best"], "'best' is not one of"),
        (["speed"], "'speed' is not one of"),
    ],
)
def test_what_cannot_be_measured_is_refused(arguments, sentence):
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == 2
    assert sentence in " ".join(done.output.replace("│", " ").split())


@pytest.mark.parametrize(("aimed", "least", "most"), [(0, 0, 1e-4), (0.1, 0.08, 0.12), (1, 0.9999, 1)])
def test_the_data_have_the_share_of_active_negatives_they_are_asked_for(aimed, least, most):
    assert least <= Case(8192, aimed).measured_active() <= most


def test_batches_are_classes_of_four_and_the_memory_is_full():
    case = Case(5000, 0.1)
    x, labels = case.inputs(3)
    assert x.shape == (64, 128)
    assert torch.unique(labels, return_counts=True)[1].tolist() == [4] * 16
    assert sum(len(part) for _, part in case.rows()) == 5000
    assert not torch.equal(case.inputs(4)[1], labels)


def test_the_set_to_search_has_classes_like_products():
    rows, labels = products_like(5000, 8)
    assert rows.shape == (5000, 8)
    assert 5 < 5000 / len(torch.unique(labels)) < 5.7


@pytest.mark.parametrize("name", losses.LOSSES)
@pytest.mark.parametrize("seed", range(3))
def test_every_loss_is_its_formula_differentiated_by_autograd(name, seed):
    assert every_loss.error(name, torch.float64, seed=seed) < 1e-10
    assert every_loss.error(name, torch.float32, seed=seed) < 1e-4


@pytest.mark.parametrize("name", losses.LOSSES)
@pytest.mark.parametrize("shape", [(6, 40), (9, 33), (16, 20)])
def test_every_loss_is_its_formula_where_a_side_has_no_pairs(name, shape):
    B, M = shape
    generator = torch.Generator().manual_seed(M)
    S = 2 * torch.rand(shape, generator=generator, dtype=torch.float64) - 1
    P = torch.randint(5, (B, 1), generator=generator) == torch.arange(M) % 5
    N = ~P
    P[0], N[1] = False, False
    P[2] = N[2] = False
    assert every_loss.difference(name, S, P, N) < 1e-10


def test_code_is_counted_without_its_docstrings():
    class Two:
        """Docstrings are not counted."""

        one = 1  # comments are not counted either

    assert every_loss.lines(Two) == 2


@pytest.mark.parametrize("loss", dense.LOSSES)
@pytest.mark.parametrize("active", [0.1, 1])
def test_dense_autograd_is_the_same_step(loss, active):
    ready, _ = contenders.line_up(Case(256, active, batch=16, dim=16, loss=loss), limit=60)
    assert {contenders.OURS, contenders.DENSE} <= ready.keys()


def test_contenders_that_disagree_are_not_timed(monkeypatch):
    monkeypatch.setitem(dense.LOSSES, "contrastive", lambda S, P, N, loss: (S * N).mean(dim=1))
    with pytest.raises(ValueError, match="xbm and dense autograd must agree to a relative 1e-3, got loss"):
        contenders.line_up(Case(256, 0.1, batch=16, dim=16), limit=60)


def test_contenders_that_do_not_fit_or_take_too_long_are_named(monkeypatch):
    case = Case(256, 0.1, batch=16, dim=16)
    _, reasons = contenders.line_up(case, limit=0)
    assert reasons["xbm"] == "0 s a call"
    monkeypatch.setattr(machine, "available", lambda device: 0)
    assert contenders.left_out("dense autograd", Case(2**20, 0.1)) == "needs 2 GB of 0"
    assert contenders.left_out("xbm", Case(2**20, 0.1)) is None


def test_forms_that_cannot_be_measured_are_named():
    sharded = ranks.Form(2, True)
    assert sharded.left_out(Case(8, 0.1, loss="triplet")) == "triplet needs whole rows"
    assert sharded.left_out(Case(9, 0.1)) == "capacity not divisible by ranks"
    assert ranks.Form(2, False).left_out(Case(9, 0.1, loss="triplet")) is None


def test_forms_that_disagree_are_refused():
    found = [[{"loss": 1.0}, {"loss": loss}] for loss in (1.0, 1.1)]
    with pytest.raises(ValueError, match=r"must have the loss of one process, 1.0, at M = 8, got .*1\.1"):
        ranks.agreed(Case(8, 0.1), [ranks.ONE, ranks.Form(2, True)], found)


def test_contenders_take_turns_on_the_same_inputs():
    calls = []
    ready = {name: lambda number, name=name: calls.append((name, number)) for name in "ab"}
    times = interleaved(ready, lambda number: (number,), rounds=3, wait=lambda: None)
    assert calls == [("a", 0), ("b", 0), ("b", 1), ("a", 1), ("a", 2), ("b", 2)]
    assert all(0 <= one.fastest <= one.median for one in times.values())


def test_peak_memory_is_seen():
    case = {"capacity": 65536, "active": 0.1, "batch": 256}
    found = machine.apart("benchmarks.memory", 1, name="dense autograd", case=case)
    assert found >= 256 * 65536 * (4 + 4)  # at least the similarities and their gradient


def test_a_child_that_fails_says_why():
    reason = machine.apart("benchmarks.memory", 1, name="xbm", case={"size": 1})
    assert reason.endswith("unexpected keyword argument 'size'")
    assert megabytes(reason) == f"- ({reason})"


def test_tables():
    table = Table("A", ("M", "time"), "Notes.")
    table.add({"M": 1}, "1", span(0.0123))
    assert table.markdown() == "### A\n\n| M | time |\n| ---: | ---: |\n| 1 | 12.3 ms |\n\nNotes.\n"
    assert [span(one) for one in (2.5, 4e-5)] == ["2.5 s", "40 us"]
    assert Times(3.0, 4.0).times(Times(1.5, 1.0)) == (2.0, 4.0)
    with pytest.raises(ValueError, match="needs 2 cells, got 1"):
        table.add({}, "1")


@pytest.fixture
def alphabets(tmp_path):
    """Return the path of ten alphabets of three characters with six pictures each, to be split by alphabet."""
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(30), 6)
    images = (rng.random((30, 8, 8))[labels] * 80 + rng.random((180, 8, 8)) * 175).astype(np.uint8)
    path = tmp_path / "tiny.npz"
    np.savez(path, images=images, labels=labels, alphabet=labels // 3)
    return path


def test_drift_trains_every_form_and_keeps_the_runs(alphabets, tmp_path):
    path = tmp_path / "runs.jsonl"
    names = ["no memory", "oracle", "follow", "map, 32 every 8", "larger batch", "ramp 500", "follow, settle"]
    command = ["--data", str(alphabets), "--capacity", "64", "--steps", "17", "--json", str(path)]
    done = CliRunner().invoke(drift.main, [*names, *command], catch_exceptions=False)
    assert done.exit_code == 0
    runs = [json.loads(line) for line in path.read_text().splitlines()]
    assert [run["form"] for run in runs] == names
    assert all(0 < run["test"]["map_at_r"] <= 1 for run in runs)
    assert len({run["held_out"]["map_at_r"] for run in runs}) > 1
    by_form = {run["form"]: run for run in runs}
    assert by_form["map, 32 every 8"]["passes"] == 4 / 32
    assert not np.isnan(by_form["map, 32 every 8"]["figures"]["drift_before"])
    counted = drift.Studied(drift.Form(**drift.FORMS["follow, settle"]), np.zeros((1, 1, 8, 8), np.uint8)).xbm.objective
    assert (counted.settle, counted.warmup, counted.compensate) == (drift.SETTLED, 0, Compensation(follow=True))
    shown = CliRunner().invoke(drift.main, ["--json", str(path), "--part", "test"], catch_exceptions=False)
    assert "Test classes" in shown.output
    assert all(name in shown.output for name in names)


def test_the_share_of_the_oracles_gain_is_of_the_seeds_that_all_have():
    def run(form, seed, score):
        scores = {"recall_at_1": score, "map_at_r": score}
        about = {"data": "glyphs", "capacity": 64, "passes": 0, "seconds": 1}
        return about | {"form": form, "seed": seed, "test": scores}

    runs = [run("no memory", 0, 0.2), run("oracle", 0, 0.4), run("follow", 0, 0.25), run("follow", 1, 0.9)]
    rows = {cells[2]: cells for cells in drift.table(runs, "test").rows}
    assert [rows[name][6] for name in ("no memory", "follow", "oracle")] == ["0 %", "25 %", "100 %"]
    assert rows["follow"][3:5] == ("2", "0.575 (0.460)")


def test_the_oracles_memory_is_what_the_network_makes_of_its_samples(alphabets):
    parts = drift.parts_of(alphabets)
    form = drift.Form(name="oracle", capacity=32, classes=4, instances=2, steps=9, refresh=1)
    engine = drift.Studied(form, parts[0].images)
    for batch in Batches(form, parts[0]):
        engine.step(*batch)
    before = [buffer.clone() for buffer in engine.encoder.buffers()]
    engine._refresh()
    assert all(map(torch.equal, engine.encoder.buffers(), before))
    ids = engine.xbm.ids.numpy()
    with torch.no_grad():
        fresh = torch.nn.functional.normalize(engine.encoder(as_input(parts[0].images[ids], torch.device("cpu"))))
    torch.testing.assert_close(engine.xbm.embeddings, fresh)
