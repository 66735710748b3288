"""The page about pretrained models is run from top to bottom, and prints what it says."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path

import pytest

PAGE = Path(__file__).parent.parent / "docs" / "pretrained.md"
BLOCK = re.compile(r"```(python|text)\n(.*?)```", flags=re.DOTALL)


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_the_page_prints_what_it_says(tmp_path, monkeypatch):
    pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "page"}
    printed, shown = "", 0
    for language, body in BLOCK.findall(PAGE.read_text(encoding="utf-8")):
        if language == "python":
            out = io.StringIO()
            with contextlib.redirect_stdout(out):
                exec(compile(body, str(PAGE), "exec"), names)
            printed = out.getvalue()
        else:
            assert printed == body
            shown += 1
    assert shown == 3
