"""Removes physically the neurons that do nothing any more.

A neuron is dead when every weight that makes it is zero or masked: its output then no longer depends on the input.
If that is zero it goes; if it is a constant (a bias, through an activation) it is folded into what follows; where that
cannot be done the neuron stays, and the report says why. Removing may kill others, so this repeats until none is left.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from netopt import measure, surgery
from netopt.axes import Axes, Outputs
from netopt.axes.find import axes_of, counted_outputs
from netopt.batches import Inputs
from netopt.model.parameters import places
from netopt.plan import Plan
from netopt.plan.build import make_plan
from netopt.prune.candidates import names_of
from netopt.prune.exactness import dead_neurons
from netopt.prune.exactness.folding import Folds, fold, shifted
from netopt.prune.look import check_model
from netopt.prune.verify import Forward, Reference, reference_outputs
from netopt.report import PruningReport, Row

__all__ = ["shrink"]


def shrink(
    model: nn.Module,
    example_inputs: Inputs,
    optimizer: Optimizer | Iterable[Optimizer] | None = None,
    *,
    outputs: Outputs = None,
) -> PruningReport:
    """Removes, in place, every neuron that is masked or exactly zero wherever it is produced.

    The smaller model computes what the model computes now; that is checked on the example inputs, and otherwise
    everything is put back. At least one neuron stays on every axis.

    Args:
        model: Any module, with masks of ``torch.nn.utils.prune`` on or with weights that are zero.
        example_inputs: A tensor, a tuple of positional or a dict of keyword inputs, of one forward call.
        optimizer: One or several, whose state is narrowed along with the parameters.
        outputs: Which results must keep their shape; see :func:`netopt.find_axes`.

    Returns:
        Parameters, MACs and bytes before and after, one row an axis that became smaller, and the plan. A model without
        dead neurons is left alone, with an empty plan.

    Raises:
        ArgumentTypeError: ``model`` is no module.
        VerificationError: The smaller model computes something else; everything was put back.

    Example:
        >>> net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
        >>> _ = net[0].weight.data[:6].zero_()
        >>> report = shrink(net, torch.randn(1, 8))
        >>> net[0].out_features, net[2].in_features
        (10, 10)
    """
    view = check_model(model, example_inputs)
    optimizers = surgery.as_optimizers(optimizer)

    def counted(result: Any) -> list[Tensor]:
        return counted_outputs(result, outputs)

    forward = Forward(view, example_inputs, counted)
    reference = reference_outputs(forward)
    before = measure.cost(view, example_inputs)
    shrinking = _Shrinking(forward, optimizers, outputs, reference)

    def finish(plan: Plan, notes: Mapping[str, str], staying: Mapping[str, str]) -> PruningReport:
        reference.check()
        rows = tuple(Row(cut.name, cut.size, len(cut.kept), cut.exact, notes.get(cut.name, "")) for cut in plan.axes)
        after = measure.cost(view, example_inputs)
        return PruningReport(call="shrink", before=before, after=after, rows=rows, plan=plan, frozen=dict(staying))

    return shrinking.run(Plan({}), {}, finish)


Finish = Callable[[Plan, Mapping[str, str], Mapping[str, str]], PruningReport]


@dataclass
class _Round:
    """What is found dead: which neurons go, what is added for them, and the notes for the report."""

    gone: dict[str, Tensor]
    shifts: dict[str, Tensor]
    notes: dict[str, str]
    staying: dict[str, str]
    """Why dead neurons stay, by axis."""


@dataclass
class _Shrinking:
    """Rounds of removal inside one another, so that a failure in the last undoes the first."""

    forward: Forward
    optimizers: Sequence[Optimizer]
    outputs: Outputs
    reference: Reference

    def run(self, done: Plan, notes: Mapping[str, str], finish: Finish) -> PruningReport:
        """Removes what is dead now, then what died of that; at the end ``finish`` is called, and everything stays."""
        view = self.forward.view
        axes = axes_of(view, self.forward.inputs, self.outputs)
        found = self._decide(axes)
        if not found.gone:
            return finish(done, notes, found.staying)
        kept = {name: torch.nonzero(~gone).flatten() for name, gone in found.gone.items()}
        plan = shifted(make_plan(view, axes, kept), found.shifts)
        whole = done.then(plan) if done.tensors else plan
        noted = {**notes, **found.notes}
        return plan.prepare(view, self.optimizers).run(lambda: self.run(whole, noted, finish))

    def _decide(self, axes: Axes) -> _Round:
        view = self.forward.view
        names, known = names_of(view, axes), places(view)
        exact = [axis for axis in axes.free if axis.exact]
        zero = {axis.name: dead_neurons.find(known, axes, axis, names[axis.name]) for axis in exact}
        found = {name: one for name, one in zero.items() if one is not None and bool(one.any())}
        outputs = dead_neurons.constant_outputs(self.forward, known, axes, list(found)) if found else {}
        gone = self._settled(axes, {name: one & outputs[name].constant for name, one in found.items()})
        constant = {name: one for name, one in gone.items() if bool((one & ~outputs[name].zero).any())}
        folding = Folds()
        if constant:
            folding = fold(self.forward, axes, outputs, constant, self.reference)
            nothing = {name: gone[name] & outputs[name].zero for name in folding.refused}
            gone = self._settled(axes, {**gone, **nothing})
        staying = {
            name: f"{int((one & ~gone.get(name, torch.zeros_like(one))).sum())} dead neurons stay: "
            + folding.refused.get(name, "what they carry is not the same everywhere it is read")
            for name, one in found.items()
            if name in folding.refused or not bool(outputs[name].constant[one].all())
        }
        folded = [name for name in folding.shifts if name in gone]
        notes = dict.fromkeys(folded, "constants folded into what reads them")
        return _Round(gone, folding.of(folded), notes, staying)

    def _settled(self, axes: Axes, gone: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What can go with one neuron left on every axis, and all equations between sizes satisfied."""
        settled = {}
        for name, one in gone.items():
            left = one.clone()
            left[0] &= not bool(one.all())
            count = int((~left).sum())
            if count < len(left) and axes.feasible({name: count}).get(name) == count:
                settled[name] = left
        counts = {name: int((~one).sum()) for name, one in settled.items()}
        found = axes.feasible(counts) if counts else {}
        possible = all(found[axis.name] == counts.get(axis.name, axis.size) for axis in axes.free) if counts else True
        return settled if possible else {}
