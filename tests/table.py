"""The table of backends: one row for each array library, and every skip and expected failure with its reason.

A test takes the fixture `backend` and names no library. It runs on every row whose library is installed, or on those
that `XBM_REQUIRE_BACKENDS` names (separated by commas): then one that is not installed is a failure.
"""

import os
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from importlib.util import find_spec
from types import ModuleType

import numpy as np


@dataclass(frozen=True)
class Backend:
    """One array library as the tests see it."""

    name: str
    xp: ModuleType
    storable: tuple[str, ...]  # memory dtypes it has
    second_device: object = None  # one beside the default, None if it has only that
    context: Callable = nullcontext  # what its tests run in
    compiles: bool = False  # each operation anew for each shape

    def __repr__(self):
        return self.name

    def array(self, x, dtype=None):
        """Return x as an array of this library; NumPy's own dtype unless one is named."""
        x = np.asarray(x)
        dtype = None if dtype is None else getattr(self.xp, dtype)
        # Copied, since a library may share memory with NumPy and every transition consumes its state.
        return self.xp.asarray(x.tolist() if x.ndim == 0 else x.copy(), dtype=dtype or self._dtype(x))

    def _dtype(self, x):
        return getattr(self.xp, x.dtype.name)

    def numpy(self, x):
        """Return an array of this library as a NumPy array; bfloat16 as float32."""
        if str(x.dtype).endswith("bfloat16"):
            x = self.xp.astype(x, self.xp.float32)
        return np.array(x.numpy() if hasattr(x, "numpy") else x)


def _numpy():
    import array_api_compat.numpy as xp

    return Backend("numpy", xp, ("float32", "float16", "float64"))


def _torch():
    import array_api_compat.torch as xp

    return Backend("torch", xp, ("float32", "bfloat16", "float16", "float64"))


DEVICES = 4  # virtual ones that JAX makes of the processor


def _strict():
    import array_api_strict as xp

    xp.set_array_api_strict_flags(
        boolean_indexing=False, data_dependent_shapes=False, enabled_extensions=("linalg",), api_version="2025.12"
    )
    return Backend("strict", xp, ("float32", "float64"), xp.Device("device1"))


def _jax():
    given_ones = (os.environ.get(name, "") for name in ("XLA_FLAGS", "XBM_XLA_FLAGS"))
    os.environ["XLA_FLAGS"] = f"{' '.join(given_ones)} --xla_force_host_platform_device_count={DEVICES}"
    import jax
    import jax.numpy as xp

    def context():
        return jax.enable_x64(True)

    return Backend("jax", xp, ("float32", "bfloat16", "float16", "float64"), jax.devices()[1], context, compiles=True)


def _tensorflow():
    from xbm.backends.namespaces import tensorflow as xp

    return Backend("tensorflow", xp, ("float32", "bfloat16", "float16", "float64"))


ROWS = {
    "numpy": ("numpy", _numpy),
    "torch": ("torch", _torch),
    "jax": ("jax", _jax),
    "tensorflow": ("tensorflow", _tensorflow),
    "strict": ("array_api_strict", _strict),
}

NOT_APPLICABLE = {
    ("test_everything_stays_on_its_device", "numpy"): "NumPy has one device",
    ("test_everything_stays_on_its_device", "torch"): "no second device with values here; the meta device is tested",
    (
        "test_everything_stays_on_its_device",
        "tensorflow",
    ): "TensorFlow computes on its scope's device, not on its inputs'",
    ("test_values_too_large_for_the_memory_are_not_finite_there", "strict"): "the standard has no float16",
    ("test_half_precision_does_not_overflow", "strict"): "the standard has no float16",
}
"""(test, backend): why it cannot run there."""

KERAS_NOT_APPLICABLE = {
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
"""(test, backend of Keras): why it cannot run there."""

NEEDS = {
    "tests/integrations/test_torch": ("torch",),
    "tests/integrations/test_torch_checkpoint.py": ("torch", "safetensors"),
    "tests/integrations/test_fsdp2.py": ("torch",),
    "tests/integrations/test_lightning.py": ("torch", "lightning"),
    "tests/integrations/test_accelerate.py": ("torch", "accelerate", "safetensors"),
    "tests/test_jax.py": ("jax",),
    "tests/test_tensorflow.py": ("tensorflow",),
    "tests/experiments": ("torch", "matplotlib", "rich", "safetensors"),
    "tests/experiments/test_jax_engine.py": ("torch", "jax", "flax", "optax"),
    "tests/experiments/test_keras_engine.py": ("torch", "keras"),
    "tests/integrations/test_pytorch_metric_learning": ("torch", "pytorch_metric_learning"),
    "tests/integrations/keras": ("keras",),
    "tests/test_tensorflow_namespace.py": ("tensorflow", "array_api_strict"),
    "tests/test_docs.py": (
        "torch",
        "jax",
        "flax",
        "optax",
        "keras",
        "tensorflow",
        "lightning",
        "accelerate",
        "safetensors",
    ),
    "tests/test_typing.py": ("torch", "mypy"),
    "tests/test_benchmarks.py": ("torch", "click", "rich"),
}
"""Tests of one framework: how their paths begin, and the packages without which they are left out."""

DATA = {"XBM_OMNIGLOT": "Omniglot's pictures are not part of the repository: the variable names them where they are"}
"""Variable with the path of a data set: why tests of that are skipped without it."""


def required():
    """Return the names of the backends that are asked for."""
    names = os.environ.get("XBM_REQUIRE_BACKENDS", "").replace(",", " ").split()
    unknown = set(names) - set(ROWS)
    if unknown:
        raise ValueError(f"XBM_REQUIRE_BACKENDS names {sorted(unknown)}, the table has {sorted(ROWS)}")
    return names


def installed():
    """Return the rows that are required, or all that can run here, in the table's order."""
    here = [name for name, (module, _) in ROWS.items() if find_spec(module)]
    missing = set(required()) - set(here)
    if missing:
        raise ModuleNotFoundError(f"required backends are not installed: {', '.join(sorted(missing))}")
    return [ROWS[name][1]() for name in here if name in (required() or here)]


def left_out():
    """Return {path: missing package} of the tests that cannot run here."""
    return {path: package for path, packages in NEEDS.items() for package in packages if find_spec(package) is None}


BACKENDS = installed()
