"""Tables as text, at most 100 columns wide, and as HTML; long lists are grouped by the pattern of their names."""

from __future__ import annotations

import html
import re
import textwrap
from collections.abc import Collection, Hashable, Iterable, Iterator, Sequence
from typing import TypeVar

__all__ = ["WIDTH", "columns", "groups", "html_table", "pattern", "reasons", "shortened", "span"]

WIDTH = 100
"""So many characters wide is a line of text at most."""
NAME = 48
"""So many characters of a name are shown where others stand beside it."""

_Item = TypeVar("_Item")
_Key = TypeVar("_Key", bound=Hashable)


def pattern(name: str) -> str:
    """Replaces the numbers in a dotted name.

    Example:
        >>> pattern("encoder.layer.11.output.dense/0")
        'encoder.layer.*.output.dense/0'
    """
    return re.sub(r"(?<![^.])\d+(?=\.)", "*", name)


def groups(items: Iterable[tuple[_Key, _Item]]) -> dict[_Key, list[_Item]]:
    """Collects what has the same key, in the order in which the keys come."""
    found: dict[_Key, list[_Item]] = {}
    for key, item in items:
        found.setdefault(key, []).append(item)
    return found


def span(values: Collection[int]) -> str:
    """Says from where to where numbers go.

    Example:
        >>> span([380, 381, 380]), span([384])
        ('380-381', '384')
    """
    low, high = min(values), max(values)
    return f"{low:,}" if low == high else f"{low:,}-{high:,}"


def columns(cells: Sequence[Sequence[str]], words: Collection[str] = ()) -> Iterator[str]:
    """Lays out cells below their heads: names to the left, numbers to the right, ``words`` to the left again.

    A last column of words is wrapped where the line would get longer than :data:`WIDTH`.
    """
    heads = cells[0]
    cells = [[shortened(line[0]), *line[1:]] for line in cells]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    left = {0, *(index for index, head in enumerate(heads) if head in words)}
    wraps = len(heads) - 1 in left and len(heads) > 1
    for line in cells:
        fixed = line[:-1] if wraps else line
        parts = [f"{c:<{w}}" if i in left else f"{c:>{w}}" for i, (c, w) in enumerate(zip(fixed, widths, strict=False))]
        yield from _wrapped("  ".join(parts), line[-1]) if wraps else ["  ".join(parts).rstrip()]


def reasons(named: Sequence[tuple[str, str]]) -> Iterator[str]:
    """Lays out names and reasons, the reasons below each other and wrapped."""
    width = min(max((len(name) for name, _ in named), default=0), NAME)
    for name, reason in named:
        yield from _wrapped(f"  {shortened(name):<{width}}", reason)


def html_table(heads: Sequence[str], cells: Sequence[Sequence[str]], words: Collection[str] = ()) -> str:
    """The same as HTML: names and ``words`` to the left, numbers to the right."""
    sides = ["left" if not index or head in words else "right" for index, head in enumerate(heads)]

    def line(tag: str, texts: Sequence[str]) -> str:
        parts = zip(sides, texts, strict=True)
        return "".join(f'<{tag} style="text-align:{side}">{html.escape(text)}</{tag}>' for side, text in parts)

    body = "".join(f"<tr>{line('td', one)}</tr>" for one in cells)
    return f"<table><thead><tr>{line('th', heads)}</tr></thead><tbody>{body}</tbody></table>"


def shortened(name: str) -> str:
    """Leaves out the middle of a name that is too long to stand beside others."""
    return name if len(name) <= NAME else f"{name[: NAME // 2 - 2]}...{name[-NAME // 2 + 1 :]}"


def _wrapped(start: str, text: str) -> list[str]:
    if len(start) > WIDTH - 24 and text:
        return [start.rstrip(), *textwrap.wrap(text, WIDTH, initial_indent="    ", subsequent_indent="    ")]
    first, *more = textwrap.wrap(text, WIDTH - len(start) - 2) or [""]
    return [f"{start}  {first}".rstrip(), *(" " * (len(start) + 2) + one for one in more)]
