"""Integers that remember where they came from.

While a model is traced, its integer attributes and every answer of ``x.shape`` are a :class:`SymbolicInt`: an ``int``
whose
``origin`` is an expression over attributes and layouts, kept through arithmetic. Where one of them is used as the size
of a dimension, "this integer = the size of this layout" is an equation; where two are compared, the outcome is a
condition; where one is used as a number, the result depends on how many neurons there are.
"""

from __future__ import annotations

import functools
import math
import operator
import os
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import torch

from netopt.axes.layout import Atom, Layout, count

if TYPE_CHECKING:
    from typing_extensions import Self

_OWN = f"{Path(__file__).parents[1]}{os.sep}"
_TORCH = f"{Path(torch.__file__).parent}{os.sep}"  # with the separator: torchvision is not torch's own
_foreign: dict[str, bool] = {}


class AttributeRef(NamedTuple):
    """Where an integer lives: the module's dotted name, the attribute, then items or attributes below it."""

    path: tuple[str | int, ...]

    def __str__(self) -> str:
        return ".".join(str(step) for step in self.path if step != "")


@dataclass(eq=False, slots=True)
class DimSize:
    """The number of positions of a layout."""

    layout: Layout


@dataclass(eq=False, slots=True)
class BinaryOp:
    """An arithmetic operation on two numbers, each with an origin or plain."""

    operation: Callable[[Any, Any], Any]
    left: Any
    right: Any


Origin: TypeAlias = AttributeRef | DimSize | BinaryOp


@dataclass(eq=False, slots=True)
class Equation:
    """``number``, as the user's code computes it, must stay the size of ``layout``."""

    number: Any
    layout: Layout
    operation: str
    where: tuple[str, int]

    def __str__(self) -> str:
        return f"{self.operation} ({show_line(self.where)})"


@dataclass(eq=False, slots=True)
class Guard:
    """A comparison the user's code made, whose outcome must stay what it was."""

    compare: Callable[[Any, Any], bool]
    left: Any
    right: Any
    outcome: bool
    where: tuple[str, int]


@dataclass
class Constraints:
    """What one trace learned of its integers, in the thread that traces; in others they are plain integers."""

    equations: list[Equation] = field(default_factory=list)
    guards: list[Guard] = field(default_factory=list)
    numbers: list[tuple[Any, str]] = field(default_factory=list)
    thread: int | None = field(default_factory=threading.get_ident)
    salt: object | None = field(default_factory=object)

    @property
    def is_recording(self) -> bool:
        """Whether this thread traces; set to False, its integers are plain ones from now on."""
        return self.thread == threading.get_ident()

    @is_recording.setter
    def is_recording(self, value: bool) -> None:
        self.thread = threading.get_ident() if value else None

    def hash_of(self, number: Any) -> int:
        """Salted, so that an lru_cache that holds the answer for the equal plain number is missed."""
        salted = self.salt is not None and self.is_recording
        return hash((self.salt, _plain(number)) if salted else _plain(number))

    def equate(self, number: Any, layout: Layout, operation: str) -> None:
        """States that ``number`` is the size of ``layout``."""
        if layout.size > 1:
            self.equations.append(Equation(number, layout, operation, calling_line()))

    def knows(self, number: Any) -> bool:
        """Whether ``number`` carries an origin of this trace."""
        return isinstance(number, (SymbolicInt, SymbolicFloat)) and number.constraints is self

    def sets_a_size(self, place: AttributeRef) -> bool:
        """Whether the integer at ``place`` is part of what some dimension's size must be."""
        return any(leaf == place for equation in self.equations for leaf in leaves(equation.number))


def calling_line() -> tuple[str, int]:
    """File and line of the innermost frame that is neither torch's nor this package's."""
    frame = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        foreign = _foreign.get(name)
        if foreign is None:
            foreign = _foreign[name] = not name.startswith((_OWN, _TORCH, "<"))
        if foreign:
            return name, frame.f_lineno
        frame = frame.f_back
    return "?", 0


def show_line(where: tuple[str, int]) -> str:
    """``model.py:33``."""
    return f"{_file_name(where[0])}:{where[1]}"


@functools.cache
def _file_name(path: str) -> str:
    return Path(path).name


class SymbolicInt(int):
    """An integer with an origin; everywhere else an ``int``."""

    origin: Origin
    constraints: Constraints

    def __new__(cls, value: int, origin: Origin, constraints: Constraints) -> Self:
        """Makes ``value`` remember ``origin``."""
        size = super().__new__(cls, value)
        size.origin = origin
        size.constraints = constraints
        return size

    def __reduce__(self) -> tuple[type[int], tuple[int]]:
        return int, (int.__int__(self),)

    def __copy__(self) -> int:
        return self if self.constraints.is_recording else _plain(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> int:
        return self if self.constraints.is_recording else _plain(self)

    def __int__(self) -> int:
        _note_number(self)
        return _plain(self)

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **kwargs: Any) -> Any:
        _note_number(self)
        return getattr(ufunc, method)(*map(_plain, inputs), **kwargs)

    def __hash__(self) -> int:
        return self.constraints.hash_of(self)

    def __float__(self) -> float:
        _note_number(self)
        return int.__float__(self)

    def __truediv__(self, other: Any) -> Any:
        return record(operator.truediv, self, other, self)

    def __rtruediv__(self, other: Any) -> Any:
        return record(operator.truediv, other, self, self)

    def __neg__(self) -> Any:
        return record(operator.sub, 0, self, self)

    def __pos__(self) -> Any:
        return self

    def __divmod__(self, other: Any) -> tuple[Any, Any]:
        return self // other, self % other


class SymbolicFloat(float):
    """A floating-point number with an origin, such as the root of a head dimension."""

    origin: Origin
    constraints: Constraints

    def __new__(cls, value: float, origin: Origin, constraints: Constraints) -> Self:
        """Makes ``value`` remember ``origin``."""
        scalar = super().__new__(cls, value)
        scalar.origin = origin
        scalar.constraints = constraints
        return scalar

    def __reduce__(self) -> tuple[type[float], tuple[float]]:
        return float, (float.__float__(self),)

    def __deepcopy__(self, memo: dict[int, Any]) -> float:
        return self if self.constraints.is_recording else _plain(self)

    def __int__(self) -> int:
        _note_number(self)
        return int(_plain(self))

    def __hash__(self) -> int:
        return self.constraints.hash_of(self)

    def __float__(self) -> float:
        _note_number(self)
        return float.__float__(self)

    def __neg__(self) -> Any:
        return record(operator.sub, 0, self, self)

    def __floor__(self) -> Any:
        return record(_floor_of, self, 0, self)

    def __ceil__(self) -> Any:
        return record(_ceil_of, self, 0, self)

    def __round__(self, digits: Any = None) -> Any:
        return record(_round_of, self, digits, self)


class Shape(tuple[int, ...]):
    """The sizes of a tensor, as ``torch.Size``, which allows no subclass and whose ``numel`` gives a plain integer."""

    __slots__ = ()

    @property
    def __class__(self) -> type:  # type: ignore[override]
        """What ``isinstance`` is told."""
        return torch.Size

    def numel(self) -> Any:
        """The product of all, which remembers."""
        total: Any = 1
        for size in self:
            total = total * size
        return total

    def __getitem__(self, index: Any) -> Any:
        found = tuple.__getitem__(self, index)
        return Shape(found) if isinstance(index, slice) else found

    def __add__(self, other: Any) -> Any:
        return Shape(tuple.__add__(self, tuple(other)))

    def __radd__(self, other: Any) -> Any:
        return Shape((*other, *self))

    def __mul__(self, times: Any) -> Any:
        return Shape(tuple.__mul__(self, times))

    def __reduce__(self) -> Any:
        return torch.Size, (tuple(map(int.__int__, self)),)

    def __repr__(self) -> str:
        return f"torch.Size([{', '.join(map(repr, self))}])"


def _floor_of(value: float, _: Any) -> int:
    return math.floor(value)


def _ceil_of(value: float, _: Any) -> int:
    return math.ceil(value)


def _round_of(value: float, digits: int | None) -> float:
    return round(value, digits)


def _note_number(number: SymbolicInt | SymbolicFloat) -> None:
    """A size turned into a plain number can no longer be followed: something is computed with it."""
    if number.constraints.is_recording:
        number.constraints.numbers.append((number, show_line(calling_line())))


def _plain(value: Any) -> Any:
    if isinstance(value, SymbolicInt):
        return int.__int__(value)
    if isinstance(value, SymbolicFloat):
        return float.__float__(value)
    return value


def plain(value: Any) -> Any:
    """A number, or a tuple or list of numbers, without origins."""
    kind = type(value)
    if kind in SYMBOLIC:
        return _plain(value)
    if kind in (tuple, list, Shape) and not SYMBOLIC.isdisjoint(map(type, value)):
        return [_plain(one) for one in value]
    return value


SYMBOLIC = frozenset([SymbolicInt, SymbolicFloat])


def record(operation: Callable[[Any, Any], Any], left: Any, right: Any, known: SymbolicInt | SymbolicFloat) -> Any:
    """The result of ``operation``, with its origin."""
    if isinstance(left, torch.Tensor) or isinstance(right, torch.Tensor):
        return NotImplemented
    result = operation(_plain(left), _plain(right))
    if not known.constraints.is_recording:
        return result
    origin = BinaryOp(operation, left, right)
    if type(result) is int:
        return SymbolicInt(result, origin, known.constraints)
    if type(result) is float:
        return SymbolicFloat(result, origin, known.constraints)
    return result


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _arithmetic(operation: Callable[[Any, Any], Any]) -> tuple[Callable[..., Any], Callable[..., Any]]:
    def forward(self: Any, other: Any) -> Any:
        return record(operation, self, other, self) if _number(other) else NotImplemented

    def reflected(self: Any, other: Any) -> Any:
        return record(operation, other, self, self) if _number(other) else NotImplemented

    return forward, reflected


def _comparison(compare: Callable[[Any, Any], bool]) -> Callable[[Any, Any], Any]:
    def method(self: Any, other: Any) -> Any:
        if not _number(other):
            return NotImplemented
        outcome = compare(_plain(self), _plain(other))
        if self.constraints.is_recording:
            self.constraints.guards.append(Guard(compare, self, other, outcome, calling_line()))
        return outcome

    return method


for _name in ("add", "sub", "mul", "floordiv", "mod", "pow"):
    _forward, _reflected = _arithmetic(getattr(operator, _name))
    for _class in (SymbolicInt, SymbolicFloat):
        setattr(_class, f"__{_name}__", _forward)
        setattr(_class, f"__r{_name}__", _reflected)
SymbolicFloat.__truediv__, SymbolicFloat.__rtruediv__ = _arithmetic(operator.truediv)  # type: ignore[method-assign]
for _name in ("eq", "ne", "lt", "le", "gt", "ge"):
    for _class in (SymbolicInt, SymbolicFloat):
        setattr(_class, f"__{_name}__", _comparison(getattr(operator, _name)))


def evaluate(number: Any, counts: dict[Atom, int], places: dict[AttributeRef, int]) -> Any:
    """What ``number`` will be once axes have ``counts`` positions and attributes the values in ``places``."""
    if not isinstance(number, (SymbolicInt, SymbolicFloat)):
        return number
    origin = number.origin
    if isinstance(origin, AttributeRef):
        return places.get(origin, _plain(number))
    if isinstance(origin, DimSize):
        return count(origin.layout, counts)
    return origin.operation(evaluate(origin.left, counts, places), evaluate(origin.right, counts, places))


def leaves(number: Any) -> Iterator[AttributeRef | DimSize]:
    """The attributes and dimensions ``number`` was computed from."""
    if isinstance(number, (SymbolicInt, SymbolicFloat)):
        origin = number.origin
        if isinstance(origin, BinaryOp):
            yield from leaves(origin.left)
            yield from leaves(origin.right)
        else:
            yield origin
