"""Which counts of neurons a configuration can say: its numbers are the unknowns, and counts follow from them.

The formulas of a model's sizes, in the numbers of its configuration, meet the terms of the same sizes in counts of
axes. Numbers that meet in some equation, or in the configuration's own validation, are chosen together; each group is a
list of choices, and one of each group is a model that the configuration builds.
"""

from __future__ import annotations

import copy
import itertools
import math
import operator
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, TypeAlias

from torch import nn

from netopt.axes import Axes
from netopt.integrations.huggingface.config import build_formulas, kept_numbers, takes_config, unsaved_buffers, validate
from netopt.integrations.huggingface.meta_build import ConfigPath, with_changes
from netopt.integrations.huggingface.solve import SizeEquation, solve
from netopt.integrations.huggingface.symbolic_build import ShapeFormulas, exact_value
from netopt.plan import shapes_of
from netopt.symbolic import Term, combine, leaves, substitute, walk

__all__ = ["possible_counts"]

Values: TypeAlias = Mapping[ConfigPath, Any]
_MOST_VALUES = 1024
"""Of one number; a larger one is tried in steps."""
_MOST_CHOICES = 20_000
"""Of numbers that are chosen together; with more, they are tried in larger steps."""
_TRIED = 5
"""So many choices of two groups are validated together, to see whether the one depends on the other."""


def possible_counts(model: nn.Module, axes: Axes, names: Collection[str]) -> list[list[dict[str, int]]] | str | None:
    """Groups of choices, each of the counts of some axes, the present ones first.

    Args:
        model: Before the surgery.
        axes: Of the model.
        names: Of the axes that may lose neurons.

    Returns:
        One choice from each group, together, is what a configuration can say; a reason where it can say nothing, and
        None for a model without a configuration.
    """
    config = getattr(model, "config", None)
    if not hasattr(config, "to_dict") or not takes_config(type(model)):
        return None
    modules = dict(model.named_modules())
    unsaved = set(unsaved_buffers(modules))
    free = {name for name in names if not any(member.tensor in unsaved for member in axes[name].members)}
    formulas, free = _explained(model, axes, free)
    if formulas is None:
        return "no size follows from its numbers"
    search = _Counting(config, formulas, _Sizes.of(model, axes, free, formulas))
    return search.groups()


def _explained(model: nn.Module, axes: Axes, free: set[str]) -> tuple[ShapeFormulas | None, set[str]]:
    """The formulas of sizes, and the axes whose sizes they explain: all, else those of some kinds."""
    terms = axes.size_terms()
    formulas = build_formulas(model, _changed(model, terms, free))
    if formulas is not None or not free:
        return formulas, free
    explained: set[str] = set()
    for kind in {axes[name].kind for name in free}:
        more = {name for name in free if axes[name].kind == kind}
        if build_formulas(model, _changed(model, terms, explained | more)) is not None:
            explained |= more
    return (build_formulas(model, _changed(model, terms, explained)) if explained else None), explained


def _changed(
    model: nn.Module, terms: Mapping[str, tuple[Term, ...]], free: Collection[str]
) -> dict[str, tuple[int, ...]]:
    """The shapes of the model, with other sizes wherever one of these axes is."""
    return {
        name: tuple(
            size + (not leaves(term).isdisjoint(free)) for size, term in zip(shape, terms.get(name, shape), strict=True)
        )
        for name, shape in shapes_of(model).items()
    }


@dataclass(frozen=True)
class _Sizes:
    """Equations between counts of axes and numbers of the configuration.

    Attributes:
        equations: A term in counts, a term in numbers.
        kept: Terms in numbers that must keep their value: numbers that modules compute, as the scale of attention.
        sizes: The counts as they are.
    """

    equations: list[tuple[Term, Term]]
    kept: list[Term]
    sizes: dict[str, int]

    @classmethod
    def of(cls, model: nn.Module, axes: Axes, free: Collection[str], formulas: ShapeFormulas) -> _Sizes:
        """The equations of a model, each once."""
        found: dict[tuple[Term, Term], None] = {}
        terms = axes.size_terms()
        for name, dims in formulas.sizes.items():
            for count, number in zip(terms.get(name, ()), dims, strict=False):
                found.setdefault((count, number))
        for path, count in axes.attribute_terms().items():
            number = formulas.attribute(str(path[0]), str(path[1])) if len(path) == 2 else None
            if number is not None and exact_value(number, formulas.dense) == exact_value(count, {}):
                found.setdefault((count, number))
        for count, integers in axes.attribute_equations():
            number = _in_numbers(integers, formulas)
            if number is not None and exact_value(number, formulas.dense) == exact_value(count, {}):
                found.setdefault((count, number))
        fixed = {axis.name: axis.size for axis in axes if axis.name not in free}
        equations = [(_at(count, fixed), number) for count, number in found]
        return cls(
            [(count, number) for count, number in equations if leaves(count) or leaves(number)],
            list(dict.fromkeys(one.term for one in kept_numbers(model, formulas))),
            {name: axes[name].size for name in free},
        )


def _in_numbers(term: Term, formulas: ShapeFormulas) -> Term | None:
    """A term in integers of modules as one in numbers of the configuration, where each of them is known."""
    found = {one: formulas.attribute(*map(str, one.path)) for one in leaves(term) if len(one.path) == 2}
    known = {one: number for one, number in found.items() if number is not None}
    return substitute(term, lambda one: known[one.key]) if len(known) == len(leaves(term)) else None


def _at(term: Term, fixed: Mapping[str, int]) -> Term:
    """A term with some of its leaves fixed."""
    return substitute(term, lambda one: fixed.get(one.key, one))  # pyright: ignore[reportArgumentType]


@dataclass
class _Group:
    """Numbers that are chosen together, the equations they are in, and their values that satisfy these."""

    paths: list[ConfigPath]
    equations: list[tuple[Term, Term]]
    choices: list[dict[ConfigPath, Any]]


class _Counting:
    """The search for all choices."""

    def __init__(self, config: Any, formulas: ShapeFormulas, sizes: _Sizes) -> None:
        self._config, self._dense, self._sizes = config, dict(formulas.dense), sizes

    def groups(self) -> list[list[dict[str, int]]] | str:
        """The choices of each group."""
        groups = [self._group(*one) for one in self._connected()]
        found = []
        for group in self._validated([one for one in groups if len(one.choices) > 1]):
            counts = [self._counts(group.equations, values) for values in group.choices]
            possible = list({tuple(sorted(one.items())): one for one in counts if one}.values())
            if len(possible) > 1:
                found.append(sorted(possible, key=lambda one: -sum(one.values())))
        return found or "none of its numbers can become smaller by itself"

    def _connected(self) -> Iterator[tuple[list[ConfigPath], list[tuple[Term, Term]], list[Term]]]:
        """Numbers that change, with the equations and the kept numbers that connect them."""
        changing = {key for count, number in self._sizes.equations if leaves(count) for key in leaves(number)}
        linked = [
            (one, {("axis", key) for key in leaves(one[0])} | {("path", key) for key in leaves(one[1]) & changing})
            for one in self._sizes.equations
        ]
        kept = [(one, {("path", key) for key in leaves(one) & changing}) for one in self._sizes.kept]
        parts: list[set[Any]] = []
        for _, keys in (*linked, *kept):
            met = [part for part in parts if not part.isdisjoint(keys)]
            parts = [part for part in parts if part.isdisjoint(keys)] + [keys.union(*met)]
        for part in parts:
            paths = [key for what, key in part if what == "path"]
            if paths:
                yield (
                    sorted(paths, key=lambda path: (self._dense[path], str(path))),
                    [one for one, keys in linked if keys & part],
                    [one for one, keys in kept if keys & part],
                )

    def _group(self, paths: list[ConfigPath], equations: list[tuple[Term, Term]], kept: list[Term]) -> _Group:
        tests: list[tuple[Term, Callable[[Any], bool]]] = [
            (number, self._size_test(count, exact_value(number, self._dense))) for count, number in equations
        ]
        tests += [(one, _equals(exact_value(one, self._dense))) for one in kept]
        tests += [(one, _equals(0)) for _, number in equations for one in _remainders(number)]
        by_depth = [
            [
                (term, test)
                for term, test in dict.fromkeys(tests)
                if paths[depth] in leaves(term) and not leaves(term) & set(paths[depth + 1 :])
            ]
            for depth in range(len(paths))
        ]
        ranges = self._ranges(paths, [number for _, number in equations])
        choices = self._choices(paths, ranges, by_depth, {})
        return _Group(paths, equations, [one for one in choices if self._counts(equations, one)])

    def _size_test(self, count: Term, present: Any) -> Callable[[Any], bool]:
        if not leaves(count):
            return _equals(exact_value(count, {}))
        return _up_to(present)

    def _ranges(self, paths: Sequence[ConfigPath], numbers: Sequence[Term]) -> list[list[Any]]:
        """The values of each number, present ones first, in steps where there are too many."""
        ranges = [self._values(path, numbers) for path in paths]
        for values in ranges:
            if len(values) > _MOST_VALUES:
                values[:] = values[:: 2 ** math.ceil(math.log2(len(values) / _MOST_VALUES))]
        while math.prod(map(len, ranges)) > _MOST_CHOICES:
            longest = max(ranges, key=len)
            longest[:] = longest[::2]
        return ranges

    def _values(self, path: ConfigPath, numbers: Sequence[Term]) -> list[Any]:
        value = self._dense[path]
        if type(value) is int:
            return list(range(value, 0, -1))
        sizes = [exact_value(one, self._dense) for one in numbers if path in leaves(one)]
        least = int(min(sizes, default=1))
        return [float(Fraction(value) * part / least) for part in range(least, 0, -1)]

    def _choices(
        self,
        paths: Sequence[ConfigPath],
        ranges: Sequence[Sequence[Any]],
        tests: Sequence[Sequence[tuple[Term, Callable[[Any], bool]]]],
        chosen: dict[ConfigPath, Any],
    ) -> Iterator[dict[ConfigPath, Any]]:
        """All values that pass, one number after the other."""
        depth = len(chosen)
        if depth == len(paths):
            yield dict(chosen)
            return
        for value in ranges[depth]:
            chosen[paths[depth]] = value
            values = {**self._dense, **chosen}
            memo: dict[int, Any] = {}
            if all(test(exact_value(term, values, memo)) for term, test in tests[depth]):
                yield from self._choices(paths, ranges, tests, chosen)
            del chosen[paths[depth]]

    def _counts(self, equations: Sequence[tuple[Term, Term]], values: Values) -> dict[str, int] | None:
        """The counts that follow from numbers, or None where none do."""
        memo: dict[int, Any] = {}
        now = {**self._dense, **values}
        system = [
            SizeEquation(count, exact_value(number, now, memo), "") for count, number in equations if leaves(count)
        ]
        solution = solve(list({(one.term, one.wanted): one for one in system}.values()), self._sizes.sizes)  # pyright: ignore[reportArgumentType]
        counts = {str(name): count for name, count in solution.values.items()}
        fits = all(type(count) is int and 1 <= count <= self._sizes.sizes[name] for name, count in counts.items())
        return counts if solution.broken is None and fits else None

    def _validated(self, groups: list[_Group]) -> list[_Group]:
        """The groups, those put together that the configuration validates together, without what it refuses."""
        for one, other in itertools.combinations(groups, 2):
            if self._are_tied(one, other):
                merged = _Group(
                    [*one.paths, *other.paths],
                    [*one.equations, *other.equations],
                    [{**left, **right} for left, right in itertools.product(one.choices, other.choices)],
                )
                rest = [group for group in groups if group is not one and group is not other]
                return self._validated([merged, *rest])
        return [_Group(one.paths, one.equations, list(filter(self._is_valid, one.choices))) for one in groups]

    def _are_tied(self, one: _Group, other: _Group) -> bool:
        for left, right in itertools.product(_some(one.choices), _some(other.choices)):
            if self._is_valid({**left, **right}) is not (self._is_valid(left) and self._is_valid(right)):
                return True
        return False

    def _is_valid(self, values: Values) -> bool:
        flat = all(len(path) == 1 for path in values)
        try:
            changed = copy.copy(self._config) if flat else with_changes(self._config, values)
            for path, value in values.items() if flat else ():
                setattr(changed, path[0], value)
            validate(changed)
        except Exception:  # a configuration may refuse a value, by any exception
            return False
        return True


def _some(choices: Sequence[dict[ConfigPath, Any]]) -> list[dict[ConfigPath, Any]]:
    """The first few choices and the middle one."""
    return [*choices[:_TRIED], choices[len(choices) // 2]]


def _remainders(number: Term) -> Iterator[Term]:
    """What divisions and roundings in a number leave over, where that is nothing as it is and so must be."""
    for one in walk(number):
        if one.operation is operator.floordiv and one.is_lossless():
            yield combine(operator.mod, one.operands)
        elif one.operation is not None and one.is_lossless():
            yield combine(operator.sub, [*one.operands[:1], one])


def _equals(wanted: Any) -> Callable[[Any], bool]:
    return lambda value: value == wanted


def _up_to(present: Any) -> Callable[[Any], bool]:
    return lambda value: type(value) is int and 1 <= value <= present
