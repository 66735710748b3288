"""What is to be done about each call of torch's: what it answers, what its integers say, what it contracts.

A call that is asked about shapes is answered with integers that remember; one whose integers set sizes states
equations between them and the dimensions of its result. Calls are known by their names.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from netopt.axes.layout import Layout, Product, SizeReason, freeze, mark_inexact, resolve, split_concat, split_product
from netopt.axes.operation import Dim, Mark
from netopt.symbolic import SYMBOLIC, DimSize, Shape, SymbolicFloat, SymbolicInt, plain

if TYPE_CHECKING:
    from netopt.axes.tracing.sizes import SizeTracer


def _argument(args: tuple[Any, ...], kwargs: dict[str, Any], position: int, name: str, default: Any = None) -> Any:
    return args[position] if len(args) > position else kwargs.get(name, default)


# Questions about shapes, answered with integers that remember.


def _shape(tracer: SizeTracer, function: Any, args: Any, kwargs: Any, result: Any) -> Any:
    if not isinstance(result, torch.Size):  # ``__get__`` of another property
        is_bytes = type(result) is int and getattr(function, "__self__", None) is Tensor.nbytes
        return _numel(tracer, function, args, kwargs, result) * args[0].itemsize if is_bytes else result
    dims = tracer.trace.dims(args[0])
    if len(dims) != len(result):  # it was given other entries
        return result
    return Shape([tracer.size(size, dim.layout) for size, dim in zip(result, dims, strict=True)])


def _size(tracer: SizeTracer, function: Any, args: Any, kwargs: Any, result: Any) -> Any:
    if isinstance(result, torch.Size):
        return _shape(tracer, function, args, kwargs, result)
    if isinstance(result, int):
        dim = _argument(args, kwargs, 1, "dim")
        return tracer.size(result, tracer.trace.dims(args[0])[int(dim)].layout)
    return result


def _numel(tracer: SizeTracer, function: Any, args: Any, kwargs: Any, result: Any) -> Any:
    total: Any = 1
    for size, dim in zip(args[0].shape, tracer.trace.dims(args[0]), strict=True):
        total = total * tracer.size(size, dim.layout)
    return total


def _stride(tracer: SizeTracer, function: Any, args: Any, kwargs: Any, result: Any) -> Any:
    """Steps through dense memory are products of the sizes of what lies further in; others are numbers."""
    tensor, dims = args[0], tracer.trace.dims(args[0])
    strides = tensor.stride()
    steps: list[Any] = list(strides)
    inner: Any = 1
    for at in sorted(range(len(dims)), key=lambda at: (strides[at], dims[at].size)):
        if strides[at] == plain(inner):
            steps[at] = inner
            inner = inner * tracer.size(dims[at].size, dims[at].layout)
        elif strides[at] > 1 and dims[at].size > 1:
            _computed_with(tracer, tensor if tensor._base is None else tensor._base)
            return result
    return steps[int(_argument(args, kwargs, 1, "dim"))] if isinstance(result, int) else tuple(steps)


def _as_number(tracer: SizeTracer, function: Any, args: Any, kwargs: Any, result: Any) -> Any:
    """An answer that cannot be followed, as ``len`` must give a plain integer: it may be computed with."""
    dims = tracer.trace.dims(args[0])
    _computed_with(tracer, args[0], dims[:1] if getattr(function, "__name__", "") == "__len__" else dims)
    return result


def _computed_with(tracer: SizeTracer, tensor: Tensor, dims: Sequence[Dim] | None = None) -> None:
    for dim in tracer.trace.dims(tensor) if dims is None else dims:
        if dim.size > 1:
            number = SymbolicInt(dim.size, DimSize(dim.layout), tracer.trace.constraints)
            tracer.trace.constraints.note_number(number)


_SHAPES: dict[str, Callable[..., Any]] = {
    "__get__": _shape,
    "size": _size,
    "numel": _numel,
    "nelement": _numel,
    "stride": _stride,
    **dict.fromkeys(("__len__", "storage_offset"), _as_number),
}


# Calls whose integers are sizes of dimensions.


def _given_sizes(first: int) -> Callable[..., None]:
    """A call whose sizes, from argument ``first`` on or under ``size``, are the result's dimensions in order."""

    def constrain(tracer: SizeTracer, args: Any, kwargs: Any, result: Any) -> None:
        sizes: Any = args[first:]
        if not sizes:
            sizes = kwargs.get("size", kwargs.get("shape", kwargs.get("sizes", ())))
        if sizes and isinstance(sizes[0], (tuple, list)):
            sizes = sizes[0]
        if not isinstance(result, Tensor) or any(isinstance(size, torch.dtype) for size in sizes):
            return
        dims = tracer.trace.dims(result)
        sizes = [size for size in sizes if isinstance(size, (int, Tensor)) and not isinstance(size, bool)]
        if len(sizes) == len(dims):
            for size, dim in zip(sizes, dims, strict=True):
                if isinstance(size, Tensor):
                    freeze(dim.layout, f"has a size that is computed by value at {tracer.trace.where()}")
                else:
                    tracer.equate(size, dim.layout, "view" if first else "a new tensor")

    return constrain


def _one_hot(tracer: SizeTracer, args: Any, kwargs: Any, result: Any) -> None:
    """The last dimension is the number of classes, said or found by value."""
    number = _argument(args, kwargs, 1, "num_classes", -1)
    tracer.equate(number, tracer.trace.dims(result)[-1].layout, "one_hot")


def _like(tracer: SizeTracer, args: Any, kwargs: Any, result: Any) -> None:
    """The result is as large as another tensor."""
    for made, given in zip(tracer.trace.dims(result), tracer.trace.dims(args[1]), strict=True):
        if resolve(made.layout) is not resolve(given.layout):
            tracer.equate(
                SymbolicInt(given.size, DimSize(given.layout), tracer.trace.constraints),
                made.layout,
                "a shape like another's",
            )


def _pad(tracer: SizeTracer, args: Any, kwargs: Any, result: Any) -> None:
    """What is padded stays, so that a computed amount must stay as large."""
    _keep(tracer, _argument(args, kwargs, 1, "pad"))


def _keep(tracer: SizeTracer, numbers: Any) -> None:
    """States that these numbers must stay, where they are computed from sizes."""
    for number in numbers if isinstance(numbers, (tuple, list)) else (numbers,):
        if type(number) is SymbolicInt and tracer.trace.constraints.knows(number):
            tracer.trace.constraints.guard(operator.eq, number, plain(number), True)


def _squeeze(tracer: SizeTracer, args: Any, kwargs: Any, result: Any) -> None:
    """A dimension that is kept because it is larger than one must stay so."""
    dims = tracer.trace.dims(args[0])
    chosen = _argument(args, kwargs, 1, "dim")
    for at in range(len(dims)) if chosen is None else chosen if isinstance(chosen, (tuple, list)) else (chosen,):
        if dims and dims[at].size > 1:
            number = SymbolicInt(dims[at].size, DimSize(dims[at].layout), tracer.trace.constraints)
            tracer.trace.constraints.guard(operator.gt, number, 1, True)


def _select(tracer: SizeTracer, args: Any, kwargs: Any, result: Any) -> None:
    """A position taken by a number that is computed from sizes must stay where it is."""
    _keep(tracer, _argument(args, kwargs, 2, "index"))


def _unflatten(tracer: SizeTracer, args: Any, kwargs: Any, result: Any) -> None:
    dim = int(_argument(args, kwargs, 1, "dim")) % args[0].dim()
    sizes = args[2:] if len(args) > 2 else kwargs["sizes"]  # tensor, dim, sizes
    if isinstance(sizes[0], (tuple, list)):
        sizes = sizes[0]
    for size, made in zip(sizes, tracer.trace.dims(result)[dim:], strict=False):
        tracer.equate(size, made.layout, "unflatten")


def _normalized(tracer: SizeTracer, args: Any, kwargs: Any, result: Any) -> None:
    shape = _argument(args, kwargs, 1, "normalized_shape")
    for size, dim in zip(shape, tracer.trace.dims(result)[-len(shape) :], strict=True):
        tracer.equate(size, dim.layout, "normalized_shape")


def _grouped(position: int, name: str) -> Callable[..., None]:
    def constrain(tracer: SizeTracer, args: Any, kwargs: Any, result: Any) -> None:
        if tracer.trace.groups is not None:
            tracer.equate(_argument(args, kwargs, position, name, 1), tracer.trace.groups, name)

    return constrain


_GROUPS = 6


def _convolved(tracer: SizeTracer, args: Any, kwargs: Any, result: Any) -> None:
    """Strides, paddings and dilations are no sizes of neurons, and say how large the result is."""
    for numbers in (*args[3:_GROUPS], *args[_GROUPS + 1 :]):  # after tensor, weight and bias
        _keep(tracer, numbers)
    for name, numbers in kwargs.items():
        if name not in ("input", "weight", "bias", "groups"):
            _keep(tracer, numbers)
    _grouped(_GROUPS, "groups")(tracer, args, kwargs, result)


def _split(tracer: SizeTracer, args: Any, kwargs: Any, result: Any) -> None:
    sizes = _argument(args, kwargs, 1, "split_size", kwargs.get("split_size_or_sections", kwargs.get("split_sizes")))
    dim = int(_argument(args, kwargs, 2, "dim", 0))
    parts = [tracer.trace.dims(part)[dim].layout for part in result]
    if isinstance(sizes, int):
        for part in parts:
            if part.size == plain(sizes):
                _equate_part(tracer, args[0], sizes, part, "split")
            else:
                freeze(part, f"is the remainder of split at {tracer.trace.where()}")
    else:
        for size, part in zip(sizes, parts, strict=True):
            _equate_part(tracer, args[0], size, part, "split")


def _chunk(tracer: SizeTracer, args: Any, kwargs: Any, result: Any) -> None:
    dim = int(_argument(args, kwargs, 2, "dim", 0))
    parts = [tracer.trace.dims(part)[dim].layout for part in result]
    for part in parts[1:]:
        if part.size == parts[0].size:
            tracer.equate(SymbolicInt(part.size, DimSize(parts[0]), tracer.trace.constraints), part, "chunk")
        else:  # the last one is what remains
            whole = SymbolicInt(
                args[0].shape[dim], DimSize(tracer.trace.dims(args[0])[dim].layout), tracer.trace.constraints
            )
            number = _argument(args, kwargs, 1, "chunks")
            tracer.equate((whole + (number - 1)) // number, parts[0], "chunk")


def _tensor_split(tracer: SizeTracer, args: Any, kwargs: Any, result: Any) -> None:
    dim = int(_argument(args, kwargs, 2, "dim", 0))
    parts = [tracer.trace.dims(part)[dim].layout for part in result]
    if len({part.size for part in parts}) == 1 and isinstance(_argument(args, kwargs, 1, "sections", ()), int):
        for part in parts[1:]:
            tracer.equate(SymbolicInt(part.size, DimSize(parts[0]), tracer.trace.constraints), part, "tensor_split")
    else:
        for part in parts:
            freeze(part, f"is an uneven part of a split at {tracer.trace.where()}")


def _strides(tracer: SizeTracer, args: Any, kwargs: Any, result: Any) -> None:
    for dim in tracer.trace.dims(args[0]):
        freeze(dim.layout, f"is viewed by strides at {tracer.trace.where()}")


def _fill(tracer: SizeTracer, args: Any, kwargs: Any, result: Any) -> None:
    sizes_first = 1 if args and isinstance(args[0], Tensor) else 0
    _given_sizes(sizes_first)(tracer, args[: sizes_first + 1], kwargs, result)
    tracer.note_numbers(args[sizes_first + 1 :], {"fill_value": kwargs.get("fill_value")}, SYMBOLIC)


def _lstm(tracer: SizeTracer, args: Any, kwargs: Any, result: Any) -> None:
    """A projection is told from none by its width: it must stay narrower than the hidden state."""
    states = args[1] if isinstance(args[1], (tuple, list)) else args[2]  # of a packed sequence, sizes come between
    if isinstance(states, (tuple, list)) and len(states) == 2 and states[0].shape[-1] != states[1].shape[-1]:
        projected, hidden = (tracer.trace.dims(state)[-1].layout for state in states)
        narrow, wide = (
            SymbolicInt(layout.size, DimSize(layout), tracer.trace.constraints) for layout in (projected, hidden)
        )
        tracer.trace.constraints.guard(operator.lt, narrow, wide, True)


def _narrow(tracer: SizeTracer, args: Any, kwargs: Any, result: Any) -> None:
    dim, start, length = (_argument(args, kwargs, 1 + i, name) for i, name in enumerate(("dim", "start", "length")))
    if isinstance(start, int) and isinstance(length, int):
        _slice(tracer, args[0], int(dim), slice(start, start + length), "narrow")


def _getitem(tracer: SizeTracer, args: Any, kwargs: Any, result: Any) -> None:
    tensor, index = args[0], args[1]
    entries = index if isinstance(index, tuple) else (index,)
    position, dims = 0, tracer.trace.dims(tensor)
    taken = sum(_consumes(entry) for entry in entries)
    for entry in entries:
        if entry is Ellipsis:
            position += len(dims) - taken
        elif isinstance(entry, slice):
            _slice(tracer, tensor, position, entry, "slice")
            position += 1
        else:
            _keep(tracer, entry)
            position += _consumes(entry)


def _consumes(entry: Any) -> int:
    if entry is None or entry is Ellipsis or isinstance(entry, bool):
        return 0
    if isinstance(entry, Tensor) and entry.dtype == torch.bool:
        return entry.dim()
    return 1


def _slice(tracer: SizeTracer, tensor: Tensor, dim: int, asked: slice, name: str) -> None:
    """States what the bounds of a slice are: the sizes of what lies before, inside or behind it."""
    if asked.step not in (None, 1):  # where a stride starts is a phase, no count
        return
    layout = tracer.trace.dims(tensor)[dim].layout
    size = layout.size
    start, stop = (plain(bound) for bound in asked.indices(size)[:2])
    if isinstance(asked.start, int) and 0 < start < size:
        halves = split_concat(layout, start)
        if halves is not None:
            _bound(tracer, tensor, asked.start, halves, name)
    if isinstance(asked.stop, int) and 0 < stop < size:
        halves = split_concat(layout, stop)
        if halves is not None:
            _bound(tracer, tensor, asked.stop, halves, name)
    elif isinstance(asked.stop, SymbolicInt) and stop == size == plain(asked.stop):
        tracer.equate(asked.stop, layout, name)


def _bound(tracer: SizeTracer, tensor: Tensor, bound: int, halves: tuple[Layout, Layout], name: str) -> None:
    if plain(bound) >= 0:
        _equate_part(tracer, tensor, bound, halves[0], name)
    else:
        _equate_part(tracer, tensor, -bound, halves[1], name)


def _equate_part(tracer: SizeTracer, tensor: Tensor, number: int, layout: Layout, name: str) -> None:
    """States the size of a part; a single position that a plain number cuts off is one by its place, and stays."""
    if layout.size == 1 and not tracer.trace.constraints.knows(number):
        why = f"is a position that is singled out by {name}, at {tracer.trace.where()}"
        tracer.trace.mark(tensor, [Mark(freeze, layout, why)])
    else:
        tracer.equate(number, layout, name)


def _slice_scatter(tracer: SizeTracer, args: Any, kwargs: Any, result: Any) -> None:
    names = ("dim", "start", "end", "step")
    dim, start, end, step = (_argument(args, kwargs, 2 + i, name) for i, name in enumerate(names))
    _slice(tracer, args[0], int(dim or 0), slice(start, end, step), "slice_scatter")


def _arange(tracer: SizeTracer, args: Any, kwargs: Any, result: Any) -> None:
    numbers = [value for value in args if isinstance(value, int)]
    if len(numbers) == 1:
        start, stop, step = 0, numbers[0], 1
    else:
        start, stop = (numbers[0], numbers[1]) if numbers else (kwargs.get("start", 0), kwargs.get("end"))
        step = numbers[2] if len(numbers) > 2 else kwargs.get("step", 1)  # start, stop, step
    layout = tracer.trace.dims(result)[0].layout
    if all(isinstance(value, int) for value in (start, stop, step)):
        span = stop if plain(start) == 0 and not isinstance(start, SymbolicInt) else stop - start
        length = span if plain(step) == 1 else (span + (step - 1)) // step
        tracer.equate(length, layout, "arange")
    else:
        freeze(layout, f"has a size that arange computes at {tracer.trace.where()}")


def _as_complex(tracer: SizeTracer, args: Any, kwargs: Any, result: Any) -> None:
    """Pairs of a part of a tensor are read in place: the rows they lie in must stay of even length."""
    base = args[0]._base
    if base is None or not base.dim():
        return
    row = resolve(tracer.trace.dims(base)[-1].layout)
    row = row.parts[-1] if isinstance(row, Product) else row
    if row.size % 2 == 0:
        odd = SymbolicInt(row.size, DimSize(row), tracer.trace.constraints) % 2
        tracer.trace.constraints.guard(operator.eq, odd, 0, True)


def _looked_at(tracer: SizeTracer, args: Any, kwargs: Any, result: Any) -> None:
    """The values leave torch, so what is done with them cannot be seen."""
    tracer.trace.by_value = True
    tracer.trace.reach([args[0]])


def _given_away(tracer: SizeTracer, args: Any, kwargs: Any, result: Any) -> None:
    """As many values leave torch as there are neurons, and may come back as if they came from outside."""
    _looked_at(tracer, args, kwargs, result)
    for dim in tracer.trace.dims(args[0]):
        freeze(dim.layout, f"leaves torch at {tracer.trace.where()}")


def _attention(tracer: SizeTracer, args: Any, kwargs: Any, result: Any) -> None:
    query, key = (tracer.trace.dims(_argument(args, kwargs, i, name)) for i, name in enumerate(("query", "key")))
    if len(query) > 2 and query[-3].size > key[-3].size:
        halves = split_product(query[-3].layout, key[-3].size)
        if halves is not None:
            # No integer of the call says how many query heads share one of the keys' heads; one of the module may.
            name = tracer.name_of("").module
            tracer.trace.implicit_sizes.append((halves[1], name, tracer.model.get_submodule(name)))
    if _argument(args, kwargs, 6, "scale") is None:
        why = SizeReason(f"sets the default scale of attention, at {tracer.trace.where()}")
        tracer.trace.mark(result, [Mark(mark_inexact, query[-1].layout, why)])


_CONSTRAIN: dict[str, Callable[..., None]] = {
    **dict.fromkeys(("view", "reshape", "expand", "broadcast_to", "_unsafe_view"), _given_sizes(1)),
    **dict.fromkeys(("new_zeros", "new_ones", "new_empty"), _given_sizes(1)),
    **dict.fromkeys(("zeros", "ones", "empty", "rand", "randn"), _given_sizes(0)),
    **dict.fromkeys(("full", "new_full"), _fill),
    **dict.fromkeys(("tensor_split", "hsplit", "vsplit", "dsplit"), _tensor_split),
    "as_strided": _strides,
    "lstm": _lstm,
    "one_hot": _one_hot,
    "unflatten": _unflatten,
    **dict.fromkeys(("squeeze", "squeeze_"), _squeeze),
    "select": _select,
    "pad": _pad,
    **dict.fromkeys(("view_as", "reshape_as", "expand_as"), _like),
    "layer_norm": _normalized,
    "rms_norm": _normalized,
    "group_norm": _grouped(1, "num_groups"),
    **dict.fromkeys(("conv1d", "conv2d", "conv3d"), _convolved),
    **dict.fromkeys(("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"), _convolved),
    "channel_shuffle": _grouped(1, "groups"),
    "deform_conv2d": _grouped(11, "groups"),
    **dict.fromkeys(("split", "split_with_sizes", "unsafe_split"), _split),
    **dict.fromkeys(("chunk", "unsafe_chunk"), _chunk),
    "narrow": _narrow,
    "slice_scatter": _slice_scatter,
    "__getitem__": _getitem,
    "__setitem__": _getitem,
    "arange": _arange,
    "view_as_complex": _as_complex,
    "scaled_dot_product_attention": _attention,
    **dict.fromkeys(("numpy", "tolist", "__array__"), _given_away),
    "data_ptr": _looked_at,
}


# Arguments of a call that are contracted over, and along which dimension.
CONTRACTIONS: dict[str, tuple[tuple[int, int], ...]] = {
    "linear": ((0, -1),),
    "bilinear": ((0, -1), (1, -1)),
    **dict.fromkeys(("conv1d", "conv2d", "conv3d"), ((0, 1),)),
    **dict.fromkeys(("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"), ((0, 1),)),
    **dict.fromkeys(("matmul", "__matmul__", "mm", "bmm", "__rmatmul__", "mv"), ((0, -1), (1, -2))),
    **dict.fromkeys(("addmm", "baddbmm", "addbmm", "addmv"), ((1, -1), (2, -2))),
    "scaled_dot_product_attention": ((0, -1), (1, -1)),
    **dict.fromkeys(("lstm", "gru", "rnn_tanh", "rnn_relu", "lstm_cell", "gru_cell"), ((0, -1),)),
}
OPERANDS: dict[str, tuple[str, ...]] = {
    "linear": ("input", "weight"),
    "matmul": ("input", "other"),
    "bmm": ("input", "mat2"),
    "scaled_dot_product_attention": ("query", "key"),
}

# Calls whose plain integers are dimensions or sizes, never values.
_NO_NUMBERS = frozenset(_CONSTRAIN) | frozenset(
    [
        "repeat",
        "tile",
        "repeat_interleave",
        "transpose",
        "permute",
        "unsqueeze",
        "flatten",
        "sum",
        "mean",
        "softmax",
        "log_softmax",
        "cat",
        "stack",
        "unbind",
        "index_select",
        "gather",
        "topk",
        "eye",
        "linspace",
        "randint",
        "randperm",
        "tril",
        "triu",
        "roll",
        "flip",
        "movedim",
        "swapaxes",
        "dropout",
        "unfold",
        "glu",
        "cumsum",
        "argmax",
        "amax",
        "max",
        "min",
        "norm",
        "bincount",
        "adaptive_avg_pool2d",
        "interpolate",
    ]
)

_FLOATING: frozenset[type] = frozenset({SymbolicFloat})


class CallRule(NamedTuple):
    """What is to be done about the calls of one name."""

    answer: Callable[..., Any] | None
    contracts: bool
    constrain: Callable[..., None] | None
    numbers: frozenset[type]


CALL_RULES: dict[str, CallRule] = {}


def call_rule_of(name: str) -> CallRule:
    """The rule of the calls of one name; kept in ``CALL_RULES`` from then on."""
    found = CALL_RULES[name] = CallRule(
        answer=_SHAPES.get(name),
        contracts=name in CONTRACTIONS,
        constrain=_CONSTRAIN.get(name),
        numbers=_FLOATING if name in _NO_NUMBERS else SYMBOLIC,
    )
    return found
