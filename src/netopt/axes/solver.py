"""How many neurons each axis may keep: a solver of constraints between integers.

The integers of a model tie the sizes of its axes: halves must stay equal, heads times head-dim must give the width, an
attribute read in two places has one value. This module states those ties as guards over counts, and finds, for wanted
counts, the nearest that satisfy all of them together.
"""

from __future__ import annotations

import math
import operator
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any

from netopt.axes.layout import Atom, Layout, Product, atoms, resolve
from netopt.symbolic import (
    AttributeRef,
    Constraints,
    DimSize,
    Expression,
    Guard,
    Term,
    combine,
    evaluate,
    expression_of,
    leaf,
    leaves,
    plain,
    substitute,
    value_of,
    walk,
)

_BUDGET = 20_000  # constraint evaluations per component and call
_CLOSER = 2_000  # values tried, per call, to find counts closer than the first that were found
_FEW = 8  # components of more unknowns are not searched for closer counts


class CountSolver:
    """The constraints of one model, over groups of atoms that are counted together.

    An unknown is a leaf of an expression: the key of a group, or an :class:`~netopt.symbolic.AttributeRef`.

    Args:
        groups: For each unknown, the atoms it counts; an atom is in one group at most.
        constraints: What a trace recorded of integers.
    """

    def __init__(self, groups: Mapping[Any, Sequence[Atom]], constraints: Constraints) -> None:
        self._group_of = {atom: key for key, together in groups.items() for atom in together}
        self._together = {key: len(together) for key, together in groups.items()}
        self.sizes: dict[Hashable, int] = {key: sum(atom.size for atom in together) for key, together in groups.items()}
        self.least: dict[Hashable, int] = dict.fromkeys(self.sizes, 1)
        self._bound: dict[AttributeRef, Term] = {}
        self._values: dict[AttributeRef, int] = {}
        self.constraints: list[Guard] = []
        self._fixed: dict[Any, str] = {}  # unknowns that keep their value, and why
        self._terms: dict[Layout, Term] = {}  # as many equations are about one layout
        self._collect(constraints)
        self._components = self._connect()

    # From integers to constraints.

    def layout(self, layout: Layout) -> Term:
        """The size of a layout as a term over counts."""
        known = self._terms.get(layout)
        if known is None:
            known = self._terms[layout] = self._layout(resolve(layout))
        return known

    def _layout(self, layout: Layout) -> Term:
        if isinstance(layout, Atom):
            key = self._group_of.get(layout)
            return plain(layout.size) if key is None else leaf(key, self.sizes[key])
        if isinstance(layout, Product):
            return combine(operator.mul, map(self.layout, layout.parts))
        found: list[Term] = []
        units: dict[Term, Counter[tuple[Atom, ...]]] = defaultdict(Counter)
        sizes: Counter[Term] = Counter()
        for part in layout.parts:
            term = self.layout(part)
            single = tuple(atom for atom in atoms(part) if atom.unit and atom in self._group_of)
            if single:
                units[term][single] += 1
                sizes[term] += plain(part.size)
            else:
                found.append(term)
        for term, times in units.items():
            rounds = self._rounds(times)
            if rounds:
                found.append(combine(operator.mul, (term, rounds)))
            else:
                found.append(sizes[term])
                self._fixed.update(dict.fromkeys(leaves(term), "a size that depends on which positions remain"))
        return combine(operator.add, found)

    def _rounds(self, times: Counter[tuple[Atom, ...]]) -> int:
        """How many copies of each position of permuted axes a layout has; 0 where their numbers differ."""
        keys = [self._group_of[atom] for atom in next(iter(times))]
        if len(set(times.values())) == 1 and len(times) == math.prod(self._together[key] for key in keys):
            return next(iter(times.values()))
        return 0

    def _number(self, number: Any) -> Term:
        """An integer of the user's code as a term over counts and attributes."""
        return substitute(expression_of(number), self._leaf)

    def _leaf(self, expression: Expression) -> Term:
        key = expression.key
        if isinstance(key, DimSize):
            return self.layout(key.layout)
        self._values[key] = expression.value
        return expression

    def _collect(self, constraints: Constraints) -> None:
        guards: list[Guard] = []
        for one in (*self._equations(constraints), *self._guards(constraints)):
            if bool(one.compare(value_of(one.left), value_of(one.right))) is one.outcome:
                guards.append(one)
            else:  # such as the size of a part that a permutation has scattered, which no counts determine
                why = f"a size that {one.where} states, and that does not follow from the counts of its axes"
                self._fixed.update({key: why for key in one.leaves if key not in self._fixed})
        guards += self._kept()
        self._bind(one for one in guards if one.compare is operator.eq and one.outcome)
        known: dict[Any, Guard] = {}
        for one in guards:
            resolved = Guard(one.compare, self._resolve(one.left), self._resolve(one.right), one.outcome, one.where)
            trivial = resolved.left == resolved.right and resolved.outcome and resolved.compare is operator.eq
            if resolved.leaves and not trivial:
                known.setdefault(resolved.key, resolved)
        self.constraints = list(known.values())
        self._keep_divisible()
        tied = frozenset().union(*(one.leaves for one in self.constraints))
        for attribute in self._values:
            if attribute in tied:  # one that changes alone has nothing to follow
                self.sizes[attribute], self.least[attribute] = self._values[attribute], 1

    def _equations(self, constraints: Constraints) -> Iterable[Guard]:
        named = Counter(resolve(equation.layout) for equation in constraints.equations)
        for equation in constraints.equations:
            only = resolve(equation.layout)
            if isinstance(only, Atom) and only not in self._group_of and only.frozen is None and named[only] == 1:
                continue  # a tensor that never met a parameter is as large as the code makes it
            yield Guard(operator.eq, self._number(equation.number), self.layout(equation.layout), True, str(equation))

    def _guards(self, constraints: Constraints) -> Iterable[Guard]:
        for guard in constraints.guards:
            compare, outcome = guard.compare, guard.outcome
            if compare is operator.ne and not outcome:
                compare, outcome = operator.eq, True
            yield Guard(compare, self._number(guard.left), self._number(guard.right), outcome, str(guard))

    def _kept(self) -> list[Guard]:
        """What keeps the unknowns that are fixed."""
        present = {**self.sizes, **self._values}
        return [
            Guard(operator.eq, leaf(key, present[key]), present[key], True, where) for key, where in self._fixed.items()
        ]

    def _keep_divisible(self) -> None:
        """An attribute divided without remainder, ``out_features // heads``, stays a multiple of the divisor."""
        present = {**self.sizes, **self._values}
        for one in list(self.constraints):
            for expression in (*walk(one.left), *walk(one.right)):
                if expression.operation is not operator.floordiv or not _is_attribute(expression.operands[0]):
                    continue
                rest = Guard(operator.eq, combine(operator.mod, expression.operands), 0, True, one.where)
                if rest.holds(present) and all(rest.key != other.key for other in self.constraints):
                    self.constraints.append(rest)

    def _bind(self, equal: Iterable[Guard]) -> None:
        """An attribute compared with a layout *is* that layout's size; with a computed number, that number."""
        equal = list(equal)
        for simple in (True, False):
            for one in equal:
                for attribute, term in ((one.left, one.right), (one.right, one.left)):
                    is_layout = not any(isinstance(key, AttributeRef) for key in leaves(term))
                    if (
                        isinstance(attribute, Expression)
                        and _is_attribute(attribute)
                        and attribute.key not in self._bound
                        and is_layout is simple
                        and attribute.key not in leaves(self._resolve(term))
                    ):
                        self._bound[attribute.key] = term

    def _resolve(self, term: Term) -> Term:
        """The term with attributes replaced by what they are bound to."""
        return substitute(term, lambda one: self._resolve(self._bound[one.key]) if one.key in self._bound else one)

    def _connect(self) -> list[tuple[list[Hashable], list[Guard]]]:
        parent: dict[Hashable, Hashable] = {}

        def root(key: Hashable) -> Hashable:
            while parent.setdefault(key, key) != key:
                parent[key] = parent[parent[key]]
                key = parent[key]
            return key

        for one in self.constraints:
            first, *rest = one.leaves
            for key in rest:
                parent[root(key)] = root(first)
        members: dict[Hashable, list[Hashable]] = defaultdict(list)
        order = {key: index for index, key in enumerate(self.sizes)}
        for key in sorted({key for one in self.constraints for key in one.leaves}, key=order.__getitem__):
            members[root(key)].append(key)
        by_root: dict[Hashable, list[Guard]] = defaultdict(list)
        for one in self.constraints:
            by_root[root(next(iter(one.leaves)))].append(one)
        return [(keys, by_root[top]) for top, keys in members.items()]

    # From wanted counts to possible ones.

    def nearest(self, wanted: Mapping[Any, int]) -> dict[Hashable, int]:
        """Counts near ``wanted`` that satisfy every constraint; axes not named keep their size where they can.

        How far counts are is the number of neurons by which the axes named are off, in sum; between equals, by which
        the others are. What is tied together in a small component has the nearest counts there are: the search
        for closer ones runs until none is left, or for a bounded number of steps.
        """
        left = _CLOSER
        result = {key: max(min(wanted.get(key, size), size), self.least[key]) for key, size in self.sizes.items()}
        for keys, constraints in self._components:
            if any(key in wanted and wanted[key] != self.sizes[key] for key in keys):
                search = _Search(self, keys, constraints, {key: result[key] for key in keys if key in wanted})
                found = search.run()
                if len(keys) <= _FEW and left > 0:
                    found, left = search.closer(found, left)
                result.update(found)
        return result

    def holds(self, counts: Mapping[Any, int]) -> bool:
        """Whether every constraint holds that is about these unknowns alone."""
        return all(one.holds(counts) for one in self.constraints if one.leaves <= counts.keys())

    def unshrinkable(self) -> dict[Hashable, str]:
        """The groups that no choice of counts can shrink, each with the constraint in its way."""
        found: dict[Hashable, str] = {}
        for keys, constraints in self._components:
            groups = [key for key in keys if not isinstance(key, AttributeRef) and self.sizes[key] > 1]
            moved = {
                key: _Search(
                    self, keys, constraints, {k: max(self.sizes[k] // 2, 1) for k in keys if k in groups}
                ).run()
                for key in groups[:1]
            }
            free = {key for counts in moved.values() for key in groups if counts[key] < self.sizes[key]}
            for key in groups:
                if key in free:
                    continue
                counts = _Search(self, keys, constraints, {key: max(self.sizes[key] // 2, 1)}).run()
                free.update(other for other in groups if counts[other] < self.sizes[other])
                if counts[key] == self.sizes[key]:
                    tie = next(one for one in constraints if key in one.leaves)
                    why = f"a size that must satisfy {tie.where}, which no smaller one does"
                    found[key] = f"has {self._fixed.get(key, why)}"
        return found

    def assignments(self, counts: Mapping[Any, int]) -> list[tuple[AttributeRef, int]]:
        """The attributes that change under ``counts``, with their new values."""
        full = {**self.sizes, **counts}
        changed: list[tuple[AttributeRef, int]] = []
        for attribute, old in self._values.items():
            term = self._resolve(leaf(attribute, old))
            if any(isinstance(key, AttributeRef) and key not in full for key in leaves(term)):
                continue
            new = evaluate(term, full)
            if new is not None and new != old:
                changed.append((attribute, int(new)))
        return changed

    def groups_of(self, attribute: AttributeRef) -> frozenset[Hashable]:
        """The groups whose counts an attribute follows, or is tied to by a constraint."""
        found = leaves(self._resolve(leaf(attribute, 0)))
        loose = {key for key in found if isinstance(key, AttributeRef)}
        for keys, _ in self._components:
            if not loose.isdisjoint(keys):
                found = found.union(keys)
        return frozenset(key for key in found if not isinstance(key, AttributeRef))

    def attribute_equations(self) -> Iterable[tuple[Term, Term]]:
        """Terms in counts that equal terms in attributes, besides those of attributes that are bound."""
        for one in self.constraints:
            for left, right in ((one.left, one.right), (one.right, one.left)):
                counts, integers = ({isinstance(key, AttributeRef) for key in leaves(side)} for side in (left, right))
                if one.compare is operator.eq and one.outcome and counts == {False} and integers == {True}:
                    yield left, right

    def bound_attributes(self) -> Iterable[tuple[AttributeRef, Term]]:
        """Attributes and the terms they are bound to."""
        return ((attribute, self._resolve(term)) for attribute, term in self._bound.items())


class _Search:
    """Backtracking over one component, values nearest to the wanted ones first, for a bounded time.

    The first counts found bring one axis near after the other, the most tied first; :meth:`closer` looks for the
    nearest of all.
    """

    def __init__(
        self, counts: CountSolver, keys: list[Hashable], constraints: list[Guard], wanted: Mapping[Any, int]
    ) -> None:
        self.keys = keys
        self.sizes = counts.sizes
        self.least = counts.least
        self.wanted = {key: wanted.get(key, counts.sizes[key]) for key in keys}
        self.requested = set(wanted)
        self.of: dict[Hashable, list[Guard]] = defaultdict(list)
        for one in constraints:
            for key in one.leaves:
                self.of[key].append(one)
        self.left = _BUDGET

    def run(self) -> dict[Hashable, int]:
        found = self._assign({})
        return found if found is not None else {key: self.sizes[key] for key in self.keys}

    def _assign(self, chosen: dict[Hashable, int]) -> dict[Hashable, int] | None:
        if len(chosen) == len(self.keys):
            return dict(chosen)
        key, values = self._next(chosen)
        for value in values:
            if self.left <= 0:
                return None
            chosen[key] = value
            if self._consistent(key, chosen):
                found = self._assign(chosen)
                if found is not None:
                    return found
            del chosen[key]
        return None

    def closer(self, found: dict[Hashable, int], budget: int) -> tuple[dict[Hashable, int], int]:
        """The nearest counts, by branch and bound from those found, and what is left of the budget."""
        self._best, self._least = found, (0, 0)
        for key in self.keys:
            self._least = self._farther(self._least, key, found[key])
        self.left = budget
        if self._least > (0, 0):
            self._improve({}, (0, 0))
        return self._best, self.left

    def _improve(self, chosen: dict[Hashable, int], far: tuple[int, int]) -> None:
        if len(chosen) == len(self.keys):
            self._best, self._least = dict(chosen), far
            return
        key, values = self._next(chosen)
        for value in values:  # those nearest to the aim first, so the rest is no nearer
            now = self._farther(far, key, value)
            self.left -= 1
            if now >= self._least or self.left <= 0:
                return
            chosen[key] = value
            if self._consistent(key, chosen):
                self._improve(chosen, now)
            del chosen[key]

    def _farther(self, far: tuple[int, int], key: Hashable, value: int) -> tuple[int, int]:
        off = abs(value - self.wanted[key])
        return (far[0] + off, far[1]) if key in self.requested else (far[0], far[1] + off)

    def _next(self, chosen: dict[Hashable, int]) -> tuple[Hashable, Iterable[int]]:
        """The next unknown: one that a constraint determines, else one that is requested, in model order."""
        for key in self.keys:
            if key not in chosen:
                for one in self.of[key]:
                    if (
                        one.compare is operator.eq
                        and one.outcome
                        and len(one.leaves) > 1  # alone, it narrows the choice and makes none
                        and all(k in chosen for k in one.leaves if k != key)
                    ):
                        return key, self._solutions(key, one, chosen)
        open_keys = [key for key in self.keys if key not in chosen]
        key = min(
            open_keys,
            key=lambda k: (isinstance(k, AttributeRef), k not in self.requested, -len(self.of[k]), -self.sizes[k]),
        )
        return key, self._values(key)

    def _values(self, key: Hashable) -> list[int]:
        aim = self.wanted[key]
        return sorted(range(self.least[key], self.sizes[key] + 1), key=lambda value: (abs(value - aim), -value))

    def _solutions(self, key: Hashable, one: Guard, chosen: dict[Hashable, int]) -> list[int]:
        for mine, other in ((one.left, one.right), (one.right, one.left)):
            if isinstance(mine, Expression) and mine.operands == (key,) and key not in leaves(other):
                value = evaluate(other, chosen)
                if value is None or value != int(value) or not self.least[key] <= value <= self.sizes[key]:
                    return []
                return [int(value)]
        found = []
        for value in self._values(key):
            self.left -= 1
            if one.holds({**chosen, key: value}):
                found.append(value)
        return found

    def _consistent(self, key: Hashable, chosen: dict[Hashable, int]) -> bool:
        for one in self.of[key]:
            if all(k in chosen for k in one.leaves):
                self.left -= 1
                if not one.holds(chosen):
                    return False
        return True


def _is_attribute(term: Term) -> bool:
    return isinstance(term, Expression) and term.operation is None and isinstance(term.key, AttributeRef)
