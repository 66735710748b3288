"""Which values of a configuration count the blocks of a list.

A number does if a model built from the configuration with one less, without memory, lacks just the last block; a list
does besides if that build reads it block by block.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from netopt.integrations.huggingface.config import CANNOT, LOADS
from netopt.integrations.huggingface.meta_build import ConfigPath, build, entries, with_changes
from netopt.plan.blocks import Counted
from netopt.plan.value import shapes_of
from netopt.surgery.attributes import Path

__all__ = ["counted", "what_it_builds"]

_LESS = f"{CANNOT}: {{}}; save with torch.save, or replay the plan on a fresh model"


def counted(model: nn.Module, name: str) -> list[Counted]:
    """The values of all configurations held around a list that count its entries.

    Args:
        model: Before the surgery.
        name: Of the list.
    """
    found: list[Counted] = []
    for prefix, holder in _holders(model, name):
        inner = name[len(prefix) :].lstrip(".")
        size = len(model.get_submodule(name)._modules)
        for (below, *path), values in _counts_in(holder, inner, size):
            module = ".".join(filter(None, (prefix, below)))
            found.append(Counted((module, *path), values))
    return list({one.path: one for one in found}.values())


def what_it_builds(model: nn.Module) -> str | None:
    """Whether the configuration of a smaller model builds it, or why not; None if there is none."""
    config = vars(model).get("config")
    if not hasattr(config, "__dict__"):
        return None
    fresh = build(type(model), copy.deepcopy(config))
    if fresh is None:
        return None
    ours, theirs = shapes_of(model), shapes_of(fresh)
    name = next((name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name)), None)
    if name is not None:
        return _LESS.format(f"`{name}` has shape {ours.get(name)}, and it gives {theirs.get(name)}")
    modules = dict(fresh.named_modules())
    for prefix, module in model.named_modules():
        other = vars(modules[prefix]) if prefix in modules else {}
        for key, value in vars(module).items():
            if type(value) in (int, bool, str) and key != "training" and other.get(key, value) != value:
                return _LESS.format(f"`{prefix}.{key}` is {value}, and it gives {other[key]}")
    return LOADS if hasattr(model, "save_pretrained") else None


def _holders(model: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
    """The modules around a list that hold a configuration, each configuration once, the outermost first."""
    seen: set[int] = set()
    steps = name.split(".")
    for length in range(len(steps)):
        prefix = ".".join(steps[:length])
        holder = model.get_submodule(prefix)
        config = vars(holder).get("config")
        if hasattr(config, "__dict__") and not isinstance(config, (nn.Module, type)) and id(config) not in seen:
            seen.add(id(config))
            yield prefix, holder


def _counts_in(holder: nn.Module, name: str, size: int) -> list[tuple[Path, tuple[Any, ...] | None]]:
    """What counts, by its path from the holder on: values of its configuration, and numbers made from these."""
    config: Any = holder.config
    shapes = shapes_of(holder)
    last = list(holder.get_submodule(name)._modules)[-1]
    wanted = {key: shape for key, shape in shapes.items() if not key.startswith(f"{name}.{last}.".lstrip("."))}
    lists = dict(_lists(config, size))
    numbers = [path for path, value in entries(config) if type(value) is int and value == size]
    for path in numbers:
        for some in ({**lists}, {}):
            read = {where: _Read(values[:-1]) for where, values in some.items()}
            fresh = _built(holder, {**read, path: size - 1}, wanted)
            if fresh is not None:
                made = [(where, None) for where in _numbers_made(holder, fresh, name, size)]
                return [*_read_of(read, lists), (("", "config", *path), None), *made]
    read = {where: _Read(values[:-1]) for where, values in lists.items()}
    return _read_of(read, lists) if read and _built(holder, read, wanted) is not None else []


def _read_of(
    read: Mapping[ConfigPath, _Read], lists: Mapping[ConfigPath, list[Any]]
) -> list[tuple[Path, tuple[Any, ...] | None]]:
    """The lists that were read item by item."""
    return [(("", "config", *where), tuple(lists[where])) for where, one in read.items() if one.is_read()]


def _numbers_made(holder: nn.Module, fresh: nn.Module, name: str, size: int) -> Iterator[Path]:
    """Numbers of modules that are one less in a model with one block less."""
    modules = dict(fresh.named_modules())
    for prefix, module in holder.named_modules():
        if prefix in modules and not f"{prefix}.".startswith(f"{name}."):
            for key, value in vars(module).items():
                if type(value) is int and value == size and vars(modules[prefix]).get(key) == size - 1:
                    yield prefix, key


def _built(
    holder: nn.Module, changes: Mapping[ConfigPath, Any], wanted: Mapping[str, tuple[int, ...]]
) -> nn.Module | None:
    """What a changed configuration builds, if that has the tensors wanted."""
    try:
        config = with_changes(holder.config, changes)
    except Exception:  # a configuration may refuse a value, by any exception
        return None
    fresh = build(type(holder), config)
    return fresh if fresh is not None and shapes_of(fresh) == wanted else None


def _lists(config: Any, size: int, path: ConfigPath = ()) -> Iterator[tuple[ConfigPath, list[Any]]]:
    """The lists of a configuration, and of its sub-configurations, with an item for each block."""
    for key, value in vars(config).items():
        if type(value) in (list, tuple) and len(value) == size:
            yield (*path, key), list(value)
        elif hasattr(value, "to_dict") and len(path) < 2:
            yield from _lists(value, size, (*path, key))


class _Read(list[Any]):
    """A list that notes which of its items are read one by one, in all of its copies."""

    def __init__(self, values: list[Any]) -> None:
        super().__init__(values)
        self.places: set[int] = set()

    def __deepcopy__(self, memo: Any) -> _Read:
        return self

    def __getitem__(self, place: Any) -> Any:
        if isinstance(place, int):
            self.places.add(place)
        return super().__getitem__(place)

    def is_read(self) -> bool:
        return self.places >= set(range(len(self)))
