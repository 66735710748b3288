"""Losses a forward computes itself: entries are compared one by one, then summed or averaged over."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from netopt.axes.layout import LOOKED_UP, Atom
from netopt.axes.operation import Dim, Dims, Operation, rule
from netopt.axes.rules.pointwise import aligned, pointwise
from netopt.axes.rules.reduction import reduced_over

_NONE, _MEAN = 0, 1


@rule("aten::mse_loss", "aten::smooth_l1_loss", "aten::huber_loss")
def distance(op: Operation, tensor: Tensor, target: Tensor, reduction: int = _MEAN, *rest: Any) -> Dims:
    """Nothing where both are zero."""
    return _compared(op, [tensor, target], reduction, zero=True)


@rule("aten::binary_cross_entropy", "aten::binary_cross_entropy_with_logits")
def likelihood(op: Operation, tensor: Tensor, target: Tensor, *rest: Any) -> Dims:
    """Something everywhere; weights may be given for some positions."""
    given = [one for one in rest if isinstance(one, Tensor)]
    reduction = next((one for one in rest if isinstance(one, int)), _MEAN)
    return _compared(op, [tensor, target, *given], reduction, zero=False)


@rule("aten::soft_margin_loss")
def margin(op: Operation, tensor: Tensor, target: Tensor, reduction: int = _MEAN) -> Dims:
    """Something everywhere."""
    return _compared(op, [tensor, target], reduction, zero=False)


def _average(op: Operation, reduction: int) -> str | None:
    return f"is averaged over by {op.short}" if reduction == _MEAN else None


def _compared(op: Operation, tensors: list[Tensor], reduction: int, *, zero: bool) -> Dims:
    rank = max(tensor.dim() for tensor in tensors)
    if reduction == _NONE:
        return pointwise(op, tensors, lambda zeros: zero and all(zeros[:2]))
    for common, zeros in aligned(op, tensors, rank):
        if common is not None:
            reduced_over(op, Dim(common.layout, zero and all(zeros[:2])), _average(op, reduction))
    return []


@rule("aten::nll_loss_forward", "aten::nll_loss2d_forward", "aten::nll_loss_nd")
def class_likelihood(
    op: Operation, tensor: Tensor, target: Tensor, weight: Any = None, reduction: int = _MEAN, *rest: Any
) -> Any:
    """The entry of one class is taken by its number, at every position."""
    dims = list(op.dims(tensor))
    classes = dims.pop(1 if len(dims) > 1 else 0)
    op.freeze(classes, LOOKED_UP)
    if isinstance(weight, Tensor):
        op.same(op.dims(weight)[0], classes)
    for one, other in zip(dims, op.dims(target), strict=False):
        op.same(one, other)
        if reduction != _NONE:
            reduced_over(op, Dim(one.layout), _average(op, reduction))
    return [Dim(one.layout) for one in dims] if reduction == _NONE else [], None


@rule("aten::multi_margin_loss", "aten::multilabel_margin_loss_forward", "aten::_ctc_loss", "aten::_cudnn_ctc_loss")
def by_class(op: Operation, *tensors: Any, **kwargs: Any) -> Any:
    """Classes, and positions along a sequence, count by their number."""
    for tensor in tensors:
        if isinstance(tensor, Tensor):
            op.freeze(op.dims(tensor), f"is counted by {op.short}")
    outs = op.out if isinstance(op.out, (tuple, list)) else (op.out,)
    return tuple([Dim(Atom(size)) for size in one.shape] for one in outs)
