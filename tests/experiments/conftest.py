"""A small user data set, and fixtures that run the command line."""

import numpy as np
import pytest
from click.testing import CliRunner

from xbm.experiments.cli import main

CLASSES, EACH, SIDE = 12, 6, 12


@pytest.fixture(scope="session")
def arrays():
    """Return the arrays of an .npz: noisy pictures of twelve patterns in four groups, shuffled."""
    rng = np.random.default_rng(0)
    labels = rng.permutation(np.repeat(np.arange(CLASSES), EACH))
    patterns = rng.integers(80, size=(CLASSES, SIDE, SIDE))
    images = patterns[labels] + rng.integers(176, size=(len(labels), SIDE, SIDE))
    return {"images": images.astype(np.uint8), "labels": labels + 100, "group": labels % 4}


@pytest.fixture(scope="session")
def data(arrays, tmp_path_factory):
    """Return the path of an .npz with these arrays."""
    path = tmp_path_factory.mktemp("data") / "own.npz"
    np.savez(path, **arrays)
    return path


@pytest.fixture
def xbm_command():
    """Return a function that runs the command line in this process and returns click's result."""

    def run(*arguments):
        result = CliRunner().invoke(main, [str(one) for one in arguments])
        assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
        return result

    return run


@pytest.fixture
def refused(xbm_command):
    """Return a function that runs the command line, checks that it exits with a user error, and returns the message."""

    def run(*arguments):
        result = xbm_command(*arguments)
        assert result.exit_code == 2, result.output
        (*_, sentence) = result.output.strip().splitlines()
        assert sentence.startswith("Error: ")
        assert "Traceback" not in result.output
        return sentence

    return run
