"""Run by tox outside the checkout: the installed package has every module, and importing it imports no framework."""

import sys
from pathlib import Path

import xbm

root = Path(xbm.__file__).parent
assert "site-packages" in root.parts, f"not the installed package: {root}"
assert (root / "py.typed").is_file()
assert (root / "experiments" / "report.html.jinja").is_file()
assert not (root / "integrations").is_symlink(), "the wheel holds a link instead of files"
assert (root / "integrations" / "torch" / "module.py").is_file()
assert not {"torch", "tensorflow", "keras", "jax"} & set(sys.modules)
