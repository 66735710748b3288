"""Fake quantisation: numbers are rounded to a grid that holds zero, with one scale for all or one a channel."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from netopt.axes.operation import Dim, Dims, Operation, rule


@rule(
    "aten::fake_quantize_per_tensor_affine",
    "aten::fake_quantize_per_tensor_affine_cachemask",
    "aten::_fake_quantize_per_tensor_affine_cachemask_tensor_qparams",
    "aten::_fake_quantize_learnable_per_tensor_affine",
)
def per_tensor(op: Operation, tensor: Tensor, *args: Any) -> Any:
    """One scale for all."""
    return _rounded(op, op.dims(tensor))


@rule(
    "aten::fake_quantize_per_channel_affine",
    "aten::fake_quantize_per_channel_affine_cachemask",
    "aten::_fake_quantize_learnable_per_channel_affine",
)
def per_channel(op: Operation, tensor: Tensor, scale: Tensor, zero_point: Tensor, axis: int, *args: Any) -> Any:
    """One scale for each position of a dimension."""
    dims = op.dims(tensor)
    for one in (scale, zero_point):
        op.same(op.dims(one)[0], dims[axis])
    return _rounded(op, dims)


@rule("aten::_fused_moving_avg_obs_fq_helper", "aten::_fused_moving_avg_obs_fq_helper_functional")
def observed(
    op: Operation,
    tensor: Tensor,
    observes: Tensor,
    rounds: Tensor,
    lowest: Tensor,
    highest: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    constant: float,
    first: int,
    last: int,
    axis: int,
    is_per_channel: bool = False,
    is_symmetric: bool = False,
) -> Any:
    """The range seen so far, of all or of each channel, sets the scale; it always holds zero, as a masked neuron is."""
    dims = op.dims(tensor)
    for one in (lowest, highest, scale, zero_point) if is_per_channel else ():
        known = op.dims(one)
        if known and known[0].size == dims[axis].size:  # else it takes its size here
            op.same(known[0], dims[axis])
    return _rounded(op, dims)


def _rounded(op: Operation, dims: Dims) -> Any:
    """The same dimensions; beside the numbers, a mask tells which of them lay in range."""
    return dims if isinstance(op.out, Tensor) else (dims, *([Dim(dim.layout) for dim in dims] for _ in op.out[1:2]))
