"""Normalisation layers: a scale and a shift for each channel, statistics over the others or over the channels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from netopt.axes.layout import Atom
from netopt.axes.operation import Dim, Dims, Operation, rows, rule


def _rest(op: Operation) -> tuple[Dims, ...]:
    return tuple([Dim(Atom(size)) for size in out.shape] for out in op.out[1:])


def _per_channel(op: Operation, channel: Dim, tensors: Sequence[Any]) -> None:
    for tensor in tensors:
        if isinstance(tensor, Tensor) and tensor.dim() == 1 and tensor.numel() == channel.size:
            op.same(op.dims(tensor)[0], channel)


def _affine_zero(op: Operation, weight: Any, bias: Any) -> bool:
    """Whether a masked neuron's scale and shift are both zero."""
    terms = [tensor for tensor in (weight, bias) if isinstance(tensor, Tensor)]
    return isinstance(weight, Tensor) and all(op.dims(tensor)[0].zero for tensor in terms if tensor.dim())


@rule(
    "aten::native_batch_norm",
    "aten::_native_batch_norm_legit_no_training",
    "aten::_native_batch_norm_legit",
    "aten::batch_norm",
    "aten::cudnn_batch_norm",
    "aten::miopen_batch_norm",
    "aten::mkldnn_batch_norm",
    "aten::_batch_norm_with_update",
    "aten::_batch_norm_no_update",
    "aten::batch_norm_elemt",
    "aten::_native_batch_norm_legit_functional",
)
def batch_norm(op: Operation, tensor: Tensor, weight: Any, bias: Any, *stats: Any, **kwargs: Any) -> Any:
    """Statistics over everything but dimension 1, taken of this very tensor in training or where none are kept."""
    dims = list(op.dims(tensor))
    op.inexact([dims[0], *dims[2:]], "is normalised over by batch_norm")
    _per_channel(op, dims[1], [weight, bias, *stats])
    if weight is None:
        running = [stat for stat in (bias, *stats[:1]) if isinstance(stat, Tensor)]
        zero = dims[1].zero and all(op.dims(stat)[0].zero for stat in running)
    else:
        zero = _affine_zero(op, weight, bias)
    dims = [Dim(dim.layout, zero and index == 1) for index, dim in enumerate(dims)]
    if isinstance(op.out, Tensor):
        return dims
    extra = tuple(
        [dims[1]] if out.dim() == 1 and out.numel() == dims[1].size else [Dim(Atom(size)) for size in out.shape]
        for out in op.out[1:]
    )
    return (dims, *extra)


@rule("aten::native_layer_norm", "aten::layer_norm", "aten::_fused_rms_norm", "aten::rms_norm")
def layer_norm(
    op: Operation, tensor: Tensor, shape: Sequence[int], weight: Any = None, bias: Any = None, *rest: Any
) -> Any:
    """Statistics over the last dimensions."""
    dims = list(op.dims(tensor))
    start = len(dims) - len(shape)
    name = op.short.removeprefix("native_")  # as the user's code calls it
    op.inexact(dims[start:], f"is normalised over by {name}")
    terms = [one for one in (weight, bias) if isinstance(one, Tensor)]
    if isinstance(bias, Tensor):
        dims[:start] = [Dim(dim.layout) for dim in dims[:start]]
    for index in range(start, len(dims)):
        for term in terms:
            op.same(op.dims(term)[index - start], dims[index])
        zero = all(op.dims(term)[index - start].zero for term in terms) if terms else dims[index].zero
        dims[index] = Dim(dims[index].layout, zero and (isinstance(weight, Tensor) or "rms" in op.name))
    return dims if isinstance(op.out, Tensor) else (dims, *_rest(op))


@rule("aten::native_group_norm", "aten::group_norm")
def group_norm(
    op: Operation, tensor: Tensor, weight: Any, bias: Any, n: int, c: int, hxw: int, groups: int, eps: float
) -> Any:
    """Statistics over the channels of a group: whole groups may go exactly, channels within them not."""
    dims = list(op.dims(tensor))
    halves = rows(dims[1], groups) if groups > 1 else (None, dims[1])
    if halves is None:
        op.freeze(dims[1], "is cut into groups across the boundaries of its parts")
    else:
        op.inexact([halves[1], *dims[2:]], "is normalised over by group_norm")
        op.trace.groups = halves[0].layout if halves[0] is not None else None
    _per_channel(op, dims[1], [weight, bias])
    zero = _affine_zero(op, weight, bias)
    dims = [Dim(dim.layout, zero and index == 1) for index, dim in enumerate(dims)]
    return (dims, *_rest(op))


@rule("aten::_weight_norm_interface", "aten::_weight_norm")
def weight_norm(op: Operation, v: Tensor, g: Tensor, dim: int = 0) -> Any:
    """A weight scaled to a length, ``g v / |v|``, along all dimensions but one."""
    dims, lengths = op.dims(v), op.dims(g)
    for index, one in enumerate(dims):
        if index == dim % len(dims):
            if lengths and lengths[index if len(lengths) > 1 else 0].size == one.size:
                op.same(one, lengths[index if len(lengths) > 1 else 0])
        elif one.size > 1:
            op.inexact(one, "mixes weights: a weight is normalised over it")
    return dims if isinstance(op.out, Tensor) else (dims, [Dim(one.layout, False) for one in lengths])


@rule("aten::renorm")
def renorm(op: Operation, tensor: Tensor, p: Any, dim: int, maxnorm: Any) -> Dims:
    """Each slice along ``dim`` brought to a length."""
    dims = op.dims(tensor)
    op.inexact([one for index, one in enumerate(dims) if index != dim % len(dims)], "is normalised over by renorm")
    return dims
