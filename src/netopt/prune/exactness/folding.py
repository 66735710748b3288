"""Where a constant that is no longer read is added instead.

What reads a constant neuron contracts it with weights, so without the neuron every result lacks a constant of its own.
That is followed through the operations that are linear, or that do not see it, until a bias, a parameter that is
added, or a running mean can take it. Where it meets anything else first, an activation or an output, it cannot be
folded, and the reason names the operation.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_iter

from netopt import batches, surgery
from netopt.axes import Axes, Tap
from netopt.batches import Inputs
from netopt.model.calls import Call, CallNames
from netopt.model.restore import restored
from netopt.plan import Plan
from netopt.prune.candidates import names_of
from netopt.prune.exactness.bias_propagation import RefusedError, Visit, equal, within
from netopt.prune.exactness.dead_neurons import Carried, carried, dead, operand
from netopt.prune.verify import Reference, Tensors, masked_tensors, reference_outputs, zeroed

__all__ = ["Folds", "fold_removed", "folds", "shifted"]


@dataclass
class Folds:
    """What is added to which tensors so that neurons can go.

    Attributes:
        shifts: By axis, what is added to each tensor, in its present shape.
        refused: By axis, why its constants cannot be folded.
    """

    shifts: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)

    def of(self, names: Sequence[str]) -> dict[str, Tensor]:
        """What is added to each tensor when these axes lose their constants."""
        total: dict[str, Tensor] = {}
        for name in names:
            for tensor, shift in self.shifts.get(name, {}).items():
                total[tensor] = total[tensor] + shift if tensor in total else shift
        return total


def folds(
    model: nn.Module,
    axes: Axes,
    seen: Mapping[str, Carried],
    gone: Mapping[str, Tensor],
    *,
    inputs: Inputs,
    counted: Callable[[Any], list[Tensor]],
    reference: Reference | None = None,
) -> Folds:
    """Finds what can take the constants of neurons that go; believed only if the model then computes the same.

    Args:
        model: Run a few times; given back as it was.
        axes: Of the model.
        seen: What the neurons of these axes carry.
        gone: By axis, which neurons go; all of them are constant.
        inputs: Of one forward call.
        counted: From a result to the outputs that count.
        reference: What the model's outputs are; found by running it if absent.
    """
    reference = reference or reference_outputs(model, inputs, counted, None, equal=True)
    lost = {name: [(tap, _at(tap, gone[name], values)) for tap, values in seen[name].values] for name in gone}
    with restored(model) as log:
        lacking = log.enter_context(torch.no_grad(), _Lacking(model, lost))
        result = batches.call(model.eval(), inputs)
    for tensor in counted(result):
        for name in lacking.of(tensor):
            lacking.refuse(name, "reaches an output of the model")
    found = lacking.folds()

    def holds(names: Sequence[str]) -> bool:
        without = axes.tensor_indices({name: torch.nonzero(~gone[name]).flatten() for name in names})
        changes = _without(model, without, found.of(names))
        return surgery.Operation(model, changes).dry_run(lambda: reference.is_kept(model, inputs, counted))

    if found.shifts and not holds(list(found.shifts)):
        for name in list(found.shifts):
            if not holds([name]):
                found.refused[name] = "is used in a way that the trace does not see"
                del found.shifts[name]
    return found


def fold_removed(
    model: nn.Module,
    axes: Axes,
    kept: Mapping[str, Tensor],
    plan: Plan,
    *,
    inputs: Inputs,
    counted: Callable[[Any], list[Tensor]],
) -> tuple[Plan, dict[str, Tensor], dict[str, str]]:
    """The plan with the constants of dead neurons folded into what reads them, instead of masked to zero.

    Args:
        model: In which the axes were found; given back as it was.
        axes: All of them.
        kept: Positions that stay, by axis name.
        plan: Made of these.
        inputs: Of one forward call.
        counted: From a result to the outputs that count.

    Returns:
        The plan; by axis, the positions removed and folded; by axis, what is to be said of it.
    """
    names, found = names_of(model, axes), {}
    for row in plan.axes:
        zero = dead(model, axes, axes[row.name], names[row.name]) if axes[row.name].exact else None
        if zero is not None:
            zero[row.kept] = False
            if bool(zero.any()):
                found[row.name] = zero
    if not found:
        return plan, {}, {}

    def look() -> tuple[dict[str, Tensor], Folds]:
        seen = carried(model, axes, list(found), inputs)
        gone = {name: zero & seen[name].constant & ~seen[name].zero for name, zero in found.items()}
        gone = {name: one for name, one in gone.items() if bool(one.any())}
        return gone, folds(model, axes, seen, gone, inputs=inputs, counted=counted) if gone else Folds()

    # In a model in which everything else that is removed is masked, as that is what the smaller one computes.
    others = {name: torch.cat([at, torch.nonzero(found[name]).flatten()]).sort().values if name in found else at
              for name, at in kept.items()}  # fmt: skip
    masked = masked_tensors(model, axes.tensor_indices(others))
    gone, folding = surgery.Operation(model, masked).dry_run(look)
    notes = {name: f"constants of dead neurons are lost: {why}" for name, why in folding.refused.items()}
    notes |= dict.fromkeys(folding.shifts, "constants folded into what reads them")
    positions = {name: torch.nonzero(gone[name]).flatten() for name in folding.shifts}
    return shifted(plan, folding.of(list(folding.shifts))), positions, notes


def shifted(plan: Plan, shifts: Mapping[str, Tensor]) -> Plan:
    """The plan with these added to tensors of the shapes they have before it."""
    narrowed = {name: surgery.narrow(shift, plan.tensors.get(name, {})).cpu() for name, shift in shifts.items()}
    return dataclasses.replace(plan, shifts={**plan.shifts, **narrowed})


def _at(tap: Tap, gone: Tensor, values: Tensor) -> Tensor:
    chosen = (tap.positions >= 0) & gone[tap.positions.clamp(min=0)]
    return torch.where(chosen, values, torch.zeros_like(values))


def _without(model: nn.Module, kept: Tensors, shifts: Mapping[str, Tensor]) -> list[surgery.Swap]:
    """The model with everything but ``kept`` masked and the shifts added."""
    changes = {id(change.tensor): change for change in masked_tensors(model, kept)}
    for name, shift in shifts.items():
        tensor = surgery.find_tensor(model, name)
        assert tensor is not None, "a shift was found by its tensor's name"
        change = changes.setdefault(id(tensor), surgery.Swap(tensor, surgery.successor(tensor, {})))
        change.new.detach().add_(zeroed(shift.clone(), kept.get(name, {})))
    return list(changes.values())


# Calls that read a value out of a tensor.
_READ_OUT = frozenset(
    ("item", "tolist", "numpy", "equal", "allclose", "is_nonzero", "__bool__", "__float__", "__int__", "__contains__")
)


class _Lacking(CallNames):
    """Follows what tensors lack through one forward, axis by axis."""

    def __init__(self, model: nn.Module, constants: Mapping[str, Sequence[tuple[Tap, Tensor]]]) -> None:
        super().__init__(model)
        self._taps: dict[Call, list[tuple[str, Tap, Tensor]]] = {}
        for name, several in constants.items():
            for tap, values in several:
                self._taps.setdefault(tap.call, []).append((name, tap, values))
        own = surgery.named_tensors(model)
        self._tensor_names = {id(tensor): name for name, tensor in reversed(own.items())}
        self._fixed = {id(tensor): tensor for tensor in own.values()}
        """Tensors that do not depend on the inputs; kept alive, as those below, so that no id is given twice."""
        self._lacks: dict[int, tuple[Tensor, dict[str, Tensor]]] = {}
        self._uses: Counter[int] = Counter()
        self._taken: dict[str, dict[int, list[Tensor]]] = {name: {} for name in constants}
        self._refused: dict[str, str] = {}

    def of(self, tensor: Tensor) -> dict[str, Tensor]:
        """What a tensor lacks, by axis."""
        return self._lacks[id(tensor)][1] if id(tensor) in self._lacks else {}

    def refuse(self, name: str, why: str) -> None:
        """Gives up one axis; the first reason stays."""
        self._refused.setdefault(name, why)

    def folds(self) -> Folds:
        """What was taken, of the axes of which everything was."""
        found = Folds(refused=self._refused)
        for name, taken in self._taken.items():
            for key, several in taken.items():
                if len(several) < self._uses[key] or not all(equal(one, several[0]) for one in several):
                    self.refuse(name, f"would need different values of `{self._tensor_names[key]}` where it is used")
            if name not in self._refused:
                found.shifts[name] = {self._tensor_names[key]: several[0] for key, several in taken.items()}
        return found

    def on_call(
        self, call: Call, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], result: Any
    ) -> Any:
        """Works out what the results of one call lack."""
        given = [one for one in tree_iter((args, kwargs)) if isinstance(one, Tensor)]
        results = [one for one in tree_iter(result) if isinstance(one, Tensor)]
        if not results and call.function not in _READ_OUT:
            return result
        made = {id(one) for one in results}
        self._uses.update({id(one) for one in given if id(one) in self._tensor_names} - made)
        arriving = self._arriving(call, args, kwargs, given)
        if not arriving and all(map(self._is_fixed, given)) and not call.function.startswith("rand"):
            self._fixed |= {id(one): one for one in results}
        for key in made:
            self._lacks.pop(key, None)
        for name, own in arriving.items():
            if name not in self._refused:
                take = partial(self._take, name)
                visit = Visit(call.function, function, args, kwargs, own, self._is_fixed, take)
                self._hand_on(name, visit, results, call)
        return result

    def _hand_on(self, name: str, visit: Visit, results: list[Tensor], call: Call) -> None:
        try:
            lacking = visit.lacking()
        except RefusedError as error:
            self.refuse(name, f"{error}, in {call.function} of `{call.module}`")
            return
        for one, lack in zip(results, [] if lacking is None else tree_iter(lacking), strict=False):
            if lack is not None and bool((lack != 0).any()):
                self._lacks.setdefault(id(one), (one, {}))[1][name] = lack

    def _arriving(
        self, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any], given: list[Tensor]
    ) -> dict[str, dict[int, Tensor]]:
        """By axis, what each operand lacks: what it lacked before, and the constants that are read here."""
        arriving: dict[str, dict[int, Tensor]] = {}
        for one in given:
            for name, lack in self.of(one).items():
                arriving.setdefault(name, {})[id(one)] = lack
        for name, tap, values in self._taps.get(call, ()):
            one = operand(tap, args, kwargs)
            if one is None:
                self.refuse(name, "is read where its shape is not seen")
                continue
            shape = [-1 if dim == tap.dim % one.dim() else 1 for dim in range(one.dim())]
            here = values.to(one).view(shape).expand(one.shape)
            own = arriving.setdefault(name, {})
            own[id(one)] = own[id(one)] + here if id(one) in own else here
        return arriving

    def _is_fixed(self, value: Any) -> bool:
        """Whether a value does not depend on the inputs."""
        return not isinstance(value, Tensor) or id(value) in self._fixed

    def _take(self, name: str, tensor: Any, lack: Tensor) -> bool:
        """Lets a parameter or buffer that is added take what is lacking, if it has room for it."""
        if not isinstance(tensor, Tensor) or id(tensor) not in self._tensor_names or not tensor.is_floating_point():
            return False
        own = within(lack, tensor.shape)
        if own is not None:
            self._taken[name].setdefault(id(tensor), []).append(own)
        return own is not None
