"""Bias propagation: the constant of a dead neuron is added to the bias of the layer that reads it.

A linear layer, a convolution or ``addmm`` that reads a constant contracts it with its own weight, and its own bias
takes the product; without a bias, the running mean of a batch norm right behind it does. Anything else refuses, with a
reason. Whether the model then computes the same is compared.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from netopt import batches, surgery
from netopt.axes import Axes, Tap
from netopt.model.calls import Call, CallNames
from netopt.model.parameters import places
from netopt.model.restore import restored
from netopt.model.view import ModelView
from netopt.plan import Plan
from netopt.prune.candidates import names_of
from netopt.prune.exactness import dead_neurons
from netopt.prune.exactness.dead_neurons import ConstantOutputs
from netopt.prune.verify import Forward, Reference, Tensors, masked_tensors, reference_outputs, zeroed

__all__ = ["Folds", "fold", "fold_removed", "shifted"]


@dataclass
class Folds:
    """What is added to which tensors so that dead neurons can go.

    Attributes:
        shifts: By axis, what is added to each tensor, in its present shape.
        refused: By axis, why its constants cannot be folded.
        positions: By axis, the neurons whose constants are folded.
    """

    shifts: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    positions: dict[str, Tensor] = field(default_factory=dict)

    def of(self, names: Sequence[str]) -> dict[str, Tensor]:
        """What is added to each tensor when these axes lose their constants."""
        total: dict[str, Tensor] = {}
        for name in names:
            for tensor, shift in self.shifts.get(name, {}).items():
                total[tensor] = total[tensor] + shift if tensor in total else shift
        return total


def fold(
    forward: Forward,
    axes: Axes,
    outputs: Mapping[str, ConstantOutputs],
    gone: Mapping[str, Tensor],
    reference: Reference | None = None,
) -> Folds:
    """Finds the biases that take the constants of neurons that go; believed only if the model computes the same.

    Args:
        forward: The model, run a few times and given back as it was.
        axes: Of the model.
        outputs: What is read of the neurons of these axes.
        gone: By axis, which neurons go; all of them are constant.
        reference: What the model's outputs are; found by running it if absent.
    """
    model = forward.model
    reference = reference or reference_outputs(forward)
    constants = {name: [(tap, _at(tap, gone[name], values)) for tap, values in outputs[name].values] for name in gone}
    with restored(forward.view) as log:
        consumers = log.enter_context(torch.no_grad(), _Consumers(forward.view, constants))
        batches.call(batches.set_eval(model), forward.inputs)
    found = consumers.folds()
    found.positions = {name: torch.nonzero(gone[name]).flatten() for name in found.shifts}

    def holds(names: Sequence[str]) -> bool:
        without = axes.tensor_indices({name: torch.nonzero(~gone[name]).flatten() for name in names})
        changes = _without(model, without, found.of(names))
        return surgery.Operation(model, changes, forward.view).dry_run(reference.matches)

    if found.shifts and not holds(list(found.shifts)):
        for name in list(found.shifts):
            if not holds([name]):
                found.refused[name] = "the model computes something else without them"
                del found.shifts[name], found.positions[name]
    return found


def fold_removed(forward: Forward, axes: Axes, kept: Mapping[str, Tensor], plan: Plan) -> Folds:
    """Folds the constants of the dead neurons that a plan removes, which would else be masked to zero.

    Args:
        forward: The model in which the axes were found; given back as it was.
        axes: All of them.
        kept: Positions that stay, by axis name.
        plan: Made of these.
    """
    model = forward.model
    names, known, found = names_of(forward.view, axes), places(forward.view), {}
    for row in plan.axes:
        zero = dead_neurons.find(known, axes, axes[row.name], names[row.name]) if axes[row.name].exact else None
        if zero is not None:
            zero[row.kept] = False
            if bool(zero.any()):
                found[row.name] = zero
    if not found:
        return Folds()

    def look() -> Folds:
        outputs = dead_neurons.constant_outputs(forward, known, axes, list(found))
        gone = {name: zero & outputs[name].constant & ~outputs[name].zero for name, zero in found.items()}
        gone = {name: one for name, one in gone.items() if bool(one.any())}
        return fold(forward, axes, outputs, gone) if gone else Folds()

    # In a model in which everything else that is removed is masked, as that is what the smaller one computes.
    others = {name: torch.cat([at, torch.nonzero(found[name]).flatten()]).sort().values if name in found else at
              for name, at in kept.items()}  # fmt: skip
    return surgery.Operation(model, masked_tensors(model, axes.tensor_indices(others)), forward.view).dry_run(look)


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


class _RefusedError(Exception):
    """A layer cannot absorb a constant."""


def _argument(args: tuple[Any, ...], kwargs: Mapping[str, Any], place: int, name: str) -> Any:
    return args[place] if len(args) > place else kwargs.get(name)


def _linear(constant: Tensor, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Tensor, Any]:
    return nn.functional.linear(constant, _argument(args, kwargs, 1, "weight")), _argument(args, kwargs, 2, "bias")


def _addmm(constant: Tensor, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Tensor, Any]:
    if kwargs:
        raise _RefusedError("they are read with factors")
    return constant @ args[2], args[0]


def _convolution(function: Callable[..., Any]) -> Callable[..., tuple[Tensor, Any]]:
    def product(constant: Tensor, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Tensor, Any]:
        weight = _argument(args, kwargs, 1, "weight")
        places = args[0].shape[2 - weight.dim() :]
        everywhere = constant.view(1, -1, *(1 for _ in places)).expand(1, -1, *places)
        named = {name: None if name == "bias" else value for name, value in kwargs.items()}
        out = function(everywhere, weight, None, *args[3:], **named)[0].flatten(1)
        if not _equal(out, out[:, :1]):
            raise _RefusedError("they are read differently from place to place")
        return out[:, 0], _argument(args, kwargs, 2, "bias")

    return product


_CONVOLUTIONS = ("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
_PRODUCTS: Mapping[str, Callable[..., tuple[Tensor, Any]]] = {
    "linear": _linear,
    "addmm": _addmm,
    **{name: _convolution(getattr(torch, name)) for name in _CONVOLUTIONS},
}
"""By call, from a constant and the call's arguments to what the constant adds, and the bias that can take it."""


class _Consumers(CallNames):
    """Computes what the output of each layer is missing without the constants, and which of its tensors absorbs it."""

    def __init__(self, view: ModelView, constants: Mapping[str, Sequence[tuple[Tap, Tensor]]]) -> None:
        super().__init__(view)
        self._constants: dict[Call, dict[str, list[tuple[Tap, Tensor]]]] = {}
        for name, several in constants.items():
            for tap, values in several:
                self._constants.setdefault(tap.call, {}).setdefault(name, []).append((tap, values))
        self._biases = {id(tensor): name for name, tensor in reversed(view.tensors.items())}
        self._biasless: dict[int, tuple[Tensor, Call, dict[str, Tensor]]] = {}
        """Results of layers without a bias; kept alive, so that no id is given twice."""
        self._absorbed: dict[str, dict[str, list[Tensor]]] = {name: {} for name in constants}
        self._refused: dict[str, str] = {}

    def folds(self) -> Folds:
        """What was absorbed, of the axes of which everything was."""
        for _, call, missing in self._biasless.values():
            for name in missing:
                self._refused.setdefault(name, f"`{call.module}`, which reads them, has no bias to take them")
        found = Folds(refused=self._refused)
        for name, absorbed in self._absorbed.items():
            for bias, several in absorbed.items():
                if not all(_equal(one, several[0]) for one in several):
                    self._refused.setdefault(name, f"they would need different values of `{bias}` where it is used")
            if name not in self._refused:
                found.shifts[name] = {bias: several[0] for bias, several in absorbed.items()}
        return found

    def on_call(
        self,
        call: Call,
        function: Callable[..., Any],  # noqa: ARG002 - the table knows it by its name
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        result: Any,
    ) -> Any:
        """Adds the constants to the bias of a layer, or to the norm behind it."""
        if call.function in ("batch_norm", "instance_norm") and id(args[0]) in self._biasless:
            mean, of_batch = args[3], args[5]
            for name, missing in self._biasless.pop(id(args[0]))[2].items():
                # Statistics of the batch take a constant away by themselves.
                if not of_batch:
                    self._absorb(name, mean, -missing, call)
        for name, several in self._constants.get(call, {}).items():
            self._read(name, several, call, args, kwargs, result)
        return result

    def _read(
        self,
        name: str,
        several: Sequence[tuple[Tap, Tensor]],
        call: Call,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        result: Any,
    ) -> None:
        product = _PRODUCTS.get(call.function)
        if product is None:
            why = f"{call.function} in `{call.module}`, which reads them, has no bias to take them"
            self._refused.setdefault(name, why)
            return
        try:
            missing, bias = product(torch.stack([values for _, values in several]).sum(0).to(result), args, kwargs)
        except _RefusedError as error:
            self._refused.setdefault(name, f"{error} by `{call.module}`")
            return
        if bias is None:
            self._biasless.setdefault(id(result), (result, call, {}))[2][name] = missing
        else:
            self._absorb(name, bias, missing, call)

    def _absorb(self, name: str, bias: Any, missing: Tensor, call: Call) -> None:
        own = self._biases.get(id(bias))
        if own is None or bias.shape != missing.shape:
            self._refused.setdefault(name, f"`{call.module}`, which reads them, has no bias of its own")
        else:
            self._absorbed[name].setdefault(own, []).append(missing)


def _equal(first: Tensor, second: Tensor) -> bool:
    """Whether two constants are the same to rounding."""
    largest = float(second.abs().max()) if second.numel() else 0.0
    gap = float((first - second).abs().max()) if second.numel() else 0.0
    return gap <= 64 * torch.finfo(second.dtype).eps * largest
