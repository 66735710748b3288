"""What no configuration can express, found by changing many of its numbers at once.

Every number is doubled in half of a few trials, each number in a half of its own, so that no number is always doubled
along with another. Sizes that grew alike in all trials come from the same numbers and stay in proportion whatever the
configuration: if they are wanted otherwise, there is no use in searching. Many at once are tested as by Dorfman, The
Detection of Defective Members of Large Populations (1943), https://doi.org/10.1214/aoms/1177731363
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import Any, TypeAlias, TypeGuard

from netopt.integrations.huggingface.meta_build import Shapes

__all__ = ["out_of_proportion"]

Numbers: TypeAlias = Mapping[Any, Any]
"""New values by their place in the configuration."""


def out_of_proportion(
    build: Callable[[Numbers], Shapes | None],
    others: Sequence[tuple[Any, Sequence[Any]]],
    dense: Shapes,
    wanted: Shapes,
) -> str | None:
    """Says which two sizes are wanted out of a proportion that every configuration keeps.

    Args:
        build: From changes to the shapes of the model that is built with them; None if none is.
        others: Every number that may set a size: its place, and other values to try.
        dense: The shapes built from the configuration as it is.
        wanted: The shapes wanted.

    Returns:
        The reason; None if there is no such pair, or some number allows no other value, so that nothing is known.

    Example:
        >>> def build(changes):
        ...     width = changes.get("width", 4)
        ...     return {"query": (width, width), "head": (changes.get("classes", 3), width)}
        >>> numbers = [("width", [8]), ("classes", [6])]
        >>> print(out_of_proportion(build, numbers, build({}), {"query": (2, 2), "head": (3, 4)}))
        ... # doctest: +NORMALIZE_WHITESPACE
        `query` has shape (2, 2) and `head` (3, 4), and every configuration keeps dimension 0 of the one
        and dimension 1 of the other in proportion
        >>> out_of_proportion(build, numbers, build({}), {"query": (2, 2), "head": (3, 2)}) is None
        True
    """
    trials: list[Shapes] = []
    for part in _halves(others):
        built = _built(build, part, wanted)
        if built is None:
            return None
        trials += built
    if not trials:
        return None
    known: dict[tuple[Fraction, ...], tuple[Fraction, str, int]] = {}
    for name, shape in dense.items():
        for dim, size in enumerate(shape):
            if size == 0:
                continue
            growth = tuple([Fraction(trial[name][dim], size) for trial in trials])
            change = Fraction(wanted[name][dim], size)
            before, other, place = known.setdefault(growth, (change, name, dim))
            if before != change:
                return (
                    f"`{other}` has shape {wanted[other]} and `{name}` {wanted[name]}, and every configuration keeps "
                    f"dimension {place} of the one and dimension {dim} of the other in proportion"
                )
    return None


def _halves(numbers: Sequence[Any]) -> list[list[Any]]:
    """The fewest selections, two at least, of which each number is in half, no two numbers in the same."""
    count = next(count for count in itertools.count(2) if math.comb(count, count // 2) >= len(numbers))
    parts: list[list[Any]] = [[] for _ in range(count)]
    for number, places in zip(numbers, itertools.combinations(range(count), count // 2), strict=False):
        for place in places:
            parts[place].append(number)
    return parts


def _built(
    build: Callable[[Numbers], Shapes | None], part: Sequence[tuple[Any, Sequence[Any]]], wanted: Shapes
) -> list[Shapes] | None:
    """What is built with all of these numbers changed, or, where that is nothing, with one half and then the other.

    A number without which tensors are missing, as that of the layers, is one that no solution changes.
    """
    if len(part) > 1:
        shapes = build({place: values[0] for place, values in part})
        if _is_like(shapes, wanted):
            return [shapes]
        middle = len(part) // 2
        first, second = _built(build, part[:middle], wanted), _built(build, part[middle:], wanted)
        return None if first is None or second is None else first + second
    for place, values in part:
        tried = [build({place: value}) for value in values]
        usable = next(filter(lambda shapes: _is_like(shapes, wanted), tried), None)
        if usable is not None:
            return [usable]
        return None if all(shapes is None for shapes in tried) else []
    return []


def _is_like(shapes: Shapes | None, wanted: Shapes) -> TypeGuard[Shapes]:
    """Whether there are the tensors wanted, of as many dimensions; there may be more of them."""
    return shapes is not None and all(len(shapes.get(name, ())) == len(shape) for name, shape in wanted.items())
