"""Decompositions and solutions of matrices: a part of a matrix has others, so rows and columns stay; batches pass."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves

from netopt.axes.operation import Dim, Dims, Operation, rule

_WHOLE = """linalg_cholesky_ex cholesky cholesky_inverse _cholesky_solve_helper cholesky_solve linalg_inv_ex _linalg_det
_linalg_slogdet linalg_qr linalg_lu linalg_lu_factor_ex linalg_lu_solve lu_unpack _linalg_svd _linalg_eigh linalg_eig
linalg_eigvals _linalg_eigvals linalg_matrix_exp _linalg_solve_ex linalg_solve_triangular triangular_solve
linalg_lstsq linalg_householder_product linalg_ldl_factor_ex linalg_ldl_solve geqrf ormqr"""


@rule(*(f"aten::{name}" for name in _WHOLE.split()))
def whole_matrix(op: Operation, *args: Any, **kwargs: Any) -> tuple[Dims, ...]:
    """Every entry of a result depends on the whole matrix."""
    why = f"is part of a matrix that goes through {op.short}"
    batch: Dims = []
    for tensor in (one for one in (*args, *kwargs.values()) if isinstance(one, Tensor)):
        dims = op.dims(tensor)
        op.freeze(dims[-2:], why)
        if len(dims) > 2 and not batch:
            batch = [Dim(dim.layout) for dim in dims[:-2]]
        elif len(dims) == len(batch) + 2:
            for mine, other in zip(dims, batch, strict=False):
                op.same(mine, other) if mine.size == other.size else op.freeze([mine, other], why)
        else:
            op.freeze([*dims, *batch], why)
    answers = []
    for out in tree_leaves(op.out):
        sizes = list(out.shape)
        passing = batch if sizes[: len(batch)] == [dim.size for dim in batch] else []
        answers.append([*passing, *(op.frozen(size, why) for size in sizes[len(passing) :])])
    return tuple(answers)
