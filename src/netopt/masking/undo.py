"""What masks change of a model is put back if the change as a whole fails."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["all_or_nothing", "values_undone_on_error", "zeroed"]

TABLES = ("_parameters", "_buffers", "_forward_pre_hooks", "_forward_pre_hooks_with_kwargs")


class _Form:
    """A module's class, names and hooks; not its values."""

    def __init__(self, module: nn.Module) -> None:
        self.module, self.kind = module, type(module)
        self.tables = {name: dict(vars(module)[name]) for name in TABLES if name in vars(module)}
        self.transient = set(module._non_persistent_buffers_set)
        self.own = {key: value for key, value in vars(module).items() if not isinstance(value, dict)}

    def restore(self) -> None:
        """Puts them back; may be called again."""
        module = self.module
        if type(module) is not self.kind:
            module.__class__ = self.kind
        for name, entries in self.tables.items():
            table = vars(module)[name]
            table.clear()
            table.update(entries)
        module._non_persistent_buffers_set.clear()
        module._non_persistent_buffers_set.update(self.transient)
        for key in [key for key in vars(module) if key not in self.own and not isinstance(vars(module)[key], dict)]:
            del vars(module)[key]
        vars(module).update(self.own)


@contextlib.contextmanager
def all_or_nothing(model: nn.Module) -> Iterator[None]:
    """Gives ``model`` its classes, names and hooks back if the block fails."""
    forms = [_Form(module) for module in model.modules()]
    try:
        yield
    except BaseException:
        for form in forms:
            form.restore()
        raise


@contextlib.contextmanager
def zeroed(dropped: Iterable[tuple[nn.Parameter, Tensor]]) -> Iterator[None]:
    """Writes zeros where a mask is true; the values that were there come back if that or the block fails."""
    hidden: list[tuple[nn.Parameter, Tensor, Tensor]] = []
    try:
        for parameter, gone in dropped:
            values = parameter.detach()
            # What is no plain tensor (sharded, for example) need not know how to pick entries.
            is_plain = type(parameter) is nn.Parameter
            hidden.append((parameter, gone, values[gone] if is_plain else values.clone()))
            with torch.no_grad():
                parameter.masked_fill_(gone, 0)
        yield
    except BaseException:
        with torch.no_grad():
            for parameter, gone, values in hidden:
                if values.shape == parameter.shape:
                    parameter.copy_(values)
                else:
                    parameter[gone] = values
        raise


@contextlib.contextmanager
def values_undone_on_error(tensors: Mapping[str, Any]) -> Iterator[None]:
    """Gives tensors their values back if the block fails."""
    kept = [(one, one.detach().clone()) for one in tensors.values() if isinstance(one, Tensor) and not one.is_meta]
    try:
        yield
    except BaseException:
        with torch.no_grad():
            for tensor, values in kept:
                tensor.detach().copy_(values)
        raise
