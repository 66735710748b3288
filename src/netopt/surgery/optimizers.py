"""How an optimizer's memory of a parameter is narrowed with it.

State is read by its shape, not by the optimizer's class: what has the parameter's shape is cut alike, what is one
number stays, and what fits neither is refused before anything changes.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from netopt.errors import ArgumentTypeError, InvalidArgumentError, OptimizerStateError
from netopt.model.view import ModelView
from netopt.surgery.attributes import Entry
from netopt.surgery.tensors import Cuts, narrow

Cut = tuple[Tensor, Cuts]
"""A tensor and its kept indices."""


def as_optimizers(optimizer: Optimizer | Iterable[Optimizer] | None) -> tuple[Optimizer, ...]:
    """None, one optimizer or several, as a tuple.

    Raises:
        ArgumentTypeError: Something in it is no optimizer.
    """
    if optimizer is None:
        return ()
    several = (
        (optimizer,) if isinstance(optimizer, (Optimizer, str)) or not isinstance(optimizer, Iterable) else optimizer
    )
    found = tuple(several)
    for one in found:
        if not isinstance(one, Optimizer):
            raise ArgumentTypeError(f"optimizer must be a torch.optim.Optimizer, not {type(one).__name__}")
    return found


def narrowed_states(optimizers: Iterable[Optimizer], cuts: Mapping[int, Cut]) -> Iterator[Entry]:
    """The entries of every optimizer's state that change when the parameters in ``cuts`` (by id) are narrowed.

    Raises:
        InvalidArgumentError: An optimizer holds none of these parameters, though there are some.
        OptimizerStateError: Some state has no known relation to the parameter's shape.
    """
    for optimizer in optimizers:
        members = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        if cuts and not any(id(parameter) in cuts for parameter in members):
            raise InvalidArgumentError(
                f"the optimizer, a {type(optimizer).__name__}, trains none of the parameters that become smaller; pass "
                f"the one that was built from this model's parameters()"
            )
        for group in optimizer.param_groups:
            flat = _Flat(group["params"], cuts)
            for parameter in group["params"]:
                state = optimizer.state.get(parameter, {})
                _, kept = cuts.get(id(parameter), (parameter, {}))
                for key, value in state.items():
                    where = f"state {key!r} of {type(optimizer).__name__}"
                    new = _narrowed(value, parameter, kept, flat, where)
                    if new is not value:
                        yield Entry(state, key, new)
            # LBFGS keeps the length of its flat vectors; the only such number in torch.optim.
            if flat.changes and vars(optimizer).get("_numel_cache") is not None:
                yield Entry(vars(optimizer), "_numel_cache", None)


class _Former:
    """The shapes that parameters had, so that an optimizer that remembers those is not mistaken for a narrowed one.

    Most optimizers fail by themselves on memory of another shape; a fused one reads it as if it were its own.
    """

    def __init__(self) -> None:
        # By model and name: a weak reference to a parameter would keep torch from ever swapping it.
        self._shapes: list[tuple[weakref.ref[nn.Module], dict[str, set[torch.Size]]]] = []
        self._checked: weakref.WeakKeyDictionary[Optimizer, int] = weakref.WeakKeyDictionary()
        self._times = 0

    def add(self, view: ModelView, shapes: Mapping[int, torch.Size]) -> None:
        """Notes the shapes, by parameter's id, that parameters of a model had until now."""
        if not self._times:
            register_optimizer_step_pre_hook(self._refuse)
        self._times += 1
        known = next((shapes for model, shapes in self._shapes if model() is view.model), {})
        others = [one for one in self._shapes if (model := one[0]()) is not None and model is not view.model]
        self._shapes = [*others, (weakref.ref(view.model), known)]
        for name, parameter in view.parameters.items():
            before = shapes.get(id(parameter))
            if before is not None and before != parameter.shape:
                known.setdefault(name, set()).add(before)

    def _refuse(self, optimizer: Optimizer, _args: Any, _kwargs: Any) -> None:
        """Looks, once after each surgery, whether a step would use memory of what is gone."""
        if self._checked.get(optimizer) == self._times:
            return
        for reference, known in self._shapes:
            for name, parameter in () if (model := reference()) is None else model.named_parameters():
                for key, value in optimizer.state.get(parameter, {}).items() if name in known else ():
                    if isinstance(value, Tensor) and value.shape != parameter.shape and value.shape in known[name]:
                        raise OptimizerStateError(
                            f"state {key!r} of {type(optimizer).__name__} has shape {tuple(value.shape)}, and `{name}` "
                            f"{tuple(parameter.shape)} since neurons were removed without it; pass optimizer=, or "
                            f"{_ADVICE}"
                        )
        self._checked[optimizer] = self._times


FORMER = _Former()


class _Flat:
    """State that runs through all parameters of a group, one after the other (LBFGS)."""

    def __init__(self, parameters: list[Tensor], cuts: Mapping[int, Cut]) -> None:
        self._parameters, self._cuts = parameters, cuts
        self.length = sum(parameter.numel() for parameter in parameters)
        self.changes = any(id(parameter) in cuts for parameter in parameters)

    def narrow(self, vector: Tensor) -> Tensor:
        parts = vector.split([parameter.numel() for parameter in self._parameters])
        kept = [
            narrow(part.view(parameter.shape), self._cuts[id(parameter)][1]).flatten()
            if id(parameter) in self._cuts
            else part
            for parameter, part in zip(self._parameters, parts, strict=True)
        ]
        return torch.cat(kept)


def _narrowed(value: Any, parameter: Tensor, kept: Cuts, flat: _Flat, where: str) -> Any:
    """``value`` for the narrowed parameter; the same object where it does not change."""
    if isinstance(value, Tensor):
        return _narrowed_tensor(value, parameter, kept, flat, where)
    if value is None or isinstance(value, (bool, int, float, complex, str)):
        return value
    if isinstance(value, (list, tuple)):
        parts = [_narrowed(part, parameter, kept, flat, where) for part in value]
        same = all(new is old for new, old in zip(parts, value, strict=True))
        return value if same else type(value)(parts)
    if isinstance(value, dict):
        items = {key: _narrowed(part, parameter, kept, flat, where) for key, part in value.items()}
        return value if all(items[key] is value[key] for key in value) else items
    if not kept:
        return value
    raise OptimizerStateError(f"{where} is a {type(value).__name__}, which cannot be narrowed; {_ADVICE}")


def _narrowed_tensor(value: Tensor, parameter: Tensor, kept: Cuts, flat: _Flat, where: str) -> Tensor:
    if value.dim() == 1 and value.numel() == flat.length and value.shape != parameter.shape:
        return flat.narrow(value) if flat.changes else value
    if not kept or value.numel() <= 1:
        return value
    # Adafactor keeps one number a row: the parameter's dimensions, some of them 1.
    aligned = value.dim() == parameter.dim() and all(
        size in (1, full) for size, full in zip(value.shape, parameter.shape, strict=True)
    )
    if aligned:
        own = {dim: indices for dim, indices in kept.items() if value.shape[dim] == parameter.shape[dim]}
        return narrow(value, own)
    raise OptimizerStateError(
        f"{where} has shape {tuple(value.shape)} for a parameter of shape {tuple(parameter.shape)}: it is factored in "
        f"a way that is not known, so it cannot be narrowed; {_ADVICE}"
    )


_ADVICE = "clear that state (optimizer.state.clear()) or build a new optimizer after pruning"
