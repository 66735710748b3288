"""What the modules of a model hold: noted in one walk, and put back after a forward has run.

Attributes, and the containers and configurations reached from them, are copied; put back, they are the same objects
with the same entries. What the entries of tensors are is not looked at.
"""

from __future__ import annotations

import enum
import functools
import operator
import sys
import types
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import filterfalse
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from netopt.errors import ForwardError
from netopt.model.copy_on_write import Writes

__all__ = [
    "COMMON",
    "DEPTH",
    "NUMBERS",
    "OPAQUE",
    "SIMPLE",
    "Attributes",
    "Own",
    "Parts",
    "attributes_given_back",
    "is_configuration",
    "is_library",
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
_common = operator.itemgetter(*(name for name, value in COMMON.items() if isinstance(value, (dict, set))))
OPAQUE = (torch.Tensor, nn.Module, type, types.ModuleType, int, float)  # a size that is lent already holds its ledger


class Attributes:
    """What some modules hold.

    Args:
        parts: The modules, each once, with their dotted names.

    Attributes:
        own: Of each module, its attributes that not every module has, flags and texts left out.
        flags_alone: Whether a change of mode changes flags and nothing else; known once one was made.
    """

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self.flags_alone = True
        self._kept: list[tuple[Any, Any]] = []
        self._empty: list[Any] = []
        self._holding: list[tuple[str, Any]] = []
        self._scripted = [(module, module.training) for _, module in parts if "training" not in module.__dict__]
        self.own = self._own = own_attributes(parts)
        waiting: list[tuple[Any, int]] = []
        for (name, module), own in zip(parts, self.own, strict=True):
            attributes = module.__dict__
            self._kept.append((attributes, attributes.copy()))
            common = _common_of(attributes)
            self._kept += [(container, container.copy()) for container in filter(None, common)]
            self._empty += filterfalse(None, common)
            for key, value in own:
                kind = type(value)
                if kind is int or (kind is tuple and NUMBERS.issuperset(map(type, value))):
                    continue
                inside = container_of(value)
                if inside is not None:
                    waiting.append((inside, DEPTH - 1))
                if inside is not None or isinstance(value, Tensor):
                    self._holding.append((f"{name}.{key}" if name else key, value))
        self._look_inside(waiting)

    def _look_inside(self, waiting: list[tuple[Any, int]]) -> None:
        seen: set[int] = set()
        while waiting:
            value, depth = waiting.pop()
            if not isinstance(value, tuple):
                if id(value) in seen:
                    continue
                seen.add(id(value))
                if not value:
                    self._empty.append(value)
                    continue
                self._kept.append((value, value.copy()))
            entries = value.values() if isinstance(value, dict) else value
            if depth and not NUMBERS.issuperset(map(type, entries)):
                for item in entries:
                    inside = container_of(item)
                    if inside is not None:
                        waiting.append((inside, depth - 1))

    def put_back(self) -> None:
        """Gives every module, container and configuration the entries it had."""
        for container in filter(None, self._empty):
            container.clear()
        for container, before in reversed(self._kept):
            _refill(container, before)

    @contextmanager
    def in_mode(self, model: nn.Module, *, training: bool, writes: Writes | None = None) -> Iterator[bool]:
        """Puts the model these modules are of in training or evaluation mode, and puts all back on leaving.

        Gives whether this changed more than flags, as where a model's own ``train`` sets up something else. What is
        written into parameters is undone by ``writes``.
        """
        writes = Writes(()) if writes is None else writes
        try:
            try:
                self.flags_alone = _set_mode(model, self._parts, writes, training)
            except Exception as error:
                name = "train" if training else "eval"
                raise ForwardError(f"{name}() of {type(model).__name__} failed; see the chained exception.") from error
            changed = not self.flags_alone and self._are_changed()
            self.own = own_attributes(self._parts) if changed else self._own
            yield changed
        finally:
            self.put_back()
            writes.undo()
            for module, flag in self._scripted:
                module.training = flag

    def _are_changed(self) -> bool:
        """Whether something else than flags is not as it was."""
        return any(self._empty) or any(map(_differs, *zip(*self._kept, strict=True)))

    def tensors(self) -> tuple[dict[str, Tensor], frozenset[str]]:
        """Parameters, buffers, then other tensors, each under its first name; and the names of the parameters."""
        parameters: dict[int, tuple[str, Tensor]] = {}
        buffers: dict[int, tuple[str, Tensor]] = {}
        others: dict[int, tuple[str, Tensor]] = {}
        for prefix, module in self._parts:
            start = f"{prefix}." if prefix else ""
            for held, found in ((module._parameters, parameters), (module._buffers, buffers)):
                if held:
                    for key, tensor in held.items():
                        if tensor is not None:
                            found.setdefault(id(tensor), (start + key, tensor))
        for name, value in self._holding:
            for path, tensor in _tensors_in(value, name, depth=3):
                others.setdefault(id(tensor), (path, tensor))
        named = dict(parameters.values())
        names = frozenset(named)
        named.update(one for key, one in buffers.items() if key not in parameters)
        named.update(one for key, one in others.items() if key not in parameters and key not in buffers)
        return named, names


def own_attributes(parts: Parts) -> list[Own]:
    """Of each module, its attributes that not every module has, flags and texts left out."""
    return [
        [item for item in module.__dict__.items() if type(item[1]) not in SIMPLE and item[0] not in COMMON]
        for _, module in parts
    ]


@contextmanager
def attributes_given_back(parts: Parts) -> Iterator[None]:
    """Undoes what a forward does to attributes, and to containers and configurations reached from them."""
    attributes = Attributes(parts)
    try:
        yield
    finally:
        attributes.put_back()


def _set_mode(model: nn.Module, parts: Parts, writes: Writes, training: bool) -> bool:
    """Sets the mode; says whether flags alone were set, since nothing in the model does more in ``train``."""
    own = any("train" in module.__dict__ or "eval" in module.__dict__ for _, module in parts)
    if not own and all(map(_changes_flags_alone, {type(module) for _, module in parts})):
        for _, module in parts:
            module.__dict__["training"] = training
        return True
    with writes.seen():
        if training:
            model.train()
        elif any(module.training for _, module in parts):
            model.eval()
    return False


def _changes_flags_alone(kind: type[nn.Module]) -> bool:
    plain = nn.Module
    return kind.train is plain.train and kind.eval is plain.eval and kind.__setattr__ is plain.__setattr__


def _differs(container: Any, before: Any) -> bool:
    if isinstance(container, dict):
        if container.keys() != before.keys():
            return True
        if all(map(operator.is_, container.values(), before.values())):
            return False
        return any(value is not before[key] and key != "training" for key, value in container.items())
    if isinstance(container, list):
        return len(container) != len(before) or not all(map(operator.is_, container, before))
    return container != before


def _common_of(attributes: dict[str, Any]) -> Sequence[Any]:
    """The containers that every module has."""
    try:
        if "training" in attributes:
            return _common(attributes)
    except KeyError:  # made by an older torch
        pass
    # Some of a scripted module's are no containers of Python's.
    return [value for key, value in attributes.items() if key in COMMON and type(value) in (dict, OrderedDict, set)]


def container_of(item: Any) -> Any:
    """What is to be looked into: ``item`` if it is a container, the attributes of a configuration, or None."""
    kind = type(item)
    if kind in NUMBERS or (kind is tuple and NUMBERS.issuperset(map(type, item))):
        return None
    if kind is dict or kind is OrderedDict or kind is list:
        return item
    if isinstance(item, OPAQUE):
        return None
    if isinstance(item, (dict, list, tuple, set)):
        return item
    return item.__dict__ if is_configuration(item) else None


def is_configuration(value: Any) -> bool:
    """Whether an object is worth looking into: one of the user's own or of a model library, with attributes."""
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


def _refill(container: Any, before: Any) -> None:
    if isinstance(container, list):
        if len(container) != len(before) or not all(map(operator.is_, container, before)):
            container[:] = before
    elif isinstance(container, dict):
        if [*container] != [*before]:
            container.clear()
            container.update(before)
        elif not all(map(operator.is_, container.values(), before.values())):
            container.update(before)
    elif container != before:
        container.clear()
        container.update(before)


def _tensors_in(value: Any, path: str, depth: int) -> Iterator[tuple[str, Tensor]]:
    if type(value) in NUMBERS:
        return
    if isinstance(value, Tensor):
        yield path, value
    elif depth and isinstance(value, (list, tuple)):
        for index, item in enumerate(() if NUMBERS.issuperset(map(type, value)) else value):
            yield from _tensors_in(item, f"{path}.{index}", depth - 1)
    elif depth and isinstance(value, dict):
        for key, item in value.items():
            yield from _tensors_in(item, f"{path}.{key}", depth - 1)
