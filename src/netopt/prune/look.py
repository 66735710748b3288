"""What a model has that could be removed: its axes, and which of them may lose neurons."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from netopt.axes import Axes, Axis, Outputs, find_axes
from netopt.axes.find import counted_outputs
from netopt.batches import Inputs
from netopt.errors import ArgumentTypeError, InvalidArgumentError
from netopt.importance.activations import recordable
from netopt.model.view import ModelView
from netopt.prune.candidates import AxisSelector, candidates
from netopt.prune.verify import Forward

__all__ = ["Found", "Where", "check_model", "look"]


@dataclass(frozen=True)
class Where:
    """Which neurons may go, and which results must keep their shape."""

    include: AxisSelector = None
    exclude: AxisSelector = None
    outputs: Outputs = None

    def counted(self, result: Any) -> list[Tensor]:
        """The tensors of a result that count."""
        return counted_outputs(result, self.outputs)


@dataclass(frozen=True)
class Found:
    """What was found in a model.

    Attributes:
        held: What the model holds.
        forward: How the model is run.
        axes: All of them.
        chosen: Those that may lose neurons.
        kept_out: Why the others may not, by name.
    """

    held: ModelView
    forward: Forward
    axes: Axes
    chosen: list[Axis]
    kept_out: dict[str, str]

    @property
    def sizes(self) -> dict[str, int]:
        """Number of neurons of each axis that may lose some."""
        return {axis.name: axis.size for axis in self.chosen}


def look(held: ModelView, example_inputs: Inputs, where: Where) -> Found:
    """Finds the axes of a model and which of them may lose neurons.

    Raises:
        NothingToPruneError: No axis may; the message lists the reasons.
    """
    # In inference mode some operations hide from a trace, and none has a gradient.
    with torch.inference_mode(False):
        inputs = recordable(example_inputs)
        axes = find_axes(held.model, inputs, outputs=where.outputs)
    chosen, kept_out = candidates(held.model, axes, where.include, where.exclude)
    return Found(held, Forward(held.model, inputs, where.counted, axes.steady), axes, chosen, kept_out)


def check_model(model: Any) -> ModelView:
    """What a model holds, if neurons can be removed from it.

    Raises:
        ArgumentTypeError: It is no module.
        InvalidArgumentError: It is compiled, or some parameter has no values, or no strided ones.
    """
    if not isinstance(model, nn.Module):
        shown = model.__name__ if isinstance(model, type) else type(model).__name__
        raise ArgumentTypeError(f"model must be a torch.nn.Module, not {shown}.")
    held = ModelView(model)
    for name, tensor in held.tensors.items():
        problem = next((why for test, why in _UNFIT if test(tensor)), None)
        if problem is not None:
            raise InvalidArgumentError(f"{name!r} {problem}.")
    return held


_UNFIT: tuple[tuple[Callable[[Tensor], bool], str], ...] = (
    (nn.parameter.is_lazy, "is not initialised yet; run the model once before pruning it"),
    (lambda one: one.is_nested, "is a nested tensor, whose neurons have no common size; use padded tensors"),
    (lambda one: one.layout is not torch.strided, "is a sparse tensor; make it dense before pruning, .to_dense()"),
)
