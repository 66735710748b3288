"""Removes physically the neurons that do nothing any more.

A neuron is dead when every weight that makes it is zero or masked: what it carries then no longer depends on the input.
If that is zero it goes; if it is a constant (a bias, through an activation) it is folded into the biases of what reads
it first; where that cannot be done the neuron stays. Removing may kill others, so this repeats until none is left.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from netopt import batches, measure, surgery
from netopt.axes import Axes, Axis, Outputs, Tap, find_axes
from netopt.axes.find import counted_outputs
from netopt.batches import Inputs
from netopt.calls import Call, CallNames
from netopt.errors import ArgumentTypeError
from netopt.parameters import places
from netopt.plan import Plan
from netopt.prune.candidates import names_of
from netopt.prune.neurons import make_plan
from netopt.prune.verify import Promise, promise
from netopt.report import PruningReport, Row
from netopt.restore import given_back

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
    if not isinstance(model, nn.Module):
        raise ArgumentTypeError(f"model must be a torch.nn.Module, not {type(model).__name__}.")
    optimizers = surgery.as_optimizers(optimizer)

    def counted(result: Any) -> list[Tensor]:
        return counted_outputs(result, outputs)

    promised = promise(model, example_inputs, counted, None, equal=True)
    before = measure.cost(model, example_inputs)
    shrinking = _Shrinking(model, example_inputs, optimizers, outputs, counted, promised)

    def finish(plan: Plan, notes: Mapping[str, str]) -> PruningReport:
        promised.check(model, example_inputs, counted)
        rows = tuple(Row(cut.name, cut.size, len(cut.kept), cut.exact, notes.get(cut.name, "")) for cut in plan.axes)
        after = measure.cost(model, example_inputs)
        return PruningReport(call="shrink", before=before, after=after, rows=rows, plan=plan)

    return shrinking.run(Plan({}), {}, finish)


@dataclass(frozen=True)
class _Fold:
    """What dead neurons of one axis add to a consumer: its bias, and by how much."""

    bias: Tensor
    addition: Tensor


@dataclass
class _Shrinking:
    """Rounds of removal inside one another, so that a failure in the last undoes the first."""

    model: nn.Module
    inputs: Inputs
    optimizers: Sequence[Optimizer]
    outputs: Outputs
    counted: Callable[[Any], list[Tensor]]
    promised: Promise

    def run(
        self, done: Plan, notes: Mapping[str, str], finish: Callable[[Plan, Mapping[str, str]], PruningReport]
    ) -> PruningReport:
        """Removes what is dead now, then what died of that; at the end ``finish`` is called, and everything stays."""
        axes = find_axes(self.model, self.inputs, outputs=self.outputs)
        kept, folds, folded = self._decide(axes)
        if not kept:
            return finish(done, notes)
        plan = make_plan(self.model, axes, kept)
        whole = done.then(plan) if done.tensors else plan
        said = {**notes, **folded}

        def remove() -> PruningReport:
            return plan.prepare(self.model, self.optimizers).run(lambda: self.run(whole, said, finish))

        return surgery.Operation(self.model, _added(folds)).run(remove)

    def _decide(self, axes: Axes) -> tuple[dict[str, Tensor], list[_Fold], dict[str, str]]:
        """Positions that stay of every axis that shrinks, what is folded, and a note on each that is folded."""
        names = names_of(self.model, axes)
        dead = {
            axis.name: found for axis in axes.free if (found := self._dead(axes, axis, names[axis.name])) is not None
        }
        dead = {name: found for name, found in dead.items() if axes[name].exact and bool(found.any())}
        carried = self._carried(axes, dead)
        kept, folds, notes = {}, [], {}
        for name, found in dead.items():
            axis, additions = axes[name], []
            gone = found & carried[name].constant
            if bool((gone & ~carried[name].zero).any()):
                additions = _folds(self.model, axes.taps(axis), carried[name], gone)
                gone = gone if additions is not None else gone & carried[name].zero
            stays = torch.nonzero(~gone).flatten()
            stays = stays if len(stays) else torch.zeros(1, dtype=torch.int64)
            if len(stays) == axis.size or axes.feasible({name: len(stays)}).get(name) != len(stays):
                continue
            kept[name] = stays
            if additions:
                folds.extend(additions)
                notes[name] = "constants folded into what reads them"
        return (kept, folds, notes) if self._possible(axes, kept) else ({}, [], {})

    def _possible(self, axes: Axes, kept: Mapping[str, Tensor]) -> bool:
        """Whether these counts satisfy all equations together."""
        counts = {name: len(positions) for name, positions in kept.items()}
        found = axes.feasible(counts) if counts else {}
        return all(found[axis.name] == counts.get(axis.name, axis.size) for axis in axes.free) if counts else True

    def _dead(self, axes: Axes, axis: Axis, makers: set[str]) -> Tensor | None:
        """Whether all weights that make each neuron are zero or masked; None if nothing is known to make the axis."""
        values = {name: place.value for name, place in places(self.model).items()}
        alive, found = torch.zeros(axis.size, dtype=torch.bool), False
        for tensor, dim, positions in axes.members(axis):
            value = values.get(tensor.removesuffix("_orig"))
            if tensor not in makers or value is None or value.dim() < 2:
                continue
            found = True
            others = [other for other in range(value.dim()) if other != dim]
            used = (
                (value != 0).any(dim=others[0]) if len(others) == 1 else (value != 0).movedim(dim, 0).flatten(1).any(1)
            )
            here = positions >= 0
            alive[positions[here & used.cpu()]] = True
        return ~alive if found else None

    def _carried(self, axes: Axes, dead: Mapping[str, Tensor]) -> dict[str, _Carried]:
        """What arrives at the taps of these axes on the example inputs."""
        taps = {name: axes.taps(axes[name]) for name in dead}
        with given_back(self.model), torch.no_grad(), _Ranges(self.model, taps) as ranges:
            batches.call(self.model.eval(), self.inputs)
        return {name: _Carried(axes[name].size, ranges.seen[name]) for name in dead}


class _Ranges(CallNames):
    """Notes the least and the largest value of every index at taps."""

    def __init__(self, model: nn.Module, taps: Mapping[str, Sequence[Tap]]) -> None:
        super().__init__(model.named_modules())
        self._wanted: dict[Call, list[tuple[str, Tap]]] = {}
        for name, several in taps.items():
            for tap in several:
                self._wanted.setdefault(tap.call, []).append((name, tap))
        self.seen: dict[str, list[tuple[Tap, Tensor, Tensor]]] = {name: [] for name in taps}

    def on_call(
        self,
        call: Call,
        function: Callable[..., Any],  # noqa: ARG002 - what is seen of every call
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        result: Any,
    ) -> Any:
        """Notes what arrives at the taps of this call."""
        for name, tap in self._wanted.get(call, ()):
            operands = [*args, *kwargs.values()]
            rows = operands[tap.argument].detach().movedim(tap.dim, 0).flatten(1)
            if rows.is_complex():
                # Without an order only zero is recognised as a constant.
                largest = rows.abs().amax(1).cpu()
                self.seen[name].append((tap, -largest, largest))
            else:
                self.seen[name].append((tap, rows.amin(1).cpu(), rows.amax(1).cpu()))
        return result


class _Carried:
    """What the neurons of one axis carry, as it is read: whether it is constant, whether it is zero, and where."""

    def __init__(self, size: int, seen: list[tuple[Tap, Tensor, Tensor]]) -> None:
        self.constant = torch.ones(size, dtype=torch.bool)
        self.zero = torch.ones(size, dtype=torch.bool)
        self.seen = seen
        for tap, low, high in seen:
            here = tap.positions >= 0
            at = tap.positions[here]
            self.constant[at[(low != high)[here]]] = False
            self.zero[at[((low != 0) | (high != 0))[here]]] = False
        if not seen:
            # Read by no contraction: what becomes of it is not known.
            self.constant[:] = False


def _folds(model: nn.Module, taps: Sequence[Tap], carried: _Carried, gone: Tensor) -> list[_Fold] | None:
    """What the constants add to each consumer's bias; None if some consumer cannot take them."""
    folds = []
    for tap, value, _ in carried.seen:
        module = model.get_submodule(tap.call.module)
        weight, bias = getattr(module, "weight", None), module._parameters.get("bias")
        if not isinstance(weight, Tensor) or bias is None or tap.argument != 0 or len(taps) != len(carried.seen):
            return None
        chosen = (tap.positions >= 0) & gone[tap.positions.clamp(min=0)]
        constants = torch.where(chosen, value, torch.zeros_like(value)).to(weight)
        if tap.call.function == "linear" and weight.shape == (len(bias), len(constants)):
            folds.append(_Fold(bias, weight.detach() @ constants))
        elif _is_unpadded(module, weight, len(constants), len(bias)):
            folds.append(_Fold(bias, weight.detach().flatten(2).sum(2) @ constants))
        else:
            return None
    return folds


def _is_unpadded(module: nn.Module, weight: Tensor, inputs: int, outputs: int) -> bool:
    """Whether a convolution reads every input at every output, so that a constant adds the same everywhere."""
    padding = getattr(module, "padding", None)
    plain = isinstance(padding, tuple) and not any(padding) and not getattr(module, "transposed", True)
    return plain and weight.dim() > 2 and weight.shape[:2] == (outputs, inputs)


def _added(folds: Sequence[_Fold]) -> list[surgery.Exchange]:
    total: dict[int, tuple[Tensor, Tensor]] = {}
    for fold in folds:
        bias, so_far = total.get(id(fold.bias), (fold.bias, torch.zeros_like(fold.addition)))
        total[id(fold.bias)] = bias, so_far + fold.addition
    return [surgery.Exchange(bias, surgery.successor(bias, {}, bias.detach() + more)) for bias, more in total.values()]
