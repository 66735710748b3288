"""Models built from changed configurations, without memory."""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils._device import DeviceContext

from netopt.model.restore import preserve_random_state
from netopt.symbolic.formulas import Where

__all__ = ["Shapes", "Unfilled", "alone", "built", "entries", "is_share", "is_size", "plant", "with_changes"]

Shapes: TypeAlias = Mapping[str, tuple[int, ...]]


@functools.cache
def is_size(name: str) -> bool:
    """Whether a number of this name is a size, which may be left to a default."""
    return any(word in name for word in ("dim", "inner", "size"))


def is_share(path: Where) -> bool:
    """Whether a number of this name is a ratio of sizes."""
    name = next(step for step in reversed(path) if isinstance(step, str))
    return any(word in name for word in ("ratio", "mult", "expan"))


def built(kind: Callable[[Any], nn.Module], config: Any) -> nn.Module | None:
    """The model this configuration builds, without memory; None if it builds none.

    Args:
        kind: The class of the model.
        config: May be kept and changed by the model.
    """
    with alone(), Unfilled():
        try:
            return kind(config)
        except Exception:
            # Whatever a constructor or a configuration raises, nothing is built from these values.
            return None


@contextmanager
def alone() -> Iterator[None]:
    """Building leaves the random state and the default type of numbers as they were, and warns of nothing."""
    kind = torch.get_default_dtype()
    try:
        with preserve_random_state(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.set_default_dtype(kind)


class Unfilled(DeviceContext):
    """The meta device, with what fills its tensors left out, which is most of what building them takes."""

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
        """Looks at what a call made."""


_SHAPED = frozenset(["requires_grad_", "resize_", "squeeze_", "unsqueeze_", "t_", "transpose_", "set_", "detach_"])


def entries(config: Any, path: Where = ()) -> Iterator[tuple[Where, Any]]:
    """The numbers of a configuration, of lists in it and of those inside it; None where a size is left to a default."""
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


def with_changes(config: Any, changes: Mapping[Where, Any]) -> Any:
    """A copy of a configuration with some values changed, in its lists and tuples and in what is inside it too."""
    config = copy.deepcopy(config)
    for path, value in changes.items():
        _set(config, path, value, setattr)
    return config


def plant(config: Any, path: Where, value: Any) -> None:
    """Sets one value without asking the configuration, which may want nothing but plain numbers."""
    _set(config, path, value, lambda holder, step, one: vars(holder).__setitem__(step, one))


def _set(config: Any, path: Where, value: Any, assign: Callable[[Any, Any, Any], None]) -> None:
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
