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
from collections import ChainMap
from collections.abc import Iterator, Mapping, Sequence
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
_LOOKING = frozenset(["locals", "vars", "eval", "exec"])
_QUIET = (
    ast.Name,
    ast.Attribute,
    ast.Constant,
    ast.Compare,
    ast.BoolOp,
    ast.UnaryOp,
    ast.boolop,
    ast.unaryop,
    ast.cmpop,
    ast.expr_context,
)
"""What a condition may consist of without doing anything."""
_TAIL = 4
"""Lines that may follow the last one with code: closing brackets."""


def only_switches_dropout(frame: types.FrameType) -> bool:
    """Whether the attribute that ``frame`` reads just now decides about dropout, or about nothing at all."""
    found = _use(frame.f_code, frame.f_lasti)
    if found is None:
        return False
    node, place = found
    names = ChainMap(frame.f_locals, frame.f_globals)
    if isinstance(node, ast.Call):
        return _drops(_value(node.func, names, types.ModuleType), place)
    if isinstance(node, ast.BoolOp):
        assert isinstance(place, int)
        return _is_decided(node, place, names)
    # A tensor that is taken in one mode only would be met in that mode only; a whole number may count anything.
    values = [_value(one, names, object) for one in (node.body, node.orelse)]
    return all(type(value) is float or (type(value) is int and value == 0) for value in values)


def _is_decided(condition: ast.BoolOp, place: int, names: Mapping[str, Any]) -> bool:
    """Whether a condition has a value that does not depend on its side at ``place``, and no other side does more."""
    deciding = isinstance(condition.op, ast.Or)
    for side in condition.values[place + 1 :]:
        value = _told(side, names)
        if value is not _UNKNOWN and bool(value) is deciding:
            return True
        if not all(isinstance(one, _QUIET) for one in ast.walk(side)):
            return False  # what it does is done in one mode only
    return False


def _drops(function: Any, argument: Any) -> bool:
    """Whether a function does nothing with an argument but switch dropout: torch's own, or one that hands it on."""
    if any(function is one for one in _TAKERS):
        return True
    calls = _handed_on(function.__code__, argument) if type(function) is types.FunctionType else ()
    takers = [_value(call.func, function.__globals__, types.ModuleType) for call in calls]
    return bool(takers) and all(any(taker is one for one in _TAKERS) for taker in takers)


@functools.lru_cache(maxsize=4096)
def _handed_on(code: types.CodeType, argument: int | str | None) -> Sequence[ast.Call]:
    """The calls that take a parameter of a function, named or counted; none if it is used in any other way."""
    if isinstance(argument, int) and argument < code.co_argcount:
        argument = code.co_varnames[argument]
    tree = _tree(code)
    if argument not in code.co_varnames[: code.co_argcount + code.co_kwonlyargcount] or tree is None:
        return ()
    parents = _parents(tree)
    names = [node for node in parents if isinstance(node, ast.Name)]
    calls = [_taking(node, parents)[0] for node in names if node.id == argument]
    taken = [call for call in calls if call is not None]
    if len(taken) < len(calls) or not _LOOKING.isdisjoint(node.id for node in names):
        return ()
    bound = _bound(tree)  # what a name stands for must not be another thing by the time of the call
    return taken if all(bound.isdisjoint(_names_in(call.func)) for call in taken) else ()


@functools.lru_cache(maxsize=4096)
def _use(code: types.CodeType, instruction: int) -> tuple[ast.Call | ast.IfExp | ast.BoolOp, int | str | None] | None:
    """The call that takes the attribute, and as which argument, or the choice or condition it is part of; else None."""
    positions = getattr(code, "co_positions", None)  # from Python 3.11 on
    if positions is None:
        return None
    place = next(itertools.islice(positions(), instruction // 2, None), None)
    tree = _tree(code)
    if place is None or tree is None:
        return None
    parents = _parents(tree)
    node: ast.AST | None = next(filter(lambda one: _is_at(one, place), parents), None)
    if node is None:
        return None
    call, argument = _taking(node, parents)
    if call is not None:
        return call, argument
    parent = parents[node]
    while isinstance(parent, ast.UnaryOp) and isinstance(parent.op, ast.Not):
        node, parent = parent, parents[parent]
    if isinstance(parent, ast.BoolOp) and isinstance(node, ast.expr):
        return parent, parent.values.index(node)
    if not isinstance(parent, ast.IfExp) or node is not parent.test:
        return None
    return (parent, None) if _chooses_zero(parent) and _is_given_away(parent, parents) else None


def _is_given_away(node: ast.AST, parents: Mapping[ast.AST, ast.AST]) -> bool:
    """Whether all that is done with a value is to give it to calls, at once or under a name of its own."""
    parent = parents[node]
    if isinstance(parent, ast.Assign) and len(parent.targets) == 1 and isinstance(parent.targets[0], ast.Name):
        name = parent.targets[0].id
        uses = [one for one in parents if isinstance(one, ast.Name) and one.id == name]
        return all(one is parent.targets[0] or _taking(one, parents)[0] is not None for one in uses)
    return _taking(node, parents)[0] is not None


def _names_in(expression: ast.AST) -> set[str]:
    return {node.id for node in ast.walk(expression) if isinstance(node, ast.Name)}


def _bound(tree: ast.AST) -> set[str]:
    """The names that a function's text gives to something itself."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load):
            found.add(node.id)
        elif isinstance(node, ast.arg):
            found.add(node.arg)
        elif isinstance(node, ast.alias):
            found.add((node.asname or node.name).partition(".")[0])
        elif isinstance(node, (ast.Global, ast.Nonlocal)):
            found.update(node.names)
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.ExceptHandler)) and node.name:
            found.add(node.name)
    return found


def _parents(tree: ast.AST) -> dict[ast.AST, ast.AST]:
    return {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}


def _taking(node: ast.AST, parents: Mapping[ast.AST, ast.AST]) -> tuple[ast.Call | None, int | str | None]:
    """The call that ``node`` is an argument of, if it is one, and which: its number or its keyword."""
    parent = parents[node]
    while isinstance(parent, ast.UnaryOp) and isinstance(parent.op, ast.Not):
        node, parent = parent, parents[parent]
    if isinstance(parent, ast.keyword):
        call = parents[parent]
        return (call, parent.arg) if isinstance(call, ast.Call) else (None, None)
    if not isinstance(parent, ast.Call) or node is parent.func:
        return None, None
    before = parent.args[: parent.args.index(node)] if isinstance(node, ast.expr) else []
    return parent, None if any(isinstance(one, ast.Starred) for one in before) else len(before)


def _is_at(node: ast.AST, place: tuple[Any, ...]) -> bool:
    if not isinstance(node, ast.Attribute):
        return False
    return (node.lineno, node.end_lineno, node.col_offset, node.end_col_offset) == place


def _chooses_zero(choice: ast.IfExp) -> bool:
    """Whether one of both is the number 0, and the other is read and not computed."""
    zeros = [
        isinstance(one, ast.Constant) and one.value == 0 and one.value is not False
        for one in (choice.body, choice.orelse)
    ]
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
        if _is_computed(type(holder), expression.attr):
            return _UNKNOWN
        return getattr(holder, "__dict__", {}).get(expression.attr, _UNKNOWN)
    return _UNKNOWN


def _is_computed(kind: type, name: str) -> bool:
    """Whether an attribute of a class's objects may be another than the one they hold, as a property is."""
    if isinstance(kind.__getattribute__, types.FunctionType):
        return True
    return any(hasattr(type(vars(base)[name]), "__set__") for base in kind.__mro__ if name in vars(base))
