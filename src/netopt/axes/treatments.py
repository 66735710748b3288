"""What is to be done about each call of torch's: what it answers, what its integers say, what it contracts.

A call that is asked about shapes is answered with integers that remember; one whose integers set sizes states
equations between them and the dimensions of its result. Calls are known by their names.
"""

from __future__ import annotations

import inspect
import operator
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from netopt.axes.layout import Layout, Product, freeze, mark_inexact, resolve, split_concat, split_product
from netopt.axes.operation import Mark
from netopt.axes.sizes import REMEMBERING, Condition, Extent, Scalar, Shape, Size, caller, plain

if TYPE_CHECKING:
    from netopt.axes.watch import Watch

_LEN = inspect.unwrap(Tensor.__len__).__code__


def _argument(args: tuple[Any, ...], kwargs: dict[str, Any], position: int, name: str, default: Any = None) -> Any:
    return args[position] if len(args) > position else kwargs.get(name, default)


# Questions about shapes, answered with integers that remember.


def _shape(watch: Watch, function: Any, args: Any, kwargs: Any, result: Any) -> Any:
    if not isinstance(result, torch.Size):  # ``__get__`` of another property
        return result
    dims = watch.trace.dims(args[0])
    if len(dims) != len(result):  # it was given other entries
        return result
    if dims and _asked_by_len():
        # ``len`` hands on a plain integer, so what it is used for cannot be seen.
        mark_inexact(dims[0].layout, f"has a size that len gives away, at {watch.trace.where()}")
    return Shape([watch.size(size, dim.layout) for size, dim in zip(result, dims, strict=True)])


def _asked_by_len() -> bool:
    """Whether the shape is asked for by ``len``, whose Python body is run through like those of all wrappers."""
    frame = sys._getframe(1)
    for _ in range(6):
        if frame is None or frame.f_code is _LEN:
            break
        frame = frame.f_back
    return frame is not None and frame.f_code is _LEN


def _size(watch: Watch, function: Any, args: Any, kwargs: Any, result: Any) -> Any:
    if isinstance(result, torch.Size):
        return _shape(watch, function, args, kwargs, result)
    if isinstance(result, int):
        dim = _argument(args, kwargs, 1, "dim")
        return watch.size(result, watch.trace.dims(args[0])[int(dim)].layout)
    return result


def _numel(watch: Watch, function: Any, args: Any, kwargs: Any, result: Any) -> Any:
    total: Any = 1
    for size, dim in zip(args[0].shape, watch.trace.dims(args[0]), strict=True):
        total = total * watch.size(size, dim.layout)
    return total


_SHAPES: dict[str, Callable[..., Any]] = {
    "__get__": _shape,
    "size": _size,
    "numel": _numel,
    "nelement": _numel,
}


# Calls whose integers are sizes of dimensions.


def _given_sizes(first: int) -> Callable[..., None]:
    """A call whose sizes, from argument ``first`` on or under ``size``, are the result's dimensions in order."""

    def speak(watch: Watch, args: Any, kwargs: Any, result: Any) -> None:
        sizes: Any = args[first:]
        if not sizes:
            sizes = kwargs.get("size", kwargs.get("shape", kwargs.get("sizes", ())))
        if sizes and isinstance(sizes[0], (tuple, list)):
            sizes = sizes[0]
        if not isinstance(result, Tensor) or any(isinstance(size, torch.dtype) for size in sizes):
            return
        dims = watch.trace.dims(result)
        sizes = [size for size in sizes if isinstance(size, (int, Tensor)) and not isinstance(size, bool)]
        if len(sizes) == len(dims):
            for size, dim in zip(sizes, dims, strict=True):
                if isinstance(size, Tensor):
                    freeze(dim.layout, f"has a size that is computed by value at {watch.trace.where()}")
                else:
                    watch.equate(size, dim.layout, "view" if first else "a new tensor")

    return speak


def _like(watch: Watch, args: Any, kwargs: Any, result: Any) -> None:
    """The result is as large as another tensor."""
    for made, given in zip(watch.trace.dims(result), watch.trace.dims(args[1]), strict=True):
        if resolve(made.layout) is not resolve(given.layout):
            watch.equate(
                Size(given.size, Extent(given.layout), watch.trace.ledger), made.layout, "a shape like another's"
            )


def _pad(watch: Watch, args: Any, kwargs: Any, result: Any) -> None:
    """What is padded stays, so that a computed amount must stay as large."""
    _keep(watch, _argument(args, kwargs, 1, "pad"))


def _keep(watch: Watch, numbers: Any) -> None:
    """States that these numbers must stay, where they are computed from sizes."""
    for number in numbers if isinstance(numbers, (tuple, list)) else (numbers,):
        if type(number) is Size and watch.trace.ledger.knows(number):
            watch.trace.ledger.conditions.append(Condition(operator.eq, number, plain(number), True, caller()))


def _unflatten(watch: Watch, args: Any, kwargs: Any, result: Any) -> None:
    dim = int(_argument(args, kwargs, 1, "dim")) % args[0].dim()
    sizes = args[2:] if len(args) > 2 else kwargs["sizes"]  # tensor, dim, sizes
    if isinstance(sizes[0], (tuple, list)):
        sizes = sizes[0]
    for size, made in zip(sizes, watch.trace.dims(result)[dim:], strict=False):
        watch.equate(size, made.layout, "unflatten")


def _normalized(watch: Watch, args: Any, kwargs: Any, result: Any) -> None:
    shape = _argument(args, kwargs, 1, "normalized_shape")
    for size, dim in zip(shape, watch.trace.dims(result)[-len(shape) :], strict=True):
        watch.equate(size, dim.layout, "normalized_shape")


def _grouped(position: int, name: str) -> Callable[..., None]:
    def speak(watch: Watch, args: Any, kwargs: Any, result: Any) -> None:
        if watch.trace.groups is not None:
            watch.equate(_argument(args, kwargs, position, name, 1), watch.trace.groups, name)

    return speak


_GROUPS = 6


def _convolved(watch: Watch, args: Any, kwargs: Any, result: Any) -> None:
    """Strides, paddings and dilations are no sizes of neurons, and say how large the result is."""
    for numbers in (*args[3:_GROUPS], *args[_GROUPS + 1 :]):  # after tensor, weight and bias
        _keep(watch, numbers)
    for name, numbers in kwargs.items():
        if name not in ("input", "weight", "bias", "groups"):
            _keep(watch, numbers)
    _grouped(_GROUPS, "groups")(watch, args, kwargs, result)


def _split(watch: Watch, args: Any, kwargs: Any, result: Any) -> None:
    sizes = _argument(args, kwargs, 1, "split_size", kwargs.get("split_size_or_sections", kwargs.get("split_sizes")))
    dim = int(_argument(args, kwargs, 2, "dim", 0))
    parts = [watch.trace.dims(part)[dim].layout for part in result]
    if isinstance(sizes, int):
        for part in parts:
            if part.size == plain(sizes):
                watch.equate(sizes, part, "split")
            else:
                freeze(part, f"is the remainder of split at {watch.trace.where()}")
    else:
        for size, part in zip(sizes, parts, strict=True):
            watch.equate(size, part, "split")


def _chunk(watch: Watch, args: Any, kwargs: Any, result: Any) -> None:
    dim = int(_argument(args, kwargs, 2, "dim", 0))
    parts = [watch.trace.dims(part)[dim].layout for part in result]
    for part in parts[1:]:
        if part.size == parts[0].size:
            watch.equate(Size(part.size, Extent(parts[0]), watch.trace.ledger), part, "chunk")
        else:  # the last one is what remains
            whole = Size(args[0].shape[dim], Extent(watch.trace.dims(args[0])[dim].layout), watch.trace.ledger)
            number = _argument(args, kwargs, 1, "chunks")
            watch.equate((whole + (number - 1)) // number, parts[0], "chunk")


def _tensor_split(watch: Watch, args: Any, kwargs: Any, result: Any) -> None:
    dim = int(_argument(args, kwargs, 2, "dim", 0))
    parts = [watch.trace.dims(part)[dim].layout for part in result]
    if len({part.size for part in parts}) == 1 and isinstance(_argument(args, kwargs, 1, "sections", ()), int):
        for part in parts[1:]:
            watch.equate(Size(part.size, Extent(parts[0]), watch.trace.ledger), part, "tensor_split")
    else:
        for part in parts:
            freeze(part, f"is an uneven part of a split at {watch.trace.where()}")


def _strides(watch: Watch, args: Any, kwargs: Any, result: Any) -> None:
    for dim in watch.trace.dims(args[0]):
        freeze(dim.layout, f"is viewed by strides at {watch.trace.where()}")


def _fill(watch: Watch, args: Any, kwargs: Any, result: Any) -> None:
    sizes_first = 1 if args and isinstance(args[0], Tensor) else 0
    _given_sizes(sizes_first)(watch, args[: sizes_first + 1], kwargs, result)
    watch.note_numbers(args[sizes_first + 1 :], {"fill_value": kwargs.get("fill_value")}, REMEMBERING)


def _lstm(watch: Watch, args: Any, kwargs: Any, result: Any) -> None:
    """A projection is told from none by its width: it must stay narrower than the hidden state."""
    states = args[1] if isinstance(args[1], (tuple, list)) else args[2]  # of a packed sequence, sizes come between
    if isinstance(states, (tuple, list)) and len(states) == 2 and states[0].shape[-1] != states[1].shape[-1]:
        projected, hidden = (watch.trace.dims(state)[-1].layout for state in states)
        narrow, wide = (Size(layout.size, Extent(layout), watch.trace.ledger) for layout in (projected, hidden))
        watch.trace.ledger.conditions.append(Condition(operator.lt, narrow, wide, True, caller()))


def _narrow(watch: Watch, args: Any, kwargs: Any, result: Any) -> None:
    dim, start, length = (_argument(args, kwargs, 1 + i, name) for i, name in enumerate(("dim", "start", "length")))
    if isinstance(start, int) and isinstance(length, int):
        _slice(watch, watch.trace.dims(args[0])[int(dim)].layout, slice(start, start + length), "narrow")


def _getitem(watch: Watch, args: Any, kwargs: Any, result: Any) -> None:
    tensor, index = args[0], args[1]
    entries = index if isinstance(index, tuple) else (index,)
    position, dims = 0, watch.trace.dims(tensor)
    taken = sum(_consumes(entry) for entry in entries)
    for entry in entries:
        if entry is Ellipsis:
            position += len(dims) - taken
        elif isinstance(entry, slice):
            _slice(watch, dims[position].layout, entry, "slice")
            position += 1
        else:
            position += _consumes(entry)


def _consumes(entry: Any) -> int:
    if entry is None or entry is Ellipsis or isinstance(entry, bool):
        return 0
    if isinstance(entry, Tensor) and entry.dtype == torch.bool:
        return entry.dim()
    return 1


def _slice(watch: Watch, layout: Layout, asked: slice, name: str) -> None:
    """States what the bounds of a slice are: the sizes of what lies before, inside or behind it."""
    if asked.step not in (None, 1):  # where a stride starts is a phase, no count
        return
    size = layout.size
    start, stop = (plain(bound) for bound in asked.indices(size)[:2])
    if isinstance(asked.start, int) and 0 < start < size:
        halves = split_concat(layout, start)
        if halves is not None:
            _bound(watch, asked.start, halves, name)
    if isinstance(asked.stop, int) and 0 < stop < size:
        halves = split_concat(layout, stop)
        if halves is not None:
            _bound(watch, asked.stop, halves, name)
    elif isinstance(asked.stop, Size) and stop == size == plain(asked.stop):
        watch.equate(asked.stop, layout, name)


def _bound(watch: Watch, bound: int, halves: tuple[Layout, Layout], name: str) -> None:
    if plain(bound) >= 0:
        watch.equate(bound, halves[0], name)
    else:
        watch.equate(-bound, halves[1], name)


def _arange(watch: Watch, args: Any, kwargs: Any, result: Any) -> None:
    numbers = [value for value in args if isinstance(value, int)]
    if len(numbers) == 1:
        start, stop, step = 0, numbers[0], 1
    else:
        start, stop = (numbers[0], numbers[1]) if numbers else (kwargs.get("start", 0), kwargs.get("end"))
        step = numbers[2] if len(numbers) > 2 else kwargs.get("step", 1)  # start, stop, step
    layout = watch.trace.dims(result)[0].layout
    if all(isinstance(value, int) for value in (start, stop, step)):
        span = stop if plain(start) == 0 and not isinstance(start, Size) else stop - start
        length = span if plain(step) == 1 else (span + (step - 1)) // step
        watch.equate(length, layout, "arange")
    else:
        freeze(layout, f"has a size that arange computes at {watch.trace.where()}")


def _as_complex(watch: Watch, args: Any, kwargs: Any, result: Any) -> None:
    """Pairs of a part of a tensor are read in place: the rows they lie in must stay of even length."""
    base = args[0]._base
    if base is None or not base.dim():
        return
    row = resolve(watch.trace.dims(base)[-1].layout)
    row = row.parts[-1] if isinstance(row, Product) else row
    if row.size % 2 == 0:
        odd = Size(row.size, Extent(row), watch.trace.ledger) % 2
        watch.trace.ledger.conditions.append(Condition(operator.eq, odd, 0, True, caller()))


def _looked_at(watch: Watch, args: Any, kwargs: Any, result: Any) -> None:
    """The values leave torch, so what is done with them cannot be seen."""
    watch.trace.by_value = True
    watch.trace.reach([args[0]])


def _given_away(watch: Watch, args: Any, kwargs: Any, result: Any) -> None:
    """As many values leave torch as there are neurons, and may come back as if they came from outside."""
    _looked_at(watch, args, kwargs, result)
    for dim in watch.trace.dims(args[0]):
        freeze(dim.layout, f"leaves torch at {watch.trace.where()}")


def _attention(watch: Watch, args: Any, kwargs: Any, result: Any) -> None:
    query, key = (watch.trace.dims(_argument(args, kwargs, i, name)) for i, name in enumerate(("query", "key")))
    if len(query) > 2 and query[-3].size > key[-3].size:
        halves = split_product(query[-3].layout, key[-3].size)
        if halves is not None:
            # No integer of the call says how many query heads share one of the keys' heads; one of the module may.
            name = watch.name_of("").module
            watch.trace.unsaid.append((halves[1], name, watch.model.get_submodule(name)))
    if _argument(args, kwargs, 6, "scale") is None:
        why = f"sets the default scale of attention, at {watch.trace.where()}"
        watch.trace.mark(result, [Mark(mark_inexact, query[-1].layout, why)])


_SPEAKERS: dict[str, Callable[..., None]] = {
    **dict.fromkeys(("view", "reshape", "expand", "broadcast_to", "_unsafe_view"), _given_sizes(1)),
    **dict.fromkeys(("new_zeros", "new_ones", "new_empty"), _given_sizes(1)),
    **dict.fromkeys(("zeros", "ones", "empty", "rand", "randn"), _given_sizes(0)),
    **dict.fromkeys(("full", "new_full"), _fill),
    **dict.fromkeys(("tensor_split", "hsplit", "vsplit", "dsplit"), _tensor_split),
    "as_strided": _strides,
    "lstm": _lstm,
    "unflatten": _unflatten,
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
    "__getitem__": _getitem,
    "__setitem__": _getitem,
    "arange": _arange,
    "view_as_complex": _as_complex,
    "scaled_dot_product_attention": _attention,
    **dict.fromkeys(("numpy", "tolist", "__array__"), _given_away),
    "data_ptr": _looked_at,
}


_FUSED = frozenset({"lstm", "gru", "rnn_tanh", "rnn_relu"})
# Calls that torch's own layers make in both modes, with another rule in training: what they drop is no zero.
_MODAL = frozenset({"alpha_dropout", "alpha_dropout_", "feature_alpha_dropout", "feature_alpha_dropout_"})

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
_NO_NUMBERS = frozenset(_SPEAKERS) | frozenset(
    [
        "repeat",
        "tile",
        "repeat_interleave",
        "select",
        "transpose",
        "permute",
        "unsqueeze",
        "squeeze",
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
        "one_hot",
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

_FLOATING: frozenset[type] = frozenset({Scalar})


class Treatment(NamedTuple):
    """What is to be done about the calls of one name."""

    answer: Callable[..., Any] | None
    contracts: bool
    speak: Callable[..., None] | None
    numbers: frozenset[type]
    fused: bool
    modal: bool


TREATMENTS: dict[str, Treatment] = {}


def treatment_of(name: str) -> Treatment:
    """What is to be done about the calls of one name; looked up in ``TREATMENTS`` from then on."""
    found = TREATMENTS[name] = Treatment(
        answer=_SHAPES.get(name),
        contracts=name in CONTRACTIONS,
        speak=_SPEAKERS.get(name),
        numbers=_FLOATING if name in _NO_NUMBERS else REMEMBERING,
        fused=name in _FUSED,
        modal=name in _MODAL,
    )
    return found
