"""A small data set of one's own, and the command that is run on it."""

import numpy as np
import pytest
from click.testing import CliRunner

from xbm.experiments.cli import main

CLASSES, EACH, SIDE = 12, 6, 12


@pytest.fixture(scope="session")
def arrays():
    """Return what an .npz holds: noisy pictures of twelve patterns in four groups, in no order."""
    rng = np.random.default_rng(0)
    labels = rng.permutation(np.repeat(np.arange(CLASSES), EACH))
    patterns = rng.integers(80, size=(CLASSES, SIDE, SIDE))
    images = patterns[labels] + rng.integers(176, size=(len(labels), SIDE, SIDE))
    return {"images": images.astype(np.uint8), "labels": labels + 100, "group": labels % 4}


@pytest.fixture(scope="session")
def data(arrays, tmp_path_factory):
    """Return the path of such an .npz."""
    path = tmp_path_factory.mktemp("data") / "own.npz"
    np.savez(path, **arrays)
    return path


@pytest.fixture
def xbm_command():
    """Return what runs the command line in this process: arguments to click's result."""

    def run(*arguments):
        result = CliRunner().invoke(main, [str(one) for one in arguments])
        assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
        return result

    return run


@pytest.fixture
def refused(xbm_command):
    """Return what runs the command line, and checks that it is refused with one sentence; the sentence."""

    def run(*arguments):
        result = xbm_command(*arguments)
        assert result.exit_code == 2, result.output
        (*_, sentence) = result.output.strip().splitlines()
        assert sentence.startswith("Error: ")
        assert "Traceback" not in result.output
        return sentence

    return run
