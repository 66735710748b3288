"""Symbolic numbers: an ``int`` and a ``float`` that record how they were computed.

Arithmetic gives another symbolic number, a comparison becomes a guard, and a conversion to a plain number or to text is
noted. What reads the digits of a number in C without calling a method of it goes unseen: ``range``, ``operator.index``,
indexing, ``math.log``, ``math.gcd`` and other functions of whole numbers, and a plain float on the left (``0.5 * n``).
"""

from __future__ import annotations

import math
import numbers
import operator
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from netopt.symbolic.constraints import Constraints
from netopt.symbolic.expression import Expression, leaf

if TYPE_CHECKING:
    from typing_extensions import Self


class SymbolicInt(int):
    """An integer that records; everywhere else an ``int``.

    Args:
        value: The integer.
        origin: What it is: a leaf's key, such as an :class:`AttributeRef`, or an :class:`Expression`.
        constraints: Record what is done with it.
    """

    expression: Expression
    constraints: Constraints

    def __new__(cls, value: int, origin: Any, constraints: Constraints) -> Self:
        """Makes ``value`` record."""
        number = super().__new__(cls, plain(value))
        number.expression = origin if type(origin) is Expression else leaf(origin, plain(value))
        number.constraints = constraints
        return number

    def __hash__(self) -> int:
        return self.constraints.hash_of(self.expression.value)


class SymbolicFloat(float):
    """A floating-point number that records, such as the root of a head dimension.

    Args:
        value: The number.
        origin: A leaf's key, or an :class:`Expression`.
        constraints: Record what is done with it.
    """

    expression: Expression
    constraints: Constraints

    def __new__(cls, value: float, origin: Any, constraints: Constraints) -> Self:
        """Makes ``value`` record."""
        number = super().__new__(cls, value)
        number.expression = origin if type(origin) is Expression else leaf(origin, value)
        number.constraints = constraints
        return number

    def __hash__(self) -> int:
        return self.constraints.hash_of(self.expression.value)


class Shape(tuple[int, ...]):
    """The sizes of a tensor, as ``torch.Size``, which allows no subclass and whose ``numel`` gives a plain integer."""

    __slots__ = ()

    @property
    def __class__(self) -> type:  # type: ignore[override]
        """What ``isinstance`` sees."""
        return torch.Size

    def numel(self) -> Any:
        """The product of all, which records."""
        return math.prod(self)

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
        return torch.Size, (tuple(map(plain, self)),)

    def __repr__(self) -> str:
        # Of plain numbers: shapes are written into messages, which are made whether they are shown or not.
        return f"torch.Size([{', '.join(str(plain(size)) for size in self)}])"


SYMBOLIC = frozenset([SymbolicInt, SymbolicFloat])
_NUMBERS = (int, float)


def plain(value: Any) -> Any:
    """A number, or the entries of a tuple or list, without expressions."""
    kind = type(value)
    if kind in SYMBOLIC:
        return value.expression.value
    if kind in (tuple, list, Shape) and not SYMBOLIC.isdisjoint(map(type, value)):
        return [plain(one) for one in value]
    return value


def record(constraints: Constraints, operation: Callable[..., Any], *operands: Any) -> Any:
    """The result of an operation on numbers, which knows how it was computed."""
    value = operation(*map(plain, operands))
    kind = type(value)
    if not constraints.is_recording or (kind is not int and kind is not float):
        return value
    expression = Expression(operation, tuple(map(constraints.term, operands)), value)
    return constraints.result(expression, _symbolic)


def _symbolic(expression: Expression, constraints: Constraints) -> Any:
    kind = SymbolicInt if type(expression.value) is int else SymbolicFloat
    return kind(expression.value, expression, constraints)


def _recorder(number: Any, other: Any) -> Constraints:
    """The constraints of the operand that still records; one of them may be kept from an earlier trace."""
    constraints = number.constraints
    return constraints if constraints.is_recording else getattr(other, "constraints", constraints)


def _not_followed(number: Any, other: Any) -> Any:
    """An operation with an object of another kind; torch's modes see those with tensors."""
    if isinstance(other, (numbers.Number, list, tuple, str, bytes)):
        number.constraints.note_number(number)
    return NotImplemented


def _binary(operation: Callable[..., Any]) -> tuple[Callable[..., Any], Callable[..., Any]]:
    def forward(self: Any, other: Any, *modulus: Any) -> Any:
        if isinstance(other, _NUMBERS):
            return record(_recorder(self, other), pow if modulus else operation, self, other, *modulus)
        return _not_followed(self, other)

    def reflected(self: Any, other: Any) -> Any:
        if isinstance(other, _NUMBERS):
            return record(_recorder(self, other), operation, other, self)
        return _not_followed(self, other)

    return forward, reflected


def _unary(operation: Callable[..., Any]) -> Callable[..., Any]:
    def method(self: Any, *digits: Any) -> Any:
        return record(self.constraints, operation, self, *digits)

    return method


def _comparison(compare: Callable[[Any, Any], bool]) -> Callable[[Any, Any], Any]:
    def method(self: Any, other: Any) -> Any:
        if not isinstance(other, _NUMBERS):
            return _not_followed(self, other) if isinstance(other, numbers.Number) else NotImplemented
        outcome = compare(plain(self), plain(other))
        _recorder(self, other).guard(compare, self, other, outcome)
        return outcome

    return method


def _conversion(operation: Callable[..., Any]) -> Callable[..., Any]:
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self.constraints.convert(self, operation, *args, **kwargs)

    return method


def _bool(self: Any) -> bool:
    return self != 0


def _is_integer(self: Any) -> bool:
    return self % 1 == 0


def _divmod(self: Any, other: Any) -> Any:
    return (self // other, self % other) if isinstance(other, _NUMBERS) else _not_followed(self, other)


def _rdivmod(self: Any, other: Any) -> Any:
    return (other // self, other % self) if isinstance(other, _NUMBERS) else _not_followed(self, other)


def _itself(self: Any) -> Any:
    return self


def _copy(self: Any, _memo: Any = None) -> Any:
    return self if self.constraints.is_recording else plain(self)


def _reduce(self: Any, _protocol: Any = None) -> Any:
    return type(plain(self)), (plain(self),)


def _array_ufunc(self: Any, ufunc: Any, method: str, *inputs: Any, **kwargs: Any) -> Any:
    self.constraints.note_number(self)
    return getattr(ufunc, method)(*map(plain, inputs), **kwargs)


_ARITHMETIC = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow")
_BITWISE = ("and_", "or_", "xor", "lshift", "rshift")
_UNARY: dict[type, tuple[Callable[..., Any], ...]] = {
    int: (operator.neg, abs, round, operator.invert, int.bit_length, int.bit_count),
    float: (operator.neg, abs, round, math.trunc, math.floor, math.ceil),
}
_CONVERSIONS: dict[type, tuple[Any, ...]] = {
    int: (int, float, repr, format, int.to_bytes, int.as_integer_ratio),
    float: (int, float, repr, format, float.hex, float.as_integer_ratio),
}
_METHODS = {
    "__bool__": _bool,
    "__divmod__": _divmod,
    "__rdivmod__": _rdivmod,
    "__pos__": _itself,
    "conjugate": _itself,
    "real": property(_itself),
    "__copy__": _copy,
    "__deepcopy__": _copy,
    "__reduce_ex__": _reduce,
    "__array_ufunc__": _array_ufunc,
}
_OWN_METHODS: dict[type, dict[str, Any]] = {
    int: {**dict.fromkeys(("__trunc__", "__floor__", "__ceil__"), _itself), "numerator": property(_itself)},
    float: {"is_integer": _is_integer},
}


def _name(operation: Any) -> str:
    """The method that an operation calls."""
    name = operation.__name__
    return name if hasattr(int, name) or hasattr(float, name) else f"__{name.strip('_')}__"


def _define(kind: type, base: type) -> None:
    for name in (*_ARITHMETIC, *(_BITWISE if base is int else ())):
        forward, reflected = _binary(getattr(operator, name))
        setattr(kind, f"__{name.strip('_')}__", forward)
        setattr(kind, f"__r{name.strip('_')}__", reflected)
    for name in ("eq", "ne", "lt", "le", "gt", "ge"):
        setattr(kind, f"__{name}__", _comparison(getattr(operator, name)))
    for operation in _UNARY[base]:
        setattr(kind, _name(operation), _unary(operation))
    for operation in _CONVERSIONS[base]:
        setattr(kind, _name(operation), _conversion(operation))
    for name, method in _METHODS.items():
        setattr(kind, name, method)
    for name, method in _OWN_METHODS[base].items():
        setattr(kind, name, method)


_define(SymbolicInt, int)
_define(SymbolicFloat, float)
