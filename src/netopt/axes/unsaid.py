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
from netopt.axes.sizes import Ledger, Place, Size

Unsaid: TypeAlias = "tuple[Layout, str, nn.Module]"


def settle_unsaid(unsaid: Sequence[Unsaid], ledger: Ledger) -> None:
    """States, for each size that no call said, which integer of the module it is, or keeps it.

    Args:
        unsaid: Layouts with the name of the module that made the call, and the module.
        ledger: Is told the equations.
    """
    by_class: dict[type, list[Unsaid]] = {}
    for one in unsaid:
        by_class.setdefault(type(one[2]), []).append(one)
    for kind, several in by_class.items():
        possible = [set(_as_large(layout, name, module, ledger)) for layout, name, module in several]
        everywhere = set.intersection(*possible) & _quotients(kind)
        for (layout, name, module), keys in zip(several, possible, strict=True):
            if len(everywhere) == 1:
                place = Place((name, *everywhere))
                ledger.equate(Size(layout.size, place, ledger), layout, f"`{place}`")
            else:
                for key in _as_large(layout, name, module, ledger) if keys else ():
                    freeze(layout, f"may have its size in `{Place((name, key))}`, which sets no size on these inputs")


def _as_large(layout: Layout, name: str, module: nn.Module, ledger: Ledger) -> Iterator[str]:
    """The integers of a module that are as large as a layout and set no size."""
    for key, value in vars(module).items():
        if type(value) is int and value == layout.size > 1 and not ledger.sets_a_size(Place((name, key))):
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
