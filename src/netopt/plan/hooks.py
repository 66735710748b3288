"""Plan hooks: functions that complete a plan for what they know of a model, such as its configuration."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

from torch import nn

from netopt.errors import InvalidArgumentError
from netopt.plan.value import Plan

__all__ = ["PlanHook", "complete", "register_hook"]

PlanHook: TypeAlias = Callable[[nn.Module, Plan], "tuple[Plan, str | None]"]
"""From a model before surgery and a plan for it to the completed plan, and a note where it could not be completed."""

_HOOKS: dict[str, PlanHook] = {}


def register_hook(name: str, hook: PlanHook) -> None:
    """Has ``hook`` complete every plan that is made from now on; its notes are reported under ``name``.

    Raises:
        InvalidArgumentError: The name is taken.
    """
    if name in _HOOKS:
        raise InvalidArgumentError(f"a plan hook {name!r} exists already; choose another name.")
    _HOOKS[name] = hook


def complete(model: nn.Module, plan: Plan) -> tuple[Plan, dict[str, str]]:
    """The plan as all hooks complete it, and their notes by name."""
    notes: dict[str, str] = {}
    for name, hook in _HOOKS.items():
        plan, note = hook(model, plan)
        if note is not None:
            notes[name] = note
    return plan, notes
