"""The numbers that follow when blocks leave a stack: those that number them, count them, or are listed for each.

A number of every block that is its position in the list is its number. Numbers and lists of the modules around a list
are candidates, of which those are believed that make the smaller model run and compute the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from netopt.model.view import ModelView
from netopt.plan.blocks import BlockPlan, Counted, StackCut, counted_by_hooks, fingerprint_of
from netopt.prune.blocks.stacks import Stack
from netopt.surgery.attributes import Path

__all__ = ["Followers", "make_block_plan"]

GENUINE = 3
"""So many blocks that hold their position show that it is their number; two may do so by chance."""


@dataclass
class Followers:
    """What follows one stack.

    Attributes:
        stack: The stack.
        numbers: Attributes, below an entry, that hold its position; those that are its number beyond doubt.
        doubtful: The same, of so few blocks that it may be chance.
        listed: Lists around it with an item for each block, by path.
        counts: Numbers around it that are the number of blocks.
        configured: Numbers and lists of configurations.
        chosen: The variant that was found to hold, see :meth:`variants`.
    """

    stack: Stack
    numbers: list[tuple[int, str, str]] = field(default_factory=list)
    doubtful: list[tuple[int, str, str]] = field(default_factory=list)
    listed: list[tuple[Path, Any]] = field(default_factory=list)
    counts: list[Path] = field(default_factory=list)
    configured: list[Counted] = field(default_factory=list)
    chosen: tuple[bool, bool, tuple[Path, ...]] | None = None

    @classmethod
    def of(cls, view: ModelView, stack: Stack) -> Followers:
        """What may follow a stack of a model."""
        found = cls(stack)
        for key, places in _positions(stack).items():
            if len(places) > 1:
                (found.numbers if len(places) >= GENUINE else found.doubtful).append(key)
        for path, value in _around(view, stack.name):
            if type(value) is int and value == stack.size:
                found.counts.append(path)
            elif isinstance(value, (list, tuple)) and len(value) == stack.size and stack.size >= GENUINE:
                found.listed.append((path, value))
        found.configured = counted_by_hooks(view.model, stack.name)
        return found

    def variants(self) -> list[tuple[bool, bool, tuple[Path, ...]]]:
        """What may be made to follow, in the order of trial: doubtful numbers, lists, and which counts."""
        if self.chosen is not None:
            return [self.chosen]
        counts = [(), *([path] for path in self.counts), self.counts]
        every = [
            (doubtful, listed, tuple(some)) for doubtful in (True, False) for listed in (True, False) for some in counts
        ]
        return list(dict.fromkeys((a and bool(self.doubtful), b and bool(self.listed), some) for a, b, some in every))

    def attributes(
        self, kept: Sequence[int], variant: tuple[bool, bool, tuple[Path, ...]], view: ModelView
    ) -> Iterator[tuple[Path, Any]]:
        """New values by path, once some blocks stay."""
        doubtful, listed, counts = variant
        for new, old in enumerate(kept):
            for column, below, attribute in (*self.numbers, *(self.doubtful if doubtful else ())):
                prefix = _name(view, self.stack.lists[column], old)
                name = f"{prefix}.{below}" if below else prefix
                if new != old and attribute in vars(view.modules[name] if name in view.modules else nn.Module()):
                    yield (name, attribute), new
        for path, value in self.listed if listed else ():
            yield path, type(value)([value[place] for place in kept])
        for path in counts:
            yield path, len(kept)
        for one in self.configured:
            yield one.path, one.after(kept)


def make_block_plan(
    view: ModelView, followers: Sequence[Followers], removed: dict[str, list[int]], variant: Any = None
) -> BlockPlan:
    """The plan to remove blocks, by names of stacks.

    Args:
        view: Of the model.
        followers: What follows the stacks.
        removed: Positions by the stack's name.
        variant: Instead of what was found to hold.
    """
    cuts, attributes = [], {}
    for one in followers:
        gone = removed.get(one.stack.name)
        if gone:
            kept = tuple(place for place in range(one.stack.size) if place not in gone)
            cuts.append(StackCut(one.stack.lists, one.stack.size, kept))
            attributes |= dict(one.attributes(kept, variant or one.variants()[0], view))
    return BlockPlan(tuple(cuts), tuple(attributes.items()), fingerprint_of(view.model))


def _name(view: ModelView, name: str, place: int) -> str:
    """The dotted name of an entry of a list."""
    return f"{name}.{list(view.modules[name]._modules)[place]}".removeprefix(".")


def _positions(stack: Stack) -> dict[tuple[int, str, str], list[int]]:
    """Integers below entries that are the position of the entry, wherever they are, with these positions."""
    found: dict[tuple[int, str, str], list[int]] = {}
    wrong: set[tuple[int, str, str]] = set()
    for block in stack.blocks:
        for column, entry in enumerate(block.entries):
            for below, module in entry.named_modules():
                for attribute, value in vars(module).items():
                    key = (column, below, attribute)
                    if type(value) is int and value == block.place:
                        found.setdefault(key, []).append(block.place)
                    elif type(value) is int:
                        wrong.add(key)
    return {key: places for key, places in found.items() if key not in wrong}


def _around(view: ModelView, name: str) -> Iterator[tuple[Path, Any]]:
    """The plain attributes of the modules that a list is in."""
    while name:
        name = name.rpartition(".")[0]
        for attribute, value in vars(view.modules[name]).items():
            if not attribute.startswith("_") and type(value) in (int, list, tuple):
                yield (name, attribute), value
