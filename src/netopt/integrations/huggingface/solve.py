"""Values of a configuration, solved from the formulas of the sizes that are computed from it.

Every dimension and every number of a module that has a formula is an equation. One with a single unknown is solved, as
long as there is one; what then does not hold has no solution. Sizes that grow alike at one point of unlike primes are
in proportion everywhere, after Schwartz, Fast Probabilistic Algorithms for Verification of Polynomial Identities
(1980), https://doi.org/10.1145/322217.322225
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from netopt.integrations.huggingface.meta_build import ConfigPath, Shapes
from netopt.integrations.huggingface.symbolic_build import ShapeFormulas, exact_value
from netopt.symbolic import Expression, Term, leaves

__all__ = ["ConfigSolution", "SizeEquation", "equations", "out_of_proportion", "solve"]


@dataclass(frozen=True, eq=False)
class SizeEquation:
    """A term that must have a value: a dimension of a tensor, or a number that a module holds.

    Attributes:
        term: The left side.
        wanted: The value.
        name: Of the tensor; of the module and the number.
        dim: Of the tensor; None for a module's number.
    """

    term: Term
    wanted: Any
    name: str
    dim: int | None = None

    def holds(self, values: Mapping[ConfigPath, Any]) -> bool:
        """Whether the numbers of the configuration give the value."""
        return exact_value(self.term, values) == self.wanted


@dataclass(frozen=True, eq=False)
class ConfigSolution:
    """What the equations give.

    Attributes:
        values: Of the numbers of the configuration.
        broken: An equation that is not satisfied.
        is_unique: Whether no other values could satisfy the equations.
    """

    values: Mapping[ConfigPath, Any]
    broken: SizeEquation | None
    is_unique: bool


def equations(
    formulas: ShapeFormulas, wanted: Shapes, attributes: Mapping[tuple[str, str], tuple[Any, Any]]
) -> list[SizeEquation]:
    """Each once: first those of tensors, then those of integers of modules, then those of floats.

    Args:
        formulas: Of the sizes.
        wanted: The shapes.
        attributes: Numbers of modules and what they must be, by the module's name and their own.
    """
    found: dict[Any, SizeEquation] = {}
    for name, shape in wanted.items():
        for dim, (term, size) in enumerate(zip(formulas.sizes[name], shape, strict=True)):
            found.setdefault((term, size), SizeEquation(term, size, name, dim))
    memo: dict[int, Any] = {}
    for kind in (int, float):
        for path, (value, new) in attributes.items():
            term = formulas.attributes.get(path)
            if term is not None and type(new) is kind and exact_value(term, formulas.dense, memo) == value:
                found.setdefault((term, new), SizeEquation(term, new, ".".join(filter(None, path))))
    return list(found.values())


def solve(system: Sequence[SizeEquation], dense: Mapping[ConfigPath, Any]) -> ConfigSolution:
    """Values of the configuration's numbers that satisfy all equations, or an equation that they break.

    Args:
        system: The equations.
        dense: The numbers as they are, which those that no equation determines keep.
    """
    values: dict[ConfigPath, Any] = {}
    is_unique, pending = True, list(system)
    while pending:
        left: list[SizeEquation] = []
        for one in pending:
            missing = leaves(one.term) - values.keys()
            solution = one.term.solve(one.wanted, values) if isinstance(one.term, Expression) and missing else None
            if len(missing) == 1 and solution is not None:
                is_unique &= solution.is_unique
                if solution.value is None:
                    return ConfigSolution(values, one, is_unique)
                values[solution.key] = solution.value
                if type(solution.value) is float and not one.holds(values):
                    values[solution.key] = math.nextafter(solution.value, math.inf)  # else int() cuts it to one less
            elif missing:
                left.append(one)
                continue
            if not one.holds(values):
                return ConfigSolution(values, one, is_unique)
        if len(left) == len(pending):
            # No equation has a single unknown: one that holds as it is keeps its numbers.
            is_unique = False
            kept = next((one for one in left if one.holds({**dense, **values})), None)
            still = _one_to_keep(left[0], values, dense) if kept is None else leaves(kept.term) - values.keys()
            values |= {path: dense[path] for path in still}
        pending = left
    return ConfigSolution(values, None, is_unique)


def _one_to_keep(
    equation: SizeEquation, values: Mapping[ConfigPath, Any], dense: Mapping[ConfigPath, Any]
) -> list[ConfigPath]:
    """The number to keep where several make up a size: the smallest beside which the rest has a solution."""
    missing = sorted(leaves(equation.term) - values.keys(), key=lambda path: (dense[path], str(path)))
    for path in missing if len(missing) == 2 else ():
        assert isinstance(equation.term, Expression), "a number has no unknowns"
        solution = equation.term.solve(equation.wanted, {**values, path: dense[path]})
        if solution is not None and solution.value is not None:
            return [path]
    return missing[:1]


def out_of_proportion(formulas: ShapeFormulas, wanted: Shapes) -> str | None:
    """Names two sizes that every configuration keeps in a proportion other than the one wanted; None if none are."""
    values = _unlike({path: formulas.dense[path] for path in formulas.leaves})
    memo: dict[int, Any] = {}
    dense: dict[int, Any] = {}
    known: dict[Any, tuple[Fraction, str, int]] = {}
    seen: set[tuple[Term, int]] = set()
    for name, shape in wanted.items():
        for dim, (term, new) in enumerate(zip(formulas.sizes[name], shape, strict=True)):
            if not isinstance(term, Expression) or (term, new) in seen:
                continue
            seen.add((term, new))
            size, grown = exact_value(term, formulas.dense, dense), exact_value(term, values, memo)
            if not size or grown is None:
                continue
            change = Fraction(new, size)
            before, other, place = known.setdefault(Fraction(grown) / size, (change, name, dim))
            if before != change:
                return (
                    f"`{other}` has shape {wanted[other]} and `{name}` {shape}, and every configuration keeps "
                    f"dimension {place} of the one and dimension {dim} of the other in proportion"
                )
    return None


def _unlike(values: Mapping[ConfigPath, Any]) -> dict[ConfigPath, Any]:
    """Other values, multiplied by products of unlike primes, so that what divided another still does."""
    factor, found = 1, {}
    for prime, path in zip(_primes(), sorted(values, key=lambda path: values[path]), strict=False):
        factor *= prime
        value = values[path]
        found[path] = value * factor if type(value) is int else Fraction(value) * factor
    return found


def _primes() -> Iterator[int]:
    for number in itertools.count(2):
        if all(number % one for one in range(2, math.isqrt(number) + 1)):
            yield number
