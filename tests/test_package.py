"""The package shows its public names, and imports the rest when it is first used."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import netopt

ROOT = Path(__file__).parents[1]


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_only_public_names_are_listed():
    assert dir(netopt) == sorted([*netopt.__all__, "__version__"])


@pytest.mark.parametrize("name", netopt.__all__)
def test_every_public_name_is_there_and_what_type_checkers_see(name):
    tree = ast.parse(Path(netopt.__file__).read_text(encoding="utf-8"))
    seen = [
        (node.module, alias.name)
        for block in tree.body
        if isinstance(block, ast.If)
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    ]
    module = next(module for module, imported in seen if imported == name)
    value = getattr(netopt, name)
    if isinstance(value, ModuleType):
        assert (module, value.__name__) == ("netopt", f"netopt.{name}")
    else:
        assert value is getattr(importlib.import_module(module), name)


def test_names_that_are_not_there_are_refused_as_by_any_module():
    with pytest.raises(AttributeError, match="has no attribute 'prune_neuron'"):
        netopt.prune_neuron  # noqa: B018
    assert not hasattr(netopt, "_nothing")


def test_importing_takes_what_it_needs_and_no_more():
    code = "import sys, torch; had = set(sys.modules); import netopt; print(*sorted(set(sys.modules) - had))"
    taken = run(code).split()
    assert not [name for name in taken if name.startswith(("netopt.axes", "netopt.distillation", "netopt.prune"))]
    assert not {"matplotlib", "tqdm.auto", "transformers"} & set(taken)
    assert len(taken) < 80


@pytest.mark.parametrize("first", ["netopt.prune", "netopt.distillation", "netopt.report", "netopt.masking.finish"])
def test_modules_can_be_imported_in_any_order(first):
    assert run(f"import {first}, netopt; print(netopt.prune_neurons.__name__, netopt.finish.__name__)").split() == [
        "prune_neurons",
        "finish",
    ]


def test_everything_can_be_imported_at_once():
    assert run("from netopt import *; print(prune_neurons.__name__, measure.__name__)").split()[1] == "netopt.measure"
