"""Number literals that let sizes remember.

``1.0 / n`` is answered by the float, which knows nothing of origins and hands back a plain number. While a model is
traced, the float constants in the code of its classes, and of the functions beside them, are floats that ask the other
operand first. Everything else about them is a float.
"""

from __future__ import annotations

import dis
import operator
import sys
import threading
import types
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias

from torch import nn

from netopt.model.attributes import Parts, is_library
from netopt.symbolic import SymbolicFloat, SymbolicInt, record

_ARITHMETIC = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow")
_COMPARISONS = {"lt": "gt", "le": "ge", "gt": "lt", "ge": "le", "eq": "eq", "ne": "ne"}
_OPERATORS = frozenset(
    code for name, code in dis.opmap.items() if name.startswith(("BINARY_", "COMPARE_OP")) and "SUBSCR" not in name
)
_lock = threading.RLock()
_Lending: TypeAlias = "tuple[types.FunctionType, types.CodeType, types.CodeType]"
_rewritten: weakref.WeakKeyDictionary[Any, list[_Lending]] = weakref.WeakKeyDictionary()


class Literal(float):
    """A float constant of the user's code; an operation with a size is the size's, any other a float's."""

    __slots__ = ()

    def __hash__(self) -> int:
        return float.__hash__(self)


def _arithmetic(operation: Callable[[Any, Any], Any], plain: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    def method(self: Any, other: Any) -> Any:
        if isinstance(other, (SymbolicInt, SymbolicFloat)):
            return record(other.constraints, operation, float(self), other)
        return plain(self, other)

    return method


def _comparison(mirrored: str, plain: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    def method(self: Any, other: Any) -> Any:
        if isinstance(other, (SymbolicInt, SymbolicFloat)):
            return getattr(other, mirrored)(float(self))
        return plain(self, other)

    return method


for _name in _ARITHMETIC:
    setattr(Literal, f"__{_name}__", _arithmetic(getattr(operator, _name), getattr(float, f"__{_name}__")))
for _name, _mirrored in _COMPARISONS.items():
    setattr(Literal, f"__{_name}__", _comparison(f"__{_mirrored}__", getattr(float, f"__{_name}__")))


@contextmanager
def remembering_literals(parts: Parts) -> Iterator[None]:
    """Lends the code of a model's classes constants that ask sizes first, until left."""
    with _lock:
        swapped = []
        try:
            for function, plain, lent in _functions_of(parts):
                if function.__code__ is plain:
                    function.__code__ = lent
                    swapped.append((function, plain))
            yield
        finally:
            for function, plain in swapped:
                function.__code__ = plain


def _functions_of(parts: Parts) -> Iterator[_Lending]:
    """Functions of the classes of a model, of their files, and kept in its attributes, that compute with constants."""
    for _, module in parts:
        values = module.__dict__.values()
        for value in values if types.FunctionType in map(type, values) else ():
            if type(value) is types.FunctionType:
                yield from _functions_in(value)
    kinds = dict.fromkeys(base for kind in dict.fromkeys(type(module) for _, module in parts) for base in kind.__mro__)
    for kind in kinds:
        if kind.__module__ != "builtins" and not is_library(kind.__module__):
            yield from _functions_in(kind)
            yield from _functions_in(sys.modules.get(kind.__module__))


def _functions_in(holder: Any) -> list[_Lending]:
    """Those a class or a file holds, or a function itself; looked for once."""
    if holder is None:
        return []
    if holder not in _rewritten:
        values = [holder] if isinstance(holder, types.FunctionType) else list(vars(holder).values())
        if isinstance(holder, types.ModuleType):
            values += [one for kind in values if _is_beside(kind, holder) for one in vars(kind).values()]
        _rewritten[holder] = [
            (function, function.__code__, lent)
            for function in filter(None, map(_function, values))
            if (lent := _with_literals(function.__code__)) is not function.__code__
        ]
    return _rewritten[holder]


def _is_beside(kind: Any, file: types.ModuleType) -> bool:
    """Whether a class of a file is none of modules, such as a function with a gradient of its own."""
    return isinstance(kind, type) and kind.__module__ == file.__name__ and not issubclass(kind, nn.Module)


def _function(value: Any) -> types.FunctionType | None:
    """The user's own function behind a method, a static method or a decorator that says what it wraps."""
    try:
        for _ in range(4):
            value = getattr(value, "__func__", None) or getattr(value, "__wrapped__", None) or value
    except Exception:  # what stands for a missing package answers every question by raising
        return None
    if not isinstance(value, types.FunctionType):
        return None
    home = value.__module__
    return None if home is None or is_library(home) else value


def _with_literals(code: types.CodeType) -> types.CodeType:
    """The code with its float constants lent, inner functions too; the very same where there is nothing to lend."""
    computes = not _OPERATORS.isdisjoint(code.co_code[::2])
    changed = False
    constants = []
    for value in code.co_consts:
        lent = value
        if isinstance(value, types.CodeType):
            lent = _with_literals(value)
        elif computes and type(value) is float:
            lent = Literal(value)
        changed = changed or lent is not value
        constants.append(lent)
    return code.replace(co_consts=tuple(constants)) if changed else code
