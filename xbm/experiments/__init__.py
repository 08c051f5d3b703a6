"""Experiments that show what the memory does, on real data and without a download."""
