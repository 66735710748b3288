"""A layer's own size used as a number: ``emb(x) * math.sqrt(emb.embedding_dim)``.

Layers describe their tensors by integers that set no size of the forward. One that the forward computes with, compares
or cuts by is stated to be the size it describes, so that what is computed with it changes with it.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from netopt.axes.tracing.dims import DimTracer
from netopt.model.attributes import Parts
from netopt.model.descriptions import QUOTIENTS, ROWS_OF, dimension, stored_under
from netopt.symbolic import AttributeRef, Constraints, DimSize, SymbolicInt, leaves


def bind_described_sizes(parts: Parts, trace: DimTracer) -> None:
    """Equates each integer that the forward has used with the size it describes in a tensor of its module."""
    modules = dict(parts)
    names = {id(tensor): name for name, tensor in trace.members.items()}
    constraints = trace.constraints
    for place in sorted(set(_used(constraints)), key=str):
        module = modules.get(str(place.path[0]))
        value = None if module is None or len(place.path) != 2 else vars(module).get(str(place.path[1]))
        if module is None or type(value) is not int:
            continue
        size = _described(place, module, value, trace, names)
        if size is not None:
            number = SymbolicInt(value, place, constraints)
            constraints.guard(operator.eq, number, size, True)


def _used(constraints: Constraints) -> Iterator[AttributeRef]:
    """The attributes that the forward has computed with."""
    numbers: list[Any] = constraints.used_as_numbers()
    numbers += [equation.number for equation in constraints.equations]
    for guard in constraints.guards:
        numbers += [guard.left, guard.right]
    for number in numbers:
        for leaf in leaves(number):
            if isinstance(leaf, AttributeRef):
                yield leaf


def _described(place: AttributeRef, module: nn.Module, value: int, trace: DimTracer, names: Mapping[int, str]) -> Any:
    """The size that an attribute of a module counts, as a symbolic integer; ``None`` if it counts none."""
    attribute = str(place.path[1])
    for row in ROWS_OF.get(attribute, ()):
        stored = stored_under(module, row.tensor)
        owner, _, last = (stored or "").rpartition(".")
        tensor = None if stored is None else getattr(module.get_submodule(owner), last)
        dim = None if tensor is None else dimension(row, module, value, tensor.shape)
        name = names.get(id(tensor))
        if tensor is None or dim is None or name not in trace.touched:
            continue
        layout = trace.dims(tensor)[dim].layout
        size = SymbolicInt(layout.size, DimSize(layout), trace.constraints)
        return size * _attribute(place, module, "groups", trace) if row.grouped else size
    for quotient, dividend, divisor in QUOTIENTS:
        above, below = vars(module).get(dividend), vars(module).get(divisor)
        if quotient != attribute or not isinstance(above, int) or not isinstance(below, int):
            continue
        if above // below == value:
            return _attribute(place, module, dividend, trace) // _attribute(place, module, divisor, trace)
    return None


def _attribute(place: AttributeRef, module: nn.Module, name: str, trace: DimTracer) -> SymbolicInt:
    return SymbolicInt(getattr(module, name, 1), AttributeRef((place.path[0], name)), trace.constraints)
