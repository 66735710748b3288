"""Operations that multiply and sum: the dimension summed over is shared by both operands and gone from the result."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from netopt.axes.layout import Atom
from netopt.axes.operation import Dim, Dims, Operation, merge, rule


def product_of(op: Operation, left: Tensor, right: Tensor) -> Dims:
    """``[..., m, k] x [..., k, n] -> [..., m, n]``, either operand possibly a vector."""
    a, b = op.dims(left), op.dims(right)
    inner = b[-2] if len(b) > 1 else b[0]
    op.summed(a[-1], inner)
    batch: Dims = []
    if len(a) > 2 and len(b) > 2:  # both are stacks of matrices
        for first, second in zip(a[:-2], b[:-2], strict=True):
            op.same(first, second)
            batch.append(Dim(first.layout, first.zero or second.zero))
    rows = [a[-2]] if len(a) > 1 else []
    columns = [b[-1]] if len(b) > 1 else []
    op.contract(left, [a[-1]], rows)
    op.contract(right, [inner], columns)
    if batch:
        _stacked(op, left, right, batch)
    return [*batch, *rows, *columns]


def _stacked(op: Operation, left: Tensor, right: Tensor, batch: Dims) -> None:
    """The parts dimensions play in products of stacked matrices: of activations, or of activations and experts."""
    held = next((one for one in (left, right) if op.is_member(one)), None)
    if held is not None:
        op.plays("experts", op.dims(held)[:1])
    elif left.shape[-2] > 1 and right.shape[-1] > 1:
        op.plays("heads", batch)
        op.plays("head_dim", [op.dims(left)[-1], op.dims(right)[-1]])


@rule("aten::mm", "aten::bmm", "aten::mv", "aten::dot", "aten::vdot", "aten::_int_mm")
def mm(op: Operation, left: Tensor, right: Tensor, **kwargs: Any) -> Dims:
    """A matrix product."""
    return product_of(op, left, right)


@rule("aten::addmm", "aten::baddbmm", "aten::addmv", "aten::_addmm_activation")
def addmm(op: Operation, bias: Tensor, left: Tensor, right: Tensor, **kwargs: Any) -> Dims:
    """A matrix product with a bias added, broadcast from the right."""
    return biased(op, product_of(op, left, right), bias)


def biased(op: Operation, dims: Dims, bias: Tensor | None) -> Dims:
    """``dims`` after a bias was added, aligned from the right."""
    if bias is None:
        return dims
    added = op.dims(bias)
    result = list(dims)
    for right in range(1, len(dims) + 1):
        term = added[-right] if right <= len(added) else None
        if term is not None and term.size != 1:
            op.same(dims[-right], term)
            result[-right] = Dim(dims[-right].layout, dims[-right].zero and term.zero)
        else:
            result[-right] = Dim(dims[-right].layout, False)
    return result


@rule("aten::linear")
def linear(op: Operation, tensor: Tensor, weight: Tensor, bias: Tensor | None = None) -> Dims:
    """``[..., k] x [n, k] -> [..., n]``."""
    dims, matrix = op.dims(tensor), op.dims(weight)
    op.summed(dims[-1], matrix[-1])
    if op.is_weight(tensor):
        op.contract(tensor, [dims[-1]], [merge(dims[:-1])] if len(dims) > 1 else [])
    op.contract(weight, [matrix[-1]], matrix[:-1])
    return biased(op, [*dims[:-1], *matrix[:-1]], bias)


@rule("aten::matmul")
def matmul_called(op: Operation, left: Tensor, right: Tensor) -> Dims:
    """A product of matrices as the user's code calls it: of as many on either side, or of one on the right for all."""
    a, b = op.dims(left), op.dims(right)
    if len(a) == len(b):
        return product_of(op, left, right)
    op.summed(a[-1], b[-2])
    if op.is_weight(left):
        op.contract(left, [a[-1]], [merge(a[:-1])])
    op.contract(right, [b[-2]], [b[-1]])
    return [*a[:-1], b[-1]]


@rule("aten::addbmm")
def addbmm(op: Operation, bias: Tensor, left: Tensor, right: Tensor, **kwargs: Any) -> Dims:
    """Products of stacked matrices, summed over the stack."""
    stacked, *dims = product_of(op, left, right)
    if not stacked.zero:
        op.inexact(stacked, "is summed over by addbmm where a masked neuron need not be zero")
    return biased(op, dims, bias)


@rule("aten::addr")
def addr(op: Operation, bias: Tensor, rows: Tensor, columns: Tensor, **kwargs: Any) -> Dims:
    """An outer product with a matrix added."""
    return biased(op, [*op.dims(rows), *op.dims(columns)], bias)


@rule("aten::_trilinear")
def trilinear(
    op: Operation,
    first: Tensor,
    second: Tensor,
    third: Tensor,
    expand1: Sequence[int],
    expand2: Sequence[int],
    expand3: Sequence[int],
    sumdim: Sequence[int],
    unroll_dim: int = 1,
) -> Dims:
    """Three operands, each with size-1 dimensions put in, multiplied and summed over ``sumdim``."""
    operands = []
    for tensor, places in ((first, expand1), (second, expand2), (third, expand3)):
        dims = list(op.dims(tensor))
        for place in sorted(places):
            dims.insert(place, Dim(Atom(1)))
        operands.append(dims)
    result: Dims = []
    for index in range(len(operands[0])):
        present = [dims[index] for dims in operands if dims[index].size > 1]
        for other in present[1:]:
            op.same(present[0], other)
        zero = any(dim.zero for dim in present)
        if index in sumdim:
            if present and not zero:
                op.inexact(present[0], "is summed over where a masked neuron need not be zero")
        else:
            result.append(Dim(present[0].layout, zero) if present else Dim(Atom(1)))
    op.contract(second, [operands[1][index] for index in sumdim], [])
    return result


_GROUPED_ROW = 16
"""Bytes of which the kernel of grouped products wants rows to be a multiple."""


@rule("aten::_grouped_mm")
def grouped_mm(
    op: Operation, left: Tensor, right: Tensor, offs: Tensor | None = None, *rest: Any, **kwargs: Any
) -> Dims:
    """Rows of ``left`` in groups, each multiplied with a matrix of its own: ``[t, k] x [g, k, n] -> [t, n]``."""
    a, b = op.dims(left), op.dims(right)
    op.summed(a[-1], b[-2])
    if len(b) > 2:  # a stack of matrices
        op.freeze(b[0], "is a number of groups of rows")
        op.plays("experts", b[:1])
    op.contract(right, [b[-2]], [b[-1]])
    for tensor, dims in ((left, a), (right, b)):  # the rows of both, as they lie in memory
        step = max(_GROUPED_ROW // tensor.element_size(), 1)
        op.keep_multiple(dims[-1] if tensor.stride(-1) == 1 else dims[-2], step)
    return [*a[:-1], b[-1]]


@rule("aten::_cdist_forward")
def cdist(op: Operation, left: Tensor, right: Tensor, *args: Any) -> Dims:
    """Distances between the rows of two matrices."""
    a, b = op.dims(left), op.dims(right)
    op.same(a[-1], b[-1])
    if not (a[-1].zero and b[-1].zero):
        op.inexact(a[-1], "is summed over by cdist where a masked neuron need not be zero")
    batch = [Dim(op.same(one, other), one.zero and other.zero) for one, other in zip(a[:-2], b[:-2], strict=False)]
    return [*batch, Dim(a[-2].layout), Dim(b[-2].layout)]


@rule("aten::_pdist_forward")
def pdist(op: Operation, tensor: Tensor, *args: Any) -> Dims:
    """Distances between the rows of one matrix."""
    rows, columns = op.dims(tensor)
    op.freeze(rows, "is paired by pdist")
    if not columns.zero:
        op.inexact(columns, "is summed over by pdist where a masked neuron need not be zero")
    return [op.frozen(op.out.shape[0], "is paired by pdist")]


@rule("aten::linalg_cross")
def cross(op: Operation, left: Tensor, right: Tensor, dim: int = -1) -> Dims:
    """Vectors of three coordinates."""
    dims = []
    for first, second in zip(op.dims(left), op.dims(right), strict=True):
        wide = first if first.size > 1 else second
        if first.size == second.size:
            op.same(first, second)
        dims.append(Dim(wide.layout, first.zero or second.zero))
    op.freeze(dims[dim], "holds coordinates")
    return dims


@rule(
    "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "aten::_scaled_dot_product_efficient_attention",
    "aten::_scaled_dot_product_cudnn_attention",
    "aten::_scaled_dot_product_attention_math",
    "aten::_scaled_dot_product_fused_attention_overrideable",
    "aten::_scaled_dot_product_attention_math_for_mps",
)
def attention(op: Operation, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
    """``softmax(q k^T) v``, head by head; fewer key heads than query heads serve several each."""
    q, k, v = op.dims(query), op.dims(key), op.dims(value)
    if True in args[:4]:  # it may be masked by position
        _causal(op, q[-2], k[-2])
    if kwargs.get("scale") is None:
        op.inexact(q[-1], "sets the default scale of attention")
    for mask in (*args, kwargs.get("attn_mask")):
        if isinstance(mask, Tensor):
            _scores_masked(op, [*q[:-1], k[-2]], mask)
    op.summed(q[-1], k[-1])
    op.same(k[-2], v[-2])
    op.inexact(k[-2], "is normalised over by softmax")
    batch: Dims = []
    for one, other, third in zip(q[:-2], k[:-2], v[:-2], strict=True):
        op.same(other, third)
        if one.size == other.size:
            op.same(one, other)
            batch.append(Dim(one.layout, third.zero))
        else:
            op.freeze([one, other], "is shared between heads inside attention")
            batch.append(Dim(one.layout))
    op.plays("heads", q[:-2])
    op.plays("head_dim", [q[-1], v[-1]])
    result = [*batch, Dim(q[-2].layout), v[-1]]
    return (result, *(None for _ in range(8)))


@rule("aten::scaled_dot_product_attention")
def attention_called(
    op: Operation,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    **kwargs: Any,
) -> Dims:
    """Attention as the user's code calls it, with as many heads of keys as of queries."""
    q, k, v = op.dims(query), op.dims(key), op.dims(value)
    if is_causal:
        _causal(op, q[-2], k[-2])
    op.contract(query, [q[-1]], [q[-2]])
    op.contract(key, [k[-1]], [k[-2]])
    op.contract(value, [v[-2]], [v[-1]])
    return attention(op, query, key, value, attn_mask=attn_mask, scale=kwargs.get("scale"))[0]


def _causal(op: Operation, queries: Dim, keys: Dim) -> None:
    """A triangle without some rows and the same columns is a triangle."""
    if queries.size == keys.size:
        op.same(queries, keys)
    else:
        op.freeze([queries, keys], "is masked by its position")


def _scores_masked(op: Operation, scores: Dims, mask: Tensor) -> None:
    for right, dim in enumerate(reversed(op.dims(mask)), 1):
        if dim.size > 1:
            op.same(scores[-right], dim)
