"""One adapter for each framework: it holds state, device and saving, and no mathematics."""
