"""Calls that query a tensor: sizes are returned as symbolic integers, values leave torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from netopt.axes.layout import freeze
from netopt.axes.tracing.calls.registry import call_rule, query
from netopt.symbolic import Shape, plain

if TYPE_CHECKING:
    from netopt.axes.tracing.sizes import SizeTracer


@query("__get__")
def properties(tracer: SizeTracer, function: Any, result: Any, tensor: Tensor, *args: Any) -> Any:
    """``shape`` and ``nbytes``; other properties are no sizes."""
    if isinstance(result, torch.Size):
        return size(tracer, function, result, tensor)
    is_bytes = type(result) is int and getattr(function, "__self__", None) is Tensor.nbytes
    return numel(tracer, function, result, tensor) * tensor.itemsize if is_bytes else result


@query("size")
def size(tracer: SizeTracer, function: Any, result: Any, tensor: Tensor, dim: int | None = None) -> Any:
    """All sizes of a tensor, or one."""
    dims = tracer.trace.dims(tensor)
    if isinstance(result, torch.Size):
        if len(dims) != len(result):  # other entries were put into the tensor
            return result
        return Shape([tracer.size(one, dim.layout) for one, dim in zip(result, dims, strict=True)])
    return result if dim is None else tracer.size(result, dims[int(dim)].layout)


@query("numel", "nelement")
def numel(tracer: SizeTracer, function: Any, result: Any, tensor: Tensor) -> Any:
    """The product of all sizes."""
    total: Any = 1
    for one, dim in zip(tensor.shape, tracer.trace.dims(tensor), strict=True):
        total = total * tracer.size(one, dim.layout)
    return total


@query("stride")
def stride(tracer: SizeTracer, function: Any, result: Any, tensor: Tensor, dim: int | None = None) -> Any:
    """Steps through dense memory are products of the sizes of what lies further in; others are numbers."""
    dims, strides = tracer.trace.dims(tensor), tensor.stride()
    steps: list[Any] = list(strides)
    inner: Any = 1
    for at in sorted(range(len(dims)), key=lambda at: (strides[at], dims[at].size)):
        if strides[at] == plain(inner):
            steps[at] = inner
            inner = inner * tracer.size(dims[at].size, dims[at].layout)
        elif strides[at] > 1 and dims[at].size > 1:
            tracer.note_sizes(tracer.trace.dims(tensor if tensor._base is None else tensor._base))
            return result
    return tuple(steps) if dim is None else steps[int(dim)]


@query("__len__")
def length(tracer: SizeTracer, function: Any, result: Any, tensor: Tensor) -> Any:
    """``len`` returns a plain integer, which the code may compute with."""
    tracer.note_sizes(tracer.trace.dims(tensor)[:1])
    return result


@query("storage_offset")
def storage_offset(tracer: SizeTracer, function: Any, result: Any, tensor: Tensor) -> Any:
    """An offset may be any sum of products of sizes."""
    tracer.note_sizes(tracer.trace.dims(tensor))
    return result


@call_rule("data_ptr")
def address(tracer: SizeTracer, result: Any, tensor: Tensor, *args: Any, **kwargs: Any) -> None:
    """The values leave torch, so that what is done with them cannot be seen."""
    tracer.trace.by_value = True
    tracer.trace.reach([tensor])


@call_rule("numpy", "tolist", "__array__")
def values(tracer: SizeTracer, result: Any, tensor: Tensor, *args: Any, **kwargs: Any) -> None:
    """As many values leave torch as there are neurons, and may come back as if they came from outside."""
    address(tracer, result, tensor)
    for dim in tracer.trace.dims(tensor):
        freeze(dim.layout, f"leaves torch at {tracer.trace.where()}")
