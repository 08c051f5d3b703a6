"""The README and the docs match the code: examples run and print the stated output, and names exist."""

import contextlib
import io
import re
import runpy
from pathlib import Path

import pytest
import torch

import xbm
from tests import table
from xbm.backends import OPERATIONS

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(page for page in DOCS.rglob("*.md") if "_build" not in page.parts)]
EXAMPLE = re.compile(r"```python\n(.*?)```(?:\s*```text\n(.*?)```)?", re.DOTALL)
LINK = re.compile(r"\]\((?!https?://)([^)#]+)")


def name(page):
    return page.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("page", PAGES, ids=name)
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


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page):
    for target in LINK.findall(page.read_text()):
        assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_tests_that_a_page_names_exist(page):
    tests = "\n".join(path.read_text() for path in (ROOT / "tests").rglob("*.py"))
    named = re.findall(r"`(test_\w+)`", page.read_text())
    assert [test for test in named if f"def {test}(" not in tests] == []


def test_every_skip_is_in_the_support_matrix():
    matrix = runpy.run_path(str(DOCS / "conf.py"))["support_matrix"]()
    marks = sum(path.read_text().count("\n@pytest.mark.not_on(") for path in (ROOT / "tests").rglob("test_*.py"))
    assert len(table.skips()) == marks > 0
    reasons = [*(reason for _, _, reason, _ in table.skips()), *table.NEEDS, *table.DATA.values()]
    assert [reason for reason in reasons if reason not in matrix] == []
    assert "{{ support_matrix }}" in (DOCS / "backends.md").read_text()


def test_every_operation_of_a_backend_is_described():
    page = (DOCS / "backends.md").read_text()
    assert [name for name in OPERATIONS if f"`{name}`" not in page] == []


def test_every_public_name_is_in_the_api():
    pages = "\n".join(page.read_text() for page in (DOCS / "api").glob("*.md"))
    documented = re.findall(r"^\.\. auto(?:class|function|data):: xbm\.(\S+)$", pages, re.MULTILINE)
    public = set(xbm.__all__) - {"compensation", "drift"}  # modules
    assert public <= set(documented)
    assert len(documented) == len(set(documented))


def test_comparison_says_what_xbm_does(monkeypatch):
    monkeypatch.syspath_prepend(DOCS)
    import comparison

    page = (DOCS / "comparison.md").read_text().splitlines()
    for line in comparison.table([comparison.XBM]):
        assert any(row.startswith(line) for row in page), line


def test_the_citation_is_of_this_version():
    assert f"\nversion: {xbm.__version__}\n" in (ROOT / "CITATION.cff").read_text()
