"""Operations over pixels: pooling, resizing, padding, patches. Channels pass; spatial dimensions stay."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves

from netopt.axes.operation import Dim, Dims, Operation, join, merge, rows, rule

_POOLS = """adaptive_avg_pool# _adaptive_avg_pool# adaptive_max_pool# avg_pool# max_pool# max_pool#_with_indices
fractional_max_pool# mkldnn_max_pool# upsample_nearest# _upsample_nearest_exact# upsample_bilinear#
upsample_bicubic# upsample_linear# upsample_trilinear# _upsample_bilinear#_aa _upsample_bicubic#_aa reflection_pad#
replication_pad# max_unpool# grid_sampler_# lp_pool# quantized_max_pool# _upsample_lanczos#_aa"""
_RANK = {"1d": 1, "2d": 2, "3d": 3}


def _spatial_names() -> tuple[str, ...]:
    return tuple(f"aten::{name.replace('#', rank)}" for name in _POOLS.split() for rank in _RANK)


@rule(*_spatial_names())
def over_pixels(op: Operation, tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
    """The last dimensions are pixels; those before pass."""
    spatial = next(rank for mark, rank in _RANK.items() if mark in op.name)
    dims = op.dims(tensor)
    passing = dims[: len(dims) - spatial]
    why = f"is a spatial dimension of {op.short}"
    op.freeze(dims[len(passing) :], why)
    for other in args:
        if isinstance(other, Tensor):
            numbers = op.dims(other)
            op.freeze(numbers[len(passing) if "unpool" in op.name else 0 :], why)
            if "unpool" in op.name:
                for one, number in zip(passing, numbers, strict=False):
                    op.same(one, number)
    return tuple(
        [
            *(Dim(dim.layout, dim.zero and out.is_floating_point()) for dim in passing),  # else they number pixels
            *(op.frozen(size, why) for size in out.shape[len(passing) :]),
        ]
        for out in tree_leaves(op.out)
        if isinstance(out, Tensor)
    )


@rule("torchvision::roi_align", "torchvision::roi_pool")
def over_regions(op: Operation, tensor: Tensor, regions: Tensor, *args: Any) -> Any:
    """``[n, c, h, w]`` and boxes ``[k, 5]``: the pixels in each box, ``[k, c, ...]``."""
    dims, boxes = op.dims(tensor), op.dims(regions)
    why = f"is a spatial dimension of {op.short}"
    op.freeze(dims[2:], why)
    op.freeze(boxes[1:], "is a box")
    return tuple(
        [Dim(boxes[0].layout), dims[1], *(op.frozen(size, why) for size in out.shape[2:])]
        for out in tree_leaves(op.out)
        if isinstance(out, Tensor)
    )


@rule("aten::constant_pad_nd", "aten::pad", "aten::_pad_enum")
def constant_pad(op: Operation, tensor: Tensor, pad: Sequence[int], *args: Any, **kwargs: Any) -> Dims:
    """New positions before and behind a dimension, from the last one on; negative ones cut."""
    value = next((one for one in args if isinstance(one, (int, float))), kwargs.get("value"))
    dims = [Dim(dim.layout, dim.zero and not value) for dim in op.dims(tensor)]
    why = "is padding"
    for index in range(len(pad) // 2):
        left, right = int(pad[2 * index]), int(pad[2 * index + 1])
        at = len(dims) - 1 - index
        if left < 0 or right < 0:
            op.freeze(dims[at], "is cut by a negative padding")
            dims[at] = op.frozen(op.out.shape[at], "is cut by a negative padding")
        elif left or right:
            before = [Dim(op.frozen(left, why).layout, True)] if left else []
            behind = [Dim(op.frozen(right, why).layout, True)] if right else []
            dims[at] = join([*before, dims[at], *behind])
    return dims


@rule("aten::pixel_shuffle")
def pixel_shuffle(op: Operation, tensor: Tensor, factor: int) -> Dims:
    """``[c r r, h, w] -> [c, h r, w r]``."""
    dims = op.dims(tensor)
    op.freeze(dims[-2:], "is a spatial dimension of pixel_shuffle")
    halves = rows(dims[-3], dims[-3].size // factor**2)
    why = "becomes pixels"
    if halves is None:
        op.freeze(dims[-3], why)
        halves = op.frozen(dims[-3].size // factor**2, why), None
    else:
        op.freeze(halves[1], why)
    return [*dims[:-3], halves[0], *(op.frozen(size, why) for size in op.out.shape[-2:])]


@rule("aten::pixel_unshuffle")
def pixel_unshuffle(op: Operation, tensor: Tensor, factor: int) -> Dims:
    """``[c, h r, w r] -> [c r r, h, w]``."""
    dims = op.dims(tensor)
    why = "comes from pixels"
    op.freeze(dims[-2:], "is a spatial dimension of pixel_unshuffle")
    channels = merge([dims[-3], Dim(op.frozen(factor**2, why).layout, True)])
    return [*dims[:-3], channels, *(op.frozen(size, why) for size in op.out.shape[-2:])]


@rule("aten::channel_shuffle", "aten::native_channel_shuffle")
def channel_shuffle(op: Operation, tensor: Tensor, groups: int) -> Dims:
    """``[g c] -> [c g]``."""
    dims = list(op.dims(tensor))
    halves = rows(dims[1], groups)
    if halves is None:
        op.freeze(dims[1], "is cut into groups across the boundaries of its parts")
    else:
        op.trace.groups = halves[0].layout
        dims[1] = merge([halves[1], halves[0]])
    return dims


@rule("aten::im2col")
def im2col(op: Operation, tensor: Tensor, kernel: Sequence[int], *args: Any) -> Dims:
    """``[n, c, h, w] -> [n, c k, l]``: the pixels of a patch lie behind each channel."""
    dims = op.dims(tensor)
    why = "is a spatial dimension of unfold"
    op.freeze(dims[-2:], why)
    patch = Dim(op.frozen(kernel[0] * kernel[1], why).layout, True)
    return [*dims[:-3], merge([dims[-3], patch]), op.frozen(op.out.shape[-1], why)]


@rule("aten::col2im")
def col2im(op: Operation, tensor: Tensor, size: Any, kernel: Sequence[int], *args: Any) -> Dims:
    """``[n, c k, l] -> [n, c, h, w]``."""
    dims = op.dims(tensor)
    why = "is a spatial dimension of fold"
    op.freeze(dims[-1], why)
    halves = rows(dims[-2], dims[-2].size // (kernel[0] * kernel[1]))
    if halves is None:
        op.freeze(dims[-2], why)
        channels = op.frozen(op.out.shape[-3], why)
    else:
        op.freeze(halves[1], why)
        channels = halves[0]
    return [*dims[:-2], channels, *(op.frozen(one, why) for one in op.out.shape[-2:])]


@rule("aten::unfold", "aten::unfold_copy")
def unfold(op: Operation, tensor: Tensor, dim: int, size: int, step: int) -> Dims:
    """Windows along one dimension."""
    dims = list(op.dims(tensor))
    why = "is read in windows"
    if dims:
        at = dim % len(dims)
        op.freeze(dims[at], why)
        dims[at] = op.frozen(op.out.shape[at], why)
    return [*dims, op.frozen(op.out.shape[-1], why)]


@rule("aten::unfold_backward")
def unfold_gradient(op: Operation, windows: Tensor, sizes: Sequence[int], dim: int, *args: Any) -> Dims:
    """Windows added up where they lie."""
    *dims, inside = op.dims(windows)
    why = "is read in windows"
    if len(dims) != op.out.dim() or not dims:  # which torch takes all the same
        op.freeze([*dims, inside], why)
        return [op.frozen(size, why) for size in op.out.shape]
    at = dim % len(dims)
    op.freeze([dims[at], inside], why)
    dims[at] = op.frozen(op.out.shape[at], why)
    return dims


@rule("aten::affine_grid_generator")
def affine_grid(op: Operation, theta: Tensor, *args: Any) -> Dims:
    """A grid of pixels from matrices."""
    dims = op.dims(theta)
    op.freeze(dims[1:], "is a matrix of coordinates")
    return [dims[0], *(op.frozen(size, "is a grid of pixels") for size in op.out.shape[1:])]
