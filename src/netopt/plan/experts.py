"""Which experts of which mixtures of a model stay: decided, checked, saved, and carried out on any fresh copy of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from netopt.errors import InvalidArgumentError, PlanMismatchError
from netopt.model.view import ModelView
from netopt.plan.blocks import fingerprint_of, path_of
from netopt.plan.files import JSONFile
from netopt.plan.providers import load
from netopt.surgery import Operation, as_optimizers, prepare
from netopt.surgery.attributes import Path
from netopt.surgery.lists import Dropped, ListCut, left_behind

__all__ = ["ExpertCut", "ExpertHook", "ExpertPlan", "counted_by_hooks", "register_expert_hook"]

FORMAT = 1

ExpertHook: TypeAlias = "Callable[[nn.Module, Mapping[str, tuple[int, ...]], int, int], list[Path]]"
"""Finds which values are the number of experts, given the shapes to come, the number, and the number to come."""

_HOOKS: dict[str, ExpertHook] = {}


def register_expert_hook(name: str, hook: ExpertHook) -> None:
    """Has ``hook`` look for what counts experts in every model whose experts are removed from now on.

    Raises:
        InvalidArgumentError: The name is taken.
    """
    if _HOOKS.get(name, hook) != hook:
        raise InvalidArgumentError(f"an expert hook {name!r} exists already; choose another name.")
    _HOOKS[name] = hook


def counted_by_hooks(model: nn.Module, shapes: Mapping[str, tuple[int, ...]], size: int, kept: int) -> list[Path]:
    """What all hooks find that counts the experts."""
    load()
    return [path for find in _HOOKS.values() for path in find(model, shapes, size, kept)]


@dataclass(frozen=True)
class ExpertCut:
    """What stays of one mixture.

    Attributes:
        name: Of the module that holds the router and the experts.
        size: How many experts it has.
        kept: The experts that stay, ascending.
        tensors: Dotted names and dimensions of tensors with an entry, or as many blocks, for each expert.
        lists: Dotted names of lists with an entry for each.
    """

    name: str
    size: int
    kept: tuple[int, ...]
    tensors: tuple[tuple[str, int], ...] = ()
    lists: tuple[str, ...] = ()

    @property
    def removed(self) -> tuple[int, ...]:
        """The experts that go."""
        return tuple(place for place in range(self.size) if place not in self.kept)

    def indices(self, length: int) -> Tensor:
        """What stays of a dimension of this length, which has as many entries for each expert."""
        each = length // self.size
        return (torch.tensor(self.kept)[:, None] * each + torch.arange(each)).flatten()


@dataclass(frozen=True)
class ExpertPlan(JSONFile):
    """Which experts stay, and the numbers that follow; see :func:`netopt.plan_experts`.

    Attributes:
        mixtures: What stays of each mixture that loses experts.
        attributes: New values of numbers of experts, by path.
        fingerprint: Of names and shapes of the tensors of the model it was made for.
        predicted: Parameters, MACs and bytes before and after, where they were measured.

    Example:
        >>> plan = ExpertPlan((ExpertCut("moe", 4, (0, 1, 3), (("moe.router.weight", 0),), ("moe.experts",)),))
        >>> print(plan)
        moe 4 -> 3 (without 2)
        >>> ExpertPlan.from_dict(plan.to_dict()) == plan
        True
    """

    mixtures: tuple[ExpertCut, ...]
    attributes: tuple[tuple[Path, Any], ...] = ()
    fingerprint: str = ""
    predicted: Mapping[str, int] = field(default_factory=dict, compare=False)

    def apply(self, model: nn.Module, optimizer: Optimizer | Iterable[Optimizer] | None = None) -> None:
        """Removes the experts from ``model``, in place; all of it is done or nothing.

        Args:
            model: The one the plan was made for, or another that is built like it.
            optimizer: One or several, whose state follows.

        Raises:
            PlanMismatchError: The model has other tensors, lists or numbers than the plan was made for.
            OptimizerStateError: An optimizer cannot follow.
        """
        self.prepare(model, as_optimizers(optimizer)).run(lambda: None)

    def prepare(self, model: nn.Module, optimizers: Sequence[Optimizer] = ()) -> Operation:
        """The surgery, checked and ready to be done; nothing is changed.

        Raises:
            PlanMismatchError: The model has other tensors, lists or numbers than the plan was made for.
        """
        view = ModelView(model)
        if self.fingerprint and fingerprint_of(model) != self.fingerprint:
            raise PlanMismatchError(
                "the plan was made for a model with other tensors or shapes; build the model from the configuration "
                "that the plan was made for, or make a new plan."
            )
        cuts: dict[str, dict[int, Tensor]] = {}
        for cut in self.mixtures:
            for name, dim in cut.tensors:
                length = _length(view, name, dim, cut)
                cuts.setdefault(name, {})[dim] = cut.indices(length)
        lists = [ListCut(_list(view, name, cut), cut.kept) for cut in self.mixtures for name in cut.lists]
        narrowed = prepare(model, cuts, attributes=self.attributes, optimizer=optimizers, view=view)
        gone = {id(one) for one in left_behind(model, {one for cut in lists for one in cut.leaving})}
        dropped = [Dropped(optimizer, gone) for optimizer in optimizers if gone]
        return Operation(model, [*narrowed.changes, *lists, *dropped], view)

    def with_prediction(self, predicted: Mapping[str, int]) -> ExpertPlan:
        """The same plan with what it costs before and after."""
        return dataclasses.replace(self, predicted=dict(predicted))

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain lists, strings and numbers, ready for :func:`json.dumps`."""
        return {
            "format": FORMAT,
            "kind": "experts",
            "mixtures": [
                {
                    "name": cut.name,
                    "size": cut.size,
                    "kept": list(cut.kept),
                    "tensors": [list(one) for one in cut.tensors],
                    "lists": list(cut.lists),
                }
                for cut in self.mixtures
            ],
            "attributes": [[list(path), value] for path, value in self.attributes],
            "fingerprint": self.fingerprint,
            "predicted": dict(self.predicted),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ExpertPlan:
        """The plan that :meth:`to_dict` described.

        Raises:
            InvalidArgumentError: ``data`` describes none.
        """
        try:
            if data["kind"] != "experts" or data["format"] != FORMAT:
                raise InvalidArgumentError(f"no plan of experts in format {FORMAT}, but {data['kind']!r}.")
            mixtures = tuple(map(_cut, data["mixtures"]))
            attributes = tuple((path_of(path), value) for path, value in data["attributes"])
            predicted = {str(name): int(value) for name, value in data["predicted"].items()}
            return cls(mixtures, attributes, str(data["fingerprint"]), predicted)
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            if isinstance(error, InvalidArgumentError):
                raise
            raise InvalidArgumentError(f"no plan of experts: {type(error).__name__} {error}.") from error

    def __str__(self) -> str:
        return "\n".join(
            f"{cut.name or 'the model'} {cut.size} -> {len(cut.kept)} (without {', '.join(map(str, cut.removed))})"
            for cut in self.mixtures
        )


def _length(view: ModelView, name: str, dim: int, cut: ExpertCut) -> int:
    tensor = view.tensors.get(name)
    if tensor is None or not 0 <= dim < tensor.dim() or tensor.shape[dim] % cut.size:
        raise PlanMismatchError(
            f"the plan cuts dimension {dim} of `{name}` into {cut.size} experts, and this {type(view.model).__name__} "
            f"{'lacks it' if tensor is None else f'has it of shape {tuple(tensor.shape)}'}"
        )
    return tensor.shape[dim]


def _list(view: ModelView, name: str, cut: ExpertCut) -> nn.Module:
    container = view.modules.get(name)
    if container is None or len(container._modules) != cut.size:
        has = "lacks" if container is None else f"has {len(container._modules)} entries in"
        raise PlanMismatchError(
            f"the plan cuts `{name}` of {cut.size} entries, and this {type(view.model).__name__} {has} it"
        )
    return container


def _cut(data: Mapping[str, Any]) -> ExpertCut:
    size, kept = data["size"], tuple(data["kept"])
    tensors, lists = tuple((str(name), dim) for name, dim in data["tensors"]), tuple(map(str, data["lists"]))
    if not all(type(one) is int for one in (size, *kept, *(dim for _, dim in tensors))):
        raise InvalidArgumentError(f"a mixture needs a size, experts and dimensions that are integers, not {data!r}.")
    if not kept or list(kept) != sorted(set(kept)) or kept[0] < 0 or kept[-1] >= size:
        raise InvalidArgumentError(f"experts that stay of {size} must be ascending and below it, not {kept!r}.")
    return ExpertCut(str(data["name"]), size, kept, tensors, lists)
