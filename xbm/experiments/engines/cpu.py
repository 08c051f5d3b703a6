"""One thread of the CPU, for each library that computes. To be called before its first array."""

import os
from importlib import import_module


def one_thread(library):
    """Let "torch", "tensorflow" or "jax" use one thread of the CPU, and no other device unless it is told to."""
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
