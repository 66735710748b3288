"""What makes removing the same as masking where it would not be: factors for what a size enters.

A mean over fewer entries is larger, a default scale of attention with fewer entries is larger; both are constant
factors, and a weight next to them takes the inverse. Which weight that is, is proposed by shapes alone and believed
only if the compensated model then computes what the masked one does.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from netopt.axes import Axes, Axis
from netopt.batches import Inputs
from netopt.errors import NetoptError
from netopt.model.view import ModelView
from netopt.plan import Plan
from netopt.prune.verify import Reference, reference_outputs

__all__ = ["compensated"]

_TRIALS = 64
_EPS = ("eps", "variance_epsilon")
_REDUCED = ("is reduced", "is normalised", "is summed")
"""How reasons begin that no factor on queries makes up for: fewer entries are reduced, whatever the scale."""

MakePlan = Callable[[Mapping[str, Tensor]], Plan]


@dataclass
class Rescaling:
    """Factors on tensors, along the first dimension as it is now, and new values of attributes, for one axis."""

    scales: dict[str, Any] = field(default_factory=dict)
    attributes: dict[tuple[Any, ...], float] = field(default_factory=dict)


@dataclass(frozen=True)
class _Subject:
    """What is to be compensated, and how it is tried."""

    held: ModelView
    axes: Axes
    kept: Mapping[str, Tensor]
    plan: Plan
    make_plan: MakePlan
    inputs: Inputs
    counted: Callable[[Any], list[Tensor]]

    def holds(self, proposals: Mapping[str, Rescaling]) -> bool:
        """Whether cutting these axes, and the exact ones, is the same as masking them, with these proposals."""
        chosen = {name: at for name, at in self.kept.items() if name in proposals or self.axes[name].exact}
        counts = {name: len(at) for name, at in chosen.items()}
        found = self.axes.feasible(counts)
        if any(found[axis.name] != counts.get(axis.name, axis.size) for axis in self.axes.free):
            return False
        model = self.held.model
        whole = self.plan if len(chosen) == len(self.kept) else self.make_plan(chosen)
        plan = _with(whole, proposals)
        try:
            reference: Reference = reference_outputs(model, self.inputs, self.counted, plan.tensors)
            return plan.prepare(self.held).dry_run(lambda: reference.is_kept(model, self.inputs, self.counted))
        except NetoptError:
            return False


def compensated(
    held: ModelView,
    axes: Axes,
    kept: Mapping[str, Tensor],
    plan: Plan,
    *,
    make_plan: MakePlan,
    inputs: Inputs,
    counted: Callable[[Any], list[Tensor]],
) -> Plan:
    """The plan with compensations for the axes that have one; those axes are exact in it.

    Args:
        held: What the model holds in which the axes were found; it is given back as it was.
        axes: All of them.
        kept: Positions that stay, by axis name.
        plan: Made of these.
        make_plan: From kept positions to a plan.
        inputs: Of one forward call.
        counted: From a result to the outputs that count.
    """
    if plan.exact or any(tensor.is_meta for tensor in held.parameters.values()):
        return plan
    subject = _Subject(held, axes, kept, plan, make_plan, inputs, counted)
    cut = [axes[row.name] for row in plan.axes if not row.exact]
    proposals = dict(_proposals(subject, cut, inner=False))
    if not proposals:
        return plan
    others = dict(_proposals(subject, cut, inner=True))
    for tried in (proposals, others) if _differ(proposals, others) else (proposals,):
        if subject.holds(tried):
            return _exact(_with(plan, tried), tried)
    alone = {
        name: proposal
        for name, proposal in list(proposals.items())[:_TRIALS]
        if len(proposals) > 1 and subject.holds({name: proposal})
    }
    return _exact(_with(plan, alone), alone) if alone else plan


def _differ(first: Mapping[str, Rescaling], second: Mapping[str, Rescaling]) -> bool:
    """Whether two proposals for the same axes scale some tensor differently."""
    return any(
        not torch.equal(torch.as_tensor(factor), torch.as_tensor(second[axis].scales[name]))
        for axis, proposal in first.items()
        for name, factor in proposal.scales.items()
    )


def _proposals(subject: _Subject, cut: list[Axis], *, inner: bool) -> Iterator[tuple[str, Rescaling]]:
    modules = subject.held.modules
    for axis in cut:
        norms = [
            (member.tensor.rpartition(".")[0], member.tensor)
            for member in axis.members
            if _eps(modules.get(member.tensor.rpartition(".")[0])) is not None
        ]
        if norms:
            proposal = _of_norms(subject, modules, norms)
        elif (axis.inexact or "").startswith(_REDUCED):
            proposal = None
        else:
            proposal = _of_queries(subject, axis, inner=inner)
        if proposal is not None:
            yield axis.name, proposal


def _of_norms(subject: _Subject, modules: Mapping[str, nn.Module], norms: list[tuple[str, str]]) -> Rescaling | None:
    """For a root of a mean of squares: the mean over ``n`` of ``N`` entries is larger by ``N / n``."""
    proposal = Rescaling()
    for prefix, tensor in norms:
        module, name = modules[prefix], _eps(modules[prefix])
        cuts = subject.plan.tensors.get(tensor)
        if tensor.rpartition(".")[2] == "bias" or name is None or cuts is None or set(cuts) != {0}:
            return None
        ratio = subject.plan.shapes[tensor][0] / len(cuts[0])
        proposal.scales[tensor] = math.sqrt(ratio)
        value = getattr(module, name)
        if isinstance(value, float):
            proposal.attributes[prefix, name] = value * ratio
    return proposal


def _of_queries(subject: _Subject, axis: Axis, *, inner: bool) -> Rescaling | None:
    """For attention's default scale: the weights that make queries, of one layer or in a block of a fused one."""
    size, left = axis.size, len(subject.kept[axis.name])
    factor = math.sqrt(left / size)
    tensors = subject.held.tensors
    makers = [
        (name, positions)
        for name, dim, positions in subject.axes.members(axis)
        if dim == 0 and tensors[name].dim() > 1 and bool((positions >= 0).all())
    ]
    if not makers:
        return None
    name, positions = makers[0]
    rows = torch.ones(len(positions))
    blocks = 3
    fused = len(makers) == 1 and len(positions) % blocks == 0
    if fused and inner:
        place = torch.arange(len(positions)) // size
        rows[place % blocks == 0] = factor
    elif fused:
        rows[: len(positions) // blocks] = factor
    else:
        rows[:] = factor
    proposal = Rescaling({name: rows.view(-1, *([1] * (tensors[name].dim() - 1)))})
    for bias in (name.removesuffix("weight") + "bias",):
        if bias != name and bias in tensors and tensors[bias].shape == tensors[name].shape[:1]:
            proposal.scales[bias] = rows
    return proposal


def _eps(module: nn.Module | None) -> str | None:
    return next((name for name in _EPS if hasattr(module, name)), None)


def _with(plan: Plan, proposals: Mapping[str, Rescaling]) -> Plan:
    scales: dict[str, Any] = dict(plan.scales)
    attributes = dict(plan.attributes)
    for proposal in proposals.values():
        for name, whole in proposal.scales.items():
            kept = plan.tensors.get(name, {}).get(0)
            factor = whole[kept] if isinstance(whole, Tensor) and kept is not None else whole
            scales[name] = scales[name] * factor if name in scales else factor
        attributes.update(proposal.attributes)
    return dataclasses.replace(plan, scales=scales, attributes=tuple(attributes.items()))


def _exact(plan: Plan, proposals: Mapping[str, Rescaling]) -> Plan:
    rows = tuple(
        dataclasses.replace(row, exact=True, reason=None) if row.name in proposals else row for row in plan.axes
    )
    return dataclasses.replace(plan, axes=rows)
