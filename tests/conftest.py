"""Fixtures and Hypothesis profiles for every test."""

import os

import pytest
from hypothesis import HealthCheck, settings

from tests import table

settings.register_profile("dev", deadline=None, max_examples=30)
settings.register_profile("ci", deadline=None, max_examples=100, derandomize=True, print_blob=True)
settings.register_profile("nightly", deadline=None, max_examples=2000, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile(os.environ.get("XBM_HYPOTHESIS_PROFILE", "dev"))


@pytest.fixture(scope="session", params=table.installed(), ids=repr)
def backend(request):
    """Each installed array library in turn."""
    return request.param


@pytest.fixture(autouse=True)
def _not_applicable(request):
    """Skip what the table says cannot run on a backend, with its reason."""
    if "backend" in request.fixturenames:
        row = request.getfixturevalue("backend")
        reason = table.NOT_APPLICABLE.get((request.node.originalname, row.name))
        if reason:
            pytest.skip(reason)
