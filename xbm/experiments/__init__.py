"""Experiments that show the effect of the memory on real data, without a download."""
