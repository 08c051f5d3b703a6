"""`xbm train`: the files of a run, interrupting and resuming it, and user errors."""

import json
import os
import re
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import xbm
from xbm.experiments import checkpoint, runs
from xbm.experiments.cli import main
from xbm.experiments.plan import PRECISIONS
from xbm.losses import LOSSES

OPTIONS = ["--steps", "24", "--classes", "3", "--instances", "2", "--dim", "8", "--capacity", "32"]
OPTIONS += ["--warmup", "4", "--shift", "1", "--threads", "1", "--follow", "--probes", "8", "--every", "3"]
FILES = {"checkpoint.safetensors", "config.json", "metrics.json", "report.html"}


@pytest.fixture
def train(xbm_command, tmp_path, data):
    """Return a function that runs `xbm train`, by default for a few steps on the small data set."""

    def run(*arguments, out="run", source=data, options=OPTIONS):
        result = xbm_command("train", *([source] if source else []), "--out", tmp_path / out, *options, *arguments)
        result.out = tmp_path / out
        return result

    return run


@pytest.fixture
def interrupt(monkeypatch):
    """Return a function that makes every run call `action` after a given step."""
    real = runs.shown

    def at(step, action):
        def shown(*arguments):
            show = real(*arguments)

            def also(now):
                show(now)
                if now == step:
                    action()

            return also

        monkeypatch.setattr(runs, "shown", shown)

    yield at
    monkeypatch.setattr(runs, "shown", real)


def snapshot(folder):
    """Return the content and the modification time of every file in a folder."""
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.rglob("*") if path.is_file()}


def assert_same_end(one, other):
    """Check that two runs ended with bit-identical tensors, curves and metrics."""
    (tensors, values), (others, other_values) = (checkpoint.read(out / checkpoint.NAME) for out in (one, other))
    assert tensors.keys() == others.keys()
    for name, tensor in tensors.items():
        torch.testing.assert_close(tensor, others[name], rtol=0, atol=0, msg=name)
    for name in ("step", "scaler", "curves"):
        assert values[name] == other_values[name]
    metrics, other_metrics = (json.loads((out / "metrics.json").read_text()) for out in (one, other))
    assert metrics | {"seconds": 0} == other_metrics | {"seconds": 0}


def in_a_new_process(*arguments):
    path = os.pathsep.join(filter(None, [str(Path(xbm.__file__).parents[1]), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-m", "xbm", *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, env=os.environ | {"PYTHONPATH": path}, **pipes)


def test_what_a_run_leaves_behind(train, data):
    result = train()
    assert result.exit_code == 0, result.output
    assert {path.name for path in result.out.iterdir()} == FILES
    for part, classes, count in (("Train", 5, 30), ("Validation", 2, 12), ("Test", 5, 30)):
        assert re.search(rf"{part} +{classes} classes +{count} pictures", result.output)
    record = json.loads((result.out / "config.json").read_text())
    config = record["config"]
    expected = {"steps": 24, "warmup": 4, "evaluate_every": 3, "reduction": "mean", "miner": None, "data": str(data)}
    assert expected.items() <= config.items()
    assert {"xbm", "torch", "numpy", "python"} == record["versions"].keys()
    assert record["data"]["shape"] == [72, 1, 12, 12]
    metrics = json.loads((result.out / "metrics.json").read_text())
    assert metrics["validation"]["steps"] == list(range(0, 25, 3))
    assert (metrics["test"]["classes"], metrics["test"]["pictures"], metrics["steps"]) == (5, 30, 24)
    recall = metrics["test"]["recall_at"]
    assert 0 < metrics["test"]["map_at_r"] <= recall["1"] <= recall["10"] <= 1
    page = (result.out / "report.html").read_text()
    assert "R@1 on the validation classes" in page
    assert "10 steps apart" in page
    assert f"{recall['1']:.3f}" in page


@pytest.mark.parametrize("command", ["train", "eval"])
def test_every_option_is_in_the_docs(command):
    page = (Path(__file__).parents[2] / "docs" / "train.md").read_text()
    options = [option for one in main.commands[command].params for option in one.opts if option.startswith("--")]
    assert len(options) > 5
    assert [option for option in options if f"{option}`" not in page and f"{option} " not in page] == []


def test_the_defaults_are_those_of_the_docs():
    page = (Path(__file__).parents[2] / "docs" / "train.md").read_text()
    told = dict(re.findall(r"^\| `--([\w-]+)` \| `?([\w.]+)`? \|", page, re.MULTILINE))
    defaults = {one.name.replace("_", "-"): one.default for one in main.commands["train"].params}
    assert {"dim", "capacity", "steps", "learning-rate", "checkpoint-every", "precision"} <= told.keys()
    assert {name: str(defaults[name]) for name in told if name != "reduction"} == {
        name: {"weight": "1.0"}.get(name, value) for name, value in told.items() if name != "reduction"
    }


def test_no_class_is_in_two_parts_and_groups_stay_whole(train, arrays):
    result = train("--split-by", "group", "--steps", "1", "--classes", "2")
    assert result.exit_code == 0, result.output
    parts = json.loads((result.out / "config.json").read_text())["data"]["classes"]
    groups = {which: {(int(name) - 100) % 4 for name in names} for which, names in parts.items()}
    assert sorted(len(names) for names in parts.values()) == [3, 3, 6]
    assert sum(map(len, groups.values())) == 4 == len(set.union(*groups.values()))


def test_the_test_classes_are_measured_once_at_the_end(train, monkeypatch):
    seen, embed = [], runs.Training.outcome
    monkeypatch.setattr(runs.Training, "outcome", lambda self, *given: seen.append(self.step) or embed(self, *given))
    assert train().exit_code == 0
    assert seen == [24]


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_left_and_taken_up_it_ends_as_if_never_left(train, interrupt, precision, number):
    handler = signal.getsignal(number)
    whole = train("--precision", precision, out="whole")
    interrupt(7, lambda: signal.raise_signal(number))
    left = train("--precision", precision)
    assert left.exit_code == 128 + number
    assert f"Stopped after step 7 of 24; resume with: xbm train --out {left.out} --resume" in left.output
    assert {path.name for path in left.out.iterdir()} == {"config.json", "checkpoint.safetensors"}
    assert signal.getsignal(number) is handler
    if number == signal.SIGINT and precision == "float32":
        process = in_a_new_process("train", "--out", left.out, "--resume")
        output, _ = process.communicate(timeout=120)
        assert process.returncode == 0, output
    else:
        interrupt(15, lambda: signal.raise_signal(number))  # interrupt a second time
        assert train("--resume", source=None, options=()).exit_code == 128 + number
        interrupt(0, None)
        assert train("--resume", source=None, options=()).exit_code == 0
    assert_same_end(whole.out, left.out)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_real_signal_leaves_a_checkpoint(data, tmp_path, number):
    out, endless = tmp_path / "run", [*OPTIONS, "--steps", "1000000", "--evaluate-every", "1000000"]
    process = in_a_new_process("train", data, "--out", out, *endless)
    try:
        until = time.monotonic() + 100
        while not (out / checkpoint.NAME).exists():
            assert process.poll() is None, process.communicate()[0]
            assert time.monotonic() < until
            time.sleep(0.05)
        process.send_signal(number)
        output, _ = process.communicate(timeout=100)
    finally:
        process.kill()
    assert process.returncode == 128 + number
    assert "Traceback" not in output
    step = checkpoint.read(out / checkpoint.NAME)[1]["step"]
    assert f"Stopped after step {step} of 1000000; resume with: xbm train --out {out} --resume" in output


def test_a_second_ctrl_c_ends_at_once(train, interrupt):
    def twice():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    interrupt(7, twice)
    result = train()
    assert result.exit_code == 130
    assert "Stopped immediately." in result.output
    assert checkpoint.read(result.out / checkpoint.NAME)[1]["step"] == 0


def test_a_killed_run_goes_on_from_its_last_checkpoint(train, interrupt):
    class Killed(BaseException):
        pass

    def kill():
        raise Killed

    whole = train(out="whole")
    interrupt(17, kill)
    with pytest.raises(Killed):
        train("--checkpoint-every", "5")
    out = whole.out.with_name("run")
    assert checkpoint.read(out / checkpoint.NAME)[1]["step"] == 15
    interrupt(0, None)
    assert train("--resume", source=None, options=()).exit_code == 0
    assert_same_end(whole.out, out)


def test_a_run_left_before_its_metrics_is_finished(train, interrupt):
    whole = train(out="whole")
    interrupt(24, lambda: signal.raise_signal(signal.SIGTERM))
    left = train()
    assert left.exit_code == 143
    interrupt(0, None)
    assert train("--resume", source=None, options=()).exit_code == 0
    assert_same_end(whole.out, left.out)


def test_a_folder_s_name_is_printed_as_it_is(train):
    result = train("--steps", "1", out="[b]:smile:")
    assert f"Report: {result.out / 'report.html'}" in result.output


def test_a_finished_run_says_so(train):
    out = train().out
    before = snapshot(out)
    again = train("--resume", source=None, options=())
    assert again.exit_code == 0
    assert f"The run in {out} is finished: 24 of 24 steps." in again.output
    assert snapshot(out) == before


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("miner", ["none", "multi-similarity"])
def test_every_loss_and_miner(train, loss, miner):
    result = train("--loss", loss, "--miner", miner, "--steps", "6")
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize("options", [["--weight", "0"], ["--reduction", "sum", "--weight", "0.02"]])
def test_weights_and_reductions(train, options):
    result = train(*options)
    assert result.exit_code == 0, result.output
    page = (result.out / "report.html").read_text()
    assert ("in-batch only" in page) == ("0" in options)


def test_photographs_in_folders(train, tmp_path):
    rng = np.random.default_rng(0)
    for name in "abcdef":
        (tmp_path / "photographs" / name).mkdir(parents=True)
        colour = rng.integers(256, size=3)
        for i in range(3):
            picture = (colour * rng.random((100, 150, 1))).astype(np.uint8)
            Image.fromarray(picture).save(tmp_path / "photographs" / name / f"{i}.jpg")
    options = ["--network", "resnet", "--steps", "2", "--classes", "2", "--instances", "2", "--threads", "1"]
    result = train(source=tmp_path / "photographs", options=options)
    assert result.exit_code == 0, result.output
    assert "data:image/webp" in (result.out / "report.html").read_text()


REFUSED = [
    (["--capacity", "0"], "0 is not in the range x>=1"),
    (["--capacity", "99999999999999"], "not enough memory for --capacity 99,999,999,999,999 and"),
    (["--probes", "3"], "probes must be 0, or at least 8 to fit a map, got 3"),
    (["--threads", "999999"], "999999 is not in the range 1<=x<=512"),
    (["--classes", "6"], "--classes must be at most the number of training classes, got 6 for 5"),
    (["--classes", "5", "--instances", "7"], "must not be larger than the training set, got 5 x 7 pictures for 30"),
    (["--device", "cuda:99"], "device 'cuda:99' is not available"),
    (["--device", "abacus"], "device 'abacus' is not available"),
    (["--device", "meta"], "device 'meta' is not available"),
    (["--loss", "supcon", "--reduction", "sum"], "reduction"),
    (["--loss", "hinge"], "'hinge' is not one of 'batch-hard-triplet'"),
    (["--miner", "gold"], "'gold' is not one of"),
    (["--learning-rate", "nan"], "nan is not a finite number"),
    (["--learning-rate", "0"], "0.0 is not in the range x>0"),
    (["--weight", "-1"], "-1.0 is not in the range x>=0"),
    (["--shift", "12"], "--shift must be less than the sides of the pictures, got 12 for 12 x 12 pixels"),
    (["--split-by", "alphabet"], "has no array alphabet: its arrays are images, labels, group"),
]


@pytest.mark.parametrize(("options", "sentence"), REFUSED)
def test_bad_options_are_refused_and_nothing_is_written(refused, data, tmp_path, options, sentence):
    assert sentence in refused("train", data, "--out", tmp_path / "run", *OPTIONS, *options)
    assert not snapshot(tmp_path)


def test_data_that_cannot_be_read_is_refused(refused, tmp_path):
    out = tmp_path / "run"
    assert "does not exist" in refused("train", tmp_path / "nothing", "--out", out)
    assert "Missing argument 'DATA'" in refused("train", "--out", out)
    broken = tmp_path / "broken.npz"
    broken.write_bytes(b"images, labels")
    sentence = f"{broken} cannot be read as an .npz of plain arrays: not a zip archive"
    assert sentence in refused("train", broken, "--out", out)
    with zipfile.ZipFile(broken, "w") as archive:
        archive.writestr("images.npy", b"no array")
        archive.writestr("labels.npy", b"none")
    assert f"{broken} cannot be read as an .npz of plain arrays" in refused("train", broken, "--out", out)
    few = tmp_path / "few.npz"
    np.savez(few, images=np.zeros((8, 4, 4), np.uint8), labels=np.arange(8) // 2)
    assert "4 classes are too few to split" in refused("train", few, "--out", out)
    assert not snapshot(out)


def test_a_folder_that_holds_a_run_is_left_alone(train, refused, data):
    out = train("--steps", "1").out
    before = snapshot(out)
    sentence = f"{out} already contains a run (config.json, metrics.json, report.html, checkpoint.safetensors)"
    assert sentence in refused("train", data, "--out", out, *OPTIONS)
    assert snapshot(out) == before


@pytest.mark.parametrize("name", sorted(FILES))
def test_a_file_of_ones_own_is_not_replaced(refused, data, tmp_path, name):
    (tmp_path / name).write_text("mine")
    assert f"already contains a run ({name})" in refused("train", data, "--out", tmp_path, *OPTIONS)
    assert (tmp_path / name).read_text() == "mine"


def test_a_folder_that_cannot_be_written_is_refused(refused, data, tmp_path):
    (tmp_path / "taken").write_text("mine")
    assert "is a file" in refused("train", data, "--out", tmp_path / "taken")
    assert "cannot write to" in refused("train", data, "--out", tmp_path / "taken" / "below")
    assert "cannot write to" in refused("train", "--out", tmp_path / "nothing", "--resume")
    assert not (tmp_path / "nothing").exists()


def test_a_run_does_not_go_among_the_pictures(refused, tmp_path):
    assert f"{tmp_path / 'run'} is inside the data folder {tmp_path}" in refused(
        "train", tmp_path, "--out", tmp_path / "run"
    )
    assert not (tmp_path / "run").exists()


def test_a_loss_that_is_not_finite_stops_the_run(refused, data, tmp_path):
    options = [*OPTIONS, "--learning-rate", "1e30", "--checkpoint-every", "1"]
    sentence = refused("train", data, "--out", tmp_path / "run", *options)
    kept = checkpoint.read(tmp_path / "run" / checkpoint.NAME)[1]["step"]
    assert "not finite" in sentence or "the loss is nan at step" in sentence
    assert f"{tmp_path / 'run'} has the checkpoint of step {kept}" in sentence
    assert kept < 3


@pytest.fixture
def left(train, interrupt):
    """Return the folder of a run that was interrupted after 7 steps."""
    interrupt(7, lambda: signal.raise_signal(signal.SIGINT))
    out = train().out
    interrupt(0, None)
    return out


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (
            ["--steps", "48"],
            "--steps 48 differs from 24 of the run in {}: options cannot change on --resume "
            "(the learning rate schedule depends on it)",
        ),
        (["--learning-rate", "0.1"], "--learning-rate 0.1 differs from 0.002 of the run in {}: options cannot change"),
        (["--miner", "multi-similarity"], "--miner multi-similarity differs from None of the run"),
        (["--precision", "float16", "--dim", "8"], "--precision float16 differs from float32 of the run"),
    ],
)
def test_resume_refuses_other_options(left, refused, options, sentence):
    before = snapshot(left)
    assert sentence.format(left) in refused("train", "--out", left, "--resume", *options)
    assert snapshot(left) == before


def test_resume_takes_the_same_options_and_moved_data(left, train, data, tmp_path):
    moved = tmp_path / "moved.npz"
    moved.write_bytes(data.read_bytes())
    assert train("--resume", source=moved).exit_code == 0


def test_resume_refuses_changed_data(left, refused, arrays, tmp_path):
    images = arrays["images"].copy()
    images[0, 0, 0] ^= 1
    np.savez(tmp_path / "changed.npz", **arrays | {"images": images})
    before = snapshot(left)
    sentence = f"the pictures in {tmp_path / 'changed.npz'} differ from those the run in {left} was started with"
    assert sentence in refused("train", tmp_path / "changed.npz", "--out", left, "--resume")
    assert snapshot(left) == before


def config_changed(out):
    file = out / "config.json"
    file.write_text(file.read_text().replace('"steps": 24', '"steps": 25'))


def config_lost(out):
    (out / "config.json").unlink()


def checkpoint_lost(out):
    (out / checkpoint.NAME).unlink()


def checkpoint_cut_short(out):
    file = out / checkpoint.NAME
    file.write_bytes(file.read_bytes()[:-1])


def checkpoint_of_other_tensors(out):
    _, values = checkpoint.read(out / checkpoint.NAME)
    checkpoint.write(out / checkpoint.NAME, {"weight": torch.zeros(2)}, values)


def values_changed(**change):
    """Return a function that changes some of a checkpoint's values; None removes a value."""

    def damage(out):
        tensors, values = checkpoint.read(out / checkpoint.NAME)
        changed = {name: value for name, value in (values | change).items() if value is not None}
        checkpoint.write(out / checkpoint.NAME, tensors, changed)

    return damage


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        *(
            (values_changed(**change), "is damaged or was modified")
            for change in (
                {"config": None},
                {"config": {"network": "nope"}},
                {"step": "x"},
                {"step": 10**9},
            )
        ),
        (config_changed, "config.json was modified"),
        (config_lost, "config.json cannot be read"),
        (checkpoint_lost, "no checkpoint found at"),
        (checkpoint_cut_short, "is not an xbm checkpoint, or is damaged"),
        (checkpoint_of_other_tensors, "is damaged or was modified"),
    ],
)
def test_resume_refuses_a_damaged_run(left, refused, damage, sentence):
    damage(left)
    before = snapshot(left)
    assert sentence in refused("train", "--out", left, "--resume")
    assert snapshot(left) == before


def test_a_full_disk_leaves_the_last_checkpoint(left, refused, interrupt, monkeypatch):
    def full(_):
        raise OSError(28, "No space left on device")

    before = snapshot(left)
    interrupt(8, lambda: monkeypatch.setattr("xbm.experiments.files.os.fsync", full))
    assert "No space left on device" in refused("train", "--out", left, "--resume")
    assert snapshot(left).keys() == before.keys()
    assert checkpoint.read(left / checkpoint.NAME)[1]["step"] == 7
