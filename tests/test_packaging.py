"""What pyproject.toml promises of versions is what tox tests."""

import os
import re
import sys
import tomllib
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def pins(name):
    """Return {package: version} of a constraints file."""
    return dict(re.findall(r"^([\w-]+)==(\S+)$", (ROOT / name).read_text(), re.MULTILINE))


def test_the_lower_bounds_of_the_core_are_tested():
    bounds = dict(re.findall(r"^([\w-]+)>=([\d.]+)$", "\n".join(PROJECT["dependencies"]), re.MULTILINE))
    lowest, pinned = pins("tests/lowest.txt"), pins("constraints.txt")
    assert len(bounds) == len(PROJECT["dependencies"]) > 0
    for package, bound in bounds.items():
        assert re.fullmatch(rf"{re.escape(bound)}(\.0)*", lowest[package]), package
    assert {package: pinned[package] for package in {*lowest} - {*bounds}} == {
        package: version for package, version in lowest.items() if package not in bounds
    }


def test_each_python_that_is_named_is_in_tox():
    named = re.findall(r"Python :: 3\.(\d+)$", "\n".join(PROJECT["classifiers"]), re.MULTILINE)
    tested = re.search(r"numpy-py\{(.*?)\}", (ROOT / "tox.ini").read_text())[1].split(",")
    lowest = re.fullmatch(r">=3\.(\d+)", PROJECT["requires-python"])[1]
    assert named == [lowest, *(python.removeprefix("3") for python in tested)]


def test_this_is_the_python_and_the_numpy_that_tox_was_asked_for():
    """An environment of tox that runs another interpreter or version than its name says tests nothing."""
    environment = os.environ.get("TOX_ENV_NAME", "")
    if match := re.search(r"py3(\d+)", environment):
        assert sys.version_info[:2] == (3, int(match[1]))
    if "lowest" in environment:
        assert np.__version__ == pins("tests/lowest.txt")["numpy"]
