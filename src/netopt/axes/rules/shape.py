"""Operations that rearrange: dimensions are moved, split into factors, flattened into products, joined and cut."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from netopt.axes.layout import Atom, shatter
from netopt.axes.operation import Dim, Dims, Operation, cut, join, merge, rows, rule


def at(dim: int, rank: int) -> int:
    """A dimension counted from the left."""
    return dim % rank if rank else 0


@rule("aten::t", "aten::numpy_T", "aten::adjoint")
def t(op: Operation, tensor: Tensor) -> Dims:
    """Dimensions in reverse order."""
    return op.dims(tensor)[::-1]


@rule("aten::transpose", "aten::swapaxes", "aten::swapdims", "aten::transpose_copy")
def transpose(op: Operation, tensor: Tensor, first: int, second: int) -> Dims:
    """Two dimensions exchanged."""
    dims = list(op.dims(tensor))
    dims[first], dims[second] = dims[second], dims[first]
    return dims


@rule("aten::permute", "aten::permute_copy")
def permute(op: Operation, tensor: Tensor, order: Sequence[int]) -> Dims:
    """Dimensions in another order."""
    dims = op.dims(tensor)
    return [dims[index] for index in order]


@rule("aten::movedim", "aten::moveaxis")
def movedim(op: Operation, tensor: Tensor, source: Any, target: Any) -> Dims:
    """Some dimensions moved, the others in order."""
    dims = op.dims(tensor)
    sources = [at(d, len(dims)) for d in ([source] if isinstance(source, int) else source)]
    targets = [at(d, len(dims)) for d in ([target] if isinstance(target, int) else target)]
    rest = iter(dim for index, dim in enumerate(dims) if index not in sources)
    placed = dict(zip(targets, sources, strict=True))
    return [dims[placed[index]] if index in placed else next(rest) for index in range(len(dims))]


@rule("aten::squeeze", "aten::squeeze_copy")
def squeeze(op: Operation, tensor: Tensor, dim: Any = None) -> Dims:
    """Dimensions of size 1 dropped."""
    dims = op.dims(tensor)
    chosen = range(len(dims)) if dim is None else [at(d, len(dims)) for d in ([dim] if isinstance(dim, int) else dim)]
    return [one for index, one in enumerate(dims) if index not in chosen or one.size != 1]


@rule("aten::unsqueeze", "aten::unsqueeze_copy")
def unsqueeze(op: Operation, tensor: Tensor, dim: int) -> Dims:
    """A dimension of size 1 put in."""
    dims = list(op.dims(tensor))
    dims.insert(at(dim, len(dims) + 1), Dim(Atom(1)))
    return dims


@rule("aten::view", "aten::_unsafe_view", "aten::reshape", "aten::_reshape_alias", "aten::view_copy", "aten::flatten")
def view(op: Operation, tensor: Tensor, *sizes: Any, **kwargs: Any) -> Dims:
    """Dimensions split into factors or flattened into products, row-major."""
    if tensor.dtype != op.out.dtype and tensor.shape == op.out.shape:
        return op.dims(tensor)
    if tensor.dtype != op.out.dtype:
        op.freeze(op.dims(tensor), "is read as another type of number")
        return [op.frozen(size, "is read as another type of number") for size in op.out.shape]
    if not op.trace.in_call:  # a compiled or scripted body: its integers cannot be followed
        op.freeze(op.dims(tensor), "has its shape set where integers cannot be followed")
    return reshaped(op, op.dims(tensor), list(op.out.shape))


def reshaped(op: Operation, dims: Dims, sizes: list[int]) -> Dims:
    """The dimensions of a tensor with ``dims`` viewed with ``sizes``."""
    result: list[Dim | None] = [Dim(Atom(1)) if size == 1 else None for size in sizes]
    sources = [dim for dim in dims if dim.size != 1]
    targets = [index for index, size in enumerate(sizes) if size != 1]
    if 0 in sizes:
        return _empty(dims, sizes)
    while targets:
        group, have = [targets.pop(0)], 0
        want = sizes[group[0]]
        taken: Dims = []
        have = 1
        while have != want:
            if have < want:
                taken.append(sources.pop(0))
                have *= taken[-1].size
            else:
                group.append(targets.pop(0))
                want *= sizes[group[-1]]
        for index, dim in zip(group, _factors(op, merge(taken), [sizes[index] for index in group]), strict=True):
            result[index] = dim
    return [dim for dim in result if dim is not None]


def _empty(dims: Dims, sizes: list[int]) -> Dims:
    """Of a tensor without entries the last dimensions are followed as long as they stay, the others are new."""
    passing = 0
    while passing < min(len(dims), len(sizes)) and dims[-1 - passing].size == sizes[-1 - passing] != 0:
        passing += 1
    kept = dims[len(dims) - passing :]
    return [*(Dim(Atom(size), True) for size in sizes[: len(sizes) - passing]), *kept]


def _factors(op: Operation, dim: Dim, sizes: list[int]) -> Dims:
    found: Dims = []
    rest = dim
    for size in sizes[:-1]:
        halves = rows(rest, size)
        if halves is None:
            why = "is split by a view across the boundaries of its parts"
            op.freeze(dim, why)
            return [op.frozen(one, why) for one in sizes]
        found.append(halves[0])
        rest = halves[1]
    return [*found, rest]


@rule("aten::expand", "aten::broadcast_to", "aten::expand_copy")
def expand(op: Operation, tensor: Tensor, sizes: Sequence[int], **kwargs: Any) -> Dims:
    """Dimensions of size 1 repeated, and new ones put in front."""
    dims = op.dims(tensor)
    missing = op.out.dim() - len(dims)
    result: Dims = []
    for index, size in enumerate(op.out.shape):
        old = dims[index - missing] if index >= missing else None
        result.append(old if old is not None and old.size == size else op.new_size(size))
    return result


@rule("aten::repeat", "aten::tile")
def repeat(op: Operation, tensor: Tensor, repeats: Sequence[int]) -> Dims:
    """A dimension of C positions repeated R times is R x C."""
    dims = op.dims(tensor)
    missing = len(repeats) - len(dims)
    result: Dims = []
    for index, times in enumerate(repeats):
        if index < missing:
            result.append(op.new_size(times))
        elif times == 1:
            result.append(dims[index - missing])
        elif times == 0:
            result.append(op.frozen(0, "is empty"))
        else:
            result.append(merge([Dim(op.new_size(times).layout, True), dims[index - missing]]))
    return result


@rule("aten::cat", "aten::concat", "aten::concatenate")
def cat(op: Operation, tensors: Sequence[Tensor], dim: int = 0) -> Dims:
    """The joined dimension is the concatenation of its parts; every other dimension is one and the same."""
    real = [tensor for tensor in tensors if tensor.dim() > 1 or tensor.numel() > 0] or list(tensors[:1])
    parts = [op.dims(tensor) for tensor in real]
    joined = at(dim, op.out.dim())
    result: Dims = []
    for index, first in enumerate(parts[0]):
        if index == joined:
            result.append(join([dims[index] for dims in parts if dims[index].size] or [first]))
            continue
        for dims in parts[1:]:
            op.same(first, dims[index])
        result.append(Dim(first.layout, all(dims[index].zero for dims in parts)))
    return result


@rule("aten::stack")
def stack(op: Operation, tensors: Sequence[Tensor], dim: int = 0) -> Dims:
    """A new dimension, one position a tensor."""
    parts = [op.dims(tensor) for tensor in tensors]
    result: Dims = []
    for index, first in enumerate(parts[0]):
        for dims in parts[1:]:
            op.same(first, dims[index])
        result.append(Dim(first.layout, all(dims[index].zero for dims in parts)))
    result.insert(at(dim, op.out.dim()), op.frozen(len(parts), "is the number of tensors stacked"))
    return result


@rule(
    "aten::split",
    "aten::split_with_sizes",
    "aten::chunk",
    "aten::unsafe_split",
    "aten::unsafe_chunk",
    "aten::unsafe_split_with_sizes",
    "aten::tensor_split",
    "aten::split_copy",
    "aten::split_with_sizes_copy",
)
def split(op: Operation, tensor: Tensor, sizes: Any, dim: int = 0) -> tuple[Dims, ...]:
    """A dimension cut into parts, one after the other."""
    dims = op.dims(tensor)
    where = at(dim, len(dims))
    results: list[Dims] = []
    rest: Dim | None = dims[where]
    for index, part in enumerate(op.out):
        piece = rest
        if index < len(op.out) - 1 and rest is not None:
            halves = cut(rest, part.shape[where])
            piece, rest = halves if halves is not None else (None, None)
        if piece is None:
            op.freeze(dims[where], "is cut across the boundaries of its parts")
            piece = op.frozen(part.shape[where], "is cut across the boundaries of its parts")
        results.append([*dims[:where], piece, *dims[where + 1 :]])
    return tuple(results)


@rule("aten::glu")
def glu(op: Operation, tensor: Tensor, dim: int = -1) -> Dims:
    """The first half of a dimension, gated by the second: their positions belong together."""
    dims = list(op.dims(tensor))
    where = at(dim, len(dims))
    halves = cut(dims[where], dims[where].size // 2)
    if halves is None:
        why = "is cut across the boundaries of its parts"
        op.freeze(dims[where], why)
        dims[where] = op.frozen(op.out.shape[where], why)
        return dims
    op.same(*halves)
    dims[where] = halves[0]
    return dims


@rule("aten::slice", "aten::narrow", "aten::slice_copy", "aten::narrow_copy")
def slice_(op: Operation, tensor: Tensor, dim: int = 0, start: Any = None, end: Any = None, step: int = 1) -> Dims:
    """A part of a dimension; every ``step``-th position is one column of a product."""
    dims = list(op.dims(tensor))
    where = at(dim, len(dims))
    size = tensor.shape[where]
    if op.short.startswith("narrow"):
        end = start + end
    first, last, _ = slice(start, end, step).indices(size)
    whole = dims[where]
    dims[where] = sliced(op, whole, first, last, step, op.out.shape[where])
    if dims[where].size != whole.size:
        op.note_slice(tensor, whole, dims[where])
    return dims


@rule("aten::slice_scatter")
def slice_scatter(
    op: Operation, tensor: Tensor, source: Tensor, dim: int = 0, start: Any = None, end: Any = None, step: int = 1
) -> Dims:
    """A part of a dimension replaced."""
    dims, given = list(op.dims(tensor)), list(op.dims(source))
    where = at(dim, len(dims))
    first, last, _ = slice(start, end, step).indices(tensor.shape[where])
    part = sliced(op, dims[where], first, last, step, source.shape[where])
    for index, one in enumerate(given):
        op.same(one, part if index == where else dims[index])
        dims[index] = Dim(dims[index].layout, dims[index].zero and one.zero)
    return dims


@rule("aten::select_scatter")
def select_scatter(op: Operation, tensor: Tensor, source: Tensor, dim: int, index: int) -> Dims:
    """One position replaced, by its number."""
    dims = list(op.dims(tensor))
    where = at(dim, len(dims))
    op.freeze(dims[where], "has a position taken by number")
    rest = iter(op.dims(source))
    for position, one in enumerate(dims):
        if position != where:
            other = next(rest)
            op.same(one, other)
            dims[position] = Dim(one.layout, one.zero and other.zero)
    return dims


def sliced(op: Operation, dim: Dim, first: int, last: int, step: int, size: int) -> Dim:
    """The positions ``first:last:step`` of a dimension, ``size`` in number."""
    if size == dim.size:
        return dim
    if size and step > 1 and dim.size % step == 0 and size == dim.size // step and first < step:
        halves = rows(dim, dim.size // step)
        if halves is not None:
            op.freeze(halves[1], "is read every few positions")
            return halves[0]
    if step == 1 and size:
        rest: Dim | None = dim
        if first > 0:
            halves = cut(dim, first)
            rest = None if halves is None else halves[1]
        if rest is not None and last - first < rest.size:
            halves = cut(rest, last - first)
            rest = None if halves is None else halves[0]
        if rest is not None:
            return rest
    op.freeze(dim, "is sliced across the boundaries of its parts")
    return op.frozen(size, "is sliced across the boundaries of its parts")


@rule("aten::select", "aten::select_copy")
def select(op: Operation, tensor: Tensor, dim: int, index: int) -> Dims:
    """One position taken by its number, which must stay where it is; what lies behind it may go."""
    dims = list(op.dims(tensor))
    chosen = dims.pop(at(dim, len(dims)))
    why = "has a position taken by number"
    number = int(index)
    behind = None
    if chosen.size > 1 and any(atom.frozen is None for atom in _atoms(chosen)):
        kept = number + 1 if number >= 0 else chosen.size + number
        behind = cut(chosen, kept) if 0 < kept < chosen.size else None
    if behind is not None:
        op.freeze(behind[0] if number >= 0 else behind[1], why)
        op.note_slice(tensor, chosen, behind[0] if number >= 0 else behind[1])
    else:
        op.freeze(chosen, why)
    return dims


def _atoms(dim: Dim) -> list[Atom]:
    from netopt.axes.layout import atoms

    return list(atoms(dim.layout))


@rule("aten::unbind", "aten::unbind_copy")
def unbind(op: Operation, tensor: Tensor, dim: int = 0) -> tuple[Dims, ...]:
    """A dimension taken apart by position."""
    dims = list(op.dims(tensor))
    op.freeze(dims.pop(at(dim, len(dims))), "is taken apart by position")
    return tuple(dims for _ in op.out)


@rule("aten::flip", "aten::fliplr", "aten::flipud")
def flip(op: Operation, tensor: Tensor, dims: Sequence[int]) -> Dims:
    """A dimension in reverse order."""
    result = list(op.dims(tensor))
    for dim in dims:
        old = result[dim]
        if old.size > 1 and not all(atom.frozen for atom in _atoms(old)):
            result[dim] = join([Dim(unit, old.zero) for unit in reversed(shatter(old.layout))])
    return result


@rule("aten::rot90")
def rot90(op: Operation, tensor: Tensor, times: int = 1, dims: Sequence[int] = (0, 1)) -> Dims:
    """A plane turned by right angles."""
    result = list(op.dims(tensor))
    op.freeze([result[dim] for dim in dims], "is turned by rot90")
    for dim in dims:
        result[dim] = op.frozen(op.out.shape[dim], "is turned by rot90")
    return result


@rule("aten::roll")
def roll(op: Operation, tensor: Tensor, shifts: Any, dims: Any = ()) -> Dims:
    """The last positions come first; how many is fixed, so they stay."""
    result = list(op.dims(tensor))
    shifts, dims = ([one] if isinstance(one, int) else list(one) for one in (shifts, dims))
    if not dims:
        op.freeze(result, "is rolled as if flattened")
        return result
    for shift, dim in zip(shifts, dims, strict=True):
        old = result[dim]
        moved = shift % old.size
        halves = cut(old, old.size - moved) if moved else None
        if halves is not None:
            op.freeze(halves[1] if shift > 0 else halves[0], "is rolled by a fixed number of positions")
            result[dim] = join([halves[1], halves[0]])
        elif moved:
            op.freeze(old, "is rolled across the boundaries of its parts")
    return result


@rule("aten::tril", "aten::triu")
def triangle(op: Operation, tensor: Tensor, diagonal: int = 0) -> Dims:
    """Rows and columns are compared by position: in a square, the same ones must go from both."""
    dims = op.dims(tensor)
    if len(dims) > 1 and dims[-1].size == dims[-2].size and abs(diagonal) <= 1:
        op.same(dims[-1], dims[-2])
    else:
        op.freeze(dims[-2:], "is compared with another dimension by position")
    return dims


@rule("aten::diagonal")
def diagonal(op: Operation, tensor: Tensor, offset: int = 0, dim1: int = 0, dim2: int = 1) -> Dims:
    """Rows and columns matched by position."""
    dims = list(op.dims(tensor))
    first, second = at(dim1, len(dims)), at(dim2, len(dims))
    matched = dims[first]
    if offset == 0 and matched.size == dims[second].size:
        op.same(matched, dims[second])
    else:
        why = "is matched with another dimension by position"
        op.freeze([matched, dims[second]], why)
        matched = op.frozen(op.out.shape[-1], why)
    return [*(dim for index, dim in enumerate(dims) if index not in (first, second)), matched]


@rule("aten::diag_embed")
def diag_embed(op: Operation, tensor: Tensor, offset: int = 0, dim1: int = -2, dim2: int = -1) -> Dims:
    """The last dimension along rows and columns, zero elsewhere."""
    *dims, last = op.dims(tensor)
    rank = len(dims) + 2
    if offset:
        op.freeze(last, "is matched with another dimension by position")
        last = op.frozen(op.out.shape[dim1], "is matched with another dimension by position")
    for where in sorted((at(dim1, rank), at(dim2, rank))):
        dims.insert(where, last)
    return dims


@rule("aten::trace")
def trace(op: Operation, tensor: Tensor) -> Dims:
    """The sum over rows and columns matched by position."""
    first, second = op.dims(tensor)
    if first.size == second.size:
        op.summed(first, second)
    else:
        op.freeze([first, second], "is matched with another dimension by position")
    return []


@rule("aten::set")
def set_(op: Operation, tensor: Tensor, source: Any = None, *rest: Any) -> Dims:
    """A tensor given the entries of another, or none, as those do that free what they can compute again."""
    if isinstance(source, Tensor) and not rest:
        return op.dims(source)
    if source is None:
        return [Dim(Atom(size)) for size in op.out.shape]
    op.freeze(op.dims(tensor), "is given other entries")
    return [op.frozen(size, "is given other entries") for size in op.out.shape]


@rule("aten::as_strided")
def as_strided(op: Operation, tensor: Tensor, size: Sequence[int], stride: Sequence[int], offset: Any = None) -> Any:
    """A view by strides; what it leaves as it is passes, as the signals that are each cut into frames."""
    dims = op.dims(tensor)
    passing = 0
    rest = list(zip(size, stride, strict=True))
    for own in zip(tensor.shape, tensor.stride(), strict=True):
        if not rest or own != rest[0] or offset not in (None, tensor.storage_offset()):
            break
        reach = sum((one - 1) * step for one, step in rest[1:])
        if reach >= own[1] and len(rest) > 1:  # the rest runs into the next row
            break
        passing += 1
        del rest[0]
    op.freeze(dims[passing:], "is viewed by strides")
    return [*dims[:passing], *(op.frozen(one, "is viewed by strides") for one, _ in rest)]


@rule("aten::diagonal_scatter")
def diagonal_scatter(
    op: Operation, tensor: Tensor, source: Tensor, offset: int = 0, dim1: int = 0, dim2: int = 1
) -> Dims:
    """Entries put where row and column are the same position."""
    dims, given = list(op.dims(tensor)), op.dims(source)
    for one, other in zip(diagonal(op, tensor, offset, dim1, dim2), given, strict=True):
        op.same(one, other) if one.size == other.size else op.freeze([one, other], "is written to in part")
    zeros = iter([one.zero for one in given])
    places = {at(dim1, len(dims)), at(dim2, len(dims))}
    return [
        Dim(dim.layout, dim.zero and (given[-1].zero if index in places else next(zeros)))
        for index, dim in enumerate(dims)
    ]
