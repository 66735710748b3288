"""Fourier transforms: what is transformed stays, everything else passes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from netopt.axes.operation import Dims, Operation, rule


@rule("aten::_fft_r2c", "aten::_fft_c2r", "aten::_fft_c2c")
def fft(op: Operation, tensor: Tensor, dim: Sequence[int], *args: Any, **kwargs: Any) -> Dims:
    """A transform along some dimensions, whose positions all depend on each other."""
    dims = list(op.dims(tensor))
    for one in dim:
        op.freeze(dims[one], f"is transformed by {op.short}")
        dims[one] = op.frozen(op.out.shape[one], f"is transformed by {op.short}")
    return dims
