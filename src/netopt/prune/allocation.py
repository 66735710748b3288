"""Scores that are computed once and serve every budget."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from netopt.axes import Outputs, find_axes
from netopt.axes.find import counted_outputs
from netopt.batches import Batch, Inputs
from netopt.importance.activations import recordable
from netopt.importance.neurons import ComparableScores, neuron_scores
from netopt.prune.candidates import AxisSelector, candidates

__all__ = ["reconstruction_scores"]


def reconstruction_scores(
    model: nn.Module,
    example_inputs: Inputs,
    data: Iterable[Batch],
    *,
    loss_fn: Callable[[Any, Any], Tensor] | None = None,
    include: AxisSelector = None,
    exclude: AxisSelector = None,
    outputs: Outputs = None,
    progress: bool = True,
) -> ComparableScores:
    """What the outputs lose when neurons go and all that reads them is refitted; for several budgets at once.

    The result is what ``importance="reconstruction"`` computes, and goes into ``importance=`` of
    :func:`netopt.prune_neurons` with the same ``include``, ``exclude`` and ``outputs``.

    Args:
        model: Run forwards once and backwards twice on all data, and given back as it was.
        example_inputs: Of one forward call.
        data: Calibration batches; labels are used by ``loss_fn`` alone.
        loss_fn: Of the result and a batch's targets. Without it the change of all outputs counts.
        include: The axes that may lose neurons.
        exclude: Those that stay whole.
        outputs: Which results keep their shape.
        progress: Whether to show a progress bar.

    Example:
        >>> net, data = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)), [torch.randn(64, 8)]
        >>> scores = reconstruction_scores(net, data[0], data, progress=False)
        >>> {name: len(one) for name, one in scores.items()}
        {'0': 16}
    """
    with torch.inference_mode(False):
        example_inputs = recordable(example_inputs)
        axes = find_axes(model, example_inputs, outputs=outputs)
    chosen, _ = candidates(model, axes, include, exclude)

    def differentiated(result: Any) -> list[Tensor]:
        return [tensor for tensor in counted_outputs(result, outputs) if tensor.is_floating_point()]

    found = neuron_scores(
        model,
        {axis.name: axes.members(axis) for axis in chosen},
        lambda name: axes.taps(axes[name]),
        {axis.name: axis.size for axis in chosen},
        importance="reconstruction",
        data=data,
        loss_fn=loss_fn,
        outputs=None if outputs is None else differentiated,
        progress=progress,
    )
    return ComparableScores(found.scores, found.scale)
