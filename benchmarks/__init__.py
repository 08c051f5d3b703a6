"""What a step, its memory, the enqueue and a search cost, beside peers and beside the limit: `python -m benchmarks`.

No part of the package. Needs Linux, PyTorch and the `bench` extra; peers not installed are left out, and named.
"""
