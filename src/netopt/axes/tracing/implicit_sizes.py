"""Sizes that a fused kernel for grouped-query attention implies.

Such a kernel is not given the number of query heads that share a key head: the shapes imply it. The module may hold
that number for other inputs, as ``num_key_value_groups``, and use it on another path. Where it holds an integer as
large that set no size on these inputs, the layout is frozen.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

from torch import nn

from netopt.axes.layout import Layout, freeze
from netopt.symbolic.number import AttributeRef, Constraints

ImplicitSize: TypeAlias = "tuple[Layout, str, nn.Module]"


def freeze_implicit_sizes(implicit_sizes: Sequence[ImplicitSize], constraints: Constraints) -> None:
    """Freezes each implied size that an integer of the module may hold.

    Args:
        implicit_sizes: Layouts with the name of the module that made the call, and the module.
        constraints: Of the trace.
    """
    for layout, name, module in implicit_sizes:
        for key, value in vars(module).items():
            ref = AttributeRef((name, key))
            if type(value) is int and value == layout.size > 1 and not constraints.sets_a_size(ref):
                freeze(layout, f"may have its size in `{ref}`, which sets no size on these inputs")
