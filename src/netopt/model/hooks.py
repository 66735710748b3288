"""Hooks on modules for the time being, found again by what they are: an interruption loses their handles."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from netopt.model.signals import UndoLog

__all__ = ["put_hook", "take_hook"]

_TABLES = (
    ("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs"),
    ("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called"),
)


def put_hook(
    log: UndoLog, module: nn.Module, hook: Callable[..., Any], *, before: bool = False, with_kwargs: bool = True
) -> None:
    """Has ``module`` call ``hook``, before or after its forward, until the log is left.

    Args:
        log: Takes it away.
        module: Calls it.
        hook: Held by no other call of this.
        before: Whether it is a forward pre-hook.
        with_kwargs: Whether it takes keyword arguments too.
    """
    log.callback(take_hook, module, hook)
    (module.register_forward_pre_hook if before else module.register_forward_hook)(hook, with_kwargs=with_kwargs)


def take_hook(module: nn.Module, hook: Callable[..., Any]) -> None:
    """Takes ``hook`` away, if it is there."""
    for tables in _TABLES:
        for key in [key for key, one in getattr(module, tables[0]).items() if one is hook]:
            for table in tables:
                getattr(module, table).pop(key, None)
