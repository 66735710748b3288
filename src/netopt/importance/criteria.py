"""The criteria for weights: what is known about a weight, as one number for each entry."""

from __future__ import annotations

import zlib

import torch
from torch import Tensor

from netopt.importance.evidence import Evidence
from netopt.importance.registry import criterion

__all__: list[str] = []


@criterion(
    "magnitude",
    paper="https://proceedings.neurips.cc/paper/1989/hash/6c9882bbac1c7093bd25041881277658-Abstract.html",
    entrywise=True,
)
def magnitude(seen: Evidence) -> Tensor:
    r"""The absolute value, :math:`|w|`."""
    return seen.weight.abs()


@criterion(
    "saliency",
    needs={"output_grad_sq"},
    paper="https://proceedings.neurips.cc/paper/1992/hash/303ed4c69846ab36c2904d3ba8573050-Abstract.html",
)
def saliency(seen: Evidence) -> Tensor:
    r"""Squared gradients of all outputs, :math:`\sum_j (\partial y_j / \partial w)^2`, averaged over samples."""
    return seen.output_grad_sq


@criterion("fisher", needs={"grad_sq"}, paper="https://arxiv.org/abs/1801.05787")
def fisher(seen: Evidence) -> Tensor:
    r"""Loss expected to rise when a weight is zeroed, :math:`\tfrac12 w^2\,\mathbb{E}[g^2]`."""
    return 0.5 * seen.weight.square() * seen.grad_sq


@criterion("taylor", needs={"grad_abs"}, paper="https://arxiv.org/abs/1906.10771")
def taylor(seen: Evidence) -> Tensor:
    r"""First-order change of a sample's loss when a weight is zeroed, :math:`\mathbb{E}|w g|`."""
    return seen.weight.abs() * seen.grad_abs


@criterion("snip", needs={"grad"}, paper="https://arxiv.org/abs/1810.02340")
def snip(seen: Evidence) -> Tensor:
    r"""First-order change of the mean loss when a weight is zeroed, :math:`|w\,\mathbb{E}[g]|`."""
    return (seen.weight * seen.grad).abs()


@criterion("movement", needs={"grad"}, paper="https://arxiv.org/abs/2005.07683")
def movement(seen: Evidence) -> Tensor:
    r"""Whether descent moves a weight away from zero, :math:`-w\,\mathbb{E}[g]`; negative if towards it."""
    return -seen.weight * seen.grad


@criterion("lamp", paper="https://arxiv.org/abs/2010.07611")
def lamp(seen: Evidence) -> Tensor:
    r"""A weight's share in what is left of its layer, :math:`w^2 / \sum_{|w'| \ge |w|} w'^2`.

    Comparable between layers, so that a global amount becomes an amount for each layer, and no layer vanishes.
    """
    squares = seen.weight.double().square().flatten()
    order = squares.argsort(stable=True, descending=True)
    left = squares[order].cumsum(0)
    share = torch.where(left > 0, squares[order] / left, 0.0)
    return torch.empty_like(squares).scatter_(0, order, share).view_as(seen.weight).to(_precision(seen.weight))


@criterion("wanda", needs={"input_norm"}, paper="https://arxiv.org/abs/2306.11695")
def wanda(seen: Evidence) -> Tensor:
    r"""The largest change of an output a weight can make, :math:`|w| \cdot \lVert x \rVert_2` over all inputs."""
    return seen.weight.abs() * seen.input_norm


@criterion("random", paper="https://arxiv.org/abs/2202.02643")
def random(seen: Evidence) -> Tensor:
    """Uniform noise, the same for the same ``torch.manual_seed`` on every device."""
    generator = torch.Generator().manual_seed(torch.initial_seed() ^ zlib.crc32(seen.name.encode()))
    return torch.rand(seen.weight.shape, generator=generator).to(seen.weight.device)


def _precision(weight: Tensor) -> torch.dtype:
    return torch.float64 if weight.dtype == torch.float64 else torch.float32
