"""A short run on Omniglot, split by alphabet: real pictures, and a checkpoint with a full memory."""

import json
import os

import numpy as np
import pytest

from tests import table

PATH = os.environ.get("XBM_OMNIGLOT")
pytestmark = pytest.mark.skipif(not PATH, reason=table.DATA["XBM_OMNIGLOT"])


def test_omniglot_by_alphabet(xbm_command, tmp_path):
    out = tmp_path / "run"
    options = ["--steps", "150", "--warmup", "120", "--evaluate-every", "150", "--shift", "2", "--threads", "1"]
    result = xbm_command("train", PATH, "--out", out, "--split-by", "alphabet", *options)
    assert result.exit_code == 0, result.output

    with np.load(PATH, allow_pickle=False) as archive:
        alphabet = dict(zip(archive["labels"].tolist(), archive["alphabet"].tolist(), strict=True))
    classes = json.loads((out / "config.json").read_text())["data"]["classes"]
    parts = [{alphabet[int(name)] for name in names} for names in classes.values()]
    assert [len(part) for part in parts] == [15, 3, 12]
    assert len(set.union(*parts)) == 30
    assert sum(map(len, classes.values())) == 964

    metrics = json.loads((out / "metrics.json").read_text())
    before, after = metrics["validation"]["recall_at_1"]
    assert after > before + 0.1

    result = xbm_command("eval", out, "--data", PATH)
    assert f"{metrics['test']['map_at_r']:.3f}" in result.output
