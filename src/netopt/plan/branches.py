"""Which branches of blocks go: the attention or the feed-forward part of a layer, as values of a plan."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from netopt.errors import InvalidArgumentError, PlanMismatchError
from netopt.model.view import ModelView
from netopt.surgery.branches import PartCut, RemovedPart

__all__ = ["BranchCut", "Part"]


@dataclass(frozen=True)
class Part:
    """A module of a branch that goes.

    Attributes:
        name: Dotted.
        argument: The position or name of the argument in whose place its result stood.
        length: Of the tuple that it returned; None if it returned a tensor.
        zero: Whether its result was added to the stream, and is zero from now on.
    """

    name: str
    argument: int | str
    length: int | None
    zero: bool


@dataclass(frozen=True)
class BranchCut:
    """A branch that goes.

    Attributes:
        name: Of its part with the most parameters.
        parts: All of them, in the order of the forward.
    """

    name: str
    parts: tuple[Part, ...]

    def ways(self) -> Iterator[BranchCut]:
        """This cut; and that of its last part alone, where the others feed more than this branch."""
        yield self
        if len(self.parts) > 1 and self.parts[-1].name == self.name:
            yield BranchCut(self.name, self.parts[-1:])

    def changes(self, view: ModelView) -> Iterator[PartCut]:
        """What takes it out of a model.

        Raises:
            PlanMismatchError: The model lacks a part.
        """
        for part in self.parts:
            parent, _, key = part.name.rpartition(".")
            holder = view.modules.get(parent)
            if holder is None or holder._modules.get(key) is None:
                raise PlanMismatchError(
                    f"the plan removes `{part.name}`, which this {type(view.model).__name__} lacks; make a new plan."
                )
            yield PartCut(holder, key, RemovedPart(part.argument, part.length, zero=part.zero))

    def to_dict(self) -> dict[str, Any]:
        """As plain lists, strings and numbers."""
        parts = [[part.name, part.argument, part.length, part.zero] for part in self.parts]
        return {"name": self.name, "parts": parts}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> BranchCut:
        """What :meth:`to_dict` described.

        Raises:
            InvalidArgumentError: ``data`` describes none.
        """
        name, parts = data["name"], tuple(Part(*part) for part in data["parts"])
        if type(name) is not str or not parts or not all(map(_is_whole, parts)):
            raise InvalidArgumentError(f"a branch needs a name and parts, not {dict(data)!r}.")
        return cls(name, parts)


def _is_whole(part: Part) -> bool:
    length = part.length is None or (type(part.length) is int and part.length > 0)
    return type(part.name) is str and type(part.argument) in (int, str) and length and type(part.zero) is bool
