"""`import xbm` imports no framework."""

import re
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path

import pytest

FRAMEWORKS = ("torch", "tensorflow", "keras", "jax")
CHECK = f"import sys; print(*sorted(set({FRAMEWORKS}) & set(sys.modules)))"


def frameworks_after(program, **options):
    """Return the frameworks that a fresh interpreter has imported after running the program."""
    command = [sys.executable, "-c", f"{program}\n{CHECK}"]
    return subprocess.run(command, capture_output=True, text=True, check=True, **options).stdout.split()


@pytest.mark.parametrize("module", ["xbm", "xbm.metrics", "xbm.sampling", "xbm.backends.numpy"])
def test_no_framework_is_imported(module):
    assert frameworks_after(f"import {module}") == []


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_the_check_would_see_one(framework, tmp_path):
    (tmp_path / f"{framework}.py").touch()
    assert frameworks_after(f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import xbm, {framework}") == [
        framework
    ]


def test_every_tox_environment_is_one():
    """A tox name without a section would run the default commands, and pass."""
    tox = ConfigParser(interpolation=None)
    tox.read(Path(__file__).parents[1] / "tox.ini")
    names = re.findall(r"(?:[^,{\s]|\{.*?\})+", tox["tox"]["env_list"])
    assert {"lint", "keras-{tensorflow,jax,torch}"} <= {*names}
    for name in names:
        assert f"testenv:{name}" in tox
