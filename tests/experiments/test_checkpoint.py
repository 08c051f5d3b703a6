"""Checkpoints: writing and reading round-trips, and invalid files raise an error that names the problem."""

import json
import math

import pytest
import torch
from safetensors.torch import save_file

from xbm.experiments import checkpoint
from xbm.experiments.errors import InputError

VALUES = {"config": {"name": "a", "rate": 0.1 + 0.2, "none": None}, "step": 7, "curves": [1.5, math.nan, math.inf]}


@pytest.fixture
def path(tmp_path):
    """Return the path of a checkpoint."""
    path = tmp_path / checkpoint.NAME
    checkpoint.write(path, tensors(), VALUES)
    return path


def tensors():
    shared = torch.arange(6.0).reshape(2, 3)
    return {
        "encoder.weight": shared,
        "encoder.transposed": shared.T,
        "encoder.half": shared.to(torch.bfloat16),
        "xbm.count": torch.tensor(2**40),
    }


def test_what_goes_in_comes_out(path):
    found, values = checkpoint.read(path)
    assert found.keys() == tensors().keys()
    for name, tensor in tensors().items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)
    assert values == VALUES | {"curves": [1.5, None, None]}
    assert [one.name for one in path.parent.iterdir()] == [checkpoint.NAME]


def test_a_part_of_it(path):
    found, values = checkpoint.read(path, "xbm.")
    assert list(found) == ["xbm.count"]
    assert values["step"] == 7


def test_it_is_json_that_others_read(path):
    header = path.read_bytes()
    size = int.from_bytes(header[:8], "little")
    metadata = json.loads(header[8 : 8 + size])["__metadata__"]
    assert metadata["format"] == "xbm checkpoint"
    assert "NaN" not in metadata["values"]


def foreign(path):
    save_file({"weight": torch.zeros(3)}, path)


def foreign_with_metadata(path):
    save_file({"weight": torch.zeros(3)}, path, {"format": "pt"})


def of_another_version(path):
    save_file({"weight": torch.zeros(3)}, path, {"format": "xbm checkpoint", "version": "2", "values": "{}"})


def without_values(path):
    save_file({"weight": torch.zeros(3)}, path, {"format": "xbm checkpoint", "version": "1"})


def cut_short(path):
    path.write_bytes(path.read_bytes()[:-1])


def cut_in_the_header(path):
    path.write_bytes(path.read_bytes()[:40])


def emptied(path):
    path.write_bytes(b"")


def pickled(path):
    torch.save({"weight": torch.zeros(3)}, path)


def missing(path):
    path.unlink()


DAMAGES = [
    (foreign, "is not an xbm checkpoint: its metadata must have format 'xbm checkpoint', got None"),
    (foreign_with_metadata, "is not an xbm checkpoint: its metadata must have format 'xbm checkpoint', got 'pt'"),
    (of_another_version, "has checkpoint version 2, expected 1"),
    (without_values, "is not an xbm checkpoint, or is damaged"),
    (cut_short, "is not an xbm checkpoint, or is damaged"),
    (cut_in_the_header, "is not an xbm checkpoint, or is damaged"),
    (emptied, "is not an xbm checkpoint, or is damaged"),
    (pickled, "is not an xbm checkpoint, or is damaged"),
    (missing, "no checkpoint found at"),
]


@pytest.mark.parametrize(("damage", "sentence"), DAMAGES)
def test_what_is_none_is_refused(path, damage, sentence):
    damage(path)
    with pytest.raises(InputError, match=sentence):
        checkpoint.read(path)


def test_a_failing_disk_leaves_the_last_one(path, monkeypatch):
    before = path.read_bytes()

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("xbm.experiments.files.os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        checkpoint.write(path, tensors(), VALUES | {"step": 8})
    assert path.read_bytes() == before
    assert len(list(path.parent.iterdir())) == 1
