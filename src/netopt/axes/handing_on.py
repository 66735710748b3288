"""What becomes of a flag that a line of code reads: whether it changes more than a dropout.

Most forwards that read ``training`` hand it to dropout, choose by it between a probability and 0, or ask it together
with a setting that has decided already. The text of the reading function is looked at: is the flag an argument of
torch's dropout, the test of ``0.0 if ... else p``, or one side of ``self.training and self.rate > 0`` where the rate is
0? Any other use, and code whose text is not at hand, counts as one that may do anything.
"""

from __future__ import annotations

import ast
import functools
import itertools
import linecache
import operator
import types
from collections.abc import Iterator, Mapping
from typing import Any

import torch

__all__ = ["only_switches_dropout"]

_FUNCTIONAL = torch.nn.functional
# Not those named alpha, which give no zero where they drop.
_TAKERS = (
    _FUNCTIONAL.dropout,
    _FUNCTIONAL.dropout1d,
    _FUNCTIONAL.dropout2d,
    _FUNCTIONAL.dropout3d,
    torch.dropout,
    torch.dropout_,
    torch.feature_dropout,
)
_TAIL = 4
"""Lines that may follow the last one with code: closing brackets."""


def only_switches_dropout(frame: types.FrameType) -> bool:
    """Whether the attribute that ``frame`` reads just now decides about dropout, or about nothing at all."""
    found = _use(frame.f_code, frame.f_lasti)
    if isinstance(found, ast.BoolOp):
        deciding = isinstance(found.op, ast.Or)
        sides = [_told(one, {**frame.f_globals, **frame.f_locals}) for one in found.values]
        return any(side is not _UNKNOWN and bool(side) is deciding for side in sides)
    if isinstance(found, ast.Call):
        return any(_value(found.func, frame.f_globals, types.ModuleType) is one for one in _TAKERS)
    # A tensor that is taken in one mode only would be met in that mode only.
    return found is not None and all(
        isinstance(_value(one, {**frame.f_globals, **frame.f_locals}, object), (int, float))
        for one in (found.body, found.orelse)
    )


@functools.lru_cache(maxsize=4096)
def _use(code: types.CodeType, instruction: int) -> ast.Call | ast.IfExp | ast.BoolOp | None:
    """The call that takes the attribute as an argument, or the choice or condition it is part of; else None."""
    positions = getattr(code, "co_positions", None)  # from Python 3.11 on
    if positions is None:
        return None
    place = next(itertools.islice(positions(), instruction // 2, None), None)
    tree = _tree(code)
    if place is None or tree is None:
        return None
    parents = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
    node: ast.AST | None = next(filter(lambda one: _is_at(one, place), parents), None)
    parent = parents.get(node) if node is not None else None
    while isinstance(parent, ast.UnaryOp) and isinstance(parent.op, ast.Not):
        node, parent = parent, parents.get(parent)
    if isinstance(parent, ast.keyword):
        parent = parents.get(parent)
    if isinstance(parent, ast.Call) and node is not parent.func:
        return parent
    if isinstance(parent, ast.IfExp) and node is parent.test and _chooses_zero(parent):
        return parent
    return parent if isinstance(parent, ast.BoolOp) else None


def _is_at(node: ast.AST, place: tuple[Any, ...]) -> bool:
    if not isinstance(node, ast.Attribute):
        return False
    return (node.lineno, node.end_lineno, node.col_offset, node.end_col_offset) == place


def _chooses_zero(choice: ast.IfExp) -> bool:
    """Whether one of both is the number 0, and the other is read and not computed."""
    zeros = [isinstance(one, ast.Constant) and one.value == 0 for one in (choice.body, choice.orelse)]
    plain = [isinstance(one, (ast.Constant, ast.Name, ast.Attribute)) for one in (choice.body, choice.orelse)]
    return any(zeros) and all(plain)


def _tree(code: types.CodeType) -> ast.AST | None:
    """The syntax of a function's text, with the lines and columns of its file."""
    lines = linecache.getlines(code.co_filename)
    last = max((line for line in _lines(code) if line is not None), default=0)
    for end in range(last, last + _TAIL):
        text = lines[code.co_firstlineno - 1 : end]
        if not text:
            return None
        indented = text[0][:1].isspace()
        # An indented function stands below a line of its own, so that its columns stay.
        head = ["if True:\n"] if indented else []
        try:
            tree = ast.parse("".join(head + text))
        except SyntaxError:
            continue
        return ast.increment_lineno(tree, code.co_firstlineno - 1 - len(head))
    return None


def _lines(code: types.CodeType) -> Iterator[int | None]:
    yield from (line for _, _, line in code.co_lines())
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _lines(constant)


def _value(expression: ast.AST, names: Mapping[str, Any], holders: type) -> Any:
    """What a constant or a dotted name is, its attributes read of ``holders`` alone; None for any other expression."""
    if isinstance(expression, ast.Constant):
        return expression.value
    if isinstance(expression, ast.Name):
        return names.get(expression.id)
    if isinstance(expression, ast.Attribute):
        holder = _value(expression.value, names, holders)
        return getattr(holder, expression.attr, None) if isinstance(holder, holders) else None
    return None


_UNKNOWN = object()
_COMPARISONS = {
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Is: operator.is_,
    ast.IsNot: operator.is_not,
}
_PLAIN = (bool, int, float, str, type(None))


def _told(expression: ast.AST, names: Mapping[str, Any]) -> Any:
    """The plain value that a side of a condition has, found without running any code of the user's; else unknown."""
    if isinstance(expression, ast.UnaryOp) and isinstance(expression.op, ast.Not):
        value = _told(expression.operand, names)
        return value if value is _UNKNOWN else not value
    if isinstance(expression, ast.Compare) and len(expression.ops) == 1:
        compare = _COMPARISONS.get(type(expression.ops[0]))
        sides = [_told(one, names) for one in (expression.left, *expression.comparators)]
        try:
            return _UNKNOWN if compare is None or _UNKNOWN in sides else compare(*sides)
        except TypeError:  # of a number and a text
            return _UNKNOWN
    found = _held(expression, names)
    return found if type(found) in _PLAIN else _UNKNOWN


def _held(expression: ast.AST, names: Mapping[str, Any]) -> Any:
    """What a constant, a name or a dotted name stands for, its attributes read of objects that simply hold them."""
    if isinstance(expression, ast.Constant):
        return expression.value
    if isinstance(expression, ast.Name):
        return names.get(expression.id, _UNKNOWN)
    if isinstance(expression, ast.Attribute) and expression.attr != "training":
        holder = _held(expression.value, names)
        return getattr(holder, "__dict__", {}).get(expression.attr, _UNKNOWN)
    return _UNKNOWN
