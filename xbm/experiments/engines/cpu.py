"""Limit a library to one CPU thread. Must be called before the library creates its first array."""

import os
from importlib import import_module


def one_thread(library):
    """Limit "torch", "tensorflow" or "jax" to one CPU thread; the latter two are also kept off the GPU."""
    module = import_module(library)
    if library == "torch":
        module.set_num_threads(1)
    elif library == "tensorflow":
        module.config.threading.set_intra_op_parallelism_threads(1)
        module.config.threading.set_inter_op_parallelism_threads(1)
        module.config.set_visible_devices([], "GPU")
    else:
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_multi_thread_eigen=false"
        module.config.update("jax_platforms", "cpu")
