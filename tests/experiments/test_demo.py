"""The demo: its output, its files, its errors, and that its runs differ only in the memory."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from xbm.experiments import engines, glyphs
from xbm.experiments.cli import main
from xbm.experiments.demo import one_run, plans
from xbm.experiments.plan import FRAMEWORKS, Plan, plan_of


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return glyphs.split(glyphs.load(quick=True, cache=tmp_path_factory.mktemp("cache")))


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """Keep the user's cache folder untouched."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HOME", str(tmp_path))


def test_quick_demo_ends_with_a_table_and_a_report(tmp_path):
    result = CliRunner().invoke(main, ["demo", "--quick", "--steps", "20", "--out", str(tmp_path / "a" / "b")])
    assert result.exit_code == 0, result.output
    for column in ("R@1", "MAP@R", "seconds", "memory MB", "in-batch only", "compensated memory", "last minus first"):
        assert column in result.output
    assert f"torch {torch.__version__}" in result.output
    for figure in ("loss", "fill", "pairs", "drift"):
        assert figure in result.output
    page = (tmp_path / "a" / "b" / "report.html").read_text()
    assert "in-batch only" in page
    assert f"torch {torch.__version__}" in page
    assert [path.name for path in (tmp_path / "a" / "b").iterdir()] == ["report.html"]


def test_the_runs_differ_by_the_memory_alone(data):
    plan = Plan(steps=20, warmup=10, capacity=64, evaluate_every=10)
    without, with_memory, moving = (one_run(each, *data) for each in plans(plan))
    assert without.figures["batch_loss"][0] == with_memory.figures["batch_loss"][0]  # the last warm-up step
    assert without.figures["batch_loss"][1] != with_memory.figures["batch_loss"][1]
    assert with_memory.figures["memory_loss"][0] == 0 < with_memory.figures["memory_loss"][1]
    assert without.recall[:2] == with_memory.recall[:2]
    assert without.memory_megabytes == 0 < with_memory.memory_megabytes
    assert with_memory.figures["fill"] == [1.0, 1.0]
    assert moving.figures["batch_loss"][0] == with_memory.figures["batch_loss"][0]  # still in the warm-up
    assert moving.figures["memory_loss"][1] != with_memory.figures["memory_loss"][1]
    assert np.isnan(with_memory.figures["drift_after"]).all()
    assert (np.asarray(moving.figures["drift_after"]) <= moving.figures["drift_before"]).all()


def test_a_seed_fixes_the_run(data):
    plan = Plan(steps=10, warmup=2, capacity=64, evaluate_every=10)
    first, again, other = (one_run(one, *data) for one in (plan, plan, Plan(**vars(plan) | {"seed": 1})))
    assert first.figures["batch_loss"] == again.figures["batch_loss"]
    np.testing.assert_array_equal(first.neighbours, again.neighbours)
    assert first.figures["batch_loss"] != other.figures["batch_loss"]


@pytest.mark.parametrize(
    ("options", "steps", "warmup"),
    [({"steps": None}, 2500, 300), ({"steps": 100}, 100, 25), ({"steps": 1}, 1, 0), ({"steps": 5000}, 5000, 300)],
)
def test_the_warmup_is_a_quarter_of_the_steps_at_most(options, steps, warmup):
    plan = plan_of(seed=0, quick=False, **options)
    assert (plan.steps, plan.warmup) == (steps, warmup)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--steps", "0"], "0 is not in the range x>=1"),
        (["--seed", "-1"], "-1 is not in the range 0<=x<=4294967295"),
        (["--steps", "many"], "'many' is not a valid integer"),
        (["--out", "taken"], "is a file"),
        (["--out", "taken/below"], "cannot write to taken/below: Not a directory"),
        (["--capacity", "8"], "No such option"),
        (["--framework", "mxnet"], "'mxnet' is not one of 'torch', 'keras', 'jax'"),
    ],
)
def test_refuses_with_a_sentence(arguments, sentence, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken").write_text("mine")
    result = CliRunner().invoke(main, ["demo", "--quick", *arguments])
    assert result.exit_code == 2
    assert sentence in result.output
    assert "Traceback" not in result.output
    assert (tmp_path / "taken").read_text() == "mine"


def test_the_folders_own_files_are_left_alone(tmp_path):
    mine = tmp_path / ".writable"
    mine.write_text("mine")
    assert CliRunner().invoke(main, ["demo", "--quick", "--steps", "1", "--out", str(tmp_path)]).exit_code == 0
    assert mine.read_text() == "mine"


def test_without_its_packages_the_command_says_what_to_install():
    program = "import sys; sys.modules['click'] = None; from xbm.__main__ import main; main()"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert "pip install xbm[demo]" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(("command", "option"), [("demo", "--quick"), ("train", "--resume"), ("eval", "--data")])
def test_help_loads_no_framework(command, option):
    program = """
import sys
from xbm.experiments.cli import main
try:
    main([sys.argv[1], "--help"])
finally:
    assert not {"torch", "keras", "tensorflow", "jax"} & set(sys.modules)
"""
    run = [sys.executable, "-c", program, command]
    assert option in subprocess.run(run, capture_output=True, text=True, check=True).stdout


def test_what_the_frameworks_share_imports_none():
    program = """
import sys
from xbm.experiments import demo, training
assert not {"torch", "keras", "tensorflow", "jax"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_every_framework_has_its_engine(framework):
    source = Path(engines.__file__).with_name(f"{framework}.py").read_text()
    for name in ("class Engine", "def one_thread(", "def versions(", "def embed(", "def figures("):
        assert name in source
