"""The site: the pages of this folder, and the API from its docstrings.

`python -m sphinx -W --keep-going -n docs docs/_build/html`, from the root of the checkout.
"""

import re

import xbm
from tests import table

project = "xbm"
author = "The xbm developers"
copyright = f"2026, {author}"
version = release = xbm.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "numpydoc"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"xbm {release}"
html_copy_source = html_show_sphinx = False

autodoc_typehints = "none"  # docstrings say more: shapes, ranges, units
autodoc_member_order = "bysource"
autodoc_class_signature = "mixed"
numpydoc_show_class_members = False
default_role = "py:obj"

myst_enable_extensions = ["substitution"]
myst_heading_anchors = 3


def support_matrix():
    """Return the tests' table of skips as a Markdown table."""
    skips = [
        (test, f"{'Keras with' if keras else 'with'} {' or '.join(backends)}", reason)
        for test, backends, reason, keras in table.skips()
    ]
    needs = [(path, f"without {' or '.join(packages)}", "it is theirs") for path, packages in table.NEEDS.items()]
    data = [(variable, "where it is not set", reason) for variable, reason in table.DATA.items()]
    rows = [f"| `{test}` | {where} | {why} |" for test, where, why in skips + needs + data]
    return "\n".join(["| test | left out | why |", "|---|---|---|", *rows])


myst_substitutions = {"support_matrix": support_matrix()}


def as_written(app, what, name, obj, options, lines):
    """Show |x| and `.half()` literally."""
    for i, line in enumerate(lines):
        if not line.lstrip().startswith((">>>", "...")):
            lines[i] = re.sub(r"(?<!\S)`(\.\w[^`]*)`", r"``\1``", line.replace("|", r"\|"))


def without_a_page(app, env, node, content):
    """Leave a name in single backticks that is no object of the API: a parameter, a name of another library."""
    return content if node["reftype"] == "obj" else None


def setup(app):
    """Connect the above."""
    app.connect("autodoc-process-docstring", as_written, priority=900)  # after numpydoc
    app.connect("missing-reference", without_a_page)
