"""The constraints that the integers of torch calls put on dimensions.

Operations state how dimensions relate; the calls that made them carry integers. This mode applies to each call its
rule: shapes are returned as symbolic integers, and every integer that sets the size of a dimension becomes an equation.
It also records which calls contract over a dimension, where activations can be read later.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import Tensor
from torch.utils._pytree import tree_iter

from netopt.axes.layout import Layout, freeze
from netopt.axes.tracing.calls import CALL_RULES, CONTRACTIONS, OPERANDS, call_rule_of
from netopt.axes.tracing.dims import DimTracer
from netopt.model.calls import Call, CallNames
from netopt.model.kernels import unfused
from netopt.model.view import ModelView
from netopt.symbolic import SYMBOLIC, DimSize, SymbolicInt, plain


class Reading(NamedTuple):
    """A place where activations are contracted over one of their dimensions."""

    call: Call
    argument: int
    dim: int
    layout: Layout


class SizeTracer(CallNames):
    """Sees every torch call of one traced forward, and answers with symbolic integers where ``symbolic``."""

    def __init__(self, view: ModelView, trace: DimTracer, *, symbolic: bool = True) -> None:
        super().__init__(view)
        self.symbolic = symbolic
        self.model = view.model
        self.trace = trace
        self.readings: list[Reading] = []

    def run_call(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Runs one call, and turns its integers into equations with the layouts its operations made."""
        trace = self.trace
        if trace.asked:
            trace.asked.clear()
        trace.groups = None
        name = getattr(function, "__name__", "")
        rule = CALL_RULES.get(name) or call_rule_of(name)
        trace.in_call = True
        try:
            result = unfused(function)(*args, **kwargs)
        finally:
            trace.in_call = False
        if rule.answer is not None:
            return rule.answer(self, function, args, kwargs, result) if self.symbolic else result
        if rule.contracts:
            self._note_readings(self.name_of(name), args, kwargs)
        if rule.constrain is not None:
            rule.constrain(self, args, kwargs, result)
        elif trace.asked:
            self._explain(name, args, kwargs)
        self.note_numbers(args, kwargs, rule.numbers)
        return result

    @property
    def reached(self) -> frozenset[str]:
        """Names of the modules that were called."""
        return frozenset(self.visits.counts)

    def size(self, value: int, layout: Layout) -> int:
        """``value`` as an integer that remembers it is the size of ``layout``."""
        return SymbolicInt(plain(value), DimSize(layout), self.trace.constraints) if plain(value) > 1 else value

    def equate(self, number: Any, layout: Layout, name: str) -> None:
        """States that ``number``, if it is one, is the size of ``layout``; a plain one freezes it."""
        if isinstance(number, bool) or not isinstance(number, int) or plain(number) < 0:
            return
        if layout.size == 1:
            if type(number) is SymbolicInt and self.trace.constraints.knows(
                number
            ):  # a quotient, which must not become 0
                self.trace.constraints.guard(operator.eq, number, 1, True)
        elif self.trace.constraints.knows(number):
            self.trace.constraints.equate(number, layout, name)
        else:
            freeze(layout, f"meets the literal {int(number)} in {name} at {self.trace.where()}")

    def _explain(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Finds, for every dimension the call made afresh, the integer that asked for it."""
        numbers = _integers((args, kwargs))
        for layout in self.trace.asked:
            fitting = [number for number in numbers if plain(number) == layout.size]
            match = next(
                (number for number in fitting if self.trace.constraints.knows(number)), fitting[0] if fitting else None
            )
            if match is not None:
                numbers = [number for number in numbers if number is not match]
                self.equate(match, layout, name)
            elif not any(
                isinstance(leaf, Tensor) for leaf in tree_iter((args, kwargs))
            ):  # else C++ follows the tensors
                freeze(layout, f"has a size that {name} computes at {self.trace.where()}")

    def note_numbers(self, args: tuple[Any, ...], kwargs: dict[str, Any], kinds: frozenset[type]) -> None:
        """Notes sizes used as numbers: the result then depends on how many neurons there are."""
        for value in (*args, *kwargs.values()) if kwargs else args:
            kind = type(value)
            if kind in kinds:
                if value.constraints is self.trace.constraints:
                    self.trace.constraints.numbers.append((value, self.trace.where()))
            elif kinds is SYMBOLIC and isinstance(value, (tuple, list, dict)):
                self.note_numbers(tuple(value.values() if isinstance(value, dict) else value), {}, kinds)

    def _note_readings(self, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        name = call.function
        given: Sequence[Any] = args
        if kwargs:
            given = [*args, *(kwargs[key] for key in OPERANDS.get(name, ()) if key in kwargs)]
        for argument, dim in CONTRACTIONS[name]:
            tensor = given[argument] if argument < len(given) else None
            if isinstance(tensor, Tensor) and self.trace.depends_on_data(tensor):
                dims = self.trace.dims(tensor)
                if dims:
                    at = dim if dim >= 0 else max(len(dims) + dim, 0)
                    if name.startswith("conv"):
                        at = 1 if len(dims) == _weight_dim(given) else 0
                    self.readings.append(Reading(call, argument, at, dims[at][0]))


def _weight_dim(tensors: Sequence[Any]) -> int:
    return tensors[1].dim() if len(tensors) > 1 and isinstance(tensors[1], Tensor) else -1


def _integers(value: Any) -> list[int]:
    if isinstance(value, bool):
        return []
    if isinstance(value, int):
        return [value]
    if isinstance(value, (tuple, list)):
        return [number for item in value for number in _integers(item)]
    if isinstance(value, dict):
        return [number for item in value.values() for number in _integers(item)]
    return []
