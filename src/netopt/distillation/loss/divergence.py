"""Hinton's divergence in one pass over the classes, with its gradient.

Its derivative by the student's logits, :math:`T (p^s - p^t)`, needs what its value needs, so both are computed
together, a block of positions at a time that stays in the processor's cache: of a vocabulary's logits each further pass
would cost as much as a layer. Of a teacher whose largest logits alone are kept only those are looked at.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["TopK", "condense", "condensed_divergence", "divergence", "explicit_divergence"]

BLOCK = 2**17
FEW = 16
LEAST = -1e30
"""A log-probability for classes excluded by a logit of -inf: zero times it is zero, and no NaN."""


class TopK(NamedTuple):
    """A teacher's output, of which the largest logits are kept and the others have their sum of probability.

    Args:
        top: The largest logits, ``(..., k)``.
        which: Their classes, ``(..., k)``.
        rest: One logit for each of the other classes, ``(..., 1)``, at the temperature it was made for.
        classes: How many classes there are.
    """

    top: Tensor
    which: Tensor
    rest: Tensor
    classes: int

    @property
    def shape(self) -> torch.Size:
        """The shape of all of it."""
        return torch.Size((*self.top.shape[:-1], self.classes))

    def dense(self) -> Tensor:
        """Returns it spread out to all classes."""
        rest = self.rest.to(self.top.dtype).expand(*self.rest.shape[:-1], self.classes)
        return rest.scatter(-1, self.which.long(), self.top)


def condense(output: Tensor, k: int, temperature: float) -> TopK:
    """Keeps the ``k`` largest logits, and at ``temperature`` the probability of the others together.

    Example:
        >>> kept = condense(torch.tensor([[3.0, 1.0, 1.0, 2.0]]), 2, temperature=1.0)
        >>> kept.which.tolist(), kept.dense().tolist()
        ([[0, 3]], [[3.0, 1.0, 1.0, 2.0]])
    """
    classes = output.shape[-1]
    top, index = output.topk(k, dim=-1)
    others = (output.float() / temperature).scatter(-1, index, -math.inf)
    rest = temperature * (others.logsumexp(-1, keepdim=True) - math.log(classes - k))
    return TopK(top, index.int(), rest, classes)


def divergence(student: Tensor, teacher: Tensor, *, temperature: float) -> Tensor:
    r"""Returns :math:`T^2 KL(p^t \| p^s)` of every position; only ``student`` gets a gradient."""
    return _Divergence.apply(student, (teacher,), temperature, 0)


def condensed_divergence(student: Tensor, teacher: TopK, *, temperature: float = 4.0) -> Tensor:
    """:func:`divergence` from a condensed teacher."""
    return _Divergence.apply(student, teacher[:3], temperature, _others(teacher))


def explicit_divergence(
    student: Tensor, teacher: Tensor | TopK, share: float | Tensor, *, temperature: float = 4.0
) -> tuple[Tensor, Tensor]:
    """Returns the sum of :func:`divergence` over all positions, and ``share`` times its gradient."""
    condensed = isinstance(teacher, TopK)
    parts, others = (teacher[:3], _others(teacher)) if condensed else ((teacher,), 0)
    values, slopes = _divergences(student.detach(), parts, temperature, others, temperature * share)
    return values.sum(), slopes


def _others(teacher: TopK) -> int:
    return teacher.classes - teacher.top.shape[-1]


class _Divergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Sequence[Tensor], temperature: float, others: int) -> Tensor:
        values, ctx.slopes = _divergences(student, teacher, temperature, others, temperature)
        return values

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        return ctx.slopes * upstream.unsqueeze(-1), None, None, None


def _divergences(
    student: Tensor, teacher: Sequence[Tensor], temperature: float, others: int, scale: float | Tensor
) -> tuple[Tensor, Tensor]:
    """Returns the divergence of every position, and its gradient times ``scale`` over the temperature."""
    if student.device.type != "cpu":
        return _block(student, teacher, temperature, others, scale)
    if student.dim() == 2 and student.shape[1] <= FEW and not others and student.dtype is teacher[0].dtype:
        return _columns(student, teacher[0], temperature, scale)
    if student.numel() <= BLOCK:
        return _block(student, teacher, temperature, others, scale)
    rows = student.reshape(-1, student.shape[-1])
    theirs = [one.reshape(len(rows), one.shape[-1]) for one in teacher]
    values, slopes = rows.new_empty(len(rows)), torch.empty_like(rows)
    # Of a condensed teacher half as many numbers are at hand.
    size = max(1, (2 * BLOCK if others else BLOCK) // rows.shape[1])
    for first in range(0, len(rows), size):
        block = slice(first, first + size)
        parts = [one[block] for one in theirs]
        values[block], _ = _block(rows[block], parts, temperature, others, scale, slopes[block])
    return values.reshape(student.shape[:-1]), slopes.reshape(student.shape)


def _columns(student: Tensor, teacher: Tensor, temperature: float, scale: float | Tensor) -> tuple[Tensor, Tensor]:
    """The same of few classes, one class a row: a processor takes many positions at once, and few classes slowly."""
    logs = torch.stack([student, teacher]).mul_(1 / temperature).transpose(1, 2).log_softmax(1).clamp_min_(LEAST)
    ours, theirs = logs.unbind()
    slopes, chances = logs.exp().unbind()
    values = (theirs - ours).mul_(chances).sum(0).mul_(temperature**2)
    return values, slopes.sub_(chances).mul_(scale).t()


def _block(
    student: Tensor,
    teacher: Sequence[Tensor],
    temperature: float,
    others: int,
    scale: float | Tensor,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The same of some positions, the gradient put into ``out``."""
    ours = (student / temperature).log_softmax(-1).clamp_min_(LEAST)
    slopes = torch.exp(ours, out=out)
    if others:
        return _largest(ours, slopes, temperature, others, teacher), slopes.mul_(scale)
    theirs = (teacher[0] / temperature).log_softmax(-1).clamp_min_(LEAST)
    chances = theirs.exp()
    slopes.sub_(chances).mul_(scale)
    return theirs.sub_(ours).mul_(chances).sum(-1).mul_(temperature**2), slopes


def _largest(ours: Tensor, slopes: Tensor, temperature: float, others: int, teacher: Sequence[Tensor]) -> Tensor:
    """The same from the largest logits, all ``others`` sharing the rest of the probability equally."""
    top, which, rest = teacher
    which, top, rest = which.long(), top.to(ours.dtype) / temperature, rest.to(ours.dtype) / temperature
    whole = torch.cat([top, rest + math.log(others)], dim=-1).logsumexp(-1, keepdim=True)
    logs, chances = (top - whole).clamp_min_(LEAST), (top - whole).exp()
    each_log, each = (rest - whole).clamp_min_(LEAST), (rest - whole).exp()
    hit = ours.gather(-1, which)
    elsewhere = ours.sum(-1, keepdim=True) - hit.sum(-1, keepdim=True)
    values = ((logs - hit) * chances).sum(-1, keepdim=True) + each * (others * each_log - elsewhere)
    slopes.sub_(each).scatter_add_(-1, which, each - chances)
    return values.squeeze(-1).mul_(temperature**2)
