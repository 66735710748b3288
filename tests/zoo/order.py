"""The law that neurons have no order: exchanged in every tensor that holds them, they compute the same.

It holds for exact and inexact axes alike, so it shows what masking cannot: that what a norm or a softmax mixes is
coupled to the right neurons, and that no free axis has positions with a meaning of their own.
"""

from __future__ import annotations

import torch
from tests.zoo.case import Case, call, seeded
from tests.zoo.laws import held_tensors, tensors, to_double
from torch import Tensor, nn

from netopt.axes import Axes, Axis, find_axes


@torch.no_grad()
def reorder(model: nn.Module, axes: Axes, seed: int) -> int:
    """Exchanges the neurons of every free axis, at random, in all its members; how many axes there were to do."""
    held, _ = held_tensors(model)
    generator = torch.Generator().manual_seed(seed)
    done = 0
    for axis in axes.free:
        members = [one for one in axes.members(axis) if one[0] in held]  # a cache may be gone, and is made anew
        if axis.size < 2 or any(not _holds_values(held[name]) for name, _, _ in members) or _pointed_at(axes, axis):
            continue
        order = torch.randperm(axis.size, generator=generator).tolist()
        for name, dim, positions in members:
            tensor = held[name]
            tensor.copy_(tensor.detach().index_select(dim, moved(positions, order).to(tensor.device)).clone())
        done += 1
    return done


def moved(positions: Tensor, order: list[int]) -> Tensor:
    """From where each index of a dimension is filled: the k-th place of a neuron, from the k-th place of another."""
    places: dict[int, list[int]] = {}
    for index, position in enumerate(positions.tolist()):
        places.setdefault(position, []).append(index)
    filled = torch.arange(len(positions))
    for position, indices in places.items():
        if position >= 0:
            filled[indices] = torch.tensor(places[order[position]])
    return filled


def _holds_values(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def _pointed_at(axes: Axes, axis: Axis) -> bool:
    """Whether a buffer holds numbers of this axis's neurons, which exchanging them would have to rewrite."""
    return bool(axes.values({axis.name: torch.arange(1, axis.size)}))


def check_order_does_not_matter(case: Case) -> None:
    """The neurons of every free axis, exchanged at random: the same outputs."""
    if not case.ordered:
        check_reordered(case, case.build(), case.build(), find_axes(case.build(), case.inputs()))


def check_reordered(case: Case, dense: nn.Module, moved_about: nn.Module, axes: Axes) -> None:
    """The law, for two equal models, the second of which is changed."""
    inputs = to_double(case.inputs()) if case.double else case.inputs()
    results = []
    for model in (dense.eval(), moved_about.eval()):
        if case.double:
            model.double()
        if model is moved_about:
            reorder(model, axes, seed=3)
        results.append(tensors(seeded(lambda model=model: call(model, inputs), 4)))
    # Sums run in another order, in float32 where the model asks for it; a neuron in the wrong place differs by more.
    tolerance = max(case.tolerance, 1e-5)
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(other, one, rtol=tolerance, atol=tolerance)
