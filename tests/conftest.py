"""Fixtures and Hypothesis profiles for every test."""

import os

import pytest
from hypothesis import HealthCheck, settings

from tests import table
from tests.table import BACKENDS

untimed = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # a busy machine fails no test
settings.register_profile("dev", untimed, max_examples=30)
settings.register_profile("ci", untimed, max_examples=60, derandomize=True, print_blob=True)
settings.register_profile("ci-traced", settings.get_profile("ci"), max_examples=30)  # graphs, for each signature
settings.register_profile("ci-compiled", settings.get_profile("ci"), max_examples=20)  # of few shapes, see strategies
settings.register_profile("nightly", untimed, max_examples=2000)
settings.load_profile(os.environ.get("XBM_HYPOTHESIS_PROFILE", "dev"))


def pytest_report_header():
    """Say what is tested, and what is left out for want of a package."""
    lines = [f"backends: {', '.join(row.name for row in BACKENDS)}"]
    return lines + [f"left out: {path} (no {package} here)" for path, package in table.left_out().items()]


def pytest_ignore_collect(collection_path, config):
    """Leave out what the table says needs a package that is not installed."""
    path = collection_path.relative_to(config.rootpath).as_posix()
    return True if any(path.startswith(left_out) for left_out in table.left_out()) else None


@pytest.fixture(scope="session", params=BACKENDS, ids=repr)
def backend(request):
    """Each installed array library in turn."""
    return request.param


@pytest.fixture(autouse=True)
def _as_the_table_says(request):
    """Run a backend's test in its context; skip what the table says cannot run on it, with its reason."""
    if "backend" not in request.fixturenames:
        yield
        return
    row = request.getfixturevalue("backend")
    reason = table.NOT_APPLICABLE.get((request.node.originalname, row.name))
    if reason:
        pytest.skip(reason)
    with row.context():
        yield
