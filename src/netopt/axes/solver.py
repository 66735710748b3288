"""How many neurons each axis may keep.

The integers of a model tie the sizes of its axes: halves must stay equal, heads times head-dim must give the width, an
attribute read in two places has one value. This module writes those ties as constraints between counts, and finds, for
wanted counts, the nearest that satisfy all of them together.
"""

from __future__ import annotations

import math
import operator
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from netopt.axes.layout import Atom, Layout, Product, atoms, resolve
from netopt.symbolic.number import AttributeRef, BinaryOp, Constraints, DimSize, SymbolicFloat, SymbolicInt, show_line

_BUDGET = 20_000  # constraint evaluations per component and question
_CLOSER = 2_000  # values tried, per question, to find counts closer than the first that were found
_FEW = 8  # components of more unknowns are not searched for closer counts
_COMMUTATIVE = {operator.mul: "*", operator.add: "+"}
Expression = tuple  # ("const", n) | ("var", key) | ("*", parts) | ("+", parts) | ("op", function, left, right)


def constant(value: Any) -> Expression:
    """A number that does not change."""
    return ("const", value)


def _fold(kind: str, parts: Iterable[Expression]) -> Expression:
    flat: list[Expression] = []
    number = 1 if kind == "*" else 0
    for part in parts:
        for one in part[1] if part[0] == kind else (part,):
            if one[0] == "const":
                number = number * one[1] if kind == "*" else number + one[1]
            else:
                flat.append(one)
    if not flat:
        return constant(number)
    if number != (1 if kind == "*" else 0):
        flat.append(constant(number))
    return flat[0] if len(flat) == 1 else (kind, tuple(sorted(flat, key=repr)))


def value_of(expression: Expression, counts: Mapping[Any, int]) -> Any:
    """The value of an expression under ``counts``."""
    kind = expression[0]
    if kind == "const":
        return expression[1]
    if kind == "var":
        return counts[expression[1]]
    if kind == "*":
        return math.prod(value_of(part, counts) for part in expression[1])
    if kind == "+":
        return sum(value_of(part, counts) for part in expression[1])
    return expression[1](value_of(expression[2], counts), value_of(expression[3], counts))


def variables_of(expression: Expression) -> frozenset[Hashable]:
    """The unknowns an expression depends on."""
    kind = expression[0]
    if kind == "const":
        return frozenset()
    if kind == "var":
        return frozenset((expression[1],))
    parts = expression[1] if kind in ("*", "+") else expression[2:]
    return frozenset().union(*(variables_of(part) for part in parts))


def _within(expression: Expression) -> Iterator[Expression]:
    """An expression and everything it is computed from."""
    yield expression
    if expression[0] not in ("const", "var"):
        for part in expression[1] if expression[0] in ("*", "+") else expression[2:]:
            yield from _within(part)


class Constraint:
    """A comparison between two expressions that must keep its outcome."""

    __slots__ = ("compare", "left", "outcome", "right", "variables", "where")

    def __init__(self, left: Expression, right: Expression, compare: Any, outcome: bool, where: str) -> None:
        self.left, self.right, self.compare, self.outcome, self.where = left, right, compare, outcome, where
        self.variables = variables_of(left) | variables_of(right)

    @property
    def key(self) -> tuple[Any, ...]:
        """Equal for two constraints that say the same."""
        return (self.left, self.right, self.compare, self.outcome)

    def holds(self, counts: Mapping[Any, int]) -> bool:
        """Whether the counts keep the outcome."""
        try:
            return bool(self.compare(value_of(self.left, counts), value_of(self.right, counts))) is self.outcome
        except (ZeroDivisionError, OverflowError, ValueError):
            return False


class CountSolver:
    """The constraints of one model, over groups of atoms that are counted together.

    Args:
        groups: For each unknown, the atoms it counts and its size; an atom stands in one group at most.
        ledger: What a trace learned of integers.
    """

    def __init__(self, groups: Mapping[Any, Sequence[Atom]], constraints: Constraints) -> None:
        self._group_of = {atom: key for key, together in groups.items() for atom in together}
        self._together = {key: len(together) for key, together in groups.items()}
        self.sizes: dict[Hashable, int] = {key: sum(atom.size for atom in together) for key, together in groups.items()}
        self.least: dict[Hashable, int] = dict.fromkeys(self.sizes, 1)
        self._bound: dict[AttributeRef, Expression] = {}
        self._values: dict[AttributeRef, int] = {}
        self.constraints: list[Constraint] = []
        self._uneven: set[Hashable] = set()
        self._expressions: dict[Layout, Expression] = {}  # as many equations are about one layout
        self._collect(constraints)
        self._components = self._connect()

    # From integers to constraints.

    def layout(self, layout: Layout) -> Expression:
        """The size of a layout as an expression over counts."""
        known = self._expressions.get(layout)
        if known is None:
            known = self._expressions[layout] = self._layout(resolve(layout))
        return known

    def _layout(self, layout: Layout) -> Expression:
        if isinstance(layout, Atom):
            key = self._group_of.get(layout)
            return constant(layout.size) if key is None else ("var", key)
        if isinstance(layout, Product):
            return _fold("*", (self.layout(part) for part in layout.parts))
        found: list[Expression] = []
        units: dict[Expression, Counter[tuple[Atom, ...]]] = defaultdict(Counter)
        for part in layout.parts:
            expression = self.layout(part)
            single = tuple(atom for atom in atoms(part) if atom.unit and atom in self._group_of)
            if single:
                units[expression][single] += 1
            else:
                found.append(expression)
        for expression, times in units.items():
            rounds = self._rounds(times)
            found.append(_fold("*", (expression, constant(rounds))) if rounds else constant(sum(times.values())))
        return _fold("+", found)

    def _rounds(self, times: Counter[tuple[Atom, ...]]) -> int:
        """How often the positions of taken-apart axes run through; where not all run alike, their counts must stay."""
        keys = [self._group_of[atom] for atom in next(iter(times))]
        if len(set(times.values())) == 1 and len(times) == math.prod(self._together[key] for key in keys):
            return next(iter(times.values()))
        self._uneven.update(keys)
        return 0

    def number(self, number: Any) -> Expression:
        """An integer of the user's code as an expression over counts and attributes."""
        if not isinstance(number, (SymbolicInt, SymbolicFloat)):
            return constant(number)
        origin = number.origin
        if isinstance(origin, AttributeRef):
            self._values[origin] = int(number)
            return ("var", origin)
        if isinstance(origin, DimSize):
            return self.layout(origin.layout)
        return self._computed(origin)

    def _computed(self, origin: BinaryOp) -> Expression:
        left, right = self.number(origin.left), self.number(origin.right)
        kind = _COMMUTATIVE.get(origin.operation)
        if kind is not None:
            return _fold(kind, (left, right))
        if left[0] == right[0] == "const":
            return constant(origin.operation(left[1], right[1]))
        return ("op", origin.operation, left, right)

    def _collect(self, constraints: Constraints) -> None:
        equal: list[tuple[Expression, Expression, str]] = []
        other: list[tuple[Expression, Expression, Any, bool, str]] = []
        named = Counter(resolve(equation.layout) for equation in constraints.equations)
        for equation in constraints.equations:
            only = resolve(equation.layout)
            if isinstance(only, Atom) and only not in self._group_of and only.frozen is None and named[only] == 1:
                continue  # a tensor that never met a parameter is as large as the code makes it
            where = f"{equation.operation} at {show_line(equation.where)}"
            equal.append((self.number(equation.number), self.layout(equation.layout), where))
        for condition in constraints.guards:
            left, right = self.number(condition.left), self.number(condition.right)
            where = f"a comparison at {show_line(condition.where)}"
            must_equal = condition.outcome if condition.compare is operator.eq else not condition.outcome
            if condition.compare in (operator.eq, operator.ne) and must_equal:
                equal.append((left, right, where))
            else:
                other.append((left, right, condition.compare, condition.outcome, where))
        self._bind_places(equal)
        seen: set[Any] = set()
        for left, right, compare, outcome, where in (
            *((left, right, operator.eq, True, where) for left, right, where in equal),
            *other,
        ):
            one = Constraint(self._settle(left), self._settle(right), compare, outcome, where)
            trivial = one.left == one.right and outcome and compare is operator.eq
            if one.variables and not trivial and one.key not in seen:
                seen.add(one.key)
                self.constraints.append(one)
        for key in sorted(self._uneven, key=list(self.sizes).index):
            where = "a size that depends on which positions remain"
            self.constraints.append(Constraint(("var", key), constant(self.sizes[key]), operator.eq, True, where))
        self._keep_divisible()
        tied = {key for one in self.constraints for key in one.variables}
        # An attribute that changes alone has nothing to follow.
        loose = {key for key in tied if isinstance(key, AttributeRef)}
        for place in loose:
            self.sizes[place] = self._values[place]
            self.least[place] = 1

    def _keep_divisible(self) -> None:
        """An attribute that is taken apart evenly, ``out_features // heads``, stays a multiple of what divides it."""
        for one in list(self.constraints):
            for expression in (*_within(one.left), *_within(one.right)):
                if expression[0] != "op" or expression[1] is not operator.floordiv:
                    continue
                dividend = expression[2]
                if dividend[0] != "var" or not isinstance(dividend[1], AttributeRef):
                    continue
                rest = Constraint(("op", operator.mod, *expression[2:]), constant(0), operator.eq, True, one.where)
                if rest.holds({**self.sizes, **self._values}) and all(
                    rest.key != other.key for other in self.constraints
                ):
                    self.constraints.append(rest)

    def _bind_places(self, equal: list[tuple[Expression, Expression, str]]) -> None:
        """An attribute compared with a layout *is* that layout's size; with a computed number, that number."""
        for simple in (True, False):
            for left, right, _ in equal:
                for place, expression in ((left, right), (right, left)):
                    is_layout = not any(isinstance(key, AttributeRef) for key in variables_of(expression))
                    if (
                        place[0] == "var"
                        and isinstance(place[1], AttributeRef)
                        and place[1] not in self._bound
                        and is_layout is simple
                        and place[1] not in variables_of(self._settle(expression))
                    ):
                        self._bound[place[1]] = expression

    def _settle(self, expression: Expression) -> Expression:
        """The expression with attributes replaced by what they are bound to."""
        kind = expression[0]
        if kind == "const":
            return expression
        if kind == "var":
            bound = self._bound.get(expression[1]) if isinstance(expression[1], AttributeRef) else None
            return expression if bound is None else self._settle(bound)
        if kind in ("*", "+"):
            return _fold(kind, (self._settle(part) for part in expression[1]))
        left, right = self._settle(expression[2]), self._settle(expression[3])
        if left[0] == right[0] == "const":
            return constant(expression[1](left[1], right[1]))
        return ("op", expression[1], left, right)

    def _connect(self) -> list[tuple[list[Hashable], list[Constraint]]]:
        parent: dict[Hashable, Hashable] = {}

        def root(key: Hashable) -> Hashable:
            while parent.setdefault(key, key) != key:
                parent[key] = parent[parent[key]]
                key = parent[key]
            return key

        for one in self.constraints:
            first, *rest = one.variables
            for key in rest:
                parent[root(key)] = root(first)
        members: dict[Hashable, list[Hashable]] = defaultdict(list)
        order = {key: index for index, key in enumerate(self.sizes)}
        for key in sorted({key for one in self.constraints for key in one.variables}, key=order.__getitem__):
            members[root(key)].append(key)
        by_root: dict[Hashable, list[Constraint]] = defaultdict(list)
        for one in self.constraints:
            by_root[root(next(iter(one.variables)))].append(one)
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

    def stuck(self) -> dict[Hashable, str]:
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
                    tie = next(one for one in constraints if key in one.variables)
                    found[key] = f"has a size that must satisfy {tie.where}, which no smaller one does"
        return found

    def assignments(self, counts: Mapping[Any, int]) -> list[tuple[AttributeRef, int]]:
        """The attributes that change under ``counts``, with their new values."""
        full = {**self.sizes, **counts}
        changed: list[tuple[AttributeRef, int]] = []
        for place, old in self._values.items():
            expression = self._settle(("var", place))
            if any(isinstance(key, AttributeRef) and key not in full for key in variables_of(expression)):
                continue
            new = value_of(expression, full)
            if new != old:
                changed.append((place, int(new)))
        return changed

    def extents(self, place: AttributeRef) -> frozenset[Hashable]:
        """The groups whose counts an attribute follows, or is tied to by a constraint."""
        found = variables_of(self._settle(("var", place)))
        loose = {key for key in found if isinstance(key, AttributeRef)}
        for keys, _ in self._components:
            if not loose.isdisjoint(keys):
                found = found.union(keys)
        return frozenset(key for key in found if not isinstance(key, AttributeRef))

    def bound_places(self) -> Iterable[tuple[AttributeRef, Expression]]:
        """Attributes and the expressions they are bound to."""
        return ((place, self._settle(expression)) for place, expression in self._bound.items())


class _Search:
    """Backtracking over one component, values nearest to the wanted ones first, for a bounded time.

    The first counts found bring one axis near after the other, the most tied first; :meth:`closer` looks for the
    nearest of all.
    """

    def __init__(
        self, counts: CountSolver, keys: list[Hashable], constraints: list[Constraint], wanted: Mapping[Any, int]
    ) -> None:
        self.keys = keys
        self.sizes = counts.sizes
        self.least = counts.least
        self.wanted = {key: wanted.get(key, counts.sizes[key]) for key in keys}
        self.asked = set(wanted)
        self.of: dict[Hashable, list[Constraint]] = defaultdict(list)
        for one in constraints:
            for key in one.variables:
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
        return (far[0] + off, far[1]) if key in self.asked else (far[0], far[1] + off)

    def _next(self, chosen: dict[Hashable, int]) -> tuple[Hashable, Iterable[int]]:
        """The next unknown: one that a constraint determines, else one that was asked for, in model order."""
        for key in self.keys:
            if key not in chosen:
                for one in self.of[key]:
                    if (
                        one.compare is operator.eq
                        and one.outcome
                        and len(one.variables) > 1  # alone, it narrows the choice and makes none
                        and all(k in chosen for k in one.variables if k != key)
                    ):
                        return key, self._solutions(key, one, chosen)
        open_keys = [key for key in self.keys if key not in chosen]
        key = min(
            open_keys,
            key=lambda k: (isinstance(k, AttributeRef), k not in self.asked, -len(self.of[k]), -self.sizes[k]),
        )
        return key, self._values(key)

    def _values(self, key: Hashable) -> list[int]:
        aim = self.wanted[key]
        return sorted(range(self.least[key], self.sizes[key] + 1), key=lambda value: (abs(value - aim), -value))

    def _solutions(self, key: Hashable, one: Constraint, chosen: dict[Hashable, int]) -> list[int]:
        for mine, other in ((one.left, one.right), (one.right, one.left)):
            if mine == ("var", key) and key not in variables_of(other):
                value = value_of(other, chosen)
                fits = value == int(value) and self.least[key] <= value <= self.sizes[key]
                return [int(value)] if fits else []
        found = []
        for value in self._values(key):
            self.left -= 1
            if one.holds({**chosen, key: value}):
                found.append(value)
        return found

    def _consistent(self, key: Hashable, chosen: dict[Hashable, int]) -> bool:
        for one in self.of[key]:
            if all(k in chosen for k in one.variables):
                self.left -= 1
                if not one.holds(chosen):
                    return False
        return True
