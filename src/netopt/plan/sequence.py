"""Plans of all kinds, one after the other: neurons, blocks, experts and vocabulary of one model."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path as FilePath
from typing import Any, TypeAlias

import torch
from torch import nn
from torch.optim import Optimizer

from netopt.errors import ArgumentTypeError, InvalidArgumentError, PlanMismatchError
from netopt.plan.blocks import BlockPlan
from netopt.plan.checkpoint import rewrite
from netopt.plan.experts import ExpertPlan
from netopt.plan.files import JSONFile, load_json
from netopt.plan.shards import Stored, open_checkpoint
from netopt.plan.value import Plan
from netopt.plan.wrapped import renaming
from netopt.surgery import as_optimizers

__all__ = ["PlanSequence", "Step", "plan_from_dict"]

Step: TypeAlias = "Plan | BlockPlan | ExpertPlan"
FORMAT = "netopt.plans"


@dataclass(frozen=True)
class PlanSequence(JSONFile):
    """Plans that are carried out one after the other, each made for what the one before leaves.

    Args:
        steps: Plans of any kind, sequences among them.

    Raises:
        ArgumentTypeError: One of them is no plan.

    Example:
        >>> from netopt.plan.blocks import StackCut
        >>> net = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.ReLU(), nn.Linear(4, 2))
        >>> first = BlockPlan((StackCut(("",), size=4, kept=(0, 1, 3)),))
        >>> second = Plan({"0.weight": {0: [0, 2]}, "0.bias": {0: [0, 2]}, "2.weight": {1: [0, 2]}})
        >>> PlanSequence((first, second)).apply(net)
        >>> net
        Sequential(
          (0): Linear(in_features=8, out_features=2, bias=True)
          (1): ReLU()
          (2): Linear(in_features=2, out_features=2, bias=True)
        )
    """

    steps: tuple[Step, ...]

    def __init__(self, steps: Iterable[Step | PlanSequence]) -> None:
        found: list[Step] = []
        for one in steps:
            if isinstance(one, PlanSequence):
                found += one.steps
            elif isinstance(one, (Plan, BlockPlan, ExpertPlan)):
                found.append(one)
            else:
                raise ArgumentTypeError(f"a sequence is of plans, and {type(one).__name__} is none.")
        object.__setattr__(self, "steps", tuple(found))

    def then(self, later: Step | PlanSequence) -> PlanSequence:
        """This one followed by another."""
        return PlanSequence((*self.steps, later))

    def apply(self, model: nn.Module, optimizer: Optimizer | Iterable[Optimizer] | None = None) -> None:
        """Carries out every step on ``model``, in place; all of them or nothing.

        Args:
            model: One with the names and shapes of the model the first step was made for.
            optimizer: One or several whose state follows.

        Raises:
            PlanMismatchError: A step was made for another model.
            OptimizerStateError: Some optimizer state cannot be narrowed.
        """
        self._run(model, as_optimizers(optimizer), self.steps)

    def _run(self, model: nn.Module, optimizers: Sequence[Optimizer], steps: Sequence[Step]) -> None:
        if steps:
            steps[0].prepare(model, optimizers).run(lambda: self._run(model, optimizers, steps[1:]))

    def apply_to_checkpoint(self, source: str | os.PathLike[str], target: str | os.PathLike[str]) -> FilePath:
        """Writes a checkpoint of safetensors files as all steps leave it; see :meth:`netopt.Plan.apply_to_checkpoint`.

        Tensors of blocks and experts in lists are left out, and those after them get their new numbers. A tokenizer
        beside the weights is copied as it is, and so is a configuration where branches are gone, which it cannot say:
        build the large model, apply the plan and load then; ``from_pretrained`` would make the branches anew.

        Raises:
            PlanMismatchError: A tensor of a step is missing or has another shape.
            CheckpointError: A file is missing, truncated, or cannot be written.
        """
        stored = open_checkpoint(source)
        edit = _Edit(stored)
        for step in self.steps:
            edit.follow(step)
        return rewrite(edit.plan, self._digest(), stored, source, target, names=edit.new_names())

    def to_dict(self) -> dict[str, Any]:
        """The plans in what JSON knows."""
        return {"format": FORMAT, "steps": [step.to_dict() for step in self.steps]}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> PlanSequence:
        """The plans that :meth:`to_dict` wrote.

        Raises:
            InvalidArgumentError: The data is no sequence of plans, or one of them is broken; the field is named.
        """
        if not isinstance(data, Mapping) or data.get("format") != FORMAT:
            raise InvalidArgumentError(f"this is no sequence of plans: its 'format' is not {FORMAT!r}")
        steps = data.get("steps")
        if not isinstance(steps, list):
            raise InvalidArgumentError("steps is no list of plans")
        found: list[Step] = []
        for place, one in enumerate(steps):
            try:
                step = plan_from_dict(one)
            except InvalidArgumentError as error:
                raise InvalidArgumentError(f"steps[{place}]: {error}") from error
            if isinstance(step, PlanSequence):
                raise InvalidArgumentError(f"steps[{place}] is a sequence itself, and one holds plans alone")
            found.append(step)
        return cls(found)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> PlanSequence:
        """Reads plans that :meth:`save` wrote, or a single one of any kind.

        Raises:
            CheckpointError: The file cannot be read.
            InvalidArgumentError: The file holds no plan; the message names the field that is broken.
        """
        found = load_json(path, plan_from_dict)
        return found if isinstance(found, PlanSequence) else cls((found,))

    def _digest(self) -> str:
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()[:16]

    def __str__(self) -> str:
        return "\n".join(f"{place}. {step}".replace("\n", "\n   ") for place, step in enumerate(self.steps, 1))


def plan_from_dict(data: Any) -> Step | PlanSequence:
    """The plan of any kind that a ``to_dict`` wrote.

    Raises:
        InvalidArgumentError: The data is no plan; the field is named.
    """
    if not isinstance(data, Mapping):
        raise InvalidArgumentError("this is no plan: it is no mapping")
    if data.get("format") == FORMAT:
        return PlanSequence.from_dict(data)
    kinds: dict[Any, Any] = {"blocks": BlockPlan, "experts": ExpertPlan}
    return kinds.get(data.get("kind"), Plan).from_dict(data)


class _Edit:
    """What several plans together make of the tensors of files, by the names they have there."""

    def __init__(self, stored: Stored) -> None:
        shapes = {name: shard.entries[name].shape for name, shard in stored.places.items()}
        self.plan = Plan({}, shapes=shapes)
        self._names = {name: name for name in shapes}  # from the name after the steps so far to that in the files
        self._all = tuple(shapes)

    def new_names(self) -> dict[str, str | None]:
        """For each tensor of the files its new name, ``None`` if it goes."""
        return dict.fromkeys(self._all) | {old: new for new, old in self._names.items()}

    def follow(self, step: Step) -> None:
        """Adds a plan, made for what those before it leave."""
        if isinstance(step, Plan):
            self._narrow(self._named(step))
            return
        if isinstance(step, ExpertPlan):
            self._narrow(Plan(self._experts(step), step.attributes))
            lists = [(name, cut.size, cut.kept) for cut in step.mixtures for name in cut.lists]
        else:
            self._narrow(Plan({}, step.attributes))
            lists = [(name, cut.size, cut.kept) for cut in step.stacks for name in cut.lists]
            gone = tuple(f"{part.name}." for branch in step.branches for part in branch.parts)
            self._names = {one: old for one, old in self._names.items() if not one.startswith(gone)}
        for name, size, kept in lists:
            self._relist(name, size, kept)

    def _named(self, plan: Plan) -> Plan:
        """The plan by the names of the files."""
        wanted = {*plan.tensors} - {*plan.unsaved}
        rename = None if wanted.issubset(self._names) else renaming(wanted, self._names)
        if rename is not None:
            plan = plan.renamed({name: rename(name) for name in (*plan.tensors, *plan.shapes)})
        missing = next((name for name in wanted if (rename or str)(name) not in self._names), None)
        if missing is not None:
            raise PlanMismatchError(f"the plan cuts `{missing}`, and the checkpoint has no tensor of that name")
        return plan.renamed(self._names)

    def _narrow(self, plan: Plan) -> None:
        after = self.plan.shapes_after
        for name, dims in plan.tensors.items():
            for dim, kept in dims.items() if name in after else ():
                if dim >= len(after[name]) or int(kept[-1]) >= after[name][dim]:
                    raise PlanMismatchError(
                        f"the plan keeps index {int(kept[-1])} of dimension {dim} of `{name}` {after[name]}"
                    )
        # An axis may have the name that another had before blocks left.
        self.plan = self.plan.then(dataclasses.replace(plan, axes=()))

    def _experts(self, step: ExpertPlan) -> dict[str, dict[int, torch.Tensor]]:
        after, found = self.plan.shapes_after, dict[str, dict[int, torch.Tensor]]()
        for cut in step.mixtures:
            for name, dim in cut.tensors:
                old = self._names.get(name)
                if old is None:
                    raise PlanMismatchError(
                        f"the plan cuts `{name}`, and the checkpoint has no tensor of that name: where a library "
                        "writes experts otherwise than it holds them, load the model, apply the plan and save it"
                    )
                if dim >= len(after[old]) or after[old][dim] % cut.size:
                    raise PlanMismatchError(f"the plan cuts `{name}` {after[old]} into {cut.size} experts")
                found.setdefault(old, {})[dim] = cut.indices(after[old][dim])
        return found

    def _relist(self, name: str, size: int, kept: Sequence[int]) -> None:
        prefix = f"{name}." if name else ""
        places = {one.removeprefix(prefix).partition(".")[0] for one in self._names if one.startswith(prefix)}
        numbers = {int(one) for one in places if one.isdecimal()}
        if not numbers or max(numbers) >= size:
            raise PlanMismatchError(
                f"the plan cuts `{name}` of {size} entries, and the checkpoint has "
                f"{f'{max(numbers) + 1} of them' if numbers else 'no numbered ones'}"
            )
        new: dict[str, str] = {}
        for one, old in self._names.items():
            place, dot, rest = one.removeprefix(prefix).partition(".")
            if not one.startswith(prefix) or not place.isdecimal():
                new[one] = old
            elif int(place) in kept:
                new[f"{prefix}{kept.index(int(place))}{dot}{rest}"] = old
        self._names = new
