"""What the user's code says of sizes.

Operations state how dimensions relate; the calls that made them carry integers. This module watches the calls, and does
about each what its treatment says: questions about shapes are answered with integers that remember, and every integer
that sets the size of a dimension becomes an equation. It also notes which calls contract over a dimension, where
activations can be read later.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_iter

from netopt.axes.layout import Layout, freeze
from netopt.axes.modes import Modes
from netopt.axes.tracing.calls import CALL_RULES, CONTRACTIONS, OPERANDS, call_rule_of
from netopt.axes.tracing.dims import DimTracer
from netopt.axes.training import Trials
from netopt.axes.whole import WHOLE
from netopt.model.attributes import Parts
from netopt.model.calls import Call, CallNames
from netopt.symbolic import SYMBOLIC, DimSize, SymbolicInt, plain


class Reading(NamedTuple):
    """A place where activations are contracted over one of their dimensions."""

    call: Call
    argument: int
    dim: int
    layout: Layout


class SizeTracer(CallNames):
    """Sees every torch call of one traced forward, and answers with symbolic integers where ``symbolic``."""

    def __init__(self, model: nn.Module, parts: Parts, trace: DimTracer, modes: Modes, symbolic: bool = True) -> None:
        super().__init__(model, parts)
        self.symbolic = symbolic
        self.model = model
        self.trace = trace
        self.modes = modes
        self.readings: list[Reading] = []
        self._trials = Trials(trace)

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Runs one call, with room for what its operations note, and turns its integers into equations."""
        if kwargs is None:
            kwargs = {}
        trace = self.trace
        if trace.asked:
            trace.asked.clear()
        trace.groups = None
        name = getattr(function, "__name__", "")
        treatment = CALL_RULES.get(name) or call_rule_of(name)
        trace.in_call = True
        try:
            result: Any = NotImplemented
            whole = WHOLE.get(function)
            if whole is not None and kwargs.keys() <= whole.names and whole.fits(*args, **kwargs):
                result = trace.whole(whole.traits, function, args, kwargs)
            if result is NotImplemented:
                result = (_step_by_step(function) if treatment.fused else function)(*args, **kwargs)
        finally:
            trace.in_call = False
        if treatment.answer is not None:
            return treatment.answer(self, function, args, kwargs, result) if self.symbolic else result
        if treatment.contracts:
            self._note_readings(self.name_of(name), args, kwargs)
        if treatment.constrain is not None:
            treatment.constrain(self, args, kwargs, result)
        elif trace.asked:
            self._explain(name, args, kwargs)
        self.note_numbers(args, kwargs, treatment.numbers)
        if treatment.modal:
            self.modes.differ = True
        return result

    def on_return(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        """Asks, of a small module that asked for its own mode, whether it does the like in training."""
        modes = self.modes
        if modes.asking and modes.asking[-1] is module and not modes.differ:
            stack, visits, readings = self._stack[-1], self._visits.copy(), len(self.readings)
            depth = len(modes.asking) - 1
            self._stack[-1] = (stack[0], stack[1], {})
            modes.differ = not self._trials.is_alike(module, args, kwargs, result)
            modes.differ |= len(self.readings) > readings  # what is contracted there is not found in evaluation
            self._stack[-1] = stack
            self._visits.clear()
            self._visits.update(visits)
            del modes.asking[depth:]  # one that contains this module may be asking too

    @property
    def reached(self) -> frozenset[str]:
        """Names of the modules that were called."""
        return frozenset(self._visits)

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


def _step_by_step(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function without the libraries that run a whole recurrent layer as one operation."""

    def run(*args: Any, **kwargs: Any) -> Any:
        onednn = torch._C._get_mkldnn_enabled()
        torch._C._set_mkldnn_enabled(False)
        try:
            with torch.backends.cudnn.flags(enabled=False):
                return function(*args, **kwargs)
        finally:
            torch._C._set_mkldnn_enabled(onednn)

    return run


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
