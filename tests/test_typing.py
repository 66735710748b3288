"""Users' code against the public calls passes a strict type checker."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import netopt

CODE = Path(__file__).parent / "users_code.py"


@pytest.mark.slow
def test_users_code_passes_pyright_strict(tmp_path):
    if importlib.util.find_spec("pyright") is None:
        pytest.skip("pyright is not installed")
    source = str(Path(netopt.__file__).parents[1])
    shutil.copy(CODE, tmp_path)
    settings = {"typeCheckingMode": "strict", "extraPaths": [source], "pythonVersion": "3.10"}
    (tmp_path / "pyrightconfig.json").write_text(json.dumps(settings))
    command = [sys.executable, "-m", "pyright", "--outputjson", "-p", str(tmp_path), "--pythonpath", sys.executable]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=240)
    report = json.loads(done.stdout)
    told = [f"{one['range']['start']['line'] + 1}: {one['message']}" for one in report["generalDiagnostics"]]
    assert report["summary"]["filesAnalyzed"] == 1
    assert told == []
