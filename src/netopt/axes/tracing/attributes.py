"""The integer attributes of a model, symbolic for the time of a trace.

Sizes sit in module attributes, in tuples, lists and dicts, and in configuration objects reached from modules. Each is
replaced by a :class:`~netopt.symbolic.SymbolicInt` that refers to its attribute; everything is restored
afterwards, including whatever the forward itself left in the attributes.
"""

from __future__ import annotations

import functools
import operator
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from netopt.model.attributes import COMMON, DEPTH, OPAQUE, SIMPLE, Own, Parts, is_configuration
from netopt.model.restore import Snapshot
from netopt.model.signals import UndoLog
from netopt.symbolic import AttributeRef, Constraints, SymbolicInt, plain

_TORCH_OWN = frozenset(COMMON) | {"call_super_init", "dump_patches"}


def symbolic_integers(parts: Parts, attributes: Snapshot, constraints: Constraints) -> UndoLog:
    """Replaces every integer above 1 that modules hold by a symbolic one, and restores all.

    Attributes of modules themselves are restored by ``attributes``, when its mode is left.
    """

    def start(log: UndoLog) -> None:
        wrapping = _Wrapping(constraints)
        log.callback(wrapping.restore)
        for (name, module), own in zip(parts, attributes.own, strict=True):
            wrapping.module(module, name, own)

    return UndoLog(start)


def _restore(container: Any, key: Any, value: Any) -> None:
    """Undoes one replacement; if the forward has taken the entry away, the container is restored as a whole."""
    gone = isinstance(container, list) and isinstance(key, int) and key >= len(container)
    if not gone:
        container[key] = value


class _Wrapping:
    """Walks attributes and containers, replaces integers, and records how to undo it."""

    def __init__(self, constraints: Constraints) -> None:
        self.constraints = constraints
        self.undo: list[Callable[[], None]] = []
        self.seen: set[int] = set()

    def restore(self) -> None:
        for step in reversed(self.undo):
            step()

    def module(self, module: nn.Module, name: str, own: Own) -> None:
        """Wraps the integers of a module; its own attributes are restored together, from their copy."""
        held = module.__dict__
        changed = {}
        for key, value in own:
            if type(value) is int:
                if value > 1:
                    changed[key] = self.size(value, (name, key))
                continue
            wrapped = self.wrap(value, (name, key), DEPTH)
            if wrapped is not value:
                changed[key] = wrapped
        held.update(changed)

    def attributes(self, held: dict[str, Any], path: tuple[str | int, ...], depth: int) -> None:
        for key, value in list(held.items()):
            if not isinstance(key, str) or key in _TORCH_OWN:
                continue
            wrapped = self.wrap(value, (*path, key), depth)
            if wrapped is not value:
                held[key] = wrapped
                self.undo.append(functools.partial(held.__setitem__, key, value))

    def size(self, value: int, path: tuple[str | int, ...]) -> SymbolicInt:
        return SymbolicInt(value, AttributeRef(path), self.constraints)

    def wrap(self, value: Any, path: tuple[str | int, ...], depth: int) -> Any:
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
        return _keyed_by_value(value)

    def entries(self, value: Any, path: tuple[str | int, ...], depth: int) -> Any:
        if _are_small(value):
            return value
        wrapped = [self.wrap(item, (*path, index), depth) for index, item in enumerate(value)]
        if all(map(operator.is_, wrapped, value)):
            return value
        return type(value)(*wrapped) if hasattr(value, "_fields") else type(value)(wrapped)

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
            wrapped = self.wrap(value, (*path, key), depth)
            if wrapped is not value:
                container[key] = wrapped
                self.undo.append(functools.partial(_restore, container, key, value))


def _keyed_by_value(value: Any) -> Any:
    """A dict with integers for keys as one that finds them under symbolic keys, whose hashes differ."""
    return _Table(value) if type(value) is dict and any(type(key) is int for key in value) else value


class _Table(dict[Any, Any]):
    """A dict that looks up symbolic integers by their value."""

    def __getitem__(self, key: Any) -> Any:
        return super().__getitem__(self._known(key))

    def __contains__(self, key: Any) -> bool:
        return super().__contains__(self._known(key))

    def __setitem__(self, key: Any, value: Any) -> None:
        super().__setitem__(self._known(key), value)

    def get(self, key: Any, default: Any = None) -> Any:
        """As of any dict."""
        return super().get(self._known(key), default)

    def setdefault(self, key: Any, default: Any = None) -> Any:
        """As of any dict."""
        return super().setdefault(self._known(key), default)

    def _known(self, key: Any) -> Any:
        """The key that equals ``key``, if there is one; that they are equal is a guard."""
        value = plain(key)
        return value if value is not key and super().__contains__(value) and key == value else key


def _are_small(values: Sequence[Any]) -> bool:
    """Whether all entries are integers that stay as they are: a one can neither shrink nor split."""
    return _INTEGER.issuperset(map(type, values)) and (not values or max(values) < 2)


_INTEGER = frozenset([int])
