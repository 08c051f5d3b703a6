"""The enqueue on every installed array library. Where it works in place, its cost does not depend on the capacity."""

from importlib import import_module
from importlib.util import find_spec

import numpy as np

import xbm
from benchmarks.tables import Table, span
from benchmarks.timing import interleaved
from xbm.memory_state import MemoryState

NAMESPACES = {
    "numpy": "array_api_compat.numpy",
    "torch": "array_api_compat.torch",
    "jax": "jax.numpy",
    "tensorflow": "xbm.backends.namespaces.tensorflow",
    "array_api_strict": "array_api_strict",
}
"""Library to namespace. array_api_strict represents all other libraries, where a write copies the memory."""


class Enqueue:
    """`xbm.enqueue` into a memory of one library, called as its users would, compiled if possible."""

    def __init__(self, library, capacity, dim):
        self.xp = import_module(NAMESPACES[library])
        self.state = xbm.init(capacity=capacity, dim=dim, xp=self.xp)
        self.enqueue = xbm.enqueue
        if library == "jax":
            import jax

            self.enqueue = jax.jit(xbm.enqueue, donate_argnums=0)
        if library == "tensorflow":
            self._hold_variables()

    def _hold_variables(self):
        import tensorflow as tf

        variables = MemoryState(*(tf.Variable(array, trainable=False) for array in self.state))

        @tf.function
        def enqueue(x, labels):
            for variable, new in zip(variables, xbm.enqueue(variables, x, labels), strict=True):
                if new is not variable:
                    variable.assign(new)

        def keeping(state, x, labels):
            enqueue(x, labels)
            return variables

        self.enqueue = keeping

    def __call__(self, x, labels):
        """Store a batch of NumPy arrays and wait for completion."""
        self.state = self.enqueue(self.state, self.xp.asarray(x), xbm.as_integers(labels, xp=self.xp))
        int(self.state.cursor)


def run(options):
    """Return the table of every library and memory size, all of them interleaved."""
    here = [library for library in NAMESPACES if find_spec(library)]
    table = Table(
        f"The enqueue on every library, B = {options.batch}, D = {options.dim}",
        ("M", *here),
        f"Fastest (median) of {options.rounds} interleaved rounds, including the fixed costs of converting a NumPy "
        "batch, validating it and reading the cursor. JAX is compiled with a donated memory; TensorFlow runs a graph "
        "with the memory in variables; array_api_strict copies, because the standard has no scatter.",
    )
    ready = {(size, name): Enqueue(name, size, options.dim) for size in options.sizes for name in here}
    rng = np.random.default_rng(0)
    x, labels = rng.normal(size=(options.batch, options.dim)).astype(np.float32), rng.integers(9, size=options.batch)
    for contender in ready.values():
        contender(x, labels)
    found = interleaved(ready, lambda number: (x, labels), rounds=options.rounds, wait=lambda: None)
    for size in options.sizes:
        times = {name: found[size, name] for name in here}
        figures = {"M": size} | {name: one._asdict() for name, one in times.items()}
        table.add(figures, f"{size:,}", *(f"{span(one.fastest)} ({span(one.median)})" for one in times.values()))
    return table
