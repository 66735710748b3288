"""Calls that make or view a tensor by sizes: each integer is the size of a dimension of the result."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from netopt.axes.layout import Product, freeze, resolve
from netopt.axes.tracing.calls.registry import call_rule, integers_are_sizes
from netopt.symbolic import SYMBOLIC, SymbolicInt, plain

if TYPE_CHECKING:
    from netopt.axes.tracing.sizes import SizeTracer

integers_are_sizes("repeat", "tile", "repeat_interleave", "transpose", "permute", "unsqueeze", "flatten", "movedim")
integers_are_sizes("swapaxes", "sum", "mean", "softmax", "log_softmax", "cumsum", "argmax", "amax", "max", "min")
integers_are_sizes("cat", "stack", "unbind", "index_select", "gather", "topk", "roll", "flip", "tril", "triu", "unfold")
integers_are_sizes("eye", "linspace", "randint", "randperm", "bincount", "dropout", "glu", "norm", "interpolate")
integers_are_sizes("adaptive_avg_pool2d")


@call_rule("view", "reshape", "expand", "broadcast_to", "_unsafe_view", "new_zeros", "new_ones", "new_empty")
def viewed(tracer: SizeTracer, result: Any, *args: Any, **kwargs: Any) -> None:
    """A tensor, then sizes."""
    _sizes(tracer, result, args[1:], kwargs, "view")


@call_rule("zeros", "ones", "empty", "rand", "randn")
def made(tracer: SizeTracer, result: Any, *args: Any, **kwargs: Any) -> None:
    """Sizes alone."""
    _sizes(tracer, result, args, kwargs, "a new tensor")


@call_rule("full")
def full(tracer: SizeTracer, result: Any, size: Any, fill_value: Any, **kwargs: Any) -> None:
    """Sizes and a value."""
    _sizes(tracer, result, (size,), kwargs, "a new tensor")
    tracer.note_numbers((fill_value,), {}, SYMBOLIC)


@call_rule("new_full")
def new_full(tracer: SizeTracer, result: Any, tensor: Tensor, size: Any, fill_value: Any, **kwargs: Any) -> None:
    """A tensor, then sizes and a value."""
    full(tracer, result, size, fill_value)


def _sizes(tracer: SizeTracer, result: Any, sizes: Sequence[Any], kwargs: Any, name: str) -> None:
    """States that these are the sizes of the result, where they are sizes: ``view`` also takes a dtype."""
    sizes = sizes or kwargs.get("size", kwargs.get("shape", ()))
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
                tracer.equate(size, dim.layout, name)


@call_rule("view_as", "reshape_as", "expand_as")
def same_sizes(tracer: SizeTracer, result: Any, tensor: Tensor, other: Tensor) -> None:
    """The result is as large as another tensor."""
    for made, given in zip(tracer.trace.dims(result), tracer.trace.dims(other), strict=True):
        if resolve(made.layout) is not resolve(given.layout):
            tracer.equate(tracer.number(given.layout), made.layout, "a shape like another's")


@call_rule("one_hot")
def one_hot(tracer: SizeTracer, result: Any, tensor: Tensor, num_classes: int = -1) -> None:
    """The last dimension is the number of classes, given or found by value."""
    tracer.equate(num_classes, tracer.trace.dims(result)[-1].layout, "one_hot")


@call_rule("unflatten")
def unflatten(tracer: SizeTracer, result: Any, tensor: Tensor, dim: int, *given: Any, **kwargs: Any) -> None:
    """One dimension as several."""
    sizes: Any = given or kwargs["sizes"]
    sizes = sizes[0] if isinstance(sizes[0], (tuple, list)) else sizes
    for size, made in zip(sizes, tracer.trace.dims(result)[int(dim) % tensor.dim() :], strict=False):
        tracer.equate(size, made.layout, "unflatten")


@call_rule("squeeze", "squeeze_")
def squeeze(tracer: SizeTracer, result: Any, input: Tensor, dim: Any = None) -> None:
    """A dimension that is kept because it is larger than one must stay so."""
    dims = tracer.trace.dims(input)
    for at in range(len(dims)) if dim is None else dim if isinstance(dim, (tuple, list)) else (dim,):
        if dims and dims[at].size > 1:
            tracer.constraints.guard(operator.gt, tracer.number(dims[at].layout), 1, True)


@call_rule("pad")
def pad(tracer: SizeTracer, result: Any, input: Tensor, pad: Any, *args: Any, **kwargs: Any) -> None:
    """What is padded stays, so that a computed amount must stay as large."""
    tracer.keep(pad)


@call_rule("arange")
def arange(tracer: SizeTracer, result: Any, *args: Any, **kwargs: Any) -> None:
    """As many positions as there are steps."""
    numbers = [value for value in args if isinstance(value, int)]
    if len(numbers) == 1:
        start, stop, step = 0, numbers[0], 1
    else:
        stop: Any
        start, stop = (numbers[0], numbers[1]) if numbers else (kwargs.get("start", 0), kwargs.get("end"))
        step = numbers[2] if len(numbers) > 2 else kwargs.get("step", 1)
    layout = tracer.trace.dims(result)[0].layout
    if all(isinstance(value, int) for value in (start, stop, step)):
        span = stop if plain(start) == 0 and not isinstance(start, SymbolicInt) else stop - start
        length = span if plain(step) == 1 else (span + (step - 1)) // step
        tracer.equate(length, layout, "arange")
    else:
        freeze(layout, f"has a size that arange computes at {tracer.trace.where()}")


@call_rule("as_strided")
def as_strided(tracer: SizeTracer, result: Any, input: Tensor, *args: Any, **kwargs: Any) -> None:
    """Strides are products of sizes."""
    for dim in tracer.trace.dims(input):
        freeze(dim.layout, f"is viewed by strides at {tracer.trace.where()}")


@call_rule("view_as_complex")
def view_as_complex(tracer: SizeTracer, result: Any, input: Tensor) -> None:
    """Pairs of a part of a tensor are read in place: the rows they lie in must stay of even length."""
    base = input._base
    if base is None or not base.dim():
        return
    row = resolve(tracer.trace.dims(base)[-1].layout)
    row = row.parts[-1] if isinstance(row, Product) else row
    if row.size % 2 == 0:
        tracer.constraints.guard(operator.eq, tracer.number(row) % 2, 0, True)
