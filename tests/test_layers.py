"""Imports go only downward, so that every module can be read knowing only what lies below it."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import netopt

ROOT = Path(netopt.__file__).parent
SOURCES = sorted(ROOT.rglob("*.py"))

# A module may import from rows below its own, and from its own package.
LAYERS = (
    {"__main__"},
    {"integrations"},
    {"training", "sensitivities"},
    {"prune", "distillation"},
    {"report"},
    {"plan", "reconstruction"},
    {"masking", "surgery"},
    {"selection"},
    {"axes", "importance", "measure"},
    {"symbolic", "model"},
    {"batches", "calibration", "figures", "flops", "progress", "selectors", "tables"},
    {"errors"},
)
OPTIONAL = {"matplotlib", "IPython", "transformers", "timm", "torchvision", "lightning_fabric", "accelerate", "sklearn"}
OPTIONAL |= {"lightning", "safetensors", "tokenizers"}


def row(package: str) -> int:
    rows = [index for index, layer in enumerate(LAYERS) if package in layer]
    assert rows, f"{package} is in no row of LAYERS; add it"
    return rows[0]


def package_of(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def netopt_imports(path: Path) -> set[str]:
    """The top-level parts of netopt that the file imports, anywhere in it; parsed, nothing is executed."""
    found: set[str] = set()
    inside = path.relative_to(ROOT.parent).with_suffix("").parts
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level:
            base = ".".join(inside[: len(inside) - node.level])
            names = [f"{base}.{node.module or ''}".rstrip(".") + f".{alias.name}" for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        found.update(name.split(".")[1] for name in names if name.startswith("netopt."))
    return found


@pytest.mark.parametrize("path", [path for path in SOURCES if path != ROOT / "__init__.py"], ids=lambda p: p.stem)
def test_imports_point_downward(path):
    own = package_of(path)
    for target in sorted(netopt_imports(path)):
        assert target == own or row(target) > row(own), f"{path.relative_to(ROOT)} reaches up or aside, to {target}"


def test_the_layers_name_what_exists_and_nothing_else():
    exists = {path.name.removesuffix(".py") for path in ROOT.iterdir() if path.suffix == ".py" or path.is_dir()}
    exists -= {"__init__", "__pycache__"}
    assert set().union(*LAYERS) == exists


def test_the_contributing_guide_names_the_same_layers():
    guide = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text(encoding="utf-8")
    rows = [line.split("|")[2] for line in guide.splitlines() if line.startswith("| ") and "`" in line.split("|")[2]]
    assert tuple(set(re.findall(r"`(\w+)`", row)) for row in reversed(rows)) == LAYERS


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: p.stem)
def test_a_module_opens_with_its_idea_and_stays_small(path):
    text = path.read_text(encoding="utf-8")
    assert ast.get_docstring(ast.parse(text)), f"{path.relative_to(ROOT)} has no docstring"
    assert len(text.splitlines()) <= 511, f"{path.relative_to(ROOT)} wants to be two modules"


def test_import_reaches_no_optional_package():
    code = f"import sys, netopt; print(sorted(set(sys.modules) & {OPTIONAL!r}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: p.stem)
def test_functions_stay_short(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            body = node.body[1:] if ast.get_docstring(node) and len(node.body) > 1 else node.body
            lines = (node.end_lineno or 0) - body[0].lineno + 1
            assert lines < 64, f"{path.relative_to(ROOT)}: {node.name} wants to be two functions"


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: p.stem)
def test_whoever_catches_everything_says_why_or_raises_it_again(path):
    text = path.read_text(encoding="utf-8")
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.ExceptHandler):
            continue
        names = {one.id for one in ast.walk(node.type) if isinstance(one, ast.Name)} if node.type else {"Exception"}
        if names & {"Exception", "BaseException"}:
            says_why = "#" in text.splitlines()[node.lineno - 1]
            again = isinstance(node.body[-1], ast.Raise) and node.body[-1].exc is None
            assert says_why or again, f"{path.relative_to(ROOT)}:{node.lineno} catches everything, without a reason"
