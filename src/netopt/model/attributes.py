"""What modules hold is looked into, noted and put back: containers, and objects of the user's with attributes."""

from __future__ import annotations

import enum
import functools
import operator
import sys
import types
from collections import OrderedDict, deque
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import nn

__all__ = [
    "COMMON",
    "CONTAINERS",
    "DEPTH",
    "NUMBERS",
    "OPAQUE",
    "SIMPLE",
    "Own",
    "Parts",
    "container_of",
    "copy_entries",
    "differs",
    "is_configuration",
    "is_library",
    "own_attributes",
    "own_classes",
    "own_slots",
    "refill",
]

Parts: TypeAlias = "Sequence[tuple[str, nn.Module]]"
"""The modules of a model, each once, with their dotted names."""
Own: TypeAlias = "list[tuple[str, Any]]"
"""The attributes of a module that are no flags or texts, and that not every module has."""

SIMPLE = frozenset(
    {bool, float, str, bytes, complex, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format}
)
NUMBERS = SIMPLE | {int}
DEPTH = 6
COMMON = vars(nn.Module())
"""What every module has, by name."""
OPAQUE = (torch.Tensor, nn.Module, type, types.ModuleType, int, float)  # a symbolic integer refers to its constraints
CONTAINERS = (dict, list, set, deque)
_ABSENT = object()
_CODE = (types.FunctionType, types.MethodType, types.BuiltinFunctionType, functools.partial)
_HOLDERS = frozenset({"types", "argparse", "collections", "__main__"})


def own_attributes(parts: Parts) -> list[Own]:
    """Of each module, its attributes that not every module has, flags and texts left out."""
    return [
        [item for item in module.__dict__.items() if type(item[1]) not in SIMPLE and item[0] not in COMMON]
        for _, module in parts
    ]


@functools.cache
def own_classes(kind: type) -> Sequence[type]:
    """The classes a class is made of that are no library's."""
    return [base for base in kind.__mro__ if base is not object and not is_library(base.__module__)]


@functools.cache
def own_slots(kind: type) -> Sequence[str]:
    """The names of the slots of a class that is no library's and whose objects have no dictionary."""
    if is_library(kind.__module__) or issubclass(kind, enum.Enum):
        return ()
    slots = [vars(base).get("__slots__", ()) for base in kind.__mro__]
    return [name for own in slots for name in ([own] if isinstance(own, str) else own) if not name.startswith("__")]


def container_of(item: Any) -> Any:
    """What is to be looked into: ``item`` if it is a container or has slots, the attributes of an object, or None."""
    kind = type(item)
    if kind in NUMBERS or (kind is tuple and NUMBERS.issuperset(map(type, item))):
        return None
    if kind is dict or kind is OrderedDict or kind is list:
        return item
    if isinstance(item, OPAQUE):
        return None
    if isinstance(item, (dict, list, tuple, set, deque)):
        return item
    own = getattr(item, "__dict__", None)
    if not isinstance(own, dict):
        return item if own_slots(kind) else None
    if isinstance(item, (enum.Enum, *_CODE)):
        return None
    return own if kind.__module__ in _HOLDERS or not is_library(kind.__module__) else None


def is_configuration(value: Any) -> bool:
    """Whether an object may say sizes: one of the user's own or of a model library, with attributes."""
    kind = type(value)
    return (
        isinstance(getattr(value, "__dict__", None), dict)
        and (not is_library(kind.__module__) or kind.__module__ in ("types", "__main__"))
        and not isinstance(value, (enum.Enum, Mapping))
        and not callable(value)
    )


@functools.cache
def is_library(module: str) -> bool:
    """Whether a Python module is of torch or the standard library: no code of the user's."""
    root = module.partition(".")[0]
    return root == "torch" or root in sys.stdlib_module_names


def differs(container: Any, before: Any) -> bool:
    """Whether a container has other entries than it had."""
    if isinstance(container, type):
        return any(vars(container).get(key, _ABSENT) is not value for key, value in before.items())
    if isinstance(container, dict):
        if container.keys() != before.keys():
            return True
        if all(map(operator.is_, container.values(), before.values())):
            return False
        return any(value is not before[key] and key != "training" for key, value in container.items())
    if isinstance(container, (list, deque)):
        return len(container) != len(before) or not all(map(operator.is_, container, before))
    return (container if isinstance(container, set) else _slots_of(container)) != before


def copy_entries(container: Any) -> Any:
    """The entries of a container, whatever its own ``copy`` does, or of an object with slots."""
    if isinstance(container, dict):
        return dict(container.items())
    if isinstance(container, set):
        return set(container)
    return list(container) if isinstance(container, CONTAINERS) else _slots_of(container)


def _slots_of(value: Any) -> dict[str, Any]:
    return {name: getattr(value, name) for name in own_slots(type(value)) if hasattr(value, name)}


def refill(container: Any, before: Any) -> None:
    """Gives a container the entries it had, in the order they had; what has not changed is not touched."""
    if isinstance(container, dict):
        _refill_dict(container, before)
    elif isinstance(container, (list, deque)):
        if len(container) != len(before) or not all(map(operator.is_, container, before)):
            container.clear()
            container.extend(before)
    elif isinstance(container, set):
        if container != before:
            container.clear()
            container.update(before)
    elif isinstance(container, type):
        now = {key: value for key, value in vars(container).items() if not key.startswith("__")}
        _refill_object(type, container, now, before)
    else:
        _refill_object(object, container, _slots_of(container), before)


def _refill_dict(container: Any, before: Mapping[Any, Any]) -> None:
    # Never empty for a moment, since other threads may read a configuration; and by the plain methods, since some
    # dictionaries refuse a change.
    plain = OrderedDict if isinstance(container, OrderedDict) else dict
    same_keys = len(container) == len(before) and all(map(operator.is_, container, before))
    if same_keys and all(map(operator.is_, container.values(), before.values())):
        return
    for key in [key for key in container if key not in before]:
        plain.__delitem__(container, key)
    if len(container) != len(before) or not all(map(operator.is_, container.values(), before.values())):
        for key, value in before.items():
            if container.get(key, _ABSENT) is not value:
                plain.__setitem__(container, key, value)
    if not all(map(operator.is_, container, before)):
        for key, value in before.items():
            plain.__delitem__(container, key)
            plain.__setitem__(container, key, value)


def _refill_object(plain: Any, holder: Any, now: Mapping[str, Any], before: Mapping[str, Any]) -> None:
    for key in now.keys() - before.keys():
        plain.__delattr__(holder, key)
    for key, value in before.items():
        if now.get(key, _ABSENT) is not value:
            plain.__setattr__(holder, key, value)
