"""Operations that look positions up: what is indexed stays, what the index brings along passes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._mode_utils import no_dispatch

from netopt.axes.layout import Atom, atoms, concat, shatter
from netopt.axes.operation import Dim, Dims, Operation, rule
from netopt.axes.rules.pointwise import aligned


@rule("aten::embedding")
def embedding(op: Operation, weight: Tensor, indices: Tensor, *args: Any) -> Dims:
    """Rows of a table."""
    table = op.dims(weight)
    op.freeze(table[0], "is looked up by number")
    op.contract(weight, [], table[1:])
    return [*(Dim(dim.layout) for dim in op.dims(indices)), *table[1:]]


@rule("aten::_embedding_bag", "aten::_embedding_bag_forward_only", "aten::embedding_bag")
def embedding_bag(op: Operation, weight: Tensor, indices: Tensor, offsets: Tensor, *args: Any) -> Any:
    """Rows of a table, summed bag by bag."""
    table = op.dims(weight)
    op.freeze(table[0], "is looked up by number")
    op.freeze(op.dims(indices), "is a list of bags")
    op.contract(weight, [], table[1:])
    return ([op.frozen(op.out[0].shape[0], "is a number of bags"), table[1]], None, None, None)


@rule("aten::embedding_renorm")
def embedding_renorm(op: Operation, weight: Tensor, indices: Tensor, *args: Any) -> Dims:
    """Rows brought to a length."""
    table = op.dims(weight)
    op.inexact(table[1], "is normalised over by embedding_renorm")
    return table


_MOST_REPEATED = 4096
"""A longer list that repeats positions is no layer's wiring but a table looked up, as of relative positions."""


def looked_up(op: Operation, dim: Dim, indices: Tensor) -> Dim | None:
    """The dimension that a fixed list of positions makes of ``dim``, if the list can be rewritten with it.

    The positions are followed one by one, so that a permutation or a selection of channels ties the right neurons.
    """
    name = op.trace.pointer(indices)
    if name is None or _MOST_REPEATED < indices.numel() > dim.size:
        return None
    if all(atom.frozen is not None for atom in atoms(dim.layout)):
        return None
    units = shatter(dim.layout)
    with no_dispatch():
        chosen = [units[position] for position in indices.tolist()]
    made = Dim(concat(chosen), dim.zero)
    op.same(op.dims(indices)[0], made)
    op.same(op.trace.pointers.setdefault(name, dim.layout), dim)
    op.trace.follows = name
    return made


@rule("aten::index", "aten::_unsafe_index")
def index(op: Operation, tensor: Tensor, indices: Sequence[Tensor | None]) -> Any:
    """Dimensions with an index are replaced by the index's own."""
    dims = op.dims(tensor)
    given = [(at, one) for at, one in enumerate(indices) if one is not None]
    if len(given) == 1:
        at, only = given[0]
        followed = looked_up(op, dims[at], only)
        if followed is not None:
            return [*dims[:at], followed, *dims[at + 1 :]]
    places: list[int] = []
    tensors: list[Tensor] = []
    at = 0
    for one in indices:
        if one is None:
            at += 1
            continue
        width = one.dim() if one.dtype in (torch.bool, torch.uint8) else 1
        op.freeze(dims[at : at + width], "is indexed by a tensor")
        places.extend(range(at, at + width))
        tensors.append(one)
        at += width
    if any(one.dtype in (torch.bool, torch.uint8) for one in tensors):
        op.trace.by_value = True
        for one in tensors:
            op.freeze(op.dims(one), "is a mask that selects positions")
        made = [op.frozen(op.out.shape[places[0]], "is selected by value")] if len(tensors) == 1 else None
    else:
        rank = max(one.dim() for one in tensors)
        made = [Dim(common.layout) if common is not None else Dim(Atom(1)) for common, _ in aligned(op, tensors, rank)]
    if made is None:
        op.freeze(dims, "is indexed by a tensor")
        return [op.frozen(size, "is indexed by a tensor") for size in op.out.shape]
    rest = [dim for position, dim in enumerate(dims) if position not in places]
    adjacent = places == list(range(places[0], places[-1] + 1)) and _no_gap(indices)
    front = sum(position < places[0] for position in range(len(dims)) if position not in places) if adjacent else 0
    return [*rest[:front], *made, *rest[front:]]


def _no_gap(indices: Sequence[Tensor | None]) -> bool:
    given = [position for position, one in enumerate(indices) if one is not None]
    return given == list(range(given[0], given[-1] + 1))


@rule("aten::index_select")
def index_select(op: Operation, tensor: Tensor, dim: int, indices: Tensor) -> Dims:
    """Positions of one dimension picked by number."""
    dims = list(op.dims(tensor))
    followed = looked_up(op, dims[dim], indices)
    if followed is not None:
        dims[dim] = followed
        return dims
    op.freeze(dims[dim], "is indexed by a tensor")
    dims[dim] = Dim(op.dims(indices)[0].layout) if indices.dim() else Dim(Atom(1))
    return dims


@rule("aten::gather", "aten::take_along_dim")
def gather(op: Operation, tensor: Tensor, dim: int, indices: Tensor, **kwargs: Any) -> Dims:
    """Positions of one dimension picked by number, elsewhere position by position."""
    dims, chosen = op.dims(tensor), op.dims(indices)
    for at, (source, picked) in enumerate(zip(dims, chosen, strict=True)):
        if at == dim % len(dims):
            op.freeze(source, "is indexed by a tensor")
        elif source.size == picked.size:
            op.same(source, picked)
        else:
            op.freeze([source, picked], "is gathered from in part")
    return [Dim(one.layout, dims[at].zero and at != dim % len(dims)) for at, one in enumerate(chosen)]


@rule("aten::scatter", "aten::scatter_add", "aten::scatter_reduce")
def scatter(
    op: Operation, tensor: Tensor, dim: int, indices: Tensor, source: Any = None, *args: Any, **kwargs: Any
) -> Dims:
    """Values written to positions of one dimension by number, elsewhere position by position."""
    dims = op.dims(tensor)
    others = [indices, *([source] if isinstance(source, Tensor) else [])]
    result = []
    for at, target in enumerate(dims):
        written = [op.dims(other)[at] for other in others if other.dim() == len(dims)]
        if at == dim % len(dims):
            op.freeze([target, *written], "is written to by number")
            result.append(Dim(target.layout))
            continue
        for one in written:
            if one.size == target.size:
                op.same(one, target)
            else:
                op.freeze([one, target], "is written to in part")
        zero = target.zero and isinstance(source, Tensor) and written[-1].zero
        result.append(Dim(target.layout, zero))
    return result


@rule("aten::index_add", "aten::index_copy", "aten::index_fill", "aten::index_reduce")
def index_add(op: Operation, tensor: Tensor, dim: int, indices: Tensor, source: Any, **kwargs: Any) -> Dims:
    """Slices written to positions of one dimension by number."""
    dims = list(op.dims(tensor))
    op.freeze(dims[dim], "is written to by number")
    if isinstance(source, Tensor) and source.dim() == len(dims):
        given = op.dims(source)
        for at, target in enumerate(dims):
            if at != dim % len(dims):
                op.same(target, given[at])
                dims[at] = Dim(target.layout, target.zero and given[at].zero)
            else:
                dims[at] = Dim(target.layout)
        return dims
    return [Dim(one.layout) for one in dims]


@rule("aten::index_put", "aten::_unsafe_index_put", "aten::_index_put_impl")
def index_put(
    op: Operation, tensor: Tensor, indices: Sequence[Tensor | None], values: Tensor, *args: Any, **kwargs: Any
) -> Dims:
    """Values written to positions by number or mask; dimensions without an index match the values', from the right."""
    dims = list(op.dims(tensor))
    at = 0
    for one in indices:
        width = one.dim() if one is not None and one.dtype in (torch.bool, torch.uint8) else 1
        if one is not None:
            op.freeze(dims[at : at + width], "is written to by number")
            op.freeze(op.dims(one), "is a list of positions")
        at += width
    trailing = len(dims) - at
    given = op.dims(values)
    op.freeze(given[: max(len(given) - trailing, 0)], "is written by number")
    for right in range(1, min(trailing, len(given)) + 1):
        if given[-right].size == dims[-right].size:
            op.same(dims[-right], given[-right])
            dims[-right] = Dim(dims[-right].layout, dims[-right].zero and given[-right].zero)
        elif given[-right].size == 1:
            dims[-right] = Dim(dims[-right].layout)
    return dims


@rule("aten::take", "aten::put")
def flat(op: Operation, tensor: Tensor, indices: Tensor, *args: Any, **kwargs: Any) -> Dims:
    """Positions counted through all dimensions."""
    op.freeze(op.dims(tensor), "is indexed as if flattened")
    return op.dims(tensor) if op.short == "put" else [Dim(dim.layout) for dim in op.dims(indices)]


@rule("aten::masked_scatter")
def masked_scatter(op: Operation, tensor: Tensor, mask: Tensor, source: Tensor) -> Dims:
    """Values written where a mask is true, in order."""
    for one in (tensor, mask, source):
        op.freeze(op.dims(one), "is written to by a mask")
    return [Dim(dim.layout) for dim in op.dims(tensor)]


@rule("aten::searchsorted", "aten::bucketize")
def searchsorted(op: Operation, first: Tensor, second: Any, *args: Any, **kwargs: Any) -> Dims:
    """Values ranked in a sorted list."""
    sorted_list, asked = (first, second) if op.short == "searchsorted" else (second, first)
    op.freeze(op.dims(sorted_list), "is searched in")
    if not isinstance(asked, Tensor):
        return []
    return [Dim(dim.layout) for dim in op.dims(asked)]
