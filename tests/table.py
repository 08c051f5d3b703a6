"""The table of backends: one row per array library; and the skips of all tests, for the support matrix.

Tests use the fixture `backend` and do not name a library. They run on all installed libraries, or on those named in
`XBM_REQUIRE_BACKENDS`, separated by commas. A named library that is not installed is an error.
"""

import ast
import os
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import numpy as np


@dataclass(frozen=True)
class Backend:
    """One array library, for the tests."""

    name: str
    xp: ModuleType
    storable: tuple[str, ...]  # supported memory dtypes
    second_device: object = None  # a device other than the default, or None
    context: Callable = nullcontext  # context manager for its tests
    compiles: bool = False  # whether each operation is compiled for each shape

    def __repr__(self):
        return self.name

    def array(self, x, dtype=None):
        """Return x as an array of this library, by default with its NumPy dtype."""
        x = np.asarray(x)
        dtype = None if dtype is None else getattr(self.xp, dtype)
        # Copy, because a library may share memory with NumPy, and every transition consumes its state.
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


DEVICES = 4  # number of virtual CPU devices in JAX


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
"""Path prefixes of tests, and the packages without which these tests are ignored."""

DATA = {"XBM_OMNIGLOT": "Omniglot is not part of the repository: set the variable to the path of its .npz"}
"""Environment variable with the path of a data set: reason why its tests are skipped if it is unset."""


def skips():
    """Return (test, backends, reason, whether they are Keras' backends) of each mark `not_on` in the tests' source."""
    found = []
    for path in sorted(Path(__file__).parent.rglob("test_*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            for mark in getattr(node, "decorator_list", []):
                if isinstance(mark, ast.Call) and ast.unparse(mark.func) == "pytest.mark.not_on":
                    backends, (reason,) = map(ast.literal_eval, mark.args), (one.value for one in mark.keywords)
                    found.append((node.name, (*backends,), ast.literal_eval(reason), "keras" in path.parts))
    return found


def required():
    """Return the names of the required backends."""
    names = os.environ.get("XBM_REQUIRE_BACKENDS", "").replace(",", " ").split()
    unknown = set(names) - set(ROWS)
    if unknown:
        raise ValueError(f"XBM_REQUIRE_BACKENDS must name some of {sorted(ROWS)}, got {sorted(unknown)}")
    return names


def installed():
    """Return the required backends, by default all installed ones, in the table's order."""
    here = [name for name, (module, _) in ROWS.items() if find_spec(module)]
    missing = set(required()) - set(here)
    if missing:
        raise ModuleNotFoundError(f"required backends are not installed: {', '.join(sorted(missing))}")
    return [ROWS[name][1]() for name in here if name in (required() or here)]


def left_out():
    """Return {path: missing package} of the tests that cannot run here."""
    return {path: package for path, packages in NEEDS.items() for package in packages if find_spec(package) is None}


BACKENDS = installed()
