"""Calls that cut a dimension by integers: parts, slices and single positions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from netopt.axes.layout import Layout, freeze, split_concat
from netopt.axes.operation import Mark
from netopt.axes.tracing.calls.registry import call_rule
from netopt.symbolic import SymbolicInt, plain

if TYPE_CHECKING:
    from netopt.axes.tracing.sizes import SizeTracer


@call_rule("split", "split_with_sizes", "unsafe_split")
def split(tracer: SizeTracer, result: Any, input: Tensor, split_size: Any = None, dim: int = 0, **kwargs: Any) -> None:
    """Parts of one size, the last of which may be a remainder, or of given sizes."""
    if split_size is None:
        split_size = kwargs.get("split_size_or_sections", kwargs.get("split_sizes"))
    parts = _parts(tracer, result, dim)
    if isinstance(split_size, int):
        for part in parts:
            if part.size == plain(split_size):
                _equate_part(tracer, input, split_size, part, "split")
            else:
                freeze(part, f"is the remainder of split at {tracer.trace.where()}")
    else:
        for size, part in zip(split_size, parts, strict=True):
            _equate_part(tracer, input, size, part, "split")


@call_rule("chunk", "unsafe_chunk")
def chunk(tracer: SizeTracer, result: Any, input: Tensor, chunks: int, dim: int = 0) -> None:
    """A number of parts, the last of which may be smaller."""
    parts = _parts(tracer, result, dim)
    for part in parts[1:]:
        if part.size == parts[0].size:
            tracer.equate(tracer.number(parts[0]), part, "chunk")
        else:  # the last one is what remains
            whole = tracer.number(tracer.trace.dims(input)[dim].layout)
            tracer.equate((whole + (chunks - 1)) // chunks, parts[0], "chunk")


@call_rule("tensor_split", "hsplit", "vsplit", "dsplit")
def tensor_split(tracer: SizeTracer, result: Any, input: Tensor, sections: Any = (), dim: int = 0, **_: Any) -> None:
    """A number of parts whose sizes differ by one at the most."""
    parts = _parts(tracer, result, dim)
    if len({part.size for part in parts}) == 1 and isinstance(sections, int):
        for part in parts[1:]:
            tracer.equate(tracer.number(parts[0]), part, "tensor_split")
    else:
        for part in parts:
            freeze(part, f"is an uneven part of a split at {tracer.trace.where()}")


def _parts(tracer: SizeTracer, result: Any, dim: int) -> list[Layout]:
    return [tracer.trace.dims(part)[int(dim)].layout for part in result]


@call_rule("select")
def select(tracer: SizeTracer, result: Any, input: Tensor, dim: int, index: Any) -> None:
    """A position whose index is computed from sizes must stay where it is."""
    tracer.keep(index)


@call_rule("narrow")
def narrow(tracer: SizeTracer, result: Any, input: Tensor, dim: int, start: Any, length: Any) -> None:
    """A slice by its start and length."""
    if isinstance(start, int) and isinstance(length, int):
        _slice(tracer, input, int(dim), slice(start, start + length), "narrow")


@call_rule("slice_scatter")
def slice_scatter(
    tracer: SizeTracer,
    result: Any,
    input: Tensor,
    src: Tensor,
    dim: int = 0,
    start: Any = None,
    end: Any = None,
    step: Any = None,
) -> None:
    """A slice that is written to."""
    _slice(tracer, input, int(dim), slice(start, end, step), "slice_scatter")


@call_rule("__getitem__", "__setitem__")
def item(tracer: SizeTracer, result: Any, tensor: Tensor, index: Any, *args: Any) -> None:
    """Slices and indices, each along a dimension."""
    entries = index if isinstance(index, tuple) else (index,)
    position, rank = 0, len(tracer.trace.dims(tensor))
    indexed = sum(_dims_indexed(entry) for entry in entries)
    for entry in entries:
        if entry is Ellipsis:
            position += rank - indexed
        elif isinstance(entry, slice):
            _slice(tracer, tensor, position, entry, "slice")
            position += 1
        else:
            tracer.keep(entry)
            position += _dims_indexed(entry)


def _dims_indexed(entry: Any) -> int:
    if entry is None or entry is Ellipsis or isinstance(entry, bool):
        return 0
    return entry.dim() if isinstance(entry, Tensor) and entry.dtype == torch.bool else 1


def _slice(tracer: SizeTracer, tensor: Tensor, dim: int, bounds: slice, name: str) -> None:
    """States what the bounds of a slice are: the sizes of what lies before, inside or behind it."""
    if bounds.step not in (None, 1):  # where a stride starts is a phase, no count
        return
    layout = tracer.trace.dims(tensor)[dim].layout
    start, stop, _ = map(plain, bounds.indices(layout.size))
    for bound, at in ((bounds.start, start), (bounds.stop, stop)):
        halves = split_concat(layout, at) if isinstance(bound, int) and 0 < at < layout.size else None
        if halves is not None and plain(bound) >= 0:
            _equate_part(tracer, tensor, bound, halves[0], name)
        elif halves is not None:
            _equate_part(tracer, tensor, -bound, halves[1], name)
    if isinstance(bounds.stop, SymbolicInt) and stop == layout.size == plain(bounds.stop):
        tracer.equate(bounds.stop, layout, name)


def _equate_part(tracer: SizeTracer, tensor: Tensor, number: int, layout: Layout, name: str) -> None:
    """States the size of a part; a single position that a plain number cuts off is one by its place, and stays."""
    if layout.size == 1 and not tracer.constraints.knows(number):
        why = f"is a position that is singled out by {name}, at {tracer.trace.where()}"
        tracer.trace.mark(tensor, [Mark(freeze, layout, why)])
    else:
        tracer.equate(number, layout, name)
