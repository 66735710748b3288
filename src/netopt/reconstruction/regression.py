r"""What to add to a matrix, and to its outputs, so that they come nearest to what they should be.

The outputs lack :math:`R`, the inputs are :math:`\hat X`: of all :math:`\Delta, \delta` the ones that minimise
:math:`\lVert R - \Delta \hat X - \delta \rVert^2 + \lambda \lVert \Delta \rVert^2`, where :math:`\lambda` is told from
halves of the data as for :mod:`~netopt.reconstruction.target`. Inputs are taken at unit norm, so that the pull
:math:`\lambda` also shrinks their correlations towards none.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from netopt.reconstruction.target import ROWS, best_pull, ridge, scaled

__all__ = ["Correction", "Sums", "correction"]

ALIKE = 1e-9
"""Outputs that lack less than this share of their own squares lack nothing."""


@dataclass
class Sums:
    """Sums over rows of one half of the data, float64.

    Attributes:
        count: How many rows, of each group; each as often as it counts.
        inputs: ``(groups, columns)``.
        lacking: ``(groups, outputs)``.
        moment: Of the inputs with themselves, ``(groups, columns, columns)``.
        cross: Of what lacks with the inputs, ``(groups, outputs, columns)``.
        square: Of what lacks, squared.
        scale: Of what there should be, squared.
    """

    count: float
    inputs: Tensor
    lacking: Tensor
    moment: Tensor
    cross: Tensor
    square: float
    scale: float

    @classmethod
    def of(cls, inputs: Tensor, lacking: Tensor, wanted: Tensor, counts: Tensor) -> Sums:
        """Sums over rows: ``(groups, rows, columns)`` of inputs, ``(groups, rows, outputs)`` of the others.

        Each row stands for as many as ``counts`` says, ``(rows,)``.
        """
        weighed, lost = inputs * counts[:, None], lacking * counts[:, None]
        return cls(
            float(counts.double().sum()),
            weighed.double().sum(1),
            lost.double().sum(1),
            (weighed.mT @ inputs).double(),
            (lacking.mT @ weighed).double(),
            float((lost.double() * lacking).sum()),
            float((wanted.double().square() * counts[:, None]).sum()),
        )

    def __add__(self, other: Sums) -> Sums:
        return Sums(*(mine + theirs for mine, theirs in zip(vars(self).values(), vars(other).values(), strict=True)))

    def centred(self, mean: Tensor, lacking: Tensor) -> tuple[Tensor, Tensor]:
        """``moment`` and ``cross`` with these means taken away from inputs and from what lacks."""
        across = self.inputs[:, :, None] * mean[:, None, :]
        moment = self.moment - across - across.mT + self.count * mean[:, :, None] * mean[:, None, :]
        cross = self.cross - self.lacking[:, :, None] * mean[:, None, :]
        return moment, cross - lacking[:, :, None] * (self.inputs - self.count * mean)[:, None, :]


@dataclass(frozen=True)
class Correction:
    """What to add, and what it takes away of the error.

    Attributes:
        weight: To the matrix, ``(groups, outputs, columns)``; ``None`` for nothing.
        offset: To each output, ``(groups, outputs)``; ``None`` for nothing.
        error: Squares lacking, as a share of those wanted.
        removed: Share of these squares that a fit to either half takes away on the other.
    """

    weight: Tensor | None
    offset: Tensor | None
    error: float
    removed: float


def correction(halves: Sequence[Sums], *, with_offset: bool) -> Correction:
    """The correction that serves the half of the data better to which it was not fitted; nothing where none does.

    Args:
        halves: Sums over two halves of the data.
        with_offset: Whether a constant can be added to the outputs.

    Example:
        >>> x = torch.randn(1, 20000, 3)
        >>> halves = [Sums.of(one, one @ torch.ones(1, 3, 2) + 1, one, torch.ones(10000)) for one in x.split(10000, 1)]
        >>> found = correction(halves, with_offset=True)
        >>> found.removed > 0.999, bool((found.weight - 1).abs().max() < 0.01)
        (True, True)
    """
    whole = halves[0] + halves[1]
    error = whole.square / max(whole.scale, 1e-300)
    nothing = Correction(None, None, error, 0.0)
    if error < ALIKE or not math.isfinite(error) or min(half.count for half in halves) == 0:
        return nothing
    mean, lacking = whole.inputs / whole.count, whole.lacking / whole.count
    if not with_offset:
        mean, lacking = torch.zeros_like(mean), torch.zeros_like(lacking)
    left = sum(_left(half, other, with_offset) for half, other in (halves, reversed(halves)))
    moments, crosses = zip(*(half.centred(mean, lacking) for half in halves), strict=True)
    total = moments[0] + moments[1]
    square = total.diagonal(dim1=-2, dim2=-1).clamp(min=0)
    # What is hardly ever there tells little of what it should count for, and may be there elsewhere.
    norm = (square + square.mean(-1, keepdim=True) + 1e-300).sqrt()
    lost = [cross / norm[:, None, :] for cross in crosses]
    pull, fall = best_pull([scaled(moment, norm) for moment in moments], lost)
    left += fall * -(-lost[0].shape[1] // ROWS)
    if not left < whole.square:
        return nothing
    change = None
    if pull is not None:
        try:
            change = ridge(scaled(total, norm), lost[0] + lost[1], pull) / norm[:, None, :]
        except torch.linalg.LinAlgError:  # pyright: ignore[reportPrivateImportUsage] - rounding is all they differ by
            return nothing
        lacking = lacking - (change @ mean[:, :, None])[:, :, 0]
    return Correction(change, lacking if with_offset else None, error, 1 - left / whole.square)


def _left(fitted: Sums, unseen: Sums, with_offset: bool) -> float:
    """What an offset fitted to one half leaves of the squares of the other."""
    if not with_offset:
        return unseen.square
    mean = fitted.lacking / fitted.count
    return unseen.square - 2 * float((mean * unseen.lacking).sum()) + unseen.count * float(mean.square().sum())
