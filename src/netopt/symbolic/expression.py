"""Expressions: what a number was computed from.

An expression is a leaf (an attribute, the size of a dimension, an entry of a configuration) or an operation on
expressions and plain numbers. It can be evaluated where leaves have other values, rewritten, and solved for one leaf.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, NamedTuple, TypeAlias


class AttributeRef(NamedTuple):
    """Where an integer lives: the module's dotted name, the attribute, then items or attributes below it."""

    path: tuple[str | int, ...]

    def __str__(self) -> str:
        return ".".join(str(step) for step in self.path if step != "")


class DimSize(NamedTuple):
    """The number of positions of a layout, which is any object with a ``size`` that is equal to itself alone."""

    layout: Any


class Expression:
    """A leaf, or an operation on expressions and plain numbers; equal to one of the same structure.

    Attributes:
        operation: None for a leaf. Sums and products may have more than two operands.
        operands: Of a leaf, its key.
        value: As it was computed.
        leaves: Keys of all leaves it depends on.
        depth: How many operations are nested in it.
    """

    __slots__ = ("_hash", "depth", "leaves", "operands", "operation", "value")

    def __init__(self, operation: Callable[..., Any] | None, operands: tuple[Any, ...], value: Any) -> None:
        self.operation, self.operands, self.value = operation, operands, value
        self.leaves: frozenset[Any] = frozenset(operands) if operation is None else frozenset()
        self.depth = 0
        if operation is not None:
            for one in operands:
                if type(one) is Expression:
                    self.leaves = self.leaves | one.leaves if self.leaves else one.leaves
                    self.depth = max(self.depth, one.depth + 1)
        self._hash = hash((operation, operands))

    @property
    def key(self) -> Any:
        """Of a leaf: which it is."""
        return self.operands[0]

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        return (
            type(other) is Expression
            and self._hash == other._hash
            and self.operation is other.operation
            and self.operands == other.operands
            and list(map(type, self.operands)) == list(map(type, other.operands))  # 2 is not 2.0
        )

    def __repr__(self) -> str:
        name = getattr(self.operation, "__name__", "")
        return f"{name}{self.operands!r}" if name else repr(self.key)

    def at(
        self,
        values: Mapping[Any, Any],
        memo: dict[int, Any] | None = None,
        divide: Callable[[Any, Any], Any] = operator.truediv,
    ) -> Any:
        """The value where leaves have other values; ``None`` where it is undefined.

        Args:
            values: By key; a leaf that is missing keeps its value.
            memo: Values of parts by their ``id``; may be handed to further calls with the same values.
            divide: In place of ``/``, such as :func:`divide_exactly`.
        """
        if self.operation is None:
            return values.get(self.operands[0], self.value)
        if memo is None:
            memo = {}
        known = id(self)
        if known not in memo:
            operands = [one.at(values, memo, divide) if type(one) is Expression else one for one in self.operands]
            operation = divide if self.operation is operator.truediv else self.operation
            try:
                memo[known] = _apply(operation, operands)
            except (ArithmeticError, ValueError, TypeError):
                memo[known] = None
        return memo[known]

    def is_lossless(self) -> bool:
        """Whether rounding lost nothing, as where a number of heads divides a width."""
        before = [value_of(one) for one in self.operands]
        if self.operation is operator.floordiv:
            return before[0] % before[1] == 0
        return self.operation in _ROUNDING and before[0] == self.value

    def solve(self, wanted: Any, values: Mapping[Any, Any]) -> Solution | None:
        """The value of the only leaf that is not in ``values`` with which the expression becomes ``wanted``.

        Returns:
            ``None`` where no rule of arithmetic gives it.
        """
        node, target, is_unique, memo = self, Fraction(wanted), True, {}
        while node.operation is not None:
            inverse = _INVERSES.get(node.operation)
            open_ = [index for index, one in enumerate(node.operands) if not leaves(one) <= values.keys()]
            if len(open_) != 1 or inverse is None:
                return None
            others = [
                one.at(values, memo, divide_exactly) if type(one) is Expression else one
                for index, one in enumerate(node.operands)
                if index != open_[0]
            ]
            try:
                target = inverse(target, open_[0], *map(Fraction, others))
            except (ArithmeticError, ValueError, TypeError):
                return None
            is_unique &= node.operation in _ONE_TO_ONE or node.is_lossless()
            node = node.operands[open_[0]]
        if type(node.value) is float:
            return Solution(node.key, float(target), is_unique)
        return Solution(node.key, int(target) if target.denominator == 1 else None, is_unique)


Term: TypeAlias = "Expression | int | float"
"""An expression, or a number that does not change."""


@dataclass(frozen=True)
class Solution:
    """The value of a leaf with which an expression is what is wanted.

    Attributes:
        key: Of the leaf.
        value: None if there is none.
        is_unique: Whether no other value would do.
    """

    key: Any
    value: Any
    is_unique: bool


def leaf(key: Hashable, value: Any) -> Expression:
    """An unknown with its present value."""
    return Expression(None, (key,), value)


def combine(operation: Callable[..., Any], operands: Iterable[Term]) -> Term:
    """An operation on terms, with constants folded, and sums and products of integers flattened and ordered."""
    terms = list(operands)
    if operation in _FLAT and all(type(value_of(one)) is int for one in terms):
        terms = _flattened(operation, terms)
        if len(terms) == 1:
            return terms[0]
    elif not any(type(one) is Expression for one in terms):
        return operation(*terms)
    return Expression(operation, tuple(terms), _apply(operation, list(map(value_of, terms))))


def _flattened(operation: Callable[..., Any], terms: Iterable[Term]) -> list[Term]:
    neutral = _FLAT[operation]
    number: Any = neutral
    found: list[Term] = []
    for one in terms:
        for part in one.operands if isinstance(one, Expression) and one.operation is operation else (one,):
            if type(part) is Expression:
                found.append(part)
            else:
                number = operation(number, part)
    if number != neutral or not found:
        found.append(number)
    return sorted(found, key=hash)


def substitute(term: Term, replace: Callable[[Expression], Term], memo: dict[int, Term] | None = None) -> Term:
    """The term with every leaf replaced, simplified on the way."""
    if type(term) is not Expression:
        return term
    if term.operation is None:
        return replace(term)
    memo = {} if memo is None else memo
    if id(term) not in memo:
        memo[id(term)] = combine(term.operation, [substitute(one, replace, memo) for one in term.operands])
    return memo[id(term)]


def evaluate(number: Any, values: Mapping[Any, Any]) -> Any:
    """What a number or term is where leaves have other values; ``None`` where it is undefined."""
    term = expression_of(number)
    return term.at(values) if type(term) is Expression else term


def expression_of(number: Any) -> Any:
    """The expression of a symbolic number; anything else is returned as it is."""
    return number if type(number) is Expression else getattr(number, "expression", number)


def leaves(number: Any) -> frozenset[Any]:
    """Keys of the leaves that a number, or a term, depends on."""
    term = expression_of(number)
    return term.leaves if type(term) is Expression else frozenset()


def walk(term: Term) -> Iterator[Expression]:
    """An expression and everything it is computed from."""
    if type(term) is Expression:
        yield term
        if term.operation is not None:
            for one in term.operands:
                yield from walk(one)


def value_of(term: Any) -> Any:
    """The present value of a term."""
    return term.value if type(term) is Expression else term


def divide_exactly(left: Any, right: Any) -> Any:
    """A quotient without rounding: a whole number, else a fraction; that of floats is a float."""
    if isinstance(left, float) or isinstance(right, float):
        return left / right
    exact = Fraction(left) / right
    return exact.numerator if exact.denominator == 1 else exact


def _apply(operation: Callable[..., Any], operands: list[Any]) -> Any:
    return functools.reduce(operation, operands) if operation in _FLAT else operation(*operands)


def _root(target: Fraction, place: int, other: Fraction) -> Fraction:
    root = math.log(target, other) if place else float(target) ** float(1 / other)
    near = round(root)
    return Fraction(near if math.isclose(root, near, rel_tol=1e-9) else root)


_FLAT = {operator.add: 0, operator.mul: 1}
"""Operations whose operands may be grouped and ordered at will, with what changes nothing."""
_ROUNDING = (int, float, round, math.trunc, math.floor, math.ceil)
_INVERSES: dict[Any, Callable[..., Fraction]] = {
    operator.add: lambda result, _, other: result - other,
    operator.sub: lambda result, place, other: other - result if place else result + other,
    operator.mul: lambda result, _, other: result / other,
    operator.truediv: lambda result, place, other: other / result if place else result * other,
    operator.floordiv: lambda result, place, other: other / result if place else result * other,
    operator.pow: _root,
    operator.neg: lambda result, _: -result,
    **dict.fromkeys(_ROUNDING, lambda result, _: result),
}
"""From a result, the position of the unknown operand, and the other operand, to the unknown one."""
_ONE_TO_ONE = frozenset([operator.add, operator.sub, operator.mul, operator.truediv, operator.pow, operator.neg])
