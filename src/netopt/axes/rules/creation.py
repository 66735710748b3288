"""Operations that make tensors from nothing: every size is an argument of the call."""

from __future__ import annotations

from typing import Any

from netopt.axes.operation import Dims, Operation, rule


@rule("aten::zeros", "aten::new_zeros")
def zeros(op: Operation, *args: Any, **kwargs: Any) -> Dims:
    """Zero everywhere."""
    return [op.new_size(size, zero=True) for size in op.out.shape]


@rule(
    "aten::ones",
    "aten::full",
    "aten::empty",
    "aten::rand",
    "aten::randn",
    "aten::new_ones",
    "aten::new_full",
    "aten::new_empty",
    "aten::randint",
    "aten::empty_permuted",
    "aten::new_empty_strided",
    "aten::empty_strided",
    "aten::scalar_tensor",
    "aten::normal_like",
    "aten::_efficientzerotensor",
)
def fresh(op: Operation, *args: Any, **kwargs: Any) -> Dims:
    """Values that do not depend on neurons."""
    return [op.new_size(size) for size in op.out.shape]


@rule("aten::arange", "aten::range", "aten::linspace", "aten::logspace", "aten::randperm",
      "aten::tril_indices", "aten::triu_indices",
      "aten::bartlett_window", "aten::blackman_window", "aten::hamming_window", "aten::hann_window",
      "aten::kaiser_window")  # fmt: skip
def positional(op: Operation, *args: Any, **kwargs: Any) -> Dims:
    """Values that are numbers of positions: those of some positions are not those of the first so many."""
    dims = [op.new_size(size) for size in op.out.shape]
    op.freeze(dims, f"is numbered by {op.short}")
    return dims


@rule("aten::eye")
def eye(op: Operation, *args: Any, **kwargs: Any) -> Dims:
    """Ones where row and column are the same position: without some positions it is the smaller one of its kind."""
    rows, columns = op.out.shape
    if rows != columns:
        return positional(op)
    dim = op.new_size(rows)
    if len(args) > 1:  # the number of columns is given too
        op.trace.new_sizes.append(dim.layout)
    return [dim, dim]
