"""Sizes that a fused kernel for grouped-query attention implies.

Such a kernel does not take the number of query heads that share a key head: the shapes imply it. The module may hold
that number for other inputs, as ``num_key_value_groups``, and use it on another path. Where all of several modules of a
class have one and the same integer that is as large and set no size on these inputs, that is the number and follows;
anywhere else such an integer freezes the layout.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeAlias

from torch import nn

from netopt.axes.layout import Layout, freeze
from netopt.symbolic import AttributeRef, Constraints, SymbolicInt

ImplicitSize: TypeAlias = "tuple[Layout, str, nn.Module]"


def bind_implicit_sizes(implicit_sizes: Sequence[ImplicitSize], constraints: Constraints) -> None:
    """Equates each implied size with the integer of the module that holds it, or freezes it.

    Args:
        implicit_sizes: Layouts with the name of the module that made the call, and the module.
        constraints: Record the equations.
    """
    by_class: dict[type, list[ImplicitSize]] = {}
    for one in implicit_sizes:
        by_class.setdefault(type(one[2]), []).append(one)
    for several in by_class.values():
        possible = [set(_as_large(layout, name, module, constraints)) for layout, name, module in several]
        # One module alone is no evidence: another integer may be as large by chance.
        everywhere = set.intersection(*possible) if len({name for _, name, _ in several}) > 1 else set()
        for (layout, name, _), keys in zip(several, possible, strict=True):
            if len(everywhere) == 1:
                ref = AttributeRef((name, *everywhere))
                constraints.equate(SymbolicInt(layout.size, ref, constraints), layout, f"`{ref}`")
            for key in () if len(everywhere) == 1 else sorted(keys):
                ref = AttributeRef((name, key))
                freeze(layout, f"may have its size in `{ref}`, which sets no size on these inputs")


def _as_large(layout: Layout, name: str, module: nn.Module, constraints: Constraints) -> Iterator[str]:
    """The integers of a module that are as large as a layout and set no size."""
    for key, value in vars(module).items():
        if type(value) is int and value == layout.size > 1 and not constraints.sets_a_size(AttributeRef((name, key))):
            yield key
