"""Accelerate: the training loop of the docs page, unchanged, on one process and on two."""

import contextlib
import os
import re
import shutil
from pathlib import Path
from unittest import mock

import torch.distributed as dist
from torch.testing import assert_close

from tests.processes import pool

PAGE = Path(__file__).parents[2] / "docs" / "accelerate.md"
LOOP = re.search(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)[1]


def run(folder):
    """Run the loop in a folder; return the final memory and weights."""
    names = {}
    with contextlib.chdir(folder):
        exec(compile(LOOP, PAGE.name, "exec"), names)
    return names["xbm"].state_dict(), names["accelerator"].unwrap_model(names["encoder"]).state_dict()


def run_on_rank(folder):
    """The same for one rank, started as by a launcher."""
    rank, size = (str(one) for one in (dist.get_rank(), dist.get_world_size()))
    launched = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
    with mock.patch.dict(os.environ, launched):
        return run(folder)


def test_two_processes_are_one_and_resume_exactly(tmp_path):
    alone, whole, resumed = (tmp_path / name for name in ("alone", "whole", "resumed"))
    for folder in (alone, whole, resumed):
        folder.mkdir()
    with pool(2) as ranks:
        first, second = ranks.run(run_on_rank, whole)
        assert_close(first, second, rtol=0, atol=0)
        assert_close(first, run(alone))
        for done in ("epoch-1", "epoch-2"):
            shutil.copytree(whole / "run" / done, resumed / "run" / done)
        (resumed / "run" / "epoch-3.partial").mkdir()  # left by a run that was killed while writing
        for found in ranks.run(run_on_rank, resumed):
            assert_close(found, first, rtol=0, atol=0)
