r"""What a layer should put out on inputs that the layers pruned before it have changed.

At best what the unpruned layer put out, :math:`W X`. A matrix that does so on the changed inputs :math:`\hat X` is a
regression, and on a few thousand samples it fits what is peculiar to them: on others it may do worse than :math:`W`
itself. So it is pulled towards :math:`W`, as strongly as each half of the calibration data says the other half needs:

.. math:: A_\lambda = \arg\min_A \lVert W X - A \hat X \rVert^2 + \lambda \lVert A - W \rVert^2
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Moments", "regression_target"]

PULLS = tuple(100 / 10 ** (step / 2) for step in range(11))
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
    pull = _pull(weight[:, :: -(-weight.shape[1] // ROWS)], moments.own, changes, norm)
    if pull is not None:
        lost = weight @ (changes[0] + changes[1]) / norm[:, None, :]
        weight = weight + _ridge(_scaled(whole, norm), lost, pull) / norm[:, None, :]
    return weight @ whole


def _pull(weight: Tensor, own: Tensor, changes: list[Tensor], norm: Tensor) -> float | None:
    """Returns how strongly to pull towards ``weight``; ``None`` is infinitely."""
    scaled = [_scaled(one, norm) for one in own]
    lost = [weight @ one / norm[:, None, :] for one in changes]
    best, least = None, 0.0
    for pull in PULLS:
        loss = 0.0
        for fitted, held in ((0, 1), (1, 0)):
            step = _ridge(scaled[fitted], lost[fitted], pull)
            # The squared error on the other half, beyond that of the weight itself.
            loss += float((step * (step @ scaled[held] - 2 * lost[held])).sum())
        if not loss < least:
            break
        best, least = pull, loss
    return best


def _ridge(moment: Tensor, lost: Tensor, pull: float) -> Tensor:
    """Returns what to add to the weight so that it makes up for ``lost``, ``(groups, rows, columns)``."""
    pulled = moment.clone()
    pulled.diagonal(dim1=-2, dim2=-1).add_(pull)
    return torch.cholesky_solve(lost.mT, torch.linalg.cholesky(pulled)).mT


def _scaled(moment: Tensor, norm: Tensor) -> Tensor:
    return moment / norm[:, None, :] / norm[:, :, None]
