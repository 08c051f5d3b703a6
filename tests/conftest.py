"""Fixtures and Hypothesis profiles for every test."""

import os

import pytest
from hypothesis import HealthCheck, settings

from tests import table
from tests.table import BACKENDS

# Without time limits, a busy machine cannot fail a test.
untimed = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("dev", untimed, max_examples=30)
settings.register_profile("ci", untimed, max_examples=60, derandomize=True, print_blob=True)
settings.register_profile("ci-traced", settings.get_profile("ci"), max_examples=20)  # traces a graph per signature
settings.register_profile("ci-compiled", settings.get_profile("ci"), max_examples=20)  # of few shapes, see strategies
settings.register_profile("nightly", untimed, max_examples=2000)
settings.load_profile(os.environ.get("XBM_HYPOTHESIS_PROFILE", "dev"))


def pytest_report_header():
    """Report which backends are tested, and which tests are skipped because a package is missing."""
    lines = [f"backends: {', '.join(row.name for row in BACKENDS)}"]
    return lines + [f"left out: {path} (no {package} here)" for path, package in table.left_out().items()]


def pytest_ignore_collect(collection_path, config):
    """Ignore the tests that, according to the table, need a package that is not installed."""
    path = collection_path.relative_to(config.rootpath).as_posix()
    return True if any(path.startswith(left_out) for left_out in table.left_out()) else None


@pytest.fixture(scope="session", params=BACKENDS, ids=repr)
def backend(request):
    """Each installed array library in turn."""
    return request.param


def skip_marked(request, name):
    """Skip a test that a mark excludes from the backend of this name, with its reason."""
    for mark in request.node.iter_markers("not_on"):
        if name in mark.args:
            pytest.skip(mark.kwargs["reason"])


@pytest.fixture(autouse=True)
def _on_its_backend(request):
    """Run a backend's test in its context, or skip it if it is marked."""
    if "backend" not in request.fixturenames:
        yield
        return
    row = request.getfixturevalue("backend")
    skip_marked(request, row.name)
    with row.context():
        yield
