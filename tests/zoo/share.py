"""How much of a model can go, and why the rest stays."""

from __future__ import annotations

import re

import torch
from tests.zoo.case import Case
from torch import Tensor, nn

from netopt.axes import Axes, find_axes

# What stays in every architecture, and needs no word in a case.
USUAL = re.compile("model's input|model's output|kernel|spatial dimension|looked up by number")


def left_over(model: nn.Module, axes: Axes) -> dict[str, Tensor]:
    """By parameter, which entries lie on no free axis."""
    left = {name: torch.ones(one.shape, dtype=torch.bool) for name, one in model.named_parameters()}
    for axis in axes.free:
        for name, dim, positions in axes.members(axis):
            if name in left:
                left[name] &= (positions < 0).view([-1 if index == dim else 1 for index in range(left[name].dim())])
    return left


def free_share(model: nn.Module, axes: Axes) -> float:
    """The share of the parameters that lies on a free axis."""
    total = sum(parameter.numel() for parameter in model.parameters())
    return 1 - sum(int(flags.sum()) for flags in left_over(model, axes).values()) / max(1, total)


def check_share(case: Case) -> None:
    """At least the share of the parameters that the architecture allows can be removed; the case says what stays."""
    model = case.build()
    axes = find_axes(model, case.inputs())
    share = free_share(model, axes)
    assert share >= case.share, f"{share:.3f} of the parameters lie on a free axis, not {case.share}\n{axes}"
    left = left_over(model, axes)
    for axis in axes.frozen:
        if USUAL.search(axis.frozen or "") or any(
            re.search(why, axis.frozen, re.IGNORECASE) for why in case.frozen.values()
        ):
            continue
        for name, dim, positions in axes.members(axis):
            if name in left:
                shape = [-1 if index == dim else 1 for index in range(left[name].dim())]
                stays = bool((left[name] & (positions >= 0).view(shape)).any())
                assert not stays, f"{name}:{dim} {axis.frozen}, which the case does not say"


def check_reasons(case: Case, axes: Axes) -> None:
    """Every frozen axis is so for a reason of every architecture or one the case declares, and no other."""
    left = set(case.stays)
    for axis in axes.frozen:
        reason = axis.frozen or ""
        declared = [why for why in case.stays if re.search(why, reason)]
        assert declared or USUAL.search(reason), f"{axis.name} {reason}, which the case does not say"
        left.difference_update(declared)
    assert not left, f"the case says of axes what holds for none: {sorted(left)}"
