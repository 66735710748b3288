"""Which neurons are dead, and the constants that are read of them.

A neuron is dead when every weight that makes it is zero or masked: its output is then a bias, sent through whatever
lies between (a normalisation, an activation, a sum with other dead neurons). The constant is not derived but read off:
it is what arrives at every consumer, the same for all samples and positions of the example inputs and of a variation
of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from netopt import batches
from netopt.axes import Axes, Axis, Tap
from netopt.errors import ForwardError
from netopt.model.calls import Call, CallNames
from netopt.model.parameters import Place
from netopt.model.restore import restored
from netopt.model.view import ModelView
from netopt.plan import Plan
from netopt.prune.verify import Forward, varied

__all__ = ["ConstantOutputs", "constant_outputs", "find", "may_exist"]


def may_exist(view: ModelView, plan: Plan, nonzero: Mapping[str, int]) -> bool:
    """Whether some neuron that ``plan`` removes may be dead: a whole slice of some weight is zero. Cheap.

    Args:
        view: What the model holds.
        plan: What is going to be removed.
        nonzero: How many entries of each parameter are not zero.
    """
    if any(parameter.is_meta for parameter in view.parameters.values()):
        return False
    for name, cuts in plan.tensors.items():
        weight = view.parameters.get(name)
        if weight is None or weight.dim() < 2:
            continue
        zeros = weight.numel() - nonzero.get(name, 0)
        for dim, kept in cuts.items():
            if zeros < weight.numel() // weight.shape[dim]:
                continue  # too few for a whole slice
            goes = torch.ones(weight.shape[dim], dtype=torch.bool)
            goes[kept] = False
            if bool(_zero(weight, view.mask_of(name), dim, goes).any()):
                return True
    return False


def find(known: Mapping[str, Place], axes: Axes, axis: Axis, makers: set[str]) -> Tensor | None:
    """Whether all weights that make each neuron are zero or masked; None if no tensor makes the axis.

    Args:
        known: The model's parameters.
        axes: All of them.
        axis: One of them.
        makers: Names of the layers and tensors whose outputs its neurons are.
    """
    zero, found = torch.ones(axis.size, dtype=torch.bool), False
    passed = {tap.call.module for tap in axes.taps(axis) if _passes(known, tap)}
    for tensor, dim, positions in axes.members(axis):
        place = known.get(tensor.removesuffix("_orig"))
        if tensor not in makers or place is None or place.parameter.dim() < 2:
            continue
        if tensor.rpartition(".")[0] in passed:
            continue
        found = True
        here = positions >= 0
        zero[positions[here & ~_zero(place.parameter, place.mask, dim, here)]] = False
    return zero if found else None


def _passes(known: Mapping[str, Place], tap: Tap) -> bool:
    """Whether a neuron passes through here by itself, as through a depthwise convolution: what reads it comes later."""
    place = known.get(f"{tap.call.module}.weight" if tap.call.module else "weight")
    return (
        place is not None
        and tap.call.function in ("conv1d", "conv2d", "conv3d")
        and place.parameter.shape[1] == 1 < len(tap.positions)
    )


def _zero(weight: Tensor, mask: Tensor | None, dim: int, chosen: Tensor) -> Tensor:
    """At which of the chosen indices a weight is zero or masked throughout; ``False`` at the others."""
    at = torch.nonzero(chosen).flatten()
    # Most have an entry that is not zero among their first.
    for share in (2, None):
        part = (slice(None), *[slice(share)] * (weight.dim() - 1))
        rows = weight.detach().movedim(dim, 0)[part]
        used = rows.index_select(0, at.to(rows.device)) != 0
        if mask is not None:
            used &= mask.movedim(dim, 0)[part].index_select(0, at.to(rows.device)).bool()
        at = at[~used.flatten(1).any(1).cpu()]
    found = torch.zeros(len(chosen), dtype=torch.bool)
    found[at] = True
    return found


class ConstantOutputs:
    """What is read of the neurons of one axis: whether it is constant, whether it is zero, and where.

    Attributes:
        constant: Whether each neuron is the same everywhere it is read.
        zero: Whether that is zero.
        values: At each tap, the constant of every index that is one.
    """

    def __init__(self, size: int, taps: Sequence[Tap]) -> None:
        self.constant = torch.full((size,), fill_value=bool(taps))
        self.zero = torch.ones(size, dtype=torch.bool)
        self.values: list[tuple[Tap, Tensor]] = []

    def add(self, tap: Tap, low: Tensor, high: Tensor) -> None:
        """Adds the least and the largest value of every index at one tap."""
        here = tap.positions >= 0
        at = tap.positions[here]
        known = next((values for other, values in self.values if other is tap), None)
        same = (low == high) & ((low == known) if known is not None else True)
        self.constant[at[~same[here]]] = False
        self.zero[at[((low != 0) | (high != 0))[here]]] = False
        if known is None:
            self.values.append((tap, low))


def constant_outputs(
    forward: Forward, known: Mapping[str, Place], axes: Axes, names: Sequence[str]
) -> dict[str, ConstantOutputs]:
    """What arrives at the taps of these axes, on the example inputs and on others of the same kind.

    Args:
        forward: Run twice.
        known: The model's parameters.
        axes: In which the names are.
        names: Of axes.
    """
    view, inputs = forward.view, forward.inputs
    taps = {name: [tap for tap in axes.taps(axes[name]) if not _passes(known, tap)] for name in names}
    found = {name: ConstantOutputs(axes[name].size, taps[name]) for name in names}
    for given in (inputs, varied(inputs)):
        with restored(view) as log:
            ranges = log.enter_context(torch.no_grad(), _Ranges(view, taps))
            try:
                batches.call(batches.set_eval(view.model), given)
            except ForwardError:
                if given is inputs:
                    raise
                continue  # not everything of the right shape is an input; what was given is
        for name, several in ranges.found.items():
            for tap, low, high in several:
                found[name].add(tap, low, high)
    for name, one in found.items():
        if len(one.values) < len(taps[name]):
            one.constant[:] = False
    return found


class _Ranges(CallNames):
    """Notes the least and the largest value of every index at taps."""

    def __init__(self, view: ModelView, taps: Mapping[str, Sequence[Tap]]) -> None:
        super().__init__(view)
        self._wanted: dict[Call, list[tuple[str, Tap]]] = {}
        for name, several in taps.items():
            for tap in several:
                self._wanted.setdefault(tap.call, []).append((name, tap))
        self.found: dict[str, list[tuple[Tap, Tensor, Tensor]]] = {name: [] for name in taps}

    def on_call(
        self,
        call: Call,
        function: Callable[..., Any],  # noqa: ARG002 - what is noted of every call
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        result: Any,
    ) -> Any:
        """Notes what arrives at the taps of this call."""
        for name, tap in self._wanted.get(call, ()):
            tensor = _operand(tap, args, kwargs)
            if tensor is None:
                continue
            rows = tensor.detach().movedim(tap.dim, 0).reshape(tensor.shape[tap.dim], -1)
            if rows.is_complex():
                # Without an order only zero is recognised as a constant.
                largest = rows.abs().amax(1).cpu()
                self.found[name].append((tap, -largest, largest))
            else:
                self.found[name].append((tap, rows.amin(1).cpu(), rows.amax(1).cpu()))
        return result


def _operand(tap: Tap, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    """The activations that a call reads at a tap; None where, inside ``vmap``, they show fewer dimensions."""
    operands = [*args, *kwargs.values()]
    tensor = operands[tap.argument] if tap.argument < len(operands) else None
    fits = isinstance(tensor, Tensor) and tap.dim < tensor.dim() and tensor.shape[tap.dim] == len(tap.positions)
    return tensor if fits else None
