"""Which values of a configuration are the number of experts.

Those are with which a model built from it, without memory, has the shapes that the smaller one will have.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import chain, combinations
from typing import Any

from torch import nn

from netopt.integrations.huggingface.meta_build import build, entries, with_changes
from netopt.plan.value import shapes_of
from netopt.surgery.attributes import Path

__all__ = ["counted_experts"]

_TOGETHER = 2
"""So many values of a configuration may have to change together."""


def counted_experts(model: nn.Module, shapes: Mapping[str, tuple[int, ...]], size: int, kept: int) -> list[Path]:
    """The values of a model's configuration that are the number of its experts, and the numbers made from these.

    Args:
        model: Before the surgery.
        shapes: Of all tensors afterwards.
        size: How many experts there are.
        kept: How many there will be.
    """
    config: Any = vars(model).get("config")
    if not hasattr(config, "__dict__"):
        return []
    numbers = [path for path, value in entries(config) if type(value) is int and value == size]
    for some in chain.from_iterable(combinations(numbers, count) for count in range(1, _TOGETHER + 1)):
        try:
            changed = with_changes(config, dict.fromkeys(some, kept))
        except Exception:  # a configuration may refuse a value, by any exception
            continue
        fresh = build(type(model), changed)
        if fresh is not None and shapes_of(fresh) == shapes:
            return [*(("", "config", *path) for path in some), *_made(model, fresh, size, kept)]
    return []


def _made(model: nn.Module, fresh: nn.Module, size: int, kept: int) -> Iterator[Path]:
    """Numbers of modules that a model with fewer experts has fewer of."""
    modules = dict(fresh.named_modules())
    for prefix, module in model.named_modules():
        for key, value in vars(module).items() if prefix in modules else ():
            if type(value) is int and value == size and vars(modules[prefix]).get(key) == kept:
                yield prefix, key
