"""Every Python example of the README and the docs runs, in the order of its page, and prints what the page says."""

import contextlib
import io
import re
from pathlib import Path

import pytest
import torch

from tests import table
from xbm.backends import OPERATIONS

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
EXAMPLE = re.compile(r"```python\n(.*?)```(?:\s*```text\n(.*?)```)?", re.DOTALL)
LINK = re.compile(r"\]\((?!https?://)([^)#]+)")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_examples_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names = {}
    for code, printed in EXAMPLE.findall(page.read_text()):
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            exec(compile(code, page.name, "exec"), names)
        if printed:
            assert out.getvalue() == printed


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in LINK.findall(page.read_text()):
        assert (page.parent / target).exists(), target


def test_every_skip_is_in_the_support_matrix():
    page = (ROOT / "docs" / "backends.md").read_text()
    assert [reason for reason in table.NOT_APPLICABLE.values() if reason not in page] == []


def test_every_operation_of_a_backend_is_described():
    page = (ROOT / "docs" / "backends.md").read_text()
    assert [name for name in OPERATIONS if f"`{name}`" not in page] == []
