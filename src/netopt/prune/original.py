"""Amounts of a model as it was at first, for loops that remove a little more at each turn."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from weakref import WeakKeyDictionary

from torch import nn

from netopt.prune.budget import Budget, by_axis
from netopt.prune.look import Found
from netopt.selection import removed

__all__ = ["as_of_now"]

_FIRST_SIZES: WeakKeyDictionary[nn.Module, dict[str, int]] = WeakKeyDictionary()
"""How many neurons each axis of a model had when a call first looked at it."""


def as_of_now(found: Found, budget: Budget) -> Budget:
    """The budget in counts of what is still to go, where its amounts are of the original model."""
    first = _FIRST_SIZES.setdefault(found.view.model, {})
    for name, size in found.sizes.items():
        first.setdefault(name, size)
    if budget.of == "now":
        return budget

    def left(amount: float, names: Collection[str]) -> int:
        whole, now = (sum(sizes[name] for name in names) for sizes in (first, found.sizes))
        return max(0, removed(amount, whole) - (whole - now))

    amount = by_axis(found, budget.amount)
    if amount is None:
        return budget
    if isinstance(amount, Mapping):
        return replace(budget, amount={name: left(one, [name]) for name, one in amount.items()})
    if budget.scope == "layer":
        return replace(budget, amount={name: left(amount, [name]) for name in found.sizes})
    return replace(budget, amount=left(amount, found.sizes))
