"""The Keras suite runs on the backend that KERAS_BACKEND names; what cannot run on one is listed here."""

from functools import partial
from pathlib import Path

import keras
import numpy as np
import pytest

BACKEND = keras.backend.backend()
HERE = Path(__file__).parent
FOREIGN = (
    # Tensors of PyTorch and variables of TensorFlow, which Keras hands to NumPy 2.
    "ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning",
)

NOT_APPLICABLE = {
    ("test_several_steps_per_execution", "torch"): "Keras refuses steps_per_execution above 1 on PyTorch",
    ("test_a_saved_model_has_no_memory", "torch"): "Keras exports a SavedModel from TensorFlow and JAX",
    ("test_a_saved_model_has_no_memory", "jax"): "a SavedModel of JAX's needs jax2tf, which this JAX has not",
    ("test_replicas_are_refused", "torch"): "a strategy of replicas is TensorFlow's",
    ("test_replicas_are_refused", "jax"): "a strategy of replicas is TensorFlow's",
    ("test_no_copy_of_the_memory_in_the_compiled_step", "torch"): "writes in place, eagerly",
    ("test_no_copy_of_the_memory_in_the_compiled_step", "tensorflow"): "writes into variables by scatter",
    ("test_integers_too_large_are_refused", "torch"): "int64 there",
    ("test_integers_too_large_are_refused", "tensorflow"): "int64 there",
    ("test_integers_beyond_32_bits_are_exact", "jax"): "int32 there without jax_enable_x64: refused",
    ("test_a_step_that_drops_the_memory_is_refused", "torch"): "its steps hold no state outside the variables",
    ("test_a_step_that_drops_the_memory_is_refused", "tensorflow"): "its steps hold no state outside the variables",
    ("test_a_step_that_drops_the_layers_memory_shows", "torch"): "JAX's own form of a step",
    ("test_a_step_that_drops_the_layers_memory_shows", "tensorflow"): "JAX's own form of a step",
    ("test_a_lost_memory_is_refused", "torch"): "gives nothing away before it is written",
    ("test_a_lost_memory_is_refused", "tensorflow"): "gives nothing away before it is written",
    ("test_data_parallel_sees_the_whole_batch", "torch"): "keras.distribution's DataParallel is JAX's",
    ("test_data_parallel_sees_the_whole_batch", "tensorflow"): "keras.distribution's DataParallel is JAX's",
    ("test_a_hand_written_jax_step", "torch"): "JAX's own form of a step",
    ("test_a_hand_written_jax_step", "tensorflow"): "JAX's own form of a step",
    ("test_the_layer_refuses_a_step_without_its_variables", "torch"): "JAX's own form of a step",
    ("test_the_layer_refuses_a_step_without_its_variables", "tensorflow"): "JAX's own form of a step",
    ("test_the_layer_within_a_train_step", "jax"): "JAX's steps are stateless: test_a_hand_written_jax_step",
}
"""(test, backend): why it cannot run there."""


def pytest_report_header():
    """Say which backend is tested."""
    return f"keras backend: {BACKEND}"


def pytest_collection_modifyitems(items):
    """Let warnings of the libraries' own pass, here alone."""
    for item in items:
        if HERE in item.path.parents:
            for warning in FOREIGN:
                item.add_marker(pytest.mark.filterwarnings(warning))


@pytest.fixture(autouse=True)
def _not_applicable_on_this_backend(request):
    reason = NOT_APPLICABLE.get((request.node.originalname, BACKEND))
    if reason:
        pytest.skip(reason)


@pytest.fixture(autouse=True)
def _float32_and_no_names_of_before():
    keras.utils.clear_session()
    yield
    keras.config.set_dtype_policy("float32")


@pytest.fixture(scope="session", autouse=True)
def _compile_once(tmp_path_factory):
    """On JAX, have tests of the same model share what they compile, which is where their time goes."""
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
    """Have PyTorch trace a step as a whole and run it without generating code, which takes minutes."""
    if BACKEND == "torch":
        import torch

        monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))


@pytest.fixture
def data():
    """50 samples of 5 classes: batches of 8 end in one of 2."""
    generator = np.random.default_rng(0)
    y = np.arange(50) % 5
    return (generator.normal(size=(50, 6)) + 0.3 * y[:, None]).astype("float32"), y
