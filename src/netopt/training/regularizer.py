"""A term of the loss that pushes all weights of a neuron to zero together, so that the neuron can be removed."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from netopt.axes import Axes, find_axes
from netopt.batches import Inputs
from netopt.errors import ArgumentTypeError, InvalidArgumentError, NothingToPruneError, UnknownNameError

__all__ = ["Regularizer"]

KINDS = ("bn_l1", "group_lasso")


@dataclass(frozen=True)
class _Part:
    """One dimension of a parameter along which the neurons of an axis lie."""

    parameter: Tensor
    dim: int
    positions: Tensor
    """For each index of the dimension, the neuron it belongs to; ``size`` of the axis where to none."""


class Regularizer:
    r"""Pushes whole neurons to zero while a model is trained; afterwards :func:`netopt.shrink` removes them.

    ``"group_lasso"`` is :math:`\lambda \sum_i \sqrt{n_i} \lVert w_i \rVert`, where :math:`w_i` are the :math:`n_i`
    weights that make neuron :math:`i`. ``"bn_l1"`` is :math:`\lambda \sum |\gamma|` of the scales that lie along an
    axis. Gradient steps come near zero; :meth:`proximal_step` after each optimizer step reaches it exactly.

    Args:
        model: Any module. Its parameters are held, not copied.
        example_inputs: Inputs of one forward call, from which the axes are found; not needed with ``axes``.
        kind: ``"group_lasso"`` or ``"bn_l1"``.
        strength: :math:`\lambda`, at least 0.
        axes: The axes of the model, if they are known.

    Raises:
        ArgumentTypeError: ``model`` is no module.
        UnknownNameError: There is no such kind.
        InvalidArgumentError: ``strength`` is negative, or neither inputs nor axes are given.
        NothingToPruneError: No free axis has such weights.

    References:
        Learning Structured Sparsity in Deep Neural Networks (Wen et al., 2016), https://arxiv.org/abs/1608.03665;
        Learning Efficient Convolutional Networks through Network Slimming (Liu et al., 2017),
        https://arxiv.org/abs/1708.06519

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> penalty = Regularizer(net, torch.randn(1, 4), strength=1e-3)
        >>> loss = net(torch.randn(16, 4)).square().mean() + penalty()
        >>> loss.backward()
    """

    def __init__(
        self,
        model: nn.Module,
        example_inputs: Inputs | None = None,
        *,
        kind: str = "group_lasso",
        strength: float = 1e-4,
        axes: Axes | None = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise ArgumentTypeError(f"model must be a torch.nn.Module, not {type(model).__name__}.")
        if kind not in KINDS:
            raise UnknownNameError.of("kind", str(kind), KINDS)
        if not strength >= 0:
            raise InvalidArgumentError(f"strength must be at least 0, not {strength}.")
        if axes is None:
            if example_inputs is None:
                raise InvalidArgumentError("give example_inputs, from which the axes are found, or axes=.")
            axes = find_axes(model, example_inputs)
        self.kind, self.strength = kind, float(strength)
        self._groups = list(_groups(model, axes, scales_alone=kind == "bn_l1"))
        if not self._groups:
            what = "scale" if kind == "bn_l1" else "weight"
            raise NothingToPruneError(
                f"no free axis of {type(model).__name__} has a {what} that could be pushed to zero."
            )

    def __call__(self) -> Tensor:
        """The term to add to the loss; a scalar with a gradient."""
        terms = [self._term(size, parts) for size, parts in self._groups]
        return self.strength * torch.stack([term.to(terms[0].device) for term in terms]).sum()

    def _term(self, size: int, parts: list[_Part]) -> Tensor:
        if self.kind == "bn_l1":
            return torch.stack([part.parameter.abs().sum() for part in parts]).sum()
        squares, count = _norms(size, parts)
        # The root has no gradient at zero, where a neuron is to stay.
        safe = torch.where(squares > 0, squares, torch.ones_like(squares))
        return (math.sqrt(count) * torch.where(squares > 0, safe.sqrt(), 0)).sum()

    @torch.no_grad()
    def proximal_step(self, lr: float) -> int:
        """Shrinks each group by ``lr * strength`` and sets what would become negative to exactly zero.

        Called after ``optimizer.step()`` instead of adding the term to the loss.

        Args:
            lr: The learning rate of the step.

        Returns:
            How many neurons are zero now.
        """
        zero = 0
        for size, parts in self._groups:
            squares, count = _norms(size, parts)
            weight = 1.0 if self.kind == "bn_l1" else math.sqrt(count)
            norms = squares.sqrt()
            factor = (1 - lr * self.strength * weight / norms.clamp_min(torch.finfo(norms.dtype).tiny)).clamp_min(0)
            zero += int((factor == 0).sum())
            padded = torch.cat([factor, factor.new_ones(1)])
            for part in parts:
                along = [-1 if dim == part.dim else 1 for dim in range(part.parameter.dim())]
                scale = padded[part.positions].view(along)
                part.parameter.mul_(scale.to(part.parameter.device, part.parameter.dtype))
        return zero


def _norms(size: int, parts: list[_Part]) -> tuple[Tensor, float]:
    """Sums of squares of the weights of each neuron, ``(size,)``, and how many weights a neuron has on average."""
    total: Tensor | None = None
    count = 0.0
    for part in parts:
        other = [dim for dim in range(part.parameter.dim()) if dim != part.dim]
        squares = part.parameter.square().sum(other) if other else part.parameter.square()
        summed = squares.new_zeros(size + 1).index_add(0, part.positions.to(squares.device), squares)[:size]
        total = summed if total is None else total + summed.to(total.device)
        count += part.parameter.numel() / size
    assert total is not None, "a group has parts"
    return total, count


def _groups(model: nn.Module, axes: Axes, *, scales_alone: bool) -> Iterator[tuple[int, list[_Part]]]:
    parameters = dict(model.named_parameters(remove_duplicate=False))
    taken: set[int] = set()
    for axis in axes.free:
        parts = []
        for name, dim, positions in axes.members(axis):
            parameter = parameters.get(name)
            # What reads a neuron lies along its inputs; only what makes or scales it must be zero for it to be dead.
            if parameter is None or not parameter.is_floating_point() or dim != 0 or id(parameter) in taken:
                continue
            if scales_alone and not (parameter.dim() == 1 and name.endswith("weight")):
                continue
            taken.add(id(parameter))
            parts.append(_Part(parameter, dim, torch.where(positions < 0, axis.size, positions)))
        if parts:
            yield axis.size, parts
