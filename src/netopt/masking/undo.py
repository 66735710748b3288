"""What masks change of a model is put back if the change as a whole fails."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from netopt.model.signals import UndoLog

__all__ = ["all_or_nothing", "note_values", "write_zeros"]

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


def all_or_nothing(model: nn.Module) -> UndoLog:
    """Gives ``model`` its classes, names and hooks back if the block fails."""

    def start(log: UndoLog) -> None:
        for form in [_Form(module) for module in model.modules()]:
            log.callback(form.restore, on=BaseException)

    return UndoLog(start)


def write_zeros(log: UndoLog, dropped: Iterable[tuple[nn.Parameter, Tensor]]) -> None:
    """Writes zeros where a mask is true; the values that were there come back if the log's block fails."""
    for parameter, gone in dropped:
        values = parameter.detach()
        # What is no plain tensor (sharded, for example) need not know how to pick entries.
        is_plain = type(parameter) is nn.Parameter
        log.callback(_write, parameter, gone, values[gone] if is_plain else values.clone(), on=BaseException)
        with torch.no_grad():
            parameter.masked_fill_(gone, 0)


def _write(parameter: nn.Parameter, gone: Tensor, values: Tensor) -> None:
    with torch.no_grad():
        if values.shape == parameter.shape:
            parameter.copy_(values)
        else:
            parameter[gone] = values


def note_values(log: UndoLog, tensors: Mapping[str, Any]) -> None:
    """Has tensors given their values back if the log's block fails."""
    for one in tensors.values():
        if isinstance(one, Tensor) and not one.is_meta:
            log.callback(_copy, one, one.detach().clone(), on=BaseException)


def _copy(tensor: Tensor, values: Tensor) -> None:
    with torch.no_grad():
        tensor.detach().copy_(values)
