"""Plan hooks: functions that complete a plan for what they know of a model, and say which counts they can express."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import TypeAlias

from torch import nn

from netopt.axes import Axes
from netopt.errors import InvalidArgumentError
from netopt.plan.providers import load
from netopt.plan.value import Plan

__all__ = ["CountsHook", "Note", "PlanHook", "complete", "expressible", "register_hook"]


@dataclass(frozen=True)
class Note:
    """What a hook has to say of a plan.

    Attributes:
        text: One sentence, without a name of what it is about.
        is_complete: Whether the hook could complete the plan.
    """

    text: str
    is_complete: bool


PlanHook: TypeAlias = Callable[[nn.Module, Plan, Axes], "tuple[Plan, Note | None]"]
"""From a model before surgery, a plan for it and its axes to the completed plan, and a note if it is of concern."""
CountsHook: TypeAlias = Callable[[nn.Module, Axes, Collection[str]], "list[list[dict[str, int]]] | str | None"]
"""From a model, its axes and the names of those that may shrink to groups of choices of counts, the present counts
first: one of each group, together, is a model whose plan the hook can complete. A reason where there are none; None
where the model is of no concern."""

_HOOKS: dict[str, tuple[PlanHook, CountsHook | None]] = {}


def register_hook(name: str, hook: PlanHook, counts: CountsHook | None = None) -> None:
    """Has ``hook`` complete every plan that is made from now on; its notes are reported under ``name``.

    Args:
        name: Of what the hook knows, such as ``"configuration"``.
        hook: Completes plans.
        counts: Says which counts it could complete a plan for.

    Raises:
        InvalidArgumentError: The name is taken.
    """
    # An interrupted import registers again what it has registered.
    if _HOOKS.get(name, (hook, counts)) != (hook, counts):
        raise InvalidArgumentError(f"a plan hook {name!r} exists already; choose another name.")
    _HOOKS[name] = hook, counts


def complete(model: nn.Module, plan: Plan, axes: Axes) -> tuple[Plan, dict[str, Note]]:
    """The plan as all hooks complete it, and their notes by name."""
    load()
    notes: dict[str, Note] = {}
    for name, (hook, _) in _HOOKS.items():
        plan, note = hook(model, plan, axes)
        if note is not None:
            notes[name] = note
    return plan, notes


def expressible(model: nn.Module, axes: Axes, names: Collection[str]) -> list[list[dict[str, int]]]:
    """The groups of choices of counts that a hook can complete a plan for.

    Raises:
        InvalidArgumentError: No hook knows the model, or one that does can express nothing.
    """
    load()
    for name, (_, counts) in _HOOKS.items():
        found = None if counts is None else counts(model, axes, names)
        if isinstance(found, str):
            raise InvalidArgumentError(
                f"loadable=True: the {name} of this {type(model).__name__} can say none of the counts of "
                f"{', '.join(sorted(names)[:6])}: {found}; include other axes, or leave out loadable=True."
            )
        if found is not None:
            return found
    raise InvalidArgumentError(
        f"loadable=True needs a model that is built from its configuration, and this {type(model).__name__} has none; "
        "leave it out, save the plan beside the weights, and apply it to a fresh model before loading."
    )
