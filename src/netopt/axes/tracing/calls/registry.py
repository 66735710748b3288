"""The table of torch calls: what is declared about the calls of one name.

Operations below autograd have rules of their own (:func:`netopt.axes.rule`); only the call above them carries integers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

from netopt.errors import InvalidArgumentError
from netopt.symbolic import SYMBOLIC, SymbolicFloat

Function = TypeVar("Function", bound=Callable[..., Any])
Operands = Mapping[tuple[int, str], int]
"""The dimension that is contracted, by the position and the name of the argument; counted from the right."""

_NOTHING: Operands = {}
_SIZES = frozenset({SymbolicFloat})


class CallRule(NamedTuple):
    """What is declared about the calls of one name.

    Attributes:
        query: Replaces the result of a call that returns sizes.
        constrain: States what the call's integers are the sizes of.
        contracts: The operands that are activations contracted over one of their dimensions.
        numbers: The types of symbolic numbers that are values in such a call, not sizes or dimensions.
    """

    query: Callable[..., Any] | None = None
    constrain: Callable[..., None] | None = None
    contracts: Operands = _NOTHING
    numbers: frozenset[type] = SYMBOLIC


_RULES: dict[str, CallRule] = {}
_UNKNOWN = CallRule()


def find_call_rule(name: str) -> CallRule:
    """What is declared about the calls of one name; of most nothing is."""
    return _RULES.get(name, _UNKNOWN)


def call_rule(*names: str, contracts: Operands = _NOTHING) -> Callable[[Function], Function]:
    """Registers what the integers of a call state about the dimensions of its tensors.

    The function gets the :class:`~netopt.axes.tracing.sizes.SizeTracer`, the call's result and its own arguments.

    Args:
        names: Of functions of torch and methods of tensors.
        contracts: The operands that are contracted; see :class:`CallRule`.

    Raises:
        InvalidArgumentError: A name has a rule already.
    """

    def register(function: Function) -> Function:
        _declare(names, CallRule(constrain=function, contracts=contracts, numbers=_SIZES))
        return function

    return register


def query(*names: str) -> Callable[[Function], Function]:
    """Registers a function that returns, in place of a call's result, the same numbers as symbolic ones."""

    def register(function: Function) -> Function:
        _declare(names, CallRule(query=function))
        return function

    return register


def contraction(*names: str, contracts: Operands) -> None:
    """Declares calls that contract some of their operands, and carry no sizes."""
    _declare(names, CallRule(contracts=contracts))


def integers_are_sizes(*names: str) -> None:
    """Declares calls whose integers are sizes or dimensions, never values, and need no equation."""
    _declare(names, CallRule(numbers=_SIZES))


def _declare(names: tuple[str, ...], rule: CallRule) -> None:
    for name in names:
        if name in _RULES:
            raise InvalidArgumentError(f"calls of {name} have a rule already; a second one would be ambiguous.")
        _RULES[name] = rule
