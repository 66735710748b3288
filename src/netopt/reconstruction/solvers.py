r"""A pruned matrix that still does to its inputs what the dense one did, as nearly as it can.

Both solvers minimise :math:`\lVert W X - \hat W \hat X \rVert^2` over matrices :math:`\hat W` with zeros in a wanted
number and pattern, where :math:`X` are the inputs in the unpruned model and :math:`\hat X` those in the model pruned so
far. All they know of the inputs are the moments :math:`H = \hat X \hat X^\top` and :math:`T = W X \hat X^\top`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from netopt.masking.patterns import keep_n_of_m, keep_per_row
from netopt.masking.quantile import Scores, keep_best

__all__ = ["SOLVERS", "Demand", "Solver", "admm", "sparsegpt"]

DAMPENING = 0.1
BLOCK = 128
ROUNDS = 20
ITERATIONS = 20
POLISH = 24


@dataclass(frozen=True)
class Demand:
    """Which zeros are wanted in one matrix.

    Attributes:
        columns: The matrix's columns.
        remove: How many entries, or with ``per_row`` how many of each row; those that are not ``alive`` among them.
        per_row: Whether each row loses the same number.
        group: ``(n, m)`` to keep ``n`` of each ``m`` neighbours instead.
        alive: ``False`` where an entry is zero already and stays so.
    """

    columns: int
    remove: int = 0
    per_row: bool = False
    group: tuple[int, int] | None = None
    alive: Tensor | None = None

    def keep(self, scores: Tensor, start: int = 0, part: float = 1.0) -> Tensor:
        """Chooses what to keep of the columns from ``start``, given their scores; ``part`` of the zeros is demanded."""
        stop = start + scores.shape[1]
        alive = None if self.alive is None else self.alive[:, start:stop]
        if alive is not None:
            scores = scores.masked_fill(~alive, -torch.inf)
        if self.group is not None:
            keep = keep_n_of_m(scores, *self.group)
        else:
            # Rounded on the way, so that the shares of all columns add up to what is demanded, exactly.
            share = part * self.remove / self.columns
            remove = round(share * stop) - round(share * start)
            if self.per_row:
                keep = keep_per_row(scores, remove)
            else:
                dead = 0 if alive is None else int((~alive).sum())
                keep = keep_best([Scores(scores)], max(remove, dead))[0]
        return keep if alive is None else keep & alive


def sparsegpt(weight: Tensor, moment: Tensor, target: Tensor, demand: Demand) -> tuple[Tensor, Tensor]:
    r"""Removes weights column by column, and lets the columns to come make up for each error.

    Args:
        weight: ``(rows, columns)``.
        moment: :math:`H`, ``(columns, columns)``; a tenth of its mean diagonal is added to the diagonal.
        target: :math:`T`, ``(rows, columns)``; ``weight @ moment`` where the inputs have not changed.
        demand: Which zeros; decided for 128 columns at a time, or for one group of ``n:m``.

    Returns:
        The new matrix and what is kept of it.

    References:
        SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot (Frantar & Alistarh, 2023),
        https://arxiv.org/abs/2301.00774
    """
    damp = DAMPENING * moment.diagonal().mean()
    weight = torch.linalg.solve(_dampened(moment, DAMPENING), target + weight * damp, left=False)
    factor = _inverse_factor(_dampened(moment, DAMPENING))
    kept = torch.ones_like(weight, dtype=torch.bool)
    columns = weight.shape[1]
    for start in range(0, columns, BLOCK):
        stop = min(start + BLOCK, columns)
        inner = factor[start:stop, start:stop]
        part = weight[:, start:stop]
        if demand.group is None:
            kept[:, start:stop] = demand.keep((part / inner.diagonal()).square(), start)
        errors = torch.zeros_like(part)
        for column in range(stop - start):
            if demand.group is not None and (start + column) % demand.group[1] == 0:
                _choose_group(demand, part, inner, kept, start, column)
            error = part[:, column].masked_fill(kept[:, start + column], 0) / inner[column, column]
            part[:, column:] -= torch.outer(error, inner[column, column:])
            errors[:, column] = error
        weight[:, stop:] -= errors @ factor[start:stop, stop:]
    return weight.masked_fill(~kept, 0), kept


def _choose_group(demand: Demand, part: Tensor, inner: Tensor, kept: Tensor, start: int, column: int) -> None:
    size = demand.group[1] if demand.group else 1
    stop = min(column + size, part.shape[1])
    scores = (part[:, column:stop] / inner.diagonal()[column:stop]).square()
    kept[:, start + column : start + stop] = demand.keep(scores, start + column)


def admm(weight: Tensor, moment: Tensor, target: Tensor, demand: Demand) -> tuple[Tensor, Tensor]:
    r"""Alternates between the best matrix near one with zeros, and the nearest matrix with zeros.

    The zeros grow in number over the first rounds; then the pattern stays, and what is kept is fitted to it by
    conjugate gradients.

    Args:
        weight: ``(rows, columns)``.
        moment: :math:`H`, ``(columns, columns)``; brought to a unit diagonal, to which a tenth is added.
        target: :math:`T`, ``(rows, columns)``; ``weight @ moment`` where the inputs have not changed.
        demand: Which zeros.

    Returns:
        The new matrix and what is kept of it.

    References:
        Fast and Effective Weight Update for Pruned Large Language Models (Boža, 2024),
        https://arxiv.org/abs/2401.02938
    """
    norm = moment.diagonal().sqrt().clamp(min=1e-8 * float(moment.diagonal().max().sqrt()) + 1e-30)
    moment = moment / norm / norm[:, None]
    dense = weight * norm
    target = target / norm + dense * (DAMPENING * moment.diagonal().mean())
    moment = _dampened(moment, DAMPENING)
    penalty = 1.0
    inverse = torch.linalg.inv(moment + penalty * torch.eye(len(moment), dtype=moment.dtype, device=moment.device))
    free, dual = dense.clone(), torch.zeros_like(dense)
    kept = torch.ones_like(dense, dtype=torch.bool)
    for step in range(ITERATIONS):
        summed = free + dual
        if step < ROUNDS:
            part = 1 - (1 - (step + 1) / ROUNDS) ** 3
            kept = demand.keep(summed.abs(), part=part)
        sparse = summed.masked_fill(~kept, 0)
        dual = summed - sparse
        free = (target + penalty * (sparse - dual)) @ inverse
    sparse = (free + dual).masked_fill(~kept, 0)
    return _polished(sparse, target, moment, kept) / norm, kept


def _polished(sparse: Tensor, target: Tensor, moment: Tensor, kept: Tensor, steps: int = POLISH) -> Tensor:
    """Fits what is kept by least squares: conjugate gradients, every row by itself."""
    residual = (target - sparse @ moment) * kept
    direction = residual.clone()
    energy = residual.square().sum(1, keepdim=True)
    for _ in range(steps):
        image = (direction @ moment) * kept
        curvature = (direction * image).sum(1, keepdim=True)
        length = torch.where(curvature > 0, energy / curvature, 0.0)
        sparse = sparse + length * direction
        residual = residual - length * image
        renewed = residual.square().sum(1, keepdim=True)
        direction = residual + torch.where(energy > 0, renewed / energy, 0.0) * direction
        energy = renewed
    return sparse


def _dampened(moment: Tensor, fraction: float) -> Tensor:
    diagonal = moment.diagonal()
    added = fraction * diagonal.mean()
    # An input that was never there constrains nothing; it must not make the matrix singular.
    added = torch.where(diagonal > 0, added, diagonal.mean().clamp(min=1e-12))
    return moment + torch.diag(added.expand(len(moment)))


def _inverse_factor(moment: Tensor) -> Tensor:
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(moment))
    return torch.linalg.cholesky(inverse, upper=True)


Solver: TypeAlias = Callable[[Tensor, Tensor, Tensor, Demand], tuple[Tensor, Tensor]]
SOLVERS: dict[str, Solver] = {"admm": admm, "sparsegpt": sparsegpt}
