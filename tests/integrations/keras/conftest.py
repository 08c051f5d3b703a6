"""The Keras tests run on the backend named in KERAS_BACKEND; marks `not_on` name the backends they skip."""

from functools import partial

import keras
import numpy as np
import pytest

from tests.conftest import skip_marked

BACKEND = keras.backend.backend()


def pytest_report_header():
    """Report which backend is tested."""
    return f"keras backend: {BACKEND}"


@pytest.fixture(autouse=True)
def _on_this_backend(request):
    skip_marked(request, BACKEND)


@pytest.fixture(autouse=True)
def _float32_and_no_names_of_before():
    keras.utils.clear_session()
    yield
    keras.config.set_dtype_policy("float32")


@pytest.fixture(scope="session", autouse=True)
def _compile_once(tmp_path_factory):
    """On JAX, share compiled functions between tests of the same model, because compilation dominates their time."""
    if BACKEND == "jax":
        import jax

        jax.config.update("jax_compilation_cache_dir", str(tmp_path_factory.mktemp("jax")))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    yield
    if BACKEND == "jax":
        jax.config.update("jax_compilation_cache_dir", None)


@pytest.fixture
def quick_compiler(monkeypatch):
    """Let PyTorch trace a whole step and run it without code generation, which takes minutes."""
    if BACKEND == "torch":
        import torch

        monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))


@pytest.fixture
def data():
    """Return 50 samples of 5 classes; with batches of 8, the last batch has 2."""
    generator = np.random.default_rng(0)
    y = np.arange(50) % 5
    return (generator.normal(size=(50, 6)) + 0.3 * y[:, None]).astype("float32"), y
