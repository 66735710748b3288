"""Constraints: what one run of a model's code states about its numbers.

By an equation a number is the size of a dimension, by a guard a comparison must keep its outcome. A number
that is turned into a plain one is noted, as nothing follows it from there.
"""

from __future__ import annotations

import functools
import os
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from netopt.symbolic.expression import AttributeRef, Expression, Term, evaluate, expression_of, leaves, value_of

_OWN = f"{Path(__file__).parents[1]}{os.sep}"
_TORCH = f"{Path(torch.__file__).parent}{os.sep}"  # with the separator: torchvision is not torch's own
_NUMPY = f"{os.sep}numpy{os.sep}"
_DEEPEST = 200
"""A number nested in more operations, as one counted up in a long loop, is followed no further."""


class Equation:
    """``number`` must stay the size of ``layout``."""

    __slots__ = ("layout", "number", "operation", "where")

    def __init__(self, number: Any, layout: Any, operation: str, where: str) -> None:
        self.number: Term = expression_of(number)
        self.layout, self.operation, self.where = layout, operation, where

    def __str__(self) -> str:
        return f"{self.operation} at {self.where}"


class Guard:
    """A comparison whose outcome must stay what it was."""

    __slots__ = ("compare", "left", "outcome", "right", "where")

    def __init__(self, compare: Callable[[Any, Any], Any], left: Any, right: Any, outcome: bool, where: str) -> None:
        self.left: Term = expression_of(left)
        self.right: Term = expression_of(right)
        self.compare, self.outcome, self.where = compare, outcome, where

    def __str__(self) -> str:
        return f"a comparison at {self.where}"

    @property
    def key(self) -> tuple[Any, ...]:
        """Equal for two guards that state the same."""
        return self.left, self.right, self.compare, self.outcome

    @property
    def leaves(self) -> frozenset[Any]:
        """Keys of the leaves it depends on."""
        return leaves(self.left) | leaves(self.right)

    def holds(self, values: Mapping[Any, Any]) -> bool:
        """Whether the outcome is the same where leaves have other values; not where a side is undefined."""
        left, right = evaluate(self.left, values), evaluate(self.right, values)
        return left is not None and right is not None and bool(self.compare(left, right)) is self.outcome


class Constraints:
    """What symbolic numbers record, until closed.

    Attributes:
        equations: Numbers that are sizes.
        guards: Comparisons.
        numbers: Numbers that were turned into plain ones, each with the line.
        salt: Makes hashes differ from those of every other trace; ``None`` for the hashes of plain numbers.
    """

    def __init__(self) -> None:
        self.equations: list[Equation] = []
        self.guards: list[Guard] = []
        self.numbers: list[tuple[Any, str]] = []
        self._unread: dict[int, tuple[Any, str]] = {}
        """Floats no operation has read yet; the code of ``math`` reads a float without a method of it being called."""
        self.salt: object | None = object()
        self._thread: int | None = threading.get_ident()

    @property
    def is_recording(self) -> bool:
        """Whether numbers record what is done with them: until closed, and only in the thread that traces."""
        return self._thread == threading.get_ident()

    def hash_of(self, value: Any) -> int:
        """The hash of a recording number, salted so that an ``lru_cache`` that knows the plain number is missed."""
        return hash((self.salt, value)) if self.salt is not None and self.is_recording else hash(value)

    def close(self) -> None:
        """Ends the recording; numbers that someone kept are as plain as any from now on."""
        self._thread = None
        self.numbers.extend(self._unread.values())
        self._unread.clear()

    def equate(self, number: Any, layout: Any, operation: str) -> None:
        """States that ``number`` is the size of ``layout``."""
        if layout.size > 1:
            self.equations.append(Equation(number, layout, operation, calling_line()))

    def guard(self, compare: Callable[[Any, Any], Any], left: Any, right: Any, outcome: bool) -> None:
        """States that a comparison keeps its outcome."""
        if self.is_recording:
            self.guards.append(Guard(compare, self.term(left), self.term(right), outcome, calling_line()))

    def note_number(self, number: Any) -> None:
        """States that the code computes with the value of ``number``, which cannot be followed further."""
        if self.is_recording:
            self._unread.pop(id(expression_of(number)), None)
            self.numbers.append((number, calling_line()))

    def used_as_numbers(self) -> list[Any]:
        """What the code computed with by value, floats that nothing has read yet among it."""
        return [number for number, _ in (*self.numbers, *self._unread.values())]

    def convert(self, number: Any, operation: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """A conversion to a plain number, or to text."""
        self.note_number(number)
        return operation(number.expression.value, *args, **kwargs)

    def result(self, expression: Expression, make: Callable[[Expression, Constraints], Any]) -> Any:
        """What an operation returns: a number that knows its expression, or a plain one if it is nested too deeply."""
        if expression.depth > _DEEPEST:
            self.numbers.append((expression, calling_line()))
            return expression.value
        number = make(expression, self)
        if type(expression.value) is float:
            self._unread[id(expression)] = number, calling_line()
        return number

    def term(self, number: Any) -> Term:
        """The expression of a number recorded here; any other number is constant."""
        if self.knows(number):
            self._unread.pop(id(number.expression), None)
            return number.expression
        return value_of(expression_of(number))

    def knows(self, number: Any) -> bool:
        """Whether ``number`` records here."""
        return getattr(number, "constraints", None) is self

    def sets_a_size(self, attribute: AttributeRef) -> bool:
        """Whether an attribute is part of what some dimension's size must be."""
        return any(attribute in leaves(equation.number) for equation in self.equations)


def calling_line() -> str:
    """``model.py:33``: the innermost line that is not torch's, numpy's or this package's."""
    frame = sys._getframe(1)
    while frame is not None:
        if _is_foreign(frame.f_code.co_filename):
            return f"{_file_name(frame.f_code.co_filename)}:{frame.f_lineno}"
        frame = frame.f_back
    return "?:0"


@functools.cache
def _is_foreign(path: str) -> bool:
    return not path.startswith((_OWN, _TORCH, "<")) and _NUMPY not in path


@functools.cache
def _file_name(path: str) -> str:
    return Path(path).name
