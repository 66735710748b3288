"""Distillation reads in the order in which things flow: data, then targets and loss, then the loop."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from netopt import distillation

ROOT = Path(distillation.__file__).parent
SOURCES = sorted(ROOT.rglob("*.py"))
FLOW = ("data", "loss", "loop")
MOST_ARGUMENTS = 6


def runtime_imports(node: ast.AST) -> Iterator[str]:
    """The modules imported below ``node``, but for what only annotations need."""
    if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
        return
    if isinstance(node, ast.ImportFrom) and node.module:
        yield from (f"{node.module}.{alias.name}" for alias in node.names)
    for child in ast.iter_child_nodes(node):
        yield from runtime_imports(child)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_folder_knows_only_what_flows_into_it(path):
    folder = path.relative_to(ROOT).parts[0]
    for name in runtime_imports(ast.parse(path.read_text(encoding="utf-8"))):
        inside = name.removeprefix("netopt.distillation.").split(".")[0]
        if folder in FLOW and name.startswith("netopt.distillation.") and inside in FLOW:
            assert FLOW.index(inside) <= FLOW.index(folder), f"{path.name} imports {name}"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_below_the_call_nothing_takes_more_than_six_arguments(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef) and (path.name, node.name) != ("call.py", "distill"):
            given = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            count = len(given) - (bool(given) and given[0].arg in ("self", "cls"))
            assert count <= MOST_ARGUMENTS, f"{node.name} in {path.name} takes {count}"
