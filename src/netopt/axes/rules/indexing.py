"""Operations that look positions up: what is indexed stays, what the index brings along passes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.utils._mode_utils import no_dispatch

from netopt.axes.layout import LOOKED_UP, Atom, atoms, concat, shatter
from netopt.axes.operation import Dim, Dims, Operation, is_zero, rule
from netopt.axes.rules.pointwise import aligned


@rule("aten::embedding")
def embedding(op: Operation, weight: Tensor, indices: Tensor, *args: Any) -> Dims:
    """Rows of a table."""
    table = op.dims(weight)
    op.freeze(table[0], LOOKED_UP)
    op.contract(weight, [], table[1:])
    return [*(Dim(dim.layout) for dim in op.dims(indices)), *table[1:]]


@rule("aten::_embedding_bag", "aten::_embedding_bag_forward_only", "aten::embedding_bag")
def embedding_bag(op: Operation, weight: Tensor, indices: Tensor, offsets: Tensor, *args: Any) -> Any:
    """Rows of a table, summed bag by bag."""
    table = op.dims(weight)
    op.freeze(table[0], LOOKED_UP)
    op.freeze(op.dims(indices), "is a list of bags")
    op.contract(weight, [], table[1:])
    return ([op.frozen(op.out[0].shape[0], "is a number of bags"), table[1]], None, None, None)


@rule("aten::embedding_renorm")
def embedding_renorm(op: Operation, weight: Tensor, indices: Tensor, *args: Any) -> Dims:
    """Rows brought to a length."""
    table = op.dims(weight)
    op.freeze(table[0], LOOKED_UP)
    op.inexact(table[1], "is normalised over by embedding_renorm")
    return table


_MOST_REPEATED = 4096
"""A longer list that repeats positions is no layer's wiring but a table looked up, as of relative positions."""


def looked_up(op: Operation, dim: Dim, indices: Tensor) -> Dim | None:
    """The dimension that a fixed list of positions makes of ``dim``, if the list can be rewritten with it.

    The positions are followed one by one, so that a permutation or a selection of channels ties the right neurons. A
    fixed mask selects positions one by one, and shrinks along with the dimension.
    """
    if indices.dim() != 1 or all(atom.frozen is not None for atom in atoms(dim.layout)):
        return None
    if _is_mask(indices):
        return _masked(op, dim, indices)
    name = op.trace.pointer(indices)
    if name is None or _MOST_REPEATED < indices.numel() > dim.size:
        return None
    made = _positions(dim, indices)
    op.same(op.dims(indices)[0], made)
    op.same(op.trace.pointers.setdefault(name, dim.layout), dim)
    op.trace.follows = name
    return made


def _positions(dim: Dim, indices: Tensor) -> Dim:
    units = shatter(dim.layout)
    with no_dispatch():
        return Dim(concat([units[position] for position in indices.tolist()]), dim.zero)


def _masked(op: Operation, dim: Dim, mask: Tensor) -> Dim | None:
    """The positions that a mask held by the model selects."""
    if not op.is_member(mask) or mask.is_meta or isinstance(mask, FakeTensor):
        return None
    op.same(op.dims(mask)[0], dim)
    with no_dispatch():
        selected = mask.nonzero().flatten()
    return _positions(dim, selected) if len(selected) else None


def _is_mask(indices: Tensor) -> bool:
    return indices.dtype in (torch.bool, torch.uint8)


class _Indexed(NamedTuple):
    """What an index by tensors does to dimensions: which it replaces, by how many, and before which of the others."""

    places: list[int]
    tensors: list[Tensor]
    rank: int
    front: int

    def put_in(self, dims: Dims, made: Dims) -> Dims:
        """The dimensions of what is selected, of which ``made`` are those of the index."""
        rest = [dim for position, dim in enumerate(dims) if position not in self.places]
        return [*rest[: self.front], *made, *rest[self.front :]]


def _indexed(indices: Sequence[Tensor | None]) -> _Indexed:
    places: list[int] = []
    tensors: list[Tensor] = []
    at = 0
    for one in indices:
        width = one.dim() if one is not None and _is_mask(one) else 1
        if one is not None:
            places.extend(range(at, at + width))
            tensors.append(one)
        at += width
    rank = max(1 if _is_mask(one) else one.dim() for one in tensors)
    given = [position for position, one in enumerate(indices) if one is not None]
    front = given[0] if given == list(range(given[0], given[-1] + 1)) else 0  # with a gap, they come first
    return _Indexed(places, tensors, rank, front)


@rule("aten::index", "aten::_unsafe_index")
def index(op: Operation, tensor: Tensor, indices: Sequence[Tensor | None]) -> Any:
    """Dimensions with an index are replaced by the index's own."""
    dims = op.dims(tensor)
    found = _indexed(indices)
    if len(found.tensors) == len(found.places) == 1:
        followed = looked_up(op, dims[found.places[0]], found.tensors[0])
        if followed is not None:
            return found.put_in(dims, [followed])
    op.freeze([dims[place] for place in found.places], "is indexed by a tensor")
    masks = [one for one in found.tensors if _is_mask(one)]
    if masks:
        op.trace.by_value = True
        for one in masks:
            op.freeze(op.dims(one), "is a mask that selects positions")
        sizes = op.out.shape[found.front : found.front + found.rank]
        return found.put_in(dims, [op.frozen(size, "is selected by value") for size in sizes])
    common = aligned(op, found.tensors, found.rank)
    return found.put_in(dims, [Dim(Atom(1)) if one is None else Dim(one.layout) for one, _ in common])


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


_NUMBERED = "is written to by number"


@rule("aten::scatter", "aten::scatter_add", "aten::scatter_reduce")
def scatter(
    op: Operation, tensor: Tensor, dim: int, indices: Tensor, source: Any = None, *args: Any, **kwargs: Any
) -> Dims:
    """Values written to positions of one dimension by number, elsewhere position by position."""
    dims = list(op.dims(tensor))
    others = [op.dims(other) for other in (indices, source) if isinstance(other, Tensor) and other.dim() == len(dims)]
    keeps = source is not None and (len(others) > 1 or is_zero(op, source))
    for at, target in enumerate(dims):
        written = [other[at] for other in others]
        if at == dim % len(dims):
            op.freeze(target, _NUMBERED)
            dims[at] = Dim(target.layout)
            _told_where(op, written, adds="add" in op.short or "sum" in args)
            continue
        for one in written:
            if one.size == target.size:
                op.same(one, target)
            else:
                op.freeze([one, target], "is written to in part")
        dims[at] = Dim(target.layout, target.zero and keeps and all(one.zero for one in written[1:]))
    return dims


def _told_where(op: Operation, written: Dims, *, adds: bool) -> None:
    """Positions of an index, then of what is written there: without one, nothing is written, not a zero."""
    if not written:
        return
    for one in written[1:]:
        if one.size == written[0].size:
            op.same(one, written[0])
        else:
            op.freeze([one, written[0]], "is written in part")
    if not (adds and len(written) > 1 and written[1].zero):
        op.inexact(written[0], f"holds the indices that {op.short} writes to")


@rule("aten::index_add", "aten::index_copy", "aten::index_fill", "aten::index_reduce")
def index_add(op: Operation, tensor: Tensor, dim: int, indices: Tensor, source: Any, *args: Any, **kwargs: Any) -> Dims:
    """Slices written to positions of one dimension by number."""
    dims = list(op.dims(tensor))
    if not dims:
        return dims
    where = dim % len(dims)
    given = op.dims(source) if isinstance(source, Tensor) and source.dim() == len(dims) else None
    followed = looked_up(op, dims[where], indices)
    for at, target in enumerate(dims):
        if at != where:
            if given is not None:
                op.same(target, given[at])
            dims[at] = Dim(target.layout, target.zero and (is_zero(op, source) if given is None else given[at].zero))
    if followed is not None:
        if given is not None:
            op.same(followed, given[where])
        dims[where] = Dim(dims[where].layout, dims[where].zero and given is not None and given[where].zero)
        return dims
    op.freeze(dims[where], _NUMBERED)
    dims[where] = Dim(dims[where].layout)
    if indices.dim():
        _told_where(op, [op.dims(indices)[0], *([] if given is None else [given[where]])], adds="add" in op.short)
    return dims


@rule("aten::index_put", "aten::_unsafe_index_put", "aten::_index_put_impl")
def index_put(
    op: Operation, tensor: Tensor, indices: Sequence[Tensor | None], values: Tensor, *args: Any, **kwargs: Any
) -> Dims:
    """Values written to positions by number or mask; they are broadcast to what the same index would select."""
    dims = list(op.dims(tensor))
    found = _indexed(indices)
    if len(found.tensors) == 1 and _is_mask(found.tensors[0]) and values.numel() == 1:
        return _filled(op, dims, found, values)
    followed = None
    if len(found.tensors) == len(found.places) == 1:
        followed = looked_up(op, dims[found.places[0]], found.tensors[0])
    if followed is None:
        op.freeze([dims[place] for place in found.places], _NUMBERED)
        for one in found.tensors:
            op.freeze(op.dims(one), "is a list of positions")
    positions = found.put_in([Dim(Atom(1))] * len(dims), [Dim(Atom(1))] * found.rank)
    passing = iter(place for place in range(len(dims)) if place not in found.places)
    made = range(found.front, found.front + found.rank)
    zero = is_zero(op, values)
    given = op.dims(values)
    for at in range(len(positions)):
        right = len(positions) - at
        one = given[-right] if right <= len(given) else None
        if at in made and followed is None:
            if one is not None:
                op.freeze(one, "is written by number")
            continue
        place = found.places[0] if at in made else next(passing)
        target = dims[place] if at not in made or followed is None else followed
        if one is not None and one.size == target.size:
            op.same(target, one)
            kept = one.zero
        else:
            kept = target.size == 1
        dims[place] = Dim(dims[place].layout, dims[place].zero and (kept or zero))
    return dims


def _filled(op: Operation, dims: Dims, found: _Indexed, value: Tensor) -> Dims:
    """One number written where a mask is true."""
    for place, one in zip(found.places, op.dims(found.tensors[0]), strict=True):
        op.same(dims[place], one)
    return [Dim(dim.layout, dim.zero and is_zero(op, value)) for dim in dims]


@rule("aten::take", "aten::put")
def flat(op: Operation, tensor: Tensor, indices: Tensor, *rest: Any, **kwargs: Any) -> Dims:
    """Positions counted through all dimensions."""
    op.freeze(op.dims(tensor), "is indexed as if flattened")
    if op.short == "take":
        return [Dim(dim.layout) for dim in op.dims(indices)]
    for one in (indices, *rest):
        if isinstance(one, Tensor):
            op.freeze(op.dims(one), "is written as if flattened")
    return [Dim(dim.layout) for dim in op.dims(tensor)]


@rule("aten::masked_scatter")
def masked_scatter(op: Operation, tensor: Tensor, mask: Tensor, source: Tensor) -> Dims:
    """Values written where a mask is true, in order."""
    for one in (tensor, mask, source):
        op.freeze(op.dims(one), "is written to by a mask")
    return [op.frozen(size, "is written to by a mask") for size in op.out.shape]


@rule("aten::isin")
def isin(op: Operation, elements: Any, sought: Any, **kwargs: Any) -> Dims:
    """For each entry whether it is one of a list."""
    if isinstance(sought, Tensor):
        op.freeze(op.dims(sought), "is searched in")
    return [Dim(dim.layout) for dim in op.dims(elements)] if isinstance(elements, Tensor) else []


@rule("aten::searchsorted", "aten::bucketize")
def searchsorted(op: Operation, first: Tensor, second: Any, *args: Any, **kwargs: Any) -> Dims:
    """Values ranked in a sorted list."""
    sorted_list, searched = (first, second) if op.short == "searchsorted" else (second, first)
    op.freeze(op.dims(sorted_list), "is searched in")
    if not isinstance(searched, Tensor):
        return []
    if sorted_list.dim() > 1:
        op.freeze(op.dims(searched)[:-1], "is searched for in a list of its own")
    return [Dim(dim.layout) for dim in op.dims(searched)]
