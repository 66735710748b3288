r"""A pruned matrix that still does to its inputs what the dense one did, as nearly as it can.

SparseGPT and ADMM minimise :math:`\lVert A \hat X - \hat W \hat X \rVert^2` over matrices :math:`\hat W` with zeros in
a wanted number and pattern, where :math:`\hat X` are the inputs in the model pruned so far. :math:`A \hat X` is what
the layer aims at: the unpruned outputs :math:`W X`, as far as the data bear it out
(:mod:`netopt.reconstruction.target`).
All they know of the inputs are the moment :math:`H = \hat X \hat X^\top` and :math:`T = A H`.

Matrices side by side with inputs of their own (the groups of a convolution) are solved at once, and compete for what is
kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from netopt.importance import criterion
from netopt.masking.patterns import keep_n_of_m, keep_per_row
from netopt.masking.quantile import Scores, keep_best

__all__ = ["Demand", "Problem", "admm", "sparsegpt", "wanda_layerwise"]

BLOCK = 128
STRIP = 16


@dataclass(frozen=True)
class Demand:
    """Which zeros are wanted in one matrix, or in several side by side.

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

    def whole_groups(self, columns: int) -> int:
        """Returns about ``columns``, such that no group of ``n:m`` is cut in two."""
        size = 1 if self.group is None else self.group[1]
        return max(columns // size, 1) * size

    def keep(self, scores: Tensor, start: int = 0, part: float = 1.0) -> Tensor:
        """Chooses what to keep of the columns from ``start``, given their scores; ``part`` of the zeros is demanded."""
        stop = start + scores.shape[-1]
        alive = None if self.alive is None else self.alive[..., start:stop]
        if alive is not None:
            scores = scores.masked_fill(~alive, -torch.inf)
        if self.group is not None:
            keep = keep_n_of_m(scores, *self.group)
        else:
            # Rounded on the way, so that the shares of all columns add up to what is demanded, exactly.
            share = part * self.remove / self.columns
            remove = round(share * stop) - round(share * start)
            if self.per_row:
                keep = keep_per_row(scores.flatten(0, -2), remove).view(scores.shape)
            else:
                dead = 0 if alive is None else int((~alive).sum())
                keep = keep_best([Scores(scores)], max(remove, dead))[0]
        return keep if alive is None else keep & alive


class Problem(NamedTuple):
    """What a solver is given; a criterion of ``"layers"`` is a function of it.

    Attributes:
        weight: ``(groups, rows, columns)``.
        moment: :math:`H`, ``(groups, columns, columns)``.
        target: :math:`T`, ``(groups, rows, columns)``; ``weight @ moment`` where the inputs have not changed, or where
            the unpruned outputs cannot be told from them.
        demand: Which zeros.
        costs: How much a squared error of each output counts beside the others, ``(groups, rows, 1)``.
    """

    weight: Tensor
    moment: Tensor
    target: Tensor
    demand: Demand
    costs: Tensor


@criterion("wanda_layerwise", of="layers", needs=["moment"], paper="https://arxiv.org/abs/2306.11695")
def wanda_layerwise(problem: Problem) -> tuple[Tensor, Tensor]:
    r"""Removes what weighs least on the inputs of the model pruned so far, and updates nothing.

    Of a weight, that is :math:`|w| \lVert \hat x \rVert`. Blocks that follow one another are pruned one after the
    other, as in the paper, each on what those before it put out; within a block all layers at once.

    Args:
        problem: The matrices, their moments and what is to be removed.

    Returns:
        The matrices with zeros and what is kept of them.

    References:
        A Simple and Effective Pruning Approach for Large Language Models (Sun et al., 2023),
        https://arxiv.org/abs/2306.11695
    """
    lengths = _diagonal(problem.moment).clamp(min=0).sqrt()
    kept = problem.demand.keep(problem.weight.abs() * lengths[:, None, :] * problem.costs.sqrt())
    return problem.weight.masked_fill(~kept, 0), kept


@criterion("sparsegpt", of="layers", paper="https://arxiv.org/abs/2301.00774")
def sparsegpt(problem: Problem, *, dampening: float = 0.1, block: int = BLOCK) -> tuple[Tensor, Tensor]:
    r"""Removes weights column by column, and lets the columns to come make up for each error.

    Args:
        problem: The matrices, their moments and what is to be removed.
        dampening: This fraction of the moment's mean diagonal is added to the diagonal, and pulls towards the old
            weights.
        block: Zeros are decided for so many columns at a time; for ``n:m``, for one group at a time.

    Returns:
        The new matrices and what is kept of them.

    References:
        SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot (Frantar & Alistarh, 2023),
        https://arxiv.org/abs/2301.00774
    """
    weight, moment, target, demand, costs = problem
    damp = dampening * _diagonal(moment).mean(-1)[..., None, None]
    lower = torch.linalg.cholesky(_dampened(moment, dampening))
    # One row an input from here on: what is worked on column by column then lies together in memory.
    columns = torch.cholesky_solve((target + weight * damp).mT, lower).contiguous()
    factor = torch.linalg.cholesky(torch.cholesky_inverse(lower), upper=True)
    kept = torch.ones_like(columns, dtype=torch.bool)
    block = demand.whole_groups(block)
    for start in range(0, demand.columns, block):
        stop = min(start + block, demand.columns)
        inner = factor[:, start:stop, start:stop]
        errors = _removed(columns[:, start:stop], inner, kept[:, start:stop], demand, start, costs)
        columns[:, stop:].baddbmm_(factor[:, start:stop, stop:].mT, errors, alpha=-1)
    return columns.masked_fill_(~kept, 0).mT, kept.mT


def _removed(part: Tensor, inner: Tensor, kept: Tensor, demand: Demand, start: int, costs: Tensor) -> Tensor:
    """Removes entries of the columns from ``start``, makes up for it within them, and returns their errors.

    ``part``, ``kept``, and the errors are ``(groups, columns, rows)``; the first two are written to.
    """
    scale = _diagonal(inner)[..., None]
    if demand.group is None:
        kept.copy_(demand.keep((part / scale).square_().mT * costs, start).mT)
    errors = torch.zeros_like(part)
    size, strip = part.shape[1], demand.whole_groups(STRIP)
    for first in range(0, size, strip):
        # Within a strip every error is made up for at once, beyond it those of a strip together.
        last = min(first + strip, size)
        for column in range(first, last):
            if demand.group is not None and (start + column) % demand.group[1] == 0:
                group = slice(column, min(column + demand.group[1], size))
                scores = (part[:, group] / scale[:, group]).square_()
                kept[:, group] = demand.keep(scores.mT, start + column).mT
            error = part[:, column].masked_fill(kept[:, column], 0) / scale[:, column]
            errors[:, column] = error
            part[:, column:last].baddbmm_(inner[:, column, column:last, None], error[:, None], alpha=-1)
        part[:, last:].baddbmm_(inner[:, first:last, last:].mT, errors[:, first:last], alpha=-1)
    return errors


@criterion("admm", of="layers", paper="https://arxiv.org/abs/2401.02938")
def admm(problem: Problem, *, dampening: float = 0.1, rounds: int = 20, polish: int = 24) -> tuple[Tensor, Tensor]:
    r"""Alternates between the best matrix near one with zeros, and the nearest matrix with zeros.

    The paper's matrices are to do on the inputs of the model pruned so far what the old weights would. These are to do
    what ``problem.target`` says, which in :func:`netopt.prune_weights` leans towards the unpruned outputs; see
    :func:`netopt.reconstruction.regression_target`.

    Args:
        problem: The matrices, their moments and what is to be removed.
        dampening: The moment is brought to a unit diagonal, to which this is added; it pulls towards the old weights.
        rounds: How many alternations, over which the zeros grow in number along a cubic.
        polish: Then the pattern stays, and what is kept is fitted to it by so many steps of conjugate gradients.

    Returns:
        The new matrices and what is kept of them.

    References:
        Fast and Effective Weight Update for Pruned Large Language Models (Boža, 2024),
        https://arxiv.org/abs/2401.02938
    """
    weight, moment, target, demand, costs = problem
    norm = _diagonal(moment).sqrt()
    norm = torch.maximum(norm, 1e-8 * norm.amax(-1, keepdim=True) + 1e-30)
    moment = moment / norm[..., None, :] / norm[..., None]
    dense = weight * norm[..., None, :]
    target = target / norm[..., None, :] + dense * (dampening * _diagonal(moment).mean(-1)[..., None, None])
    moment = _dampened(moment, dampening)
    penalty = 1.0
    one = torch.eye(moment.shape[-1], dtype=moment.dtype, device=moment.device)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(moment + penalty * one))
    free, dual = dense.clone(), torch.zeros_like(dense)
    kept = torch.ones_like(dense, dtype=torch.bool)
    for step in range(rounds):
        summed = free + dual
        kept = demand.keep(summed.abs() * costs.sqrt(), part=1 - (1 - (step + 1) / rounds) ** 3)
        sparse = summed.masked_fill(~kept, 0)
        dual = summed - sparse
        free = (target + penalty * (sparse - dual)) @ inverse
    sparse = (free + dual).masked_fill(~kept, 0)
    return _polished(sparse, target, moment, kept, polish) / norm[..., None, :], kept


def _polished(sparse: Tensor, target: Tensor, moment: Tensor, kept: Tensor, steps: int) -> Tensor:
    """Fits what is kept by least squares: conjugate gradients, every row by itself."""
    residual = (target - sparse @ moment) * kept
    direction = residual.clone()
    energy = residual.square().sum(-1, keepdim=True)
    for _ in range(steps):
        image = (direction @ moment) * kept
        curvature = (direction * image).sum(-1, keepdim=True)
        length = torch.where(curvature > 0, energy / curvature, 0.0)
        sparse = sparse + length * direction
        residual = residual - length * image
        renewed = residual.square().sum(-1, keepdim=True)
        direction = residual + torch.where(energy > 0, renewed / energy, 0.0) * direction
        energy = renewed
    return sparse


def _dampened(moment: Tensor, fraction: float) -> Tensor:
    diagonal = _diagonal(moment)
    mean = diagonal.mean(-1, keepdim=True)
    # An input that was never there constrains nothing; it must not make the matrix singular.
    added = torch.where(diagonal > 0, fraction * mean, mean.clamp(min=1e-12))
    return moment + torch.diag_embed(added)


def _diagonal(matrices: Tensor) -> Tensor:
    return matrices.diagonal(dim1=-2, dim2=-1)
