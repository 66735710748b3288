"""Factors that make removing the same as masking where the size of an axis scales what is computed.

The default scale of attention is one over the root of the size of a head, and a root of a mean of squares is over the
number of entries. The axes record where a size is used so; the weights that make the scaled operand are multiplied by
the inverse factor. It is accepted only if the scaled operation itself, the product of queries and keys or the
normalisation, then gives what it gives in the masked model, and not because outputs agree.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor, nn

from netopt import batches
from netopt.axes import Axes, Axis
from netopt.batches import Inputs
from netopt.errors import NetoptError, VerificationError
from netopt.model.calls import Call, CallNames
from netopt.model.restore import restored
from netopt.model.view import ModelView
from netopt.plan import Plan
from netopt.plan.build import make_plan
from netopt.prune.verify import Forward, reference_outputs

__all__ = ["Rescaling", "find_rescalings", "rescaled"]

_TRIALS = 64
_EPS = ("eps", "variance_epsilon")
_ATTENTION = "scaled_dot_product_attention"
_ADDING = ("addmm", "baddbmm")
_SCALINGS = frozenset(("mul", "rmul", "imul", "multiply", "div", "divide", "true_divide", "truediv", "itruediv"))

Products = Mapping[Call, int]
"""Calls that contract two activations, with the place of the first among their operands."""


@dataclass
class Rescaling:
    """Factors on tensors, along the first dimension as it is now, and new values of attributes, for one axis."""

    scales: dict[str, Any] = field(default_factory=dict)
    attributes: dict[tuple[Any, ...], float] = field(default_factory=dict)


def find_rescalings(view: ModelView, axes: Axes, kept: Mapping[str, Tensor], forward: Forward) -> dict[str, Rescaling]:
    """What makes up for a size that scales, by axis; with it, removing from these axes is the same as masking.

    Args:
        view: What the model holds in which the axes were found; it is given back as it was.
        axes: All of them.
        kept: Positions that stay, by axis name.
        forward: The model, and what it is compared on.
    """
    cut = [axes[name] for name, at in kept.items() if len(at) < axes[name].size and not axes[name].exact]
    if not cut or any(tensor.is_meta for tensor in view.parameters.values()):
        return {}
    norms = {axis.name: modules for axis in cut if (modules := _norms(view, axes, axis))}
    products = {axis.name: _products(axes, axis) for axis in cut if axis.scales and axis.name not in norms}
    try:
        found = _of_queries(view, axes, kept, forward, products)
    except NetoptError:  # a part that has no gradient
        found = {}
    found |= {name: _of_norms(view, axes, kept, name, modules) for name, modules in norms.items()}
    trial = _Trial(view, axes, kept, forward, products, norms)
    if not found or trial.holds(found):
        return found
    several = list(found.items())[:_TRIALS] if len(found) > 1 else []
    return {name: one for name, one in several if trial.holds({name: one})}


def rescaled(plan: Plan, rescalings: Mapping[str, Rescaling]) -> Plan:
    """The plan with these factors; the axes they are for are exact in it."""
    scales: dict[str, Any] = dict(plan.scales)
    attributes = dict(plan.attributes)
    for one in rescalings.values():
        for name, whole in one.scales.items():
            kept = plan.tensors.get(name, {}).get(0)
            factor = whole[kept] if isinstance(whole, Tensor) and kept is not None else whole
            scales[name] = scales[name] * factor if name in scales else factor
        attributes.update(one.attributes)
    rows = tuple(
        dataclasses.replace(row, exact=True, reason=None) if row.name in rescalings else row for row in plan.axes
    )
    return dataclasses.replace(plan, scales=scales, attributes=tuple(attributes.items()), axes=rows)


@dataclass(frozen=True)
class _Trial:
    """How rescalings are tried."""

    view: ModelView
    axes: Axes
    kept: Mapping[str, Tensor]
    forward: Forward
    products: Mapping[str, Products]
    norms: Mapping[str, Collection[str]]

    def holds(self, rescalings: Mapping[str, Rescaling]) -> bool:
        """Whether cutting these axes, and the exact ones, is the same as masking them, operation by operation."""
        chosen = {name: at for name, at in self.kept.items() if name in rescalings or self.axes[name].exact}
        counts = {name: len(at) for name, at in chosen.items()}
        found = self.axes.feasible(counts)
        if any(found[axis.name] != counts.get(axis.name, axis.size) for axis in self.axes.free):
            return False
        plan = rescaled(make_plan(self.view, self.axes, chosen), rescalings)
        calls = frozenset(call for name in rescalings for call in self.products.get(name, ()))
        norms = {module: self._places(module, plan) for name in rescalings for module in self.norms.get(name, ())}
        scaled = _ScaledForward(**{one.name: getattr(self.forward, one.name) for one in fields(self.forward)},
                                calls=calls, norms=norms)  # fmt: skip
        try:
            reference = reference_outputs(scaled, plan.tensors)
            return plan.prepare(self.view).dry_run(reference.matches)
        except NetoptError:
            return False

    def _places(self, module: str, plan: Plan) -> tuple[int, Tensor]:
        """How wide the results of a normalisation are now, and what stays of them."""
        weight = f"{module}.weight" if module else "weight"
        return plan.shapes[weight][0], plan.tensors[weight][0]


@dataclass(frozen=True)
class _ScaledForward(Forward):
    """A forward of which, besides the outputs, the results of scaled operations are compared."""

    calls: frozenset[Call] = frozenset()
    norms: Mapping[str, tuple[int, Tensor]] = field(default_factory=dict)

    def run(self, inputs: Inputs | None = None, *modes: AbstractContextManager[Any]) -> list[Tensor]:
        """The outputs that count, and the results of the scaled operations."""
        results = _ScaledResults(self.view, self.calls, self.norms)
        outputs = super().run(inputs, results, *modes)
        if not results.found or not all(bool(one.any()) for one in results.found):
            raise VerificationError("of nothing but zeros every multiple is the same")
        return [*outputs, *results.found]


class _ScaledResults(CallNames):
    """Notes products of queries and keys, scaled, and results of normalisations."""

    def __init__(self, view: ModelView, calls: Collection[Call], norms: Mapping[str, tuple[int, Tensor]]) -> None:
        super().__init__(view)
        self._calls = calls
        self._norms = {id(view.modules[name]): places for name, places in norms.items()}
        self._places: dict[int, tuple[Tensor, int]] = {}
        """Where the last product is noted, by id; it is kept alive, so that no id is given twice."""
        self.found: list[Tensor] = []

    def on_call(
        self,
        call: Call,
        function: Callable[..., Any],  # noqa: ARG002 - calls are known by their names
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        result: Any,
    ) -> Any:
        """Notes a product, and what a factor makes of it."""
        if call in self._calls:
            self._places.clear()
            self._note(len(self.found), result, _product(call.function, args, kwargs, result))
        elif call.function.strip("_") in _SCALINGS:
            place = next((self._places[id(one)][1] for one in args if id(one) in self._places), None)
            if place is not None:
                self._note(place, result, result)
        return result

    def _note(self, place: int, result: Tensor, product: Tensor) -> None:
        self.found[place:] = [_norm(product, 2), *self.found[place + 1 :]]
        if result is product:
            self._places[id(result)] = (result, place)

    def on_return(self, module: nn.Module, result: Any) -> None:
        """Notes what stays of the result of a normalisation."""
        if id(module) in self._norms:
            size, kept = self._norms[id(module)]
            self.found.append(_norm(result[..., kept.to(result.device)] if result.shape[-1] == size else result, 1))


def _norm(result: Tensor, dims: int) -> Tensor:
    """The norm over all but the last dimensions: heads that are masked there and gone here add nothing."""
    wide = result.detach().abs().to(torch.promote_types(result.abs().dtype, torch.float32))
    wide = wide.square().flatten(0, -dims - 1).sum(0).sqrt() if wide.dim() > dims else wide
    return wide.to(result.abs().dtype)


def _product(function: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Tensor) -> Tensor:
    """The product of queries and keys, without what is added to it."""
    if function != _ATTENTION:
        return result - kwargs.get("beta", 1) * args[0] if function in _ADDING else result
    query, key = (args[at] if len(args) > at else kwargs[name] for at, name in enumerate(("query", "key")))
    if query.dim() > 2 and query.shape[-3] != key.shape[-3]:
        key = key.repeat_interleave(query.shape[-3] // key.shape[-3], -3)
    scale = args[6] if len(args) > 6 else kwargs.get("scale")
    return query @ key.transpose(-2, -1) * (scale if scale is not None else query.shape[-1] ** -0.5)


def _products(axes: Axes, axis: Axis) -> Products:
    """The calls that contract two activations over an axis: queries and keys."""
    places: dict[Call, set[int]] = {}
    for tap in axes.taps(axis):
        places.setdefault(tap.call, set()).add(tap.argument)
    return {call: min(two) for call, two in places.items() if len(two) > 1}


def _of_queries(
    view: ModelView,
    axes: Axes,
    kept: Mapping[str, Tensor],
    forward: Forward,
    products: Mapping[str, Products],
) -> dict[str, Rescaling]:
    """For one over the root of a size: the factor on the rows that make queries, which gradients tell from the rest."""
    weights = {axis: _along(view, axes, axes[axis]) for axis, calls in products.items() if calls}
    if not weights:
        return {}
    makers = _Makers(view, {axis: products[axis] for axis in weights}, weights)
    with restored(view), torch.enable_grad(), torch.inference_mode(False), makers:
        batches.set_eval(view.model).requires_grad_(False)
        for own in weights.values():
            for weight in own.values():
                weight.requires_grad_(weight.is_floating_point())
        batches.call(view.model, forward.inputs)
    found = {}
    for axis, rows in makers.rows.items():
        factor = math.sqrt(len(kept[axis]) / axes[axis].size)
        scales = {}
        for name, at in rows.items():
            weight = weights[axis][name]
            scale = torch.ones(len(at), dtype=torch.promote_types(weight.dtype, torch.float32)).masked_fill_(at, factor)
            scales[name] = scale.view(-1, *[1] * (weight.dim() - 1))
        found[axis] = Rescaling(scales)
    return found


def _along(view: ModelView, axes: Axes, axis: Axis) -> dict[str, Tensor]:
    """The parameters whose first dimension an axis lies along."""
    names = [name for name, dim, _ in axes.members(axis) if dim == 0]
    return {name: view.parameters[name] for name in names if name in view.parameters}


class _Makers(CallNames):
    """Finds, by gradients, which rows of which weights make the first operand of some calls."""

    def __init__(
        self,
        view: ModelView,
        products: Mapping[str, Products],
        weights: Mapping[str, Mapping[str, Tensor]],
    ) -> None:
        super().__init__(view)
        self._places: dict[Call, list[tuple[str, int]]] = {}
        for axis, calls in products.items():
            for call, place in calls.items():
                self._places.setdefault(call, []).append((axis, place))
        self._weights = weights
        self._generator = torch.Generator("cpu").manual_seed(0)
        self.rows: dict[str, dict[str, Tensor]] = {}

    def on_call(
        self,
        call: Call,
        function: Callable[..., Any],  # noqa: ARG002 - calls are known by their names
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        result: Any,
    ) -> Any:
        """Adds what makes the first operand of a call."""
        for axis, place in self._places.get(call, ()):
            operand = [*args, *kwargs.values()][place]
            if not operand.requires_grad:
                continue
            weights = self._weights[axis]
            seed = torch.randn(operand.shape, generator=self._generator, device="cpu").to(operand)
            gradients = torch.autograd.grad(operand, list(weights.values()), seed, retain_graph=True, allow_unused=True)
            rows = self.rows.setdefault(axis, {})
            for weight, gradient in zip(weights, gradients, strict=True):
                if gradient is not None:
                    used = (gradient.detach() != 0).reshape(len(gradient), -1).any(1).cpu()
                    rows[weight] = rows[weight] | used if weight in rows else used
        return result


def _norms(view: ModelView, axes: Axes, axis: Axis) -> list[str]:
    """The modules with an epsilon and a weight all along the axis."""
    found = [
        name.rpartition(".")[0]
        for name, dim, positions in axes.members(axis)
        if name.rpartition(".")[2] == "weight"
        and name in view.parameters
        and view.parameters[name].dim() == 1
        and dim == 0
        and bool((positions >= 0).all())
    ]
    return [
        name
        for name in found
        if _eps(view.modules.get(name)) is not None and getattr(view.modules[name], "bias", None) is None
    ]


def _of_norms(
    view: ModelView, axes: Axes, kept: Mapping[str, Tensor], axis: str, modules: Collection[str]
) -> Rescaling:
    """For a root of a mean of squares: the mean over ``n`` of ``N`` entries is larger by ``N / n``."""
    one, ratio = Rescaling(), axes[axis].size / len(kept[axis])
    for prefix in modules:
        module, name = view.modules[prefix], _eps(view.modules[prefix])
        assert name is not None, "modules without an epsilon were left out"
        one.scales[f"{prefix}.weight" if prefix else "weight"] = math.sqrt(ratio)
        value = getattr(module, name)
        if isinstance(value, float):
            one.attributes[prefix, name] = value * ratio
    return one


def _eps(module: nn.Module | None) -> str | None:
    return next((name for name in _EPS if hasattr(module, name)), None)
