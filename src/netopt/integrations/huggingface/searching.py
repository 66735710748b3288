"""Which values of a configuration build the shapes wanted, found by trying, where they cannot be computed.

First every size that was replaced is looked for among the integers, alone and where several are equal. If that is not
all, what was left to a default is given the value it has, and numbers are multiplied by what became of the axes: a
product of axes, an entry of a list, a ratio of widths. A value that puts one tensor right and another wrong is tried
together with what could put the other right again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from netopt.integrations.huggingface.meta_build import Shapes, entries, is_share, with_changes
from netopt.integrations.huggingface.probing import out_of_proportion
from netopt.symbolic.formulas import Where

__all__ = ["Changes", "Hints", "Search", "distance"]

Changes = dict[Where, Any]
Moves = list[tuple[tuple[Where, ...], Any]]
"""Entries that are set to one value together, and the value."""

_ROUNDS = 12
_SOLUTIONS = 3
_TRIES = 160
"""Configurations tried at most: as many as the hardest known one took; what is not found then is not worth the wait."""


@dataclass(frozen=True)
class Hints:
    """What is known of the values to try.

    Attributes:
        replacements: New sizes by old size.
        ratios: By how much axes, and products of axes of one layer, became smaller.
        sizes: What modules say of their own sizes, by the name of the attribute, where all of them agree.
    """

    replacements: Mapping[int, set[int]]
    ratios: set[Fraction]
    sizes: Mapping[str, int]


class Search:
    """Looks for a configuration that builds the shapes wanted.

    Args:
        build: From a configuration to the shapes of the model it builds; None, or any exception, if it builds none.
        wanted: The shapes.
        judge: From changes that build the shapes to why they are still wrong, or None.
    """

    def __init__(
        self, build: Callable[[Any], Shapes | None], wanted: Shapes, judge: Callable[[Changes], str | None]
    ) -> None:
        self._build, self._wanted, self._judge = build, wanted, judge
        self._tries = 0
        self._barred: set[Where] = set()
        self._idle: set[Where] = set()
        """What has no influence on any shape."""

    def run(self, config: Any, hints: Hints) -> Changes | str:
        """The changes to ``config`` that build the shapes; else why there are none.

        Args:
            config: Where to start; not changed.
            hints: What to try.
        """
        refused, nearest = None, self._try(config, {})
        if nearest is not None and nearest.keys() == self._wanted.keys():
            why = out_of_proportion(
                lambda some: self._shapes(config, some), _others(config, hints), nearest, self._wanted
            )
            if why is not None:
                return f"the configuration cannot express it: {why}"
        for stage in (self._plainly, self._harder):
            self._barred.clear()
            for _ in range(_SOLUTIONS):
                pins, changes, shapes = stage(config, hints)
                nearest = min(shapes, nearest, key=lambda one: distance(one, self._wanted))
                if distance(shapes, self._wanted) > 0:
                    break
                why = self._judge(changes)
                if why is None:
                    return changes
                # Shapes alone do not tell half of the heads from heads of half the size.
                refused = refused or why
                self._barred.update(path for path, value in changes.items() if pins.get(path) != value)
        built = nearest or {}
        name = next((name for name in self._wanted if built.get(name) != self._wanted[name]), "")
        return refused or (
            f"the configuration cannot express it: `{name}` has shape {self._wanted.get(name)}, and the nearest "
            f"configuration gives {built.get(name)}"
        )

    def _plainly(self, config: Any, hints: Hints) -> tuple[Changes, Changes, Shapes | None]:
        return {}, *self._descend(config, {}, lambda one: _plain(one, hints.replacements))

    def _harder(self, config: Any, hints: Hints) -> tuple[Changes, Changes, Shapes | None]:
        """Pins, changes with the pins, and the shapes they build."""
        pinned = self._pinned(config, hints)

        def moves(one: Any) -> Iterator[Moves]:
            yield _scaled(one, hints)

        changes, shapes = self._descend(config, pinned, moves)
        if distance(shapes, self._wanted) == 0:
            return pinned, changes, shapes
        start = with_changes(config, changes)
        for paths, new in _scaled(start, hints):
            tried = self._move(start, paths, new)
            if tried is not None and self._rights_one(tried, shapes):
                deeper, found = self._descend(config, {**changes, **dict.fromkeys(paths, new)}, moves)
                if distance(found, self._wanted) == 0:
                    return pinned, deeper, found
        return pinned, changes, shapes

    def _pinned(self, config: Any, hints: Hints) -> Changes:
        """Sizes that were left to a default, as they are: what they are computed from may then change."""
        dense = self._try(config, {})
        pins: Changes = {}
        if dense is None:
            return pins
        unset = {path[-1]: path for path, value in entries(config) if value is None}
        for name, value in hints.sizes.items():
            path = unset.get(name, (name,))
            if getattr(config, name, None) is not None:
                continue
            # It counts if it says nothing new, and something else would.
            if self._try(config, {path: value}) == dense and self._try(config, {path: 2 * value}) != dense:
                pins[path] = value
        return pins

    def _descend(
        self,
        config: Any,
        changes: Changes,
        moves: Callable[[Any], Iterator[Moves]],
    ) -> tuple[Changes, Shapes | None]:
        """Makes the move that brings the shapes nearest, as long as one does."""
        changes = dict(changes)
        shapes = self._try(config, changes)
        for _ in range(_ROUNDS):
            if distance(shapes, self._wanted) == 0:
                break
            best = self._nearest(with_changes(config, changes), shapes, moves)
            if best is None:
                break
            paths, new, shapes = best
            changes |= dict.fromkeys(paths, new)
        return changes, shapes

    def _nearest(
        self, config: Any, shapes: Shapes | None, moves: Callable[[Any], Iterator[Moves]]
    ) -> tuple[tuple[Where, ...], Any, Shapes] | None:
        best: tuple[tuple[Where, ...], Any, Shapes] | None = None
        reached = distance(shapes, self._wanted)
        for several in moves(config):
            for paths, new in several:
                found = self._move(config, paths, new)
                if found is not None and found == shapes:
                    self._idle.update(paths)
                if found is not None and distance(found, self._wanted) < reached:
                    best, reached = (paths, new, found), distance(found, self._wanted)
            if best is not None:
                break
        return best

    def _move(self, config: Any, paths: tuple[Where, ...], new: Any) -> Shapes | None:
        if self._idle.issuperset(paths) or not self._barred.isdisjoint(paths):
            return None
        return self._try(config, dict.fromkeys(paths, new))

    def _rights_one(self, found: Shapes, before: Shapes | None) -> bool:
        old = before or {}
        return any(found.get(name) == shape != old.get(name) for name, shape in self._wanted.items())

    def _try(self, config: Any, changes: Changes) -> Shapes | None:
        self._tries += 1
        return None if self._tries > _TRIES else self._shapes(config, changes)

    def _shapes(self, config: Any, changes: Mapping[Where, Any]) -> Shapes | None:
        try:
            return self._build(with_changes(config, changes))
        except Exception:
            # Whatever a constructor or a configuration raises, nothing is built from these values.
            return None


def distance(built: Shapes | None, wanted: Shapes) -> float:
    """How far shapes are from those wanted: 0 if equal, infinite if other tensors are built."""
    if built is None or built.keys() != wanted.keys():
        return math.inf
    total = 0.0
    for name, shape in wanted.items():
        if len(built[name]) != len(shape):
            return math.inf
        total += sum(abs(math.log(one / other)) for one, other in zip(built[name], shape, strict=True) if one and other)
    return total


def _plain(config: Any, replacements: Mapping[int, set[int]]) -> Iterator[Moves]:
    """First every integer alone set to a size that replaces it, then all that are equal together."""
    known = [(path, value) for path, value in entries(config) if value is None or (type(value) is int and value > 1)]
    every = set().union(*replacements.values())
    yield [
        ((path,), new)
        for path, value in known
        for new in sorted(every if value is None else replacements.get(value, set()))
    ]
    together = []
    for old, news in replacements.items():
        equal = tuple(path for path, value in known if value == old)
        if len(equal) > 1:
            together += [(equal, new) for new in sorted(news)]
    yield together


def _others(config: Any, hints: Hints) -> list[tuple[Where, tuple[Any, ...]]]:
    """Every number that may set a size, with other values; what was left to a default is given some."""
    known = dict(entries(config))
    unset = {path[-1] for path, value in known.items() if value is None}
    set_already = {path[-1] for path in known} - unset
    found: dict[Where, Any] = {}
    for path, said in known.items():
        value = hints.sizes.get(path[-1], max(hints.replacements)) if said is None else said
        if (type(value) is int and value > 0) or is_share(path):
            found[path] = value
    found |= {(name,): value for name, value in hints.sizes.items() if name not in set_already | unset}
    return [(path, (2 * value, value // 2) if value // 2 else (2 * value,)) for path, value in found.items()]


def _scaled(config: Any, hints: Hints) -> Moves:
    """Every number multiplied by a ratio, and every integer set to a size that replaces it."""
    moves: Moves = []
    ratios = hints.ratios | {1 / one for one in hints.ratios}
    for path, value in entries(config):
        if type(value) is int:
            scaled = {int(value * one) for one in ratios if (value * one).denominator == 1}
            moves += [((path,), new) for new in sorted((scaled | hints.replacements.get(value, set())) - {value})]
        elif type(value) is float and is_share(path):
            moves += [((path,), float(value * one)) for one in sorted(ratios) if one != 1]
    return moves
