"""A branch leaves a block: in the place of its modules stand others that hold nothing and return zeros."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

__all__ = ["PartCut", "RemovedPart"]


class RemovedPart(nn.Module):
    """Stands where a part of a branch was: hands its input on, or, where the branch ends, zeros of its shape.

    Args:
        argument: The position or name of the argument that is handed on.
        length: Of the tuple that the part returned; None if it returned a tensor.
        zero: Whether it returns zeros.
    """

    def __init__(self, argument: int | str, length: int | None, *, zero: bool) -> None:
        super().__init__()
        self.argument, self.length, self.zero = argument, length, zero

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The input or zeros of its shape, the first of a tuple with nothing else if a tuple was returned."""
        given = kwargs[self.argument] if isinstance(self.argument, str) else args[self.argument]
        made = torch.zeros_like(given) if self.zero else given
        return made if self.length is None else (made, *[None] * (self.length - 1))

    def extra_repr(self) -> str:
        """Whether it returns zeros."""
        return "zeros" if self.zero else "its input"


class PartCut:
    """A module of a branch makes way for one that holds nothing.

    Args:
        parent: What holds it.
        key: Under this name.
        part: What stands in its place.

    Attributes:
        leaving: What goes, as the table that holds it, by identity, and its key there.
    """

    def __init__(self, parent: nn.Module, key: str, part: RemovedPart) -> None:
        self._held, self._key, self._after, self._before = parent._modules, key, part, parent._modules[key]
        self.leaving = {(id(self._held), key)}
        part.train(parent.training)

    def do(self) -> None:
        """Takes it out."""
        self._held[self._key] = self._after

    def undo(self) -> None:
        """Puts it back."""
        self._held[self._key] = self._before
