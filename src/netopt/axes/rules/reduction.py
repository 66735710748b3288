"""Operations that reduce dimensions away.

Summing over a neuron that is zero is the same as not having it; a mean, a maximum or a variance is not.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from netopt.axes.layout import Atom
from netopt.axes.operation import Dim, Dims, Operation, rule
from netopt.axes.rules.pointwise import aligned, pointwise


def reduce(op: Operation, tensor: Tensor, dim: Any, why: str | None) -> Any:
    """The dimensions left after reducing over ``dim`` (all, if there is none).

    Args:
        op: The operation.
        tensor: What is reduced.
        dim: A dimension, several, or ``None`` or ``()`` for all.
        why: Why a reduced dimension is inexact although masked neurons are zero, or ``None``.
    """
    dims = op.dims(tensor)
    rank = len(dims)
    gone = _gone(rank, dim)
    for index in gone:
        if dims[index].size > 1 and why is None and op.is_weight(tensor):
            op.inexact(dims[index], f"mixes weights: {op.short} is taken over it")
        else:
            reduced_over(op, dims[index], why)
    answers = []
    for out in tree_leaves(op.out):
        if isinstance(out, Tensor):
            if out.dim() == rank:
                answers.append([Dim(Atom(1)) if index in gone else one for index, one in enumerate(dims)])
            else:
                answers.append([one for index, one in enumerate(dims) if index not in gone])
    return tuple(answers)


def _gone(rank: int, dim: Any) -> set[int]:
    chosen = [dim] if isinstance(dim, int) else dim
    return {one % rank for one in chosen} if chosen and rank else set(range(rank))


def reduced_over(op: Operation, dim: Dim, why: str | None) -> None:
    """States that a dimension is summed over or, for the reason ``why``, reduced by more than a sum."""
    if dim.size > 1 and why is not None:
        op.inexact(dim, why)
    elif dim.size > 1 and not dim.zero:
        op.inexact(dim, f"is reduced by {op.short} where a masked neuron need not be zero")


@rule("aten::sum", "aten::nansum", "aten::count_nonzero", "aten::any", "aten::_is_any_true")
def summed(op: Operation, tensor: Tensor, dim: Any = None, *args: Any, **kwargs: Any) -> Any:
    """Reductions to which zeros add nothing."""
    return reduce(op, tensor, dim, None)


@rule("aten::norm", "aten::linalg_vector_norm")
def norm(op: Operation, tensor: Tensor, order: Any = 2, dim: Any = None, *args: Any, **kwargs: Any) -> Any:
    """A length; of a negative order it is that of the smallest entries."""
    smallest = isinstance(order, (int, float)) and order < 0
    return reduce(op, tensor, dim, f"is reduced by {op.short} of a negative order" if smallest else None)


@rule("aten::dist")
def dist(op: Operation, left: Tensor, right: Tensor, order: Any = 2) -> Dims:
    """The length of a difference, over all dimensions."""
    why = "is reduced by dist of a negative order" if order < 0 else None
    for common, zeros in aligned(op, [left, right], max(left.dim(), right.dim())):
        if common is not None:
            reduced_over(op, Dim(common.layout, all(zeros)), why)
    return []


@rule("aten::segment_reduce")
def segment_reduce(op: Operation, data: Tensor, how: str, *, axis: int = 0, **kwargs: Any) -> Dims:
    """Runs of one dimension reduced, of given lengths; a run may be empty, which is zero for a sum alone."""
    dims = list(op.dims(data))
    why = "is cut into segments"
    op.freeze(dims[axis], why)
    for one in kwargs.values():
        if isinstance(one, Tensor):
            op.freeze(op.dims(one), why)
    is_sum = how == "sum" and not kwargs.get("initial")
    return [
        op.frozen(op.out.shape[axis], why) if index == axis else Dim(dim.layout, dim.zero and is_sum)
        for index, dim in enumerate(dims)
    ]


@rule(
    "aten::mean",
    "aten::nanmean",
    "aten::var",
    "aten::std",
    "aten::var_mean",
    "aten::std_mean",
    "aten::logsumexp",
    "aten::prod",
    "aten::amax",
    "aten::amin",
    "aten::aminmax",
    "aten::all",
    "aten::_is_all_true",
    "aten::argmax",
    "aten::argmin",
    "aten::median",
    "aten::nanmedian",
    "aten::mode",
)
def whole(op: Operation, tensor: Tensor, dim: Any = None, *args: Any, **kwargs: Any) -> Any:
    """Reductions whose result depends on how many positions there are, or on more than their sum."""
    dim = None if isinstance(dim, bool) else -1 if dim is None and op.short == "mode" else dim
    answer = reduce(op, tensor, dim, f"is reduced by {op.short}")
    for index, out in enumerate(tree_leaves(op.out)):
        if out.dtype == torch.int64 and op.short != "aminmax" and (index or op.short.startswith("arg")):
            for gone in _gone(tensor.dim(), dim):
                op.numbered(index, op.dims(tensor)[gone])
    return tuple([Dim(one.layout, False) for one in dims] for dims in answer)


@rule("aten::max", "aten::min")
def extremum(op: Operation, tensor: Tensor, other: Any = None, *args: Any, **kwargs: Any) -> Any:
    """The largest along a dimension, or of two tensors."""
    if isinstance(other, Tensor):
        return pointwise(op, [tensor, other], all)
    return whole(op, tensor, other)


@rule("aten::_softmax", "aten::_log_softmax", "aten::softmax", "aten::log_softmax", "aten::_safe_softmax")
def softmax(op: Operation, tensor: Tensor, dim: int, *args: Any, **kwargs: Any) -> Dims:
    """Normalised over one dimension."""
    dims = op.dims(tensor)
    if dims:
        op.inexact(dims[dim], f"is normalised over by {op.short}")
    return [Dim(one.layout, False) for one in dims]


@rule("aten::_softmax_backward_data", "aten::_log_softmax_backward_data")
def softmax_gradient(op: Operation, grad: Tensor, out: Tensor, dim: int, *args: Any) -> Dims:
    """Every entry along the dimension depends on all."""
    dims = op.dims(grad)
    for one, other in zip(dims, op.dims(out), strict=True):
        op.same(one, other)
    if dims:
        op.inexact(dims[dim], f"is normalised over by {op.short}")
    return [Dim(one.layout, False) for one in dims]


@rule("aten::cumsum", "aten::cumprod", "aten::logcumsumexp", "aten::cummax", "aten::cummin")
def cumulative(op: Operation, tensor: Tensor, dim: int, *args: Any, **kwargs: Any) -> Any:
    """Every position depends on those before it."""
    dims = op.dims(tensor)
    if dims:
        op.freeze(dims[dim], f"is accumulated along by {op.short}")
    answer = [Dim(one.layout, one.zero and op.short == "cumsum") for one in dims]
    return answer if isinstance(op.out, Tensor) else tuple(answer for _ in op.out)


@rule("aten::topk", "aten::sort", "aten::kthvalue", "aten::argsort", "aten::msort")
def ranked(op: Operation, tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Positions are ranked against each other."""
    dims = op.dims(tensor)
    numbers = [arg for arg in args if isinstance(arg, int) and not isinstance(arg, bool)]
    at = kwargs.get("dim", numbers[-1] if len(numbers) > (op.short in ("topk", "kthvalue")) else -1)
    if not dims:
        return (dims, dims)
    op.freeze(dims[at], f"is ranked by {op.short}")
    if op.short == "topk":
        op.plays("experts", [dims[at]])
    answers = []
    for out in tree_leaves(op.out):
        if out.dim() == len(dims):
            kept = list(dims)
            kept[at] = op.frozen(out.shape[at], f"is ranked by {op.short}")
        else:
            kept = [one for index, one in enumerate(dims) if index != at % len(dims)]
        answers.append([Dim(one.layout, False) for one in kept])
    return tuple(answers)


@rule(
    "aten::multinomial",
    "aten::histc",
    "aten::bincount",
    "aten::unique_consecutive",
    "aten::_unique2",
    "aten::nonzero",
    "aten::masked_select",
    "aten::repeat_interleave",
    "torchvision::nms",
)
def by_value(op: Operation, *tensors: Any, **kwargs: Any) -> Any:
    """The size of the result depends on values."""
    op.trace.by_value = True
    for tensor in tensors:
        if isinstance(tensor, Tensor):
            op.freeze(op.dims(tensor), f"is selected from by value, by {op.short}")
    return tuple(
        [op.frozen(size, f"is selected by value, by {op.short}") for size in leaf.shape]
        for leaf in tree_leaves(op.out)
        if isinstance(leaf, Tensor)
    )
