"""The integers a model holds.

Sizes sit in module attributes, in tuples and lists, in configuration objects reached from modules, and in class bodies.
This module finds each of them, names its place, and
lends it out as a :class:`~netopt.symbolic.SymbolicInt` for the time of a trace; everything is put back
afterwards,
including whatever the forward itself left in the attributes.
"""

from __future__ import annotations

import functools
import operator
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from netopt.model.attributes import COMMON, DEPTH, OPAQUE, SIMPLE, Own, Parts, is_configuration, is_library
from netopt.model.restore import Snapshot
from netopt.model.signals import UndoLog
from netopt.symbolic import AttributeRef, Constraints, SymbolicInt

_TORCH_OWN = frozenset(COMMON) | {"call_super_init", "dump_patches"}


def remembered(parts: Parts, attributes: Snapshot, constraints: Constraints) -> UndoLog:
    """Replaces every integer above 1 that modules hold by one that remembers its place, and puts all back.

    What modules hold in attributes of their own is put back by ``attributes``, when its mode is left.
    """

    def start(log: UndoLog) -> None:
        loan = _Loan(constraints)
        log.callback(loan.give_back)
        for (name, module), own in zip(parts, attributes.own, strict=True):
            loan.module(module, name, own)

    return UndoLog(start)


def _put_back(container: Any, key: Any, value: Any) -> None:
    """Undoes one loan, unless the forward has taken the entry away; then the copy of the container brings it back."""
    gone = isinstance(container, list) and isinstance(key, int) and key >= len(container)
    if not gone:
        container[key] = value


class _Loan:
    """Walks attributes and containers, replaces integers, and remembers how to undo it."""

    def __init__(self, constraints: Constraints) -> None:
        self.constraints = constraints
        self.undo: list[Callable[[], None]] = []
        self.seen: set[int] = set()

    def give_back(self) -> None:
        for step in reversed(self.undo):
            step()

    def module(self, module: nn.Module, name: str, own: Own) -> None:
        """Lends the integers of a module and its class; its own attributes are put back together, from their copy."""
        held = module.__dict__
        changed = {}
        for key, value in own:
            if type(value) is int:
                if value > 1:
                    changed[key] = self.size(value, (name, key))
                continue
            lent = self.lend(value, (name, key), DEPTH)
            if lent is not value:
                changed[key] = lent
        for key, value in _class_integers(type(module)):
            if key not in held:
                changed[key] = self.size(value, (name, key))
        held.update(changed)

    def attributes(self, held: dict[str, Any], path: tuple[str | int, ...], depth: int) -> None:
        for key, value in list(held.items()):
            if not isinstance(key, str) or key in _TORCH_OWN:
                continue
            lent = self.lend(value, (*path, key), depth)
            if lent is not value:
                held[key] = lent
                self.undo.append(functools.partial(held.__setitem__, key, value))

    def size(self, value: int, path: tuple[str | int, ...]) -> SymbolicInt:
        return SymbolicInt(value, AttributeRef(path), self.constraints)

    def lend(self, value: Any, path: tuple[str | int, ...], depth: int) -> Any:
        """``value`` itself, changed inside where it can be, or its replacement."""
        kind = type(value)
        if kind is int:
            return self.size(value, path) if value > 1 else value
        if kind in SIMPLE or isinstance(value, OPAQUE):
            return value
        if isinstance(value, tuple):
            return self.entries(value, path, depth)
        if depth > 0 and id(value) not in self.seen:
            self.seen.add(id(value))
            self.inside(value, path, depth - 1)
        return value

    def entries(self, value: Any, path: tuple[str | int, ...], depth: int) -> Any:
        if _are_small(value):
            return value
        lent = [self.lend(item, (*path, index), depth) for index, item in enumerate(value)]
        if all(map(operator.is_, lent, value)):
            return value
        return type(value)(*lent) if hasattr(value, "_fields") else type(value)(lent)

    def inside(self, value: Any, path: tuple[str | int, ...], depth: int) -> None:
        if isinstance(value, list):
            if not _are_small(value):
                self.items(value, range(len(value)), path, depth)
        elif type(value) in (dict, OrderedDict):
            self.items(value, list(value), path, depth)
        elif isinstance(value, functools.partial):
            self.items(value.keywords, list(value.keywords), (*path, "keywords"), depth)
        elif is_configuration(value):
            self.attributes(value.__dict__, path, depth)

    def items(self, container: Any, keys: Any, path: tuple[str | int, ...], depth: int) -> None:
        for key in keys:
            if not isinstance(key, (str, int)):
                continue
            value = container[key]
            lent = self.lend(value, (*path, key), depth)
            if lent is not value:
                container[key] = lent
                self.undo.append(functools.partial(_put_back, container, key, value))


def _are_small(values: Sequence[Any]) -> bool:
    """Whether all entries are integers that are not lent: a one can neither shrink nor split."""
    return _INTEGER.issuperset(map(type, values)) and (not values or max(values) < 2)


_INTEGER = frozenset([int])


@functools.cache
def _class_integers(kind: type[nn.Module]) -> tuple[tuple[str, int], ...]:
    found: dict[str, int] = {}
    for base in reversed(kind.__mro__):
        if issubclass(base, nn.Module) and not is_library(base.__module__):
            found.update(
                (key, value)
                for key, value in vars(base).items()
                if type(value) is int and value > 1 and not key.startswith("__") and key not in _TORCH_OWN
            )
    return tuple(found.items())
