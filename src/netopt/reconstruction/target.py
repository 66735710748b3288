r"""What a layer should put out on inputs that the layers pruned before it have changed.

At best what the unpruned layer put out, :math:`W X`. A matrix that does so on the changed inputs :math:`\hat X` is a
regression, and on a few thousand samples it fits what is peculiar to them: on others it may do worse than :math:`W`
itself. So it is pulled towards :math:`W`, as strongly as each half of the calibration data says the other half needs:

.. math:: A_\lambda = \arg\min_A \lVert W X - A \hat X \rVert^2 + \lambda \lVert A - W \rVert^2
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Moments", "best_pull", "regression_target", "ridge", "scaled"]

PULLS = tuple(100 / 10 ** (step / 2) for step in range(13))
"""Strengths to try, from strong to weak, where every input has norm 1 over all data."""

ROWS = 256


@dataclass
class Moments:
    """Second moments of what a matrix is multiplied with, over each half of the data.

    Attributes:
        own: Of its inputs in the model as it is pruned so far, with themselves; ``(halves, groups, columns, columns)``.
        cross: Of its inputs in the unpruned model with those, of the same shape. If that model was not run, all data
            are one half, and this is ``own``.
    """

    own: Tensor
    cross: Tensor


def regression_target(weight: Tensor, moments: Moments) -> Tensor:
    r"""Returns :math:`A_\lambda \hat X \hat X^\top`, of the shape of ``weight``, ``(groups, rows, columns)``.

    The pull :math:`\lambda` is the one whose :math:`A_\lambda`, fitted to one half of the data, comes nearest to the
    unpruned outputs on the other half, and infinite where none comes nearer than ``weight``. It is told from up to 256
    of the rows; strong pulls are tried first, until one does worse than the one before.

    Args:
        weight: Matrices side by side, ``(groups, rows, columns)``; of all of them the pull is the same.
        moments: Of what they are multiplied with.

    References:
        Ridge Regression: Biased Estimation for Nonorthogonal Problems (Hoerl & Kennard, 1970),
        https://doi.org/10.1080/00401706.1970.10488634

    Example:
        Where inputs have become twice as large, half the weights would do:

        >>> x = torch.randn(2, 100, 3)
        >>> own, cross = 4 * x.mT @ x, 2 * x.mT @ x
        >>> found = regression_target(torch.ones(1, 1, 3), Moments(own[:, None], cross[:, None]))
        >>> torch.allclose(found, 0.5 * own.sum(0).sum(0), rtol=0.01)
        True
    """
    whole = moments.own.sum(0)
    changes = [cross - own for cross, own in zip(moments.cross, moments.own, strict=True)]
    if not any(change.any() for change in changes):
        return weight @ whole
    norm = whole.diagonal(dim1=-2, dim2=-1).clamp(min=0).sqrt()
    norm = torch.maximum(norm, 1e-8 * norm.amax(-1, keepdim=True) + 1e-30)
    lost = [weight @ change / norm[:, None, :] for change in changes]
    pull, _ = best_pull([scaled(one, norm) for one in moments.own], lost)
    if pull is not None:
        weight = weight + ridge(scaled(whole, norm), lost[0] + lost[1], pull) / norm[:, None, :]
    return weight @ whole


def best_pull(own: Sequence[Tensor], lost: Sequence[Tensor]) -> tuple[float | None, float]:
    """How strongly to pull towards the present weights, and by how much the squared error on unseen data then falls.

    Each half is fitted and the other one asked, strong pulls first, until one does worse than the one before.

    Args:
        own: Second moments of the inputs, scaled by :func:`scaled`, of each half; ``(groups, columns, columns)``.
        lost: What the outputs lack times the inputs, scaled alike, of each half; ``(groups, rows, columns)``. The pull
            is told from up to 256 of the rows.

    Returns:
        The pull, ``None`` for infinitely, and the fall (negative), summed over the rows and both halves.
    """
    step = -(-lost[0].shape[1] // ROWS)
    rows = [one[:, ::step] for one in lost]
    best, least = None, 0.0
    for pull in PULLS:
        try:
            fall = sum(_fall(own[one], rows[one], own[other], rows[other], pull) for one, other in ((0, 1), (1, 0)))
        except torch.linalg.LinAlgError:  # pyright: ignore[reportPrivateImportUsage] - too weak for rounded moments
            break
        if not fall < least:
            break
        best, least = pull, fall
    return best, least


def _fall(own: Tensor, lost: Tensor, unseen_own: Tensor, unseen_lost: Tensor, pull: float) -> float:
    """The squared error on unseen data, beyond that of the present weights, after a fit."""
    step = ridge(own, lost, pull)
    return float((step * (step @ unseen_own - 2 * unseen_lost)).sum())


def ridge(moment: Tensor, lost: Tensor, pull: float) -> Tensor:
    """Returns what to add to the weight so that it makes up for ``lost``, ``(groups, rows, columns)``."""
    pulled = moment.clone()
    pulled.diagonal(dim1=-2, dim2=-1).add_(pull)
    return torch.cholesky_solve(lost.mT, torch.linalg.cholesky(pulled)).mT


def scaled(moment: Tensor, norm: Tensor) -> Tensor:
    """Second moments of inputs that are divided by their norms."""
    return moment / norm[:, None, :] / norm[:, :, None]
