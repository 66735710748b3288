"""Numbers of a configuration that remember what is computed from them.

While a model is built from a configuration, its numbers are :class:`Whole` and :class:`Decimal`: an ``int`` and a
``float`` whose ``formula`` is kept through arithmetic. The formula of a size says what the size becomes when the
configuration changes, without building anything, and can be solved for one of the numbers.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

__all__ = ["Answer", "Comparison", "Decimal", "Formula", "Ledger", "Where", "Whole"]

Where = tuple[Any, ...]
"""The place of a number in a configuration: attributes, and places in lists."""


class Formula:
    """A number of a configuration, or what an operation makes of numbers.

    Attributes:
        operation: None for a number of the configuration.
        operands: Formulas and plain numbers; of a number of the configuration, its place.
        value: As it was computed.
        leaves: The places of all numbers it is computed from.
    """

    __slots__ = ("leaves", "operands", "operation", "value")

    def __init__(self, operation: Callable[..., Any] | None, operands: tuple[Any, ...], value: Any) -> None:
        self.operation, self.operands, self.value = operation, operands, value
        self.leaves: frozenset[Where]
        if operation is None:
            self.leaves = frozenset([operands])
        else:
            self.leaves = frozenset().union(*[one.leaves for one in operands if isinstance(one, Formula)])

    def at(self, values: Mapping[Where, Any], memo: dict[Formula, Any]) -> Any:
        """Its value with other numbers of the configuration, which are all in ``values``; None if it has none.

        Whole numbers and fractions are divided exactly; what is known of parts is kept in ``memo``.
        """
        if self.operation is None:
            return values[self.operands]
        if self not in memo:
            operands = [one.at(values, memo) if isinstance(one, Formula) else one for one in self.operands]
            try:
                if self.operation is operator.truediv and not any(isinstance(one, float) for one in operands):
                    exact = Fraction(operands[0]) / operands[1]
                    memo[self] = exact.numerator if exact.denominator == 1 else exact
                else:
                    memo[self] = self.operation(*operands)
            except (ArithmeticError, ValueError, TypeError):
                memo[self] = None
        return memo[self]

    def is_exact(self) -> bool:
        """Whether nothing was lost when it was made whole, as where a number of heads divides a width."""
        before = [one.value if isinstance(one, Formula) else one for one in self.operands]
        if self.operation is operator.floordiv:
            return before[0] % before[1] == 0
        return self.operation in _ROUNDING and before[0] == self.value

    def solve(self, wanted: Any, values: Mapping[Where, Any]) -> Answer | None:
        """The value of the only unknown number it depends on, with which it is what is wanted.

        Args:
            wanted: What it is to be.
            values: All other numbers it depends on.

        Returns:
            None where no rule of arithmetic gives the value.
        """
        node, target, is_only, memo = self, Fraction(wanted), True, {}
        while node.operation is not None:
            unknown = [place for place, one in enumerate(node.operands) if _is_open(one, values)]
            inverse = _INVERSES.get(node.operation)
            if len(unknown) != 1 or inverse is None:
                return None
            others = [
                one.at(values, memo) if isinstance(one, Formula) else one
                for place, one in enumerate(node.operands)
                if place != unknown[0]
            ]
            try:
                target = inverse(target, unknown[0], *map(Fraction, others))
            except (ArithmeticError, ValueError, TypeError):
                return None
            is_only &= node.operation in _ONE_TO_ONE or node.is_exact()
            node = node.operands[unknown[0]]
        if type(node.value) is float:
            return Answer(node.operands, float(target), is_only)
        return Answer(node.operands, int(target) if target.denominator == 1 else None, is_only)


@dataclass(frozen=True)
class Answer:
    """The value of a number of the configuration.

    Attributes:
        place: Where the number is.
        value: None if there is none.
        is_only: Whether there is no other.
    """

    place: Where
    value: Any
    is_only: bool


@dataclass(frozen=True)
class Comparison:
    """What the code that builds a model asked of two numbers, and what it was told."""

    compare: Callable[[Any, Any], bool]
    left: Any
    right: Any
    outcome: bool

    def at(self, values: Mapping[Where, Any]) -> bool:
        """What it would be told with other numbers; the same where one of them has no value."""
        memo: dict[Formula, Any] = {}
        sides = [one.at(values, memo) if isinstance(one, Formula) else one for one in (self.left, self.right)]
        return self.outcome if None in sides else bool(self.compare(*sides))


def _is_open(operand: Any, values: Mapping[Where, Any]) -> bool:
    return isinstance(operand, Formula) and not operand.leaves <= values.keys()


def _root(target: Fraction, place: int, other: Fraction) -> Fraction:
    root = math.log(target, other) if place else float(target) ** float(1 / other)
    near = round(root)
    return Fraction(near if math.isclose(root, near, rel_tol=1e-9) else root)


_ROUNDING = (int, float, round, math.trunc, math.floor, math.ceil)
_INVERSES: dict[Any, Callable[..., Fraction]] = {
    operator.add: lambda result, _, other: result - other,
    operator.sub: lambda result, place, other: other - result if place else result + other,
    operator.mul: lambda result, _, other: result / other,
    operator.truediv: lambda result, place, other: other / result if place else result * other,
    operator.floordiv: lambda result, place, other: other / result if place else result * other,
    operator.pow: _root,
    **dict.fromkeys(_ROUNDING, lambda result, _: result),
}
"""From a result, the place of the unknown operand, and the other operand, to the unknown one."""
_ONE_TO_ONE = frozenset([operator.add, operator.sub, operator.mul, operator.truediv, operator.pow])


class Ledger:
    """The formulas of one building, each once.

    A number that python turned into a plain one (``int(width / heads)``) is recognised by its value.

    Args:
        most: Of numbers to be computed.
    """

    def __init__(self, most: int) -> None:
        self._known: dict[Any, Formula] = {}
        self._plain: dict[int, Formula] = {}
        self._left, self._most, self._is_open = most, most, True
        self.comparisons: dict[Any, Comparison] = {}

    def close(self) -> None:
        """From now on, numbers that someone kept are as plain as any."""
        self._is_open = False

    def number(self, value: Any, path: Where) -> Any:
        """The number of the configuration that is at ``path``."""
        return _numbered(self, self._formula(None, path, value))

    def computed(self, value: Any, operation: Callable[..., Any], *operands: Any) -> Any:
        """What an operation gave, with its formula."""
        if not self._is_open:
            return value
        self._left -= 1
        if self._left < 0:
            raise RuntimeError(f"more than {self._most} numbers are computed")
        return _numbered(self, self._formula(operation, tuple([self.formula(one) for one in operands]), value))

    def compared(self, outcome: bool, compare: Callable[[Any, Any], bool], left: Any, right: Any) -> None:
        """Notes a comparison, by which other parts may be built; whether one number divides another is but checked."""
        sides = self.formula(left), self.formula(right)
        if self._is_open and not any(isinstance(one, Formula) and one.operation is operator.mod for one in sides):
            self.comparisons.setdefault((compare, *map(id, sides)), Comparison(compare, *sides, outcome))

    def made_plain(self, operation: Callable[..., Any], formula: Formula, value: Any) -> None:
        """Notes that python made a plain number of one with this formula."""
        if type(value) is int and value > _EVERYWHERE:
            same = type(formula.value) is int
            self._plain[value] = formula if same else self._formula(operation, (formula,), value)

    def formula(self, number: Any) -> Any:
        """The formula of a number, which is itself where it has none."""
        kind = type(number)
        if kind is Whole or kind is Decimal:
            return number.formula
        return self._plain.get(number, number) if self._plain and kind is int else number

    def knows_some(self, numbers: Sequence[Any]) -> bool:
        """Whether some of these have formulas."""
        return any(type(one) is Whole for one in numbers) or not self._plain.keys().isdisjoint(numbers)

    def _formula(self, operation: Callable[..., Any] | None, operands: tuple[Any, ...], value: Any) -> Formula:
        key = (operation, *[id(one) if isinstance(one, Formula) else (type(one), one) for one in operands])
        found = self._known.get(key)
        if found is None:
            found = self._known[key] = Formula(operation, operands, value)
        return found


_EVERYWHERE = 4
"""Up to this, a plain number is taken for itself."""


class Whole(int):
    """An integer with a formula; everywhere else an ``int``."""

    formula: Formula
    ledger: Ledger
    __hash__ = int.__hash__


class Decimal(float):
    """A ``float`` with a formula."""

    formula: Formula
    ledger: Ledger
    __hash__ = float.__hash__


def _numbered(ledger: Ledger, formula: Formula) -> Any:
    value = formula.value
    kind = type(value)
    if kind is int:
        number = Whole.__new__(Whole, value)
    elif kind is float:
        number = Decimal.__new__(Decimal, value)
    else:
        return value
    number.formula, number.ledger = formula, ledger
    return number


def _plain(number: Any) -> Any:
    return number.formula.value if type(number) in (Whole, Decimal) else number


def _binary(operation: Callable[[Any, Any], Any]) -> tuple[Callable[..., Any], Callable[..., Any]]:
    def forward(self: Any, other: Any) -> Any:
        if not isinstance(other, (int, float)):
            return NotImplemented
        return self.ledger.computed(operation(self.formula.value, _plain(other)), operation, self, other)

    def backward(self: Any, other: Any) -> Any:
        if not isinstance(other, (int, float)):
            return NotImplemented
        return self.ledger.computed(operation(_plain(other), self.formula.value), operation, other, self)

    return forward, backward


def _unary(operation: Callable[..., Any]) -> Callable[..., Any]:
    def method(self: Any, *digits: Any) -> Any:
        return self.ledger.computed(operation(self.formula.value, *digits), operation, self, *digits)

    return method


def _comparison(compare: Callable[[Any, Any], bool]) -> Callable[[Any, Any], Any]:
    def method(self: Any, other: Any) -> Any:
        if not isinstance(other, (int, float)):
            return NotImplemented
        outcome = compare(self.formula.value, _plain(other))
        self.ledger.compared(outcome, compare, self, other)
        return outcome

    return method


def _made_plain(operation: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def method(self: Any) -> Any:
        value = operation(self.formula.value)
        self.ledger.made_plain(operation, self.formula, value)
        return value

    return method


def _itself(self: Any, _memo: Any = None) -> Any:
    return self


def _reduce(self: Any, _protocol: Any) -> Any:
    return type(self.formula.value), (self.formula.value,)


for _kind in (Whole, Decimal):
    for _name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow"):
        _forward, _backward = _binary(getattr(operator, _name))
        setattr(_kind, f"__{_name}__", _forward)
        setattr(_kind, f"__r{_name}__", _backward)
    for _name, _operation in (
        ("neg", operator.neg),
        ("abs", abs),
        ("round", round),
        ("trunc", math.trunc),
        ("floor", math.floor),
        ("ceil", math.ceil),
    ):
        setattr(_kind, f"__{_name}__", _unary(_operation))
    for _name in ("eq", "ne", "lt", "le", "gt", "ge"):
        setattr(_kind, f"__{_name}__", _comparison(getattr(operator, _name)))
    for _name, _operation in (("int", int), ("float", float)):
        setattr(_kind, f"__{_name}__", _made_plain(_operation))
    _kind.__copy__ = _kind.__deepcopy__ = _itself  # pyright: ignore[reportAttributeAccessIssue]
    _kind.__reduce_ex__ = _reduce  # pyright: ignore[reportAttributeAccessIssue]
