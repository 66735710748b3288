"""Convolutions: channels are contracted group by group; kernels and pixels stay as they are."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from netopt.axes.layout import Atom
from netopt.axes.operation import Dim, Dims, Operation, merge, rows, rule
from netopt.axes.rules.contraction import biased

_SPATIAL = "is a spatial dimension of a convolution"


@rule(
    "aten::convolution",
    "aten::_convolution",
    "aten::mkldnn_convolution",
    "aten::cudnn_convolution",
    "aten::convolution_overrideable",
    "aten::_slow_conv2d_forward",
)
def convolution(
    op: Operation,
    tensor: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Any = None,
    padding: Any = None,
    dilation: Any = None,
    transposed: bool = False,
    output_padding: Any = None,
    groups: int = 1,
    *rest: Any,
) -> Dims:
    """Channels in ``groups``, each contracted with its own part of the kernel."""
    dims, kernel = op.dims(tensor), op.dims(weight)
    channel = len(dims) - len(kernel) + 1
    op.freeze(kernel[2:], "is a dimension of a kernel")
    op.trace.kernels.extend([layout for layout, _ in kernel[2:]])
    if groups == 1:
        made, read = (kernel[1], kernel[0]) if transposed else (kernel[0], kernel[1])
        op.summed(dims[channel], read)
    else:
        made, read = _grouped(op, dims[channel], kernel, groups, transposed=transposed)
    op.contract(weight, [read], [made])
    out = biased(op, [made], bias)[0]
    spatial = []
    called = op.short.startswith("conv")  # others take their arguments in another order
    for index, (dim, (edge, _), size) in enumerate(
        zip(dims[channel + 1 :], kernel[2:], op.out.shape[channel + 1 :], strict=True)
    ):
        alone = edge.size == 1 and called and _at(stride, index) == 1 and not _at(padding, index)
        if alone and dim[0].size == size:
            spatial.append(Dim(dim[0], dim[1] and bias is None))  # each position by itself
        else:
            op.freeze(dim, _SPATIAL)
            spatial.append(op.frozen(size, _SPATIAL))
    return [*dims[:channel], out, *spatial]


@rule("aten::conv1d", "aten::conv2d", "aten::conv3d")
def convolution_called(
    op: Operation,
    tensor: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Dims:
    """A convolution as the user's code calls it."""
    return convolution(op, tensor, weight, bias, stride, padding, dilation, False, 0, groups)


@rule("aten::conv_transpose1d", "aten::conv_transpose2d", "aten::conv_transpose3d")
def transposed_called(
    op: Operation,
    tensor: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    output_padding: Any = 0,
    groups: int = 1,
    dilation: Any = 1,
) -> Dims:
    """A transposed convolution as the user's code calls it."""
    return convolution(op, tensor, weight, bias, stride, padding, dilation, True, output_padding, groups)


@rule("torchvision::deform_conv2d")
def deformable(
    op: Operation, tensor: Tensor, weight: Tensor, offset: Tensor, mask: Tensor, bias: Tensor, *rest: Any
) -> Dims:
    """A convolution that moves each entry of its kernel, by the offsets of a second tensor, weighted by a third."""
    dims, kernel = op.dims(tensor), op.dims(weight)
    groups = rest[6]  # after strides, paddings and dilations, each in two directions
    op.freeze(kernel[2:], "is a dimension of a kernel")
    op.trace.kernels.extend(dim.layout for dim in kernel[2:])
    if groups == 1:
        made, read = kernel[0], kernel[1]
        op.summed(dims[1], read)
    else:
        made, read = _grouped(op, dims[1], kernel, groups, transposed=False)
    op.contract(weight, [read], [made])
    op.freeze([*dims[2:], *op.dims(offset)[1:], *op.dims(mask)[1:]], _SPATIAL)
    return [dims[0], biased(op, [made], bias)[0], *(op.frozen(size, _SPATIAL) for size in op.out.shape[2:])]


@rule("aten::convolution_backward")
def convolution_gradient(
    op: Operation, grad: Tensor, tensor: Tensor, weight: Tensor, sizes: Any = None, *rest: Any
) -> Any:
    """The gradient that comes in, contracted over the channels made; for a forward that takes gradients itself."""
    known, dims, kernel = op.dims(grad), list(op.dims(tensor)), op.dims(weight)
    channel = len(dims) - len(kernel) + 1
    transposed, groups = bool(rest[3]), int(rest[5])  # stride, padding, dilation, transposed, output padding, groups
    read, made = (kernel[0], kernel[1]) if transposed else (kernel[1], kernel[0])
    if groups == 1:
        op.summed(known[channel], made)
        dims[channel] = Dim(dims[channel].layout, read.zero)
    else:
        op.freeze([known[channel], dims[channel]], "is cut into groups")
    return dims, kernel, [known[channel]]


def _at(given: Any, index: int) -> Any:
    """One of several numbers, or the one for all dimensions."""
    return given[min(index, len(given) - 1)] if isinstance(given, (list, tuple)) and given else given


def _grouped(op: Operation, channels: Dim, kernel: Dims, groups: int, *, transposed: bool) -> tuple[Dim, Dim]:
    """What a grouped convolution makes and reads: in both, the groups are the rows of a product."""
    group = Dim(Atom(groups), True)
    op.trace.groups = group.layout
    first = rows(kernel[0], groups)
    if first is None:
        op.freeze([*kernel[:2], channels], "is cut into groups across the boundaries of its parts")
        return (
            (op.frozen(kernel[1].size * groups, "is cut into groups"), kernel[0])
            if transposed
            else (kernel[0], channels)
        )
    op.same(first[0], group)
    group = Dim(group.layout, kernel[0].zero)
    both = merge([group, kernel[1]])
    made, read = (both, kernel[0]) if transposed else (kernel[0], both)
    op.summed(channels, read)
    return made, read
