"""`xbm eval`: the metrics of a run's encoder, on its own test classes or on other pictures."""

import json

import numpy as np
import pytest
from PIL import Image

from xbm.experiments import checkpoint

OPTIONS = ["--steps", "6", "--classes", "3", "--instances", "2", "--dim", "8", "--capacity", "32", "--threads", "1"]


@pytest.fixture(scope="module")
def out(data, tmp_path_factory):
    """Return the folder of a finished run."""
    from click.testing import CliRunner

    from xbm.experiments.cli import main

    out = tmp_path_factory.mktemp("out") / "run"
    result = CliRunner().invoke(main, ["train", str(data), "--out", str(out), *OPTIONS])
    assert result.exit_code == 0, result.output
    return out


def row(result):
    """Return the numbers of the printed table."""
    assert result.exit_code == 0, result.output
    (line,) = [line for line in result.output.splitlines() if line.startswith("│")]
    return line.replace("│", " ").split()


def test_its_own_data_are_measured_on_the_test_classes(xbm_command, out, data):
    found = json.loads((out / "metrics.json").read_text())["test"]
    expected = [found["recall_at"]["1"], found["recall_at"]["10"], found["r_precision"], found["map_at_r"]]
    for run in (out, out / "checkpoint.safetensors"):
        result = xbm_command("eval", run, "--data", data)
        assert row(result) == ["5", "30", *(f"{value:.3f}" for value in expected)]
        assert "test classes, encoder after step 6" in result.output


@pytest.mark.parametrize(("part", "classes"), [("train", 5), ("validation", 2), ("test", 5), ("all", 12)])
def test_a_part_can_be_named(xbm_command, out, data, part, classes):
    result = xbm_command("eval", out, "--data", data, "--classes", part, "--k", "1", "--k", "2", "--k", "4")
    assert row(result)[:2] == [str(classes), str(6 * classes)]
    assert all(column in result.output for column in ("R@1", "R@2", "R@4", "R-Precision", "MAP@R"))
    assert "R@10" not in result.output


def test_the_curve_is_that_of_the_validation_classes(xbm_command, out, data):
    *_, last = json.loads((out / "metrics.json").read_text())["validation"]["recall_at_1"]
    assert row(xbm_command("eval", out, "--data", data, "--classes", "validation"))[2] == f"{last:.3f}"
    assert row(xbm_command("eval", out, "--data", data, "--classes", "test"))[2] != f"{last:.3f}"


def test_other_data_are_measured_whole(xbm_command, refused, out, arrays, tmp_path):
    other = tmp_path / "other.npz"
    np.savez(other, images=arrays["images"][::-1], labels=arrays["labels"])
    assert row(xbm_command("eval", out, "--data", other))[:2] == ["12", "72"]
    assert "does not hold the run's pictures, so it has no test classes" in refused(
        "eval", out, "--data", other, "--classes", "test"
    )


def test_pictures_of_another_shape_are_refused(xbm_command, refused, out, arrays, tmp_path):
    other = tmp_path / "other.npz"
    np.savez(other, images=arrays["images"].repeat(2, axis=2), labels=arrays["labels"])
    sentence = (
        "expected pictures of 12 x 12 pixels, 1 channels, as in the run, got 24 x 12 pixels, 1 channels in {}: "
        "resize them with --size"
    )
    assert sentence.format(other) in refused("eval", out, "--data", other)
    assert row(xbm_command("eval", out, "--data", other, "--size", "12"))[:2] == ["12", "72"]


def test_what_is_no_run_is_refused(refused, out, data, tmp_path):
    assert "no checkpoint found at" in refused("eval", tmp_path, "--data", data)
    assert "is not an xbm checkpoint" in refused("eval", data, "--data", data)
    assert "does not exist" in refused("eval", tmp_path / "nothing", "--data", data)
    assert "does not exist" in refused("eval", out, "--data", tmp_path / "nothing")
    assert "device 'cuda:99' is not available" in refused("eval", out, "--data", data, "--device", "cuda:99")
    assert "0 is not in the range x>=1" in refused("eval", out, "--data", data, "--k", "0")
    for name in "ab":
        (tmp_path / name).mkdir()
        for i in range(2):
            Image.new("RGB", (12, 12), (9, 5, 2)).save(tmp_path / name / f"{i}.png")
    assert "got 12 x 12 pixels, 3 channels in" in refused("eval", out, "--data", tmp_path)


@pytest.mark.parametrize("change", [{"config": {}}, {"data": {}}, {"step": None}, {"config": {"network": "nope"}}])
def test_a_checkpoint_whose_values_were_changed_is_refused(refused, out, data, tmp_path, change):
    tensors, values = checkpoint.read(out / checkpoint.NAME)
    checkpoint.write(tmp_path / "changed", tensors, values | change)
    assert "is damaged or was modified" in refused("eval", tmp_path / "changed", "--data", data)
    checkpoint.write(tmp_path / "changed", {"encoder.weight": next(iter(tensors.values()))}, values)
    assert "is damaged or was modified" in refused("eval", tmp_path / "changed", "--data", data)


def test_the_runs_files_are_left_as_they_are(xbm_command, out, data):
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in out.iterdir()}
    xbm_command("eval", out, "--data", data)
    assert {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in out.iterdir()} == before
