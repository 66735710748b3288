"""Models built from changed configurations, without memory."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils._device import DeviceContext

from netopt.model.restore import preserve_random_state

__all__ = [
    "ConfigPath",
    "NoInit",
    "Shapes",
    "build",
    "entries",
    "is_ratio",
    "is_size",
    "isolated",
    "set_directly",
    "with_changes",
]

Shapes: TypeAlias = Mapping[str, tuple[int, ...]]
"""Of tensors, by name."""
ConfigPath: TypeAlias = tuple[Any, ...]
"""Where a number is in a configuration: attributes, and positions in lists."""


@functools.cache
def is_size(name: str) -> bool:
    """Whether a number of this name is a size, which may be left to a default."""
    return any(word in name for word in ("dim", "inner", "size"))


def is_ratio(path: ConfigPath) -> bool:
    """Whether a number of this name is a ratio of sizes."""
    name = next(step for step in reversed(path) if isinstance(step, str))
    return any(word in name for word in ("ratio", "mult", "expan"))


def build(kind: Callable[[Any], nn.Module], config: Any) -> nn.Module | None:
    """The model this configuration builds, without memory; None if it builds none.

    Args:
        kind: The class of the model.
        config: May be kept and changed by the model.
    """
    with isolated(), NoInit():
        try:
            return kind(config)
        except Exception:  # a constructor is the user's, and may raise anything for these values
            return None


@contextmanager
def isolated() -> Iterator[None]:
    """Restores the random state, and the default dtype where a constructor has changed it."""
    kind = torch.get_default_dtype()
    try:
        with preserve_random_state():
            yield
    finally:
        if torch.get_default_dtype() is not kind:
            torch.set_default_dtype(kind)


class NoInit(DeviceContext):
    """The meta device without initialisation of its tensors, which is most of the time a build takes."""

    def __init__(self) -> None:
        super().__init__("meta")

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs every call but those that only write into their first argument."""
        kwargs = kwargs or {}
        filled = args[0] if args else kwargs.get("tensor")
        if isinstance(filled, Tensor) and filled.is_meta:
            name = getattr(func, "__name__", "")
            if name[-1:] == "_" and name[-2:] != "__" and name not in _SHAPED:
                return filled
            made = func(*args, **kwargs)
        else:
            made = super().__torch_function__(func, types, args, kwargs)
        if made is not filled and isinstance(made, Tensor):
            self.note(made, args, kwargs)
        return made

    def note(self, made: Tensor, args: Any, kwargs: Any) -> None:
        """Called with every tensor that is made."""


_SHAPED = frozenset(["requires_grad_", "resize_", "squeeze_", "unsqueeze_", "t_", "transpose_", "set_", "detach_"])


def entries(config: Any, path: ConfigPath = ()) -> Iterator[tuple[ConfigPath, Any]]:
    """The numbers of a configuration, its lists and sub-configurations; None where a size is left to a default."""
    for name, value in vars(config).items():
        if name.startswith("_"):
            continue
        if type(value) in (int, float):
            yield (*path, name), value
        elif value is None and is_size(name):
            yield (*path, name), None
        elif isinstance(value, (list, tuple)):
            yield from (((*path, name, place), one) for place, one in enumerate(value) if type(one) in (int, float))
        elif hasattr(value, "to_dict") and len(path) < 2:
            yield from entries(value, (*path, name))


def with_changes(config: Any, changes: Mapping[ConfigPath, Any]) -> Any:
    """A copy of a configuration with some values changed, in its lists, tuples and sub-configurations too."""
    config = copy.deepcopy(config)
    for path, value in changes.items():
        _set(config, path, value, setattr)
    return config


def set_directly(config: Any, path: ConfigPath, value: Any) -> None:
    """Sets one value past the checks of the configuration, which may allow nothing but plain numbers."""
    _set(config, path, value, lambda holder, step, one: vars(holder).__setitem__(step, one))


def _set(config: Any, path: ConfigPath, value: Any, assign: Callable[[Any, Any, Any], None]) -> None:
    holders = [config]
    for step in path[:-1]:
        holders.append(_get(holders[-1], step))
    for holder, step in zip(reversed(holders), reversed(path), strict=True):
        if not isinstance(holder, tuple):
            if isinstance(holder, (dict, list)):
                holder[step] = value
            else:
                assign(holder, step, value)
            return
        value = type(holder)([*holder[:step], value, *holder[step + 1 :]])


def _get(holder: Any, step: Any) -> Any:
    return holder[step] if isinstance(holder, (Mapping, list, tuple)) else getattr(holder, step)
