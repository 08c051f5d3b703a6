"""Cost of a step, its memory, the enqueue and a search, compared with peers and lower bounds: `python -m benchmarks`.

Not part of the package. Needs Linux, PyTorch and the `bench` extra. Peers that are not installed are skipped and named.
"""
