"""The integers a model holds.

Sizes sit in module attributes, in tuples and lists, in configuration objects reached from modules, in class bodies
and in the defaults and closures of functions kept by modules. This module finds each of them, names its place, and
lends it out as a :class:`~netopt.axes.sizes.Size` for the time of a trace; everything is put back afterwards,
including whatever the forward itself left in the attributes.
"""

from __future__ import annotations

import enum
import functools
import operator
import sys
import types
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from torch import nn

from netopt.axes.sizes import Ledger, Place, Size

_TORCH_OWN = frozenset(nn.Module().__dict__) | {"call_super_init", "dump_patches"}
_DEPTH = 6


Parts: TypeAlias = "Sequence[tuple[str, nn.Module]]"
"""The modules of a model, each once, with their dotted names."""


@contextmanager
def remembered(parts: Parts, ledger: Ledger) -> Iterator[None]:
    """Replaces every integer above 1 that modules hold by one that remembers its place, and puts all back."""
    loan = _Loan(ledger)
    with attributes_given_back(parts):
        try:
            for name, module in parts:
                loan.module(module, name)
            yield
        finally:
            loan.give_back()


@contextmanager
def attributes_given_back(parts: Parts) -> Iterator[None]:
    """Undoes what a forward does to attributes, and to containers and configurations reached from them."""
    kept, empty = _holders(parts)
    try:
        yield
    finally:
        for held in empty:
            if held:
                held.clear()
        for held, before in reversed(kept):
            _refill(held, before)


def _holders(parts: Parts) -> tuple[list[tuple[Any, Any]], list[Any]]:
    """Every dict of attributes, dict, list and set reached from modules, each once: with a copy, or empty."""
    kept: list[tuple[Any, Any]] = []
    empty: list[Any] = []
    seen: set[int] = set()
    waiting: list[tuple[Any, int]] = []
    for _, module in parts:
        kept.append((module.__dict__, module.__dict__.copy()))
        found = [_container(item) for item in module.__dict__.values() if type(item) not in _PLAIN]
        empty += [one for one in found if one is not None and not one and type(one) is not tuple]
        waiting += [(one, _DEPTH - 1) for one in found if one]
    while waiting:
        value, depth = waiting.pop()
        if not isinstance(value, tuple):
            if id(value) in seen:
                continue
            seen.add(id(value))
            if not value:
                empty.append(value)
                continue
            kept.append((value, value.copy()))
        if depth:
            for item in value.values() if isinstance(value, dict) else value:
                inside = _container(item)
                if inside is not None:
                    waiting.append((inside, depth - 1))
    return kept, empty


def _container(item: Any) -> Any:
    """What is to be looked into: ``item`` if it is a container, the attributes of a configuration, or None."""
    kind = type(item)
    if kind in _PLAIN or (kind is tuple and all(type(one) is int for one in item)):
        return None
    if kind is dict or kind is OrderedDict or kind is list:
        return item
    if isinstance(item, _OPAQUE):
        return None
    if isinstance(item, (dict, list, tuple, set)):
        return item
    return item.__dict__ if _is_configuration(item) else None


def _refill(container: Any, before: Any) -> None:
    if isinstance(container, list):
        if len(container) != len(before) or not all(map(operator.is_, container, before)):
            container[:] = before
    elif isinstance(container, dict):
        if list(container) != list(before):
            container.clear()
            container.update(before)
        elif not all(map(operator.is_, container.values(), before.values())):
            container.update(before)
    elif container != before:
        container.clear()
        container.update(before)


def _put_back(container: Any, key: Any, value: Any) -> None:
    """Undoes one loan, unless the forward has taken the entry away; then the copy of the container brings it back."""
    gone = isinstance(container, list) and isinstance(key, int) and key >= len(container)
    if not gone:
        container[key] = value


class _Loan:
    """Walks attributes and containers, replaces integers, and remembers how to undo it."""

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger
        self.undo: list[Callable[[], None]] = []
        self.seen: set[int] = set()

    def give_back(self) -> None:
        for step in reversed(self.undo):
            step()

    def module(self, module: nn.Module, name: str) -> None:
        """Lends the integers of a module and its class; its own attributes are put back together, from their copy."""
        held = module.__dict__
        changed = {}
        for key, value in held.items():
            kind = type(value)
            if kind in _SIMPLE or key in _TORCH_OWN or not isinstance(key, str):
                continue
            if kind is int:
                if value > 1:
                    changed[key] = self.size(value, (name, key))
                continue
            lent = self.lend(value, (name, key), _DEPTH)
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

    def size(self, value: int, path: tuple[str | int, ...]) -> Size:
        return Size(value, Place(path), self.ledger)

    def lend(self, value: Any, path: tuple[str | int, ...], depth: int) -> Any:
        """``value`` itself, changed inside where it can be, or its replacement."""
        kind = type(value)
        if kind is int:
            return self.size(value, path) if value > 1 else value
        if kind in _SIMPLE or isinstance(value, _OPAQUE):
            return value
        if isinstance(value, tuple):
            return self.entries(value, path, depth)
        if depth > 0 and id(value) not in self.seen:
            self.seen.add(id(value))
            self.inside(value, path, depth - 1)
        return value

    def entries(self, value: Any, path: tuple[str | int, ...], depth: int) -> Any:
        if all(type(item) is int and item < 2 for item in value):
            return value
        lent = [self.lend(item, (*path, index), depth) for index, item in enumerate(value)]
        if all(new is old for new, old in zip(lent, value, strict=True)):
            return value
        return type(value)(*lent) if hasattr(value, "_fields") else type(value)(lent)

    def inside(self, value: Any, path: tuple[str | int, ...], depth: int) -> None:
        if isinstance(value, list):
            self.items(value, range(len(value)), path, depth)
        elif type(value) in (dict, OrderedDict):
            self.items(value, list(value), path, depth)
        elif isinstance(value, functools.partial):
            self.items(value.keywords, list(value.keywords), (*path, "keywords"), depth)
        elif isinstance(value, types.FunctionType):
            self.function(value, path, depth)
        elif _is_configuration(value):
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

    def function(self, function: types.FunctionType, path: tuple[str | int, ...], depth: int) -> None:
        if function.__module__ is None or is_library(function.__module__):
            return
        for index, cell in enumerate(function.__closure__ or ()):
            try:
                value = cell.cell_contents
            except ValueError:  # an empty cell
                continue
            lent = self.lend(value, (*path, "__closure__", index, "cell_contents"), depth)
            if lent is not value:
                cell.cell_contents = lent
                self.undo.append(functools.partial(setattr, cell, "cell_contents", value))
        defaults = function.__defaults__
        if defaults:
            lent = self.lend(defaults, (*path, "__defaults__"), depth)
            if lent is not defaults:
                function.__defaults__ = lent
                self.undo.append(functools.partial(setattr, function, "__defaults__", defaults))


_OPAQUE = (torch.Tensor, nn.Module, type, types.ModuleType, int, float)  # a size that is lent already holds its ledger
_SIMPLE = frozenset(
    {bool, float, str, bytes, complex, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format}
)
_PLAIN = _SIMPLE | {int}


def is_library(module: str) -> bool:
    """Whether a Python module is of torch or the standard library: no code of the user's."""
    root = module.partition(".")[0]
    return root == "torch" or root in sys.stdlib_module_names


def _is_configuration(value: Any) -> bool:
    """Whether an object is worth looking into: one of the user's own or of a model library, with attributes."""
    kind = type(value)
    return (
        isinstance(getattr(value, "__dict__", None), dict)
        and (not is_library(kind.__module__) or kind.__module__ in ("types", "__main__"))
        and not isinstance(value, (enum.Enum, Mapping))
        and not callable(value)
    )


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
