"""Sizes that no integer of a call says.

A fused kernel for grouped queries is not told how many query heads share a key head: the shapes tell it. The module may
hold that number for other inputs. One that its constructor gets by dividing, and that is right in every module of the
class, is that number and follows; where another integer is as large, which may be it or not, the size is kept.
"""

from __future__ import annotations

import dis
import functools
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any, TypeAlias

from torch import nn

from netopt.axes.layout import Layout, freeze
from netopt.symbolic import AttributeRef, Constraints, SymbolicInt

Unsaid: TypeAlias = "tuple[Layout, str, nn.Module]"


def settle_implicit_sizes(implicit_sizes: Sequence[Unsaid], constraints: Constraints) -> None:
    """States, for each size that no call said, which integer of the module it is, or keeps it.

    Args:
        implicit_sizes: Layouts with the name of the module that made the call, and the module.
        constraints: Record the equations.
    """
    by_class: dict[type, list[Unsaid]] = {}
    for one in implicit_sizes:
        by_class.setdefault(type(one[2]), []).append(one)
    for kind, several in by_class.items():
        possible = [set(_as_large(layout, name, module, constraints)) for layout, name, module in several]
        everywhere = set.intersection(*possible) & _quotients(kind)
        for (layout, name, module), keys in zip(several, possible, strict=True):
            if len(everywhere) == 1:
                place = AttributeRef((name, *everywhere))
                constraints.equate(SymbolicInt(layout.size, place, constraints), layout, f"`{place}`")
            else:
                for key in _as_large(layout, name, module, constraints) if keys else ():
                    freeze(
                        layout,
                        f"may have its size in `{AttributeRef((name, key))}`, which sets no size on these inputs",
                    )


def _as_large(layout: Layout, name: str, module: nn.Module, constraints: Constraints) -> Iterator[str]:
    """The integers of a module that are as large as a layout and set no size."""
    for key, value in vars(module).items():
        if type(value) is int and value == layout.size > 1 and not constraints.sets_a_size(AttributeRef((name, key))):
            yield key


@functools.cache
def _quotients(kind: type[nn.Module]) -> frozenset[str]:
    """The attributes that the constructors of a class get by dividing, as in ``self.groups = heads // key_heads``."""
    found: set[str] = set()
    for base in kind.__mro__:
        code = getattr(vars(base).get("__init__"), "__code__", None)
        if code is not None:
            # Before the object is put on the stack and the value stored there.
            steps = [step for step in dis.get_instructions(code) if not step.opname.startswith("LOAD_FAST")]
            found.update(step.argval for before, step in pairwise(steps) if _stores(step) and _divides(before))
    return frozenset(found)


def _stores(step: Any) -> bool:
    return step.opname == "STORE_ATTR"


def _divides(step: Any) -> bool:
    return step.opname == "BINARY_FLOOR_DIVIDE" or (step.opname == "BINARY_OP" and step.argrepr.startswith("//"))
