"""Pages lead somewhere, their code is code, and nothing public is left out."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import netopt
from netopt import errors

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])


def ids(path: Path) -> str:
    return path.name


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8"))
    missing = [link for link in links if "://" not in link and not (page.parent / link).exists()]
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_code_is_python(page):
    for block in re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL):
        code = "\n".join(line.removeprefix(">>> ").removeprefix("... ") for line in block.splitlines())
        assert ast.parse(code) is not None


def test_every_page_is_in_the_index():
    index = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    site = (ROOT / "zensical.toml").read_text(encoding="utf-8")
    pages = [page.relative_to(ROOT / "docs").as_posix() for page in PAGES if ROOT / "docs" in page.parents]
    assert [page for page in pages if f"({page})" not in index] == ["index.md"]
    assert [page for page in pages if f'"{page}"' not in site] == []


def test_every_error_is_explained():
    page = (ROOT / "docs" / "errors.md").read_text(encoding="utf-8")
    assert [name for name in errors.__all__ if name != "nearest" and f"`{name}`" not in page] == []


def test_every_public_name_is_in_the_api():
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    modules = {path.stem for path in (ROOT / "src" / "netopt").iterdir()}
    listed = {line.rpartition(".")[2] for line in page.splitlines() if line.startswith("::: ")}
    # A function may share its name with the module it lies in.
    names = {name for name in netopt.__all__ if name not in modules or callable(getattr(netopt, name))}
    assert names - listed == set()
