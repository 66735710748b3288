"""Whatever is shown is run: the examples and the notebook, with next to no training, and their own assertions."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

EXAMPLES = Path(__file__).parent.parent / "examples"
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg", "NETOPT_TINY": "1"}
ENVIRONMENT["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"


def test_quickstart_runs_and_leaves_its_table_picture_and_numbers(tmp_path):
    command = [sys.executable, "-W", "error", str(EXAMPLES / "quickstart.py"), "--tiny", "--output", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr
    assert "| classic net" in done.stdout
    saved = json.loads((tmp_path / "quickstart.json").read_text(encoding="utf-8"))
    assert {line["net"] for line in saved["table"]} == {"classic net", "conv net", "student"}
    assert len(saved["claims"]) >= 10
    assert (tmp_path / "quickstart.png").stat().st_size > 10_000


NOTEBOOKS = sorted(EXAMPLES.glob("*.ipynb"))
PREPARED = f"""
import sys, warnings
sys.path.insert(0, {str(Path(__file__).parent)!r})
warnings.filterwarnings("ignore", message="IProgress")
import conftest
"""
# A torchvision that was built for another torch can be imported then, as transformers does, and no widgets are needed.


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_notebook_carries_its_outputs(path):
    shown = [output for cell in nbformat.read(path, as_version=4).cells for output in cell.get("outputs", [])]
    assert any("text/html" in output.get("data", {}) for output in shown)
    assert not [output for output in shown if output.output_type == "error"]
    assert not [output for output in shown if output.get("name") == "stderr"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_notebook_runs_from_top_to_bottom_each_cell_twice(path, monkeypatch):
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    notebook = nbformat.read(path, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    twice = [copy.deepcopy(cell) for cell in code for _ in range(2)]
    notebook.cells = [nbformat.v4.new_code_cell(PREPARED), *twice]
    NotebookClient(notebook, timeout=120, kernel_name="python3", resources={"metadata": {"path": EXAMPLES}}).execute()
    shown = [output for cell in twice for output in cell.outputs]
    assert any("text/html" in output.get("data", {}) for output in shown), "reports show as tables"
    assert any("image/png" in output.get("data", {}) for output in shown), "figures show as pictures"
    assert not [output for output in shown if output.get("name") == "stderr"], "nothing warns"
