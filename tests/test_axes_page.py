"""The page about axes is run from top to bottom, and prints what it says."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path

PAGE = Path(__file__).parent.parent / "docs" / "axes.md"
BLOCK = re.compile(r"```(python|text)\n(.*?)```", flags=re.DOTALL)


def neutral(text: str) -> list[str]:
    """Lines without the places of code, which the page gives as those of a reader's own file, and without padding."""
    return [re.sub(r"[\w.]+\.(py|md):\d+", "model.py:0", line).rstrip() for line in text.strip().splitlines()]


def test_the_page_prints_what_it_says():
    text = PAGE.read_text(encoding="utf-8")
    names: dict[str, object] = {"__name__": "page"}
    printed, shown = "", 0
    for match in BLOCK.finditer(text):
        language, body = match.groups()
        if language == "python":
            assert not neutral(printed), f"the page does not show what is printed: {printed}"
            line = text[: match.start(2)].count("\n")
            out = io.StringIO()
            with contextlib.redirect_stdout(out):
                exec(compile("\n" * line + body, str(PAGE), "exec"), names)
            printed = out.getvalue()
        else:
            assert neutral(printed) == neutral(body)
            printed, shown = "", shown + 1
    assert not neutral(printed)
    assert shown >= 8
