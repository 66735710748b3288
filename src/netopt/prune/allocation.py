"""Scores that are computed once and serve every budget."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from netopt.axes import Axes, Outputs, find_axes
from netopt.axes.find import counted_outputs
from netopt.batches import Data, Inputs
from netopt.importance.activations import recordable
from netopt.importance.contractions import Use
from netopt.importance.elimination import calibrated
from netopt.importance.neurons import ComparableScores, neuron_scores
from netopt.importance.scoring import Scoring
from netopt.plan import Plan
from netopt.plan.build import make_plan
from netopt.progress import bar
from netopt.prune.candidates import AxisSelector, candidates, scored
from netopt.prune.repair import calibration, copy_of, samples_of
from netopt.reconstruction.refit import change_when_refitted

__all__ = ["reconstruction_scores"]

DEPTHS = (0.25, 0.5, 0.75)
"""Shares of an axis that are cut."""

SAMPLES = 48
"""So many samples, in at least three batches, are run for each."""


def reconstruction_scores(
    model: nn.Module,
    example_inputs: Inputs,
    data: Data,
    *,
    loss_fn: Callable[[Any, Any], Tensor] | None = None,
    include: AxisSelector = None,
    exclude: AxisSelector = None,
    outputs: Outputs = None,
    measured: bool = False,
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
        measured: Scale the scores of each axis to the change of the outputs that is seen when it alone is cut and
            repaired, at three depths on some samples. That takes about a forward over the data for each axis.
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

    counted = None if outputs is None else differentiated
    found = neuron_scores(model, scored(axes, chosen), Scoring("reconstruction", data, loss_fn, counted, progress))
    scores = found.scores
    if measured:
        trials = _Trials(model, axes, data, differentiated)
        scores = trials.calibrated(scores, progress)
    return ComparableScores(scores, found.scale)


class _Trials:
    """Cuts one axis alone in a copy of the model, repairs what reads it, and looks at the outputs."""

    def __init__(self, model: nn.Module, axes: Axes, data: Data, outputs: Callable[[Any], list[Tensor]]) -> None:
        self.dense, self.small, self.axes, self.outputs = model, copy_of(model), axes, outputs
        self.held = calibration(data, SAMPLES, at_least=3)
        self.count = samples_of(self.held[-1])
        self.uses: dict[str, Use] = {}

    def calibrated(self, scores: Mapping[str, Tensor], progress: bool) -> dict[str, Tensor]:
        """Scores whose sums are what was measured; of axes that cannot be cut alone, by what others were on average."""
        found, ratios = {}, []
        for name in bar(scores, "trials", shown=progress, unit="axis"):
            changes = self._changes(name, scores[name])
            if changes:
                found[name] = calibrated(scores[name], changes)
                ratios.append(float(found[name].sum()) / max(float(scores[name].sum()), 1e-300))
        usual = math.exp(sum(math.log(max(one, 1e-30)) for one in ratios) / len(ratios)) if ratios else 1.0
        return {name: found[name] if name in found else one * usual for name, one in scores.items()}

    def _changes(self, name: str, scores: Tensor) -> dict[int, float]:
        """For numbers of neurons that go, the change of the outputs of a sample."""
        size, order, changes = len(scores), torch.sort(scores, stable=True).indices, {}
        for depth in DEPTHS:
            gone = max(1, round(depth * size))
            counts = self.axes.feasible({name: size - gone})
            alone = all(count == self.axes[other].size for other, count in counts.items() if other != name)
            if gone >= size or counts[name] != size - gone or not alone:
                continue
            plan = make_plan(self.small, self.axes, {name: order[gone:].sort().values})
            changes[gone] = plan.prepare(self.small).dry_run(lambda plan=plan: self._change(plan)) / self.count
        return changes

    def _change(self, plan: Plan) -> float:
        return change_when_refitted(self.small, self.dense, plan.tensors, self.held, self.outputs, self.uses)
