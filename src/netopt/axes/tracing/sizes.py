"""The constraints that the integers of torch calls put on dimensions.

Operations state how dimensions relate; the calls that made them carry integers. This mode applies to each call its
rule: shapes are returned as symbolic integers, and every integer that sets the size of a dimension becomes an equation.
It also records which calls contract over a dimension, where activations can be read later.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import Tensor
from torch.utils._pytree import tree_iter

from netopt.axes.layout import Layout, freeze
from netopt.axes.operation import Dim
from netopt.axes.tracing.calls import find_call_rule
from netopt.axes.tracing.calls.registry import Operands
from netopt.axes.tracing.dims import DimTracer
from netopt.axes.tracing.training_flag import TrainingFlag
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
    """Sees every torch call of one traced forward, and returns symbolic integers where ``symbolic``."""

    def __init__(self, view: ModelView, trace: DimTracer, *, symbolic: bool = True) -> None:
        super().__init__(view)
        self.symbolic = symbolic
        self.model = view.model
        self.trace = trace
        self.constraints = trace.constraints
        self.readings: list[Reading] = []
        self.flag: TrainingFlag | None = None

    def run_call(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Runs one call, and turns its integers into equations with the layouts its operations made."""
        trace = self.trace
        if trace.new_sizes:
            trace.new_sizes.clear()
        trace.groups = None
        name = getattr(function, "__name__", "")
        rule = find_call_rule(name)
        trace.in_call = True
        try:
            result = self._assign(function, *args) if name == "__set__" else unfused(function)(*args, **kwargs)
        finally:
            trace.in_call = False
        if rule.query is not None:
            return rule.query(self, function, result, *args, **kwargs) if self.symbolic else result
        if rule.contracts:
            self._note_readings(rule.contracts, self.name_of(name), args, kwargs)
        if rule.constrain is not None:
            rule.constrain(self, result, *args, **kwargs)
        elif trace.new_sizes:
            self._equate_new_sizes(name, args, kwargs)
        self.note_numbers(args, kwargs, rule.numbers)
        return result

    def _assign(self, attribute: Callable[..., Any], tensor: Tensor, value: Any) -> None:
        """An attribute of a tensor gets a value; new data is copied, which operations see, if it fits."""
        is_data = getattr(attribute, "__self__", None) is Tensor.data
        if is_data and (tensor.shape, tensor.dtype, tensor.device) == (value.shape, value.dtype, value.device):
            tensor.detach().copy_(value)
            return
        attribute(tensor, value)
        if is_data:
            self.trace.exchange(tensor, value)

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Leaves no names, readings or costs of the calls inside."""
        readings, counts, seen = self.readings, self.visits.counts, self.visits.current.seen
        counting, named = self.trace.counting, seen.copy()
        self.readings, self.visits.counts, self.trace.counting = [], counts.copy(), False
        try:
            yield
        finally:
            self.readings, self.visits.counts, self.trace.counting = readings, counts, counting
            seen.clear()
            seen.update(named)

    @property
    def reached(self) -> frozenset[str]:
        """Names of the modules that were called."""
        return frozenset(self.visits.counts)

    def number(self, layout: Layout) -> SymbolicInt:
        """The size of ``layout`` as a symbolic integer."""
        return SymbolicInt(layout.size, DimSize(layout), self.constraints)

    def size(self, value: int, layout: Layout) -> int:
        """``value``, which is the size of ``layout``, as a symbolic integer; a one can neither shrink nor split."""
        return SymbolicInt(plain(value), DimSize(layout), self.constraints) if plain(value) > 1 else value

    def equate(self, number: Any, layout: Layout, name: str) -> None:
        """States that ``number``, if it is one, is the size of ``layout``; a plain one freezes it."""
        if isinstance(number, bool) or not isinstance(number, int) or plain(number) < 0:
            return
        if layout.size == 1:
            if type(number) is SymbolicInt:
                self.keep(number)  # a quotient, which must not become 0
        elif self.constraints.knows(number):
            self.constraints.equate(number, layout, name)
        else:
            freeze(layout, f"meets the literal {int(number)} in {name} at {self.trace.where()}")

    def keep(self, numbers: Any) -> None:
        """States that a number, or each of several, keeps its value where it is computed from sizes."""
        for number in numbers if isinstance(numbers, (tuple, list)) else (numbers,):
            if type(number) is SymbolicInt and self.constraints.knows(number):
                self.constraints.guard(operator.eq, number, plain(number), True)

    def note_sizes(self, dims: Sequence[Dim]) -> None:
        """Notes that the code may compute with the sizes of these dimensions, as plain numbers."""
        for dim in dims:
            if dim.size > 1:
                self.constraints.note_number(self.number(dim.layout))

    def _equate_new_sizes(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Finds, for every dimension the call made afresh, the integer among its arguments that is the size."""
        numbers = _integers((args, kwargs))
        for layout in self.trace.new_sizes:
            equal = [number for number in numbers if plain(number) == layout.size]
            match = next(filter(self.constraints.knows, equal), equal[0] if equal else None)
            if match is not None:
                numbers = [number for number in numbers if number is not match]
                self.equate(match, layout, name)
            elif not any(isinstance(one, Tensor) for one in tree_iter((args, kwargs))):  # else C++ follows the tensors
                freeze(layout, f"has a size that {name} computes at {self.trace.where()}")

    def note_numbers(self, args: tuple[Any, ...], kwargs: dict[str, Any], kinds: frozenset[type]) -> None:
        """Notes sizes used as numbers: the result then depends on how many neurons there are."""
        for value in (*args, *kwargs.values()) if kwargs else args:
            kind = type(value)
            if kind in kinds:
                if value.constraints is self.constraints:
                    self.constraints.numbers.append((value, self.trace.where()))
            elif kinds is SYMBOLIC and isinstance(value, (tuple, list, dict)):
                self.note_numbers(tuple(value.values() if isinstance(value, dict) else value), {}, kinds)

    def _note_readings(self, contracts: Operands, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = [*args, *kwargs.values()]
        for (position, name), dim in contracts.items():
            if position >= len(args):
                position = len(args) + list(kwargs).index(name) if name in kwargs else len(given)  # noqa: PLW2901
            tensor = given[position] if position < len(given) else None
            if isinstance(tensor, Tensor) and self.trace.depends_on_data(tensor):
                dims = self.trace.dims(tensor)
                if dims:
                    at = max(len(dims) + dim, 0)
                    self.readings.append(Reading(call, position, at, dims[at].layout))


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
