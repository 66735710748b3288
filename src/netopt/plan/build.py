"""From the neurons that stay to a plan: which indices of which tensors, and what the model's integers become."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from netopt.axes import Axes
from netopt.model.view import ModelView
from netopt.plan import AxisCut, Plan, shapes_of

__all__ = ["make_plan"]


def make_plan(model: nn.Module | ModelView, axes: Axes, kept: Mapping[str, Tensor]) -> Plan:
    """The plan that keeps these positions of these axes.

    Args:
        model: In which the axes were found.
        axes: All of them.
        kept: Positions that stay, ascending, by axis name; axes not named keep all.
    """
    view = ModelView.of(model)
    less = {name: positions for name, positions in kept.items() if positions.shape[0] < axes[name].size}
    tied, transient = _tied(view), _transient(view)
    # Under every name a tied tensor has, so that the plan also fits where the tie is not yet made.
    tensors = {other: cuts for name, cuts in axes.tensor_indices(less).items() for other in tied.get(name, (name,))}
    counts = {name: positions.shape[0] for name, positions in less.items()}
    cuts = (AxisCut(name, axes[name].size, kept, axes[name].exact, axes[name].inexact) for name, kept in less.items())
    # A saved model has one name of a tie, and not all buffers.
    saved = (view.parameters.keys() | view.buffers.keys()) - transient
    saved.difference_update(other for names in tied.values() for other in [one for one in names if one in saved][1:])
    return Plan(
        tensors,
        tuple((tuple(path), value) for path, value in axes.attribute_values(counts)) if less else (),
        values=axes.values(less),
        axes=tuple(cuts),
        shapes=shapes_of(view, tensors),
        unsaved=tuple(name for name in tensors if name not in saved),
    )


def _tied(view: ModelView) -> dict[str, list[str]]:
    """All names of every tensor that has several, under the first."""
    named = view.tensors
    if len(set(map(id, named.values()))) == len(named):
        return {}
    names: dict[int, list[str]] = {}
    for name, tensor in named.items():
        names.setdefault(id(tensor), []).append(name)
    return {several[0]: several for several in names.values() if len(several) > 1}


def _transient(view: ModelView) -> set[str]:
    """Names of the buffers that are not saved."""
    return {
        f"{prefix}.{key}" if prefix else key
        for prefix, module in view.modules.items()
        if module._non_persistent_buffers_set
        for key in module._non_persistent_buffers_set
    }
