"""Which blocks of which lists of a model stay: decided, checked, saved, and carried out on any fresh copy of it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from torch import nn
from torch.optim import Optimizer

from netopt.errors import InvalidArgumentError, PlanMismatchError
from netopt.model.view import ModelView
from netopt.plan.branches import BranchCut
from netopt.plan.files import JSONFile
from netopt.plan.providers import load
from netopt.plan.value import shapes_of
from netopt.surgery import Operation, as_optimizers, read
from netopt.surgery.attributes import Path, assignment
from netopt.surgery.lists import ListCut, dropped_states, left_behind

__all__ = ["BlockPlan", "Counted", "DepthHook", "StackCut", "counted_by_hooks", "register_depth_hook"]

FORMAT = 1


@dataclass(frozen=True)
class Counted:
    """A value of a configuration that has to do with how many entries a list has.

    Attributes:
        path: Where it is, from the module that holds the configuration on.
        values: The list with an entry for each block; None where it is their number.
    """

    path: Path
    values: tuple[Any, ...] | None = None

    def after(self, kept: Sequence[int]) -> Any:
        """The value once these entries stay."""
        return len(kept) if self.values is None else [self.values[place] for place in kept]


DepthHook: TypeAlias = "tuple[Callable[[nn.Module, str], list[Counted]], Callable[[nn.Module], str | None]]"
"""Finds what counts the entries of a list, by its name; and says of a smaller model what its configuration cannot."""

_HOOKS: dict[str, DepthHook] = {}


def register_depth_hook(name: str, hook: DepthHook) -> None:
    """Has ``hook`` look for what counts blocks in every model whose blocks are removed from now on.

    Raises:
        InvalidArgumentError: The name is taken.
    """
    if _HOOKS.get(name, hook) != hook:
        raise InvalidArgumentError(f"a depth hook {name!r} exists already; choose another name.")
    _HOOKS[name] = hook


def counted_by_hooks(model: nn.Module, name: str) -> list[Counted]:
    """What all hooks find that counts the entries of the list of this name."""
    load()
    return [one for find, _ in _HOOKS.values() for one in find(model, name)]


def notes_of_hooks(model: nn.Module) -> dict[str, str]:
    """What hooks have to say of a smaller model, by their names."""
    load()
    return {name: note for name, (_, check) in _HOOKS.items() if (note := check(model)) is not None}


@dataclass(frozen=True)
class StackCut:
    """What stays of one stack.

    Attributes:
        lists: Dotted names of its lists; several where they are zipped together.
        size: How many blocks it has.
        kept: The positions that stay, ascending.
    """

    lists: tuple[str, ...]
    size: int
    kept: tuple[int, ...]

    @property
    def name(self) -> str:
        """The name of its first list."""
        return self.lists[0]

    @property
    def removed(self) -> tuple[int, ...]:
        """The positions that go."""
        return tuple(place for place in range(self.size) if place not in self.kept)


@dataclass(frozen=True)
class BlockPlan(JSONFile):
    """Which blocks stay, and the numbers that follow; see :func:`netopt.plan_blocks`.

    Attributes:
        stacks: What stays of each stack that loses blocks.
        attributes: New values of numbers and lists that count or number blocks, by path, as before the surgery.
        fingerprint: Of names and shapes of the tensors of the model it was made for.
        predicted: Parameters, MACs and bytes before and after, where they were measured.
        branches: Parts of blocks that go, where these were asked for.

    Example:
        >>> plan = BlockPlan((StackCut(("blocks",), 4, (0, 1, 3)),))
        >>> print(plan)
        blocks 4 -> 3 (without 2)
        >>> BlockPlan.from_dict(plan.to_dict()) == plan
        True
    """

    stacks: tuple[StackCut, ...]
    attributes: tuple[tuple[Path, Any], ...] = ()
    fingerprint: str = ""
    predicted: Mapping[str, int] = field(default_factory=dict, compare=False)
    branches: tuple[BranchCut, ...] = ()

    def apply(self, model: nn.Module, optimizer: Optimizer | Iterable[Optimizer] | None = None) -> None:
        """Removes the blocks from ``model``, in place; all of it is done or nothing.

        Args:
            model: The one the plan was made for, or another that is built like it.
            optimizer: One or several that forget the parameters of removed blocks, with their state.

        Raises:
            PlanMismatchError: The model has other tensors, lists or numbers than the plan was made for.
            OptimizerStateError: An optimizer cannot forget a part of its parameters.
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
        changes: list[Any] = []
        for path, _ in self.attributes:
            read(model, path, view.modules)
        changes += [assignment(view.modules[path[0]], path, value) for path, value in self.attributes]
        cuts: list[Any] = [ListCut(self._list(view, name, cut), cut.kept) for cut in self.stacks for name in cut.lists]
        cuts += [change for branch in self.branches for change in branch.changes(view)]
        leaving = {one for cut in cuts for one in cut.leaving}
        return Operation(model, [*changes, *cuts, *dropped_states(optimizers, left_behind(model, leaving))], view)

    def _list(self, view: ModelView, name: str, cut: StackCut) -> nn.Module:
        container = view.modules.get(name)
        if container is None or len(container._modules) != cut.size:
            has = "lacks" if container is None else f"has {len(container._modules)} entries in"
            raise PlanMismatchError(
                f"the plan cuts `{name}` of {cut.size} entries, and this {type(view.model).__name__} {has} it"
            )
        return container

    def with_prediction(self, predicted: Mapping[str, int]) -> BlockPlan:
        """The same plan with what it costs before and after."""
        return dataclasses.replace(self, predicted=dict(predicted))

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain lists, strings and numbers, ready for :func:`json.dumps`."""
        return {
            "format": FORMAT,
            "kind": "blocks",
            "stacks": [{"lists": list(c.lists), "size": c.size, "kept": list(c.kept)} for c in self.stacks],
            "attributes": [[list(path), value] for path, value in self.attributes],
            "fingerprint": self.fingerprint,
            "predicted": dict(self.predicted),
            **({"branches": [one.to_dict() for one in self.branches]} if self.branches else {}),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> BlockPlan:
        """The plan that :meth:`to_dict` described.

        Raises:
            InvalidArgumentError: ``data`` describes none.
        """
        try:
            if data["kind"] != "blocks" or data["format"] != FORMAT:
                raise InvalidArgumentError(f"no plan of blocks in format {FORMAT}, but {data['kind']!r}.")
            stacks = tuple(_stack(one) for one in data["stacks"])
            attributes = tuple((path_of(path), value) for path, value in data["attributes"])
            predicted = {str(name): int(value) for name, value in data["predicted"].items()}
            branches = tuple(map(BranchCut.from_dict, data.get("branches", ())))
            return cls(stacks, attributes, str(data["fingerprint"]), predicted, branches)
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            if isinstance(error, InvalidArgumentError):
                raise
            raise InvalidArgumentError(f"no plan of blocks: {type(error).__name__} {error}.") from error

    def __str__(self) -> str:
        lines = [
            f"{cut.name or 'the model'} {cut.size} -> {len(cut.kept)} (without {', '.join(map(str, cut.removed))})"
            for cut in self.stacks
        ]
        return "\n".join([*lines, *(f"without {branch.name}" for branch in self.branches)])


def fingerprint_of(model: nn.Module) -> str:
    """A hash of the names and shapes of a model's tensors."""
    text = json.dumps(sorted((name, list(shape)) for name, shape in shapes_of(model).items()))
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def _stack(data: Mapping[str, Any]) -> StackCut:
    lists, size, kept = tuple(data["lists"]), data["size"], tuple(data["kept"])
    numbers = all(type(one) is int for one in (size, *kept))
    if not lists or not all(isinstance(one, str) for one in lists) or not numbers:
        raise InvalidArgumentError(f"a stack needs names of lists, a size and positions, not {dict(data)!r}.")
    if not kept or list(kept) != sorted(set(kept)) or kept[0] < 0 or kept[-1] >= size:
        raise InvalidArgumentError(f"positions that stay of {size} must be ascending and below it, not {kept!r}.")
    return StackCut(lists, size, kept)


def path_of(path: Sequence[Any]) -> Path:
    """A path to an attribute, checked.

    Raises:
        InvalidArgumentError: It is none.
    """
    steps = all(type(step) in (str, int) for step in path)
    if len(path) < 2 or not steps or not all(isinstance(step, str) for step in path[:2]):
        raise InvalidArgumentError(f"{path!r} is no path to an attribute of a module.")
    return tuple(path)
