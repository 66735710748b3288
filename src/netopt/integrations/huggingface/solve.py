"""Values of a configuration, solved from the formulas of the sizes that are computed from it.

Every dimension and every number of a module that has a formula is an equation: the formula is to be what is wanted.
One with a single unknown is solved, as long as there is one; what then does not hold has no solution. Sizes that grow
alike at one point of unlike primes are in proportion everywhere, after Schwartz, Fast Probabilistic Algorithms for
Verification of Polynomial Identities (1980), https://doi.org/10.1145/322217.322225
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from netopt.integrations.huggingface.meta_build import Shapes
from netopt.integrations.huggingface.symbolic_build import Drawing
from netopt.symbolic.formulas import Formula, Where

__all__ = ["Equation", "Solution", "equations", "out_of_proportion", "solved"]


@dataclass(frozen=True, eq=False)
class Equation:
    """A formula that is to have a value: a dimension of a tensor, or a number that a module holds.

    Attributes:
        formula: Or a number, which no configuration changes.
        wanted: The value.
        name: Of the tensor; of the module and the number.
        dim: Of the tensor; None for a module's number.
    """

    formula: Any
    wanted: Any
    name: str
    dim: int | None = None


@dataclass(frozen=True, eq=False)
class Solution:
    """What the equations say.

    Attributes:
        values: Of the numbers of the configuration.
        broken: An equation that no values satisfy.
        is_only: Whether no other values could satisfy the equations.
    """

    values: Mapping[Where, Any]
    broken: Equation | None
    is_only: bool


def equations(
    drawing: Drawing, wanted: Shapes, attributes: Mapping[tuple[str, str], tuple[Any, Any]]
) -> list[Equation]:
    """Each once: first those of tensors, then those of whole numbers of modules, then those of other numbers.

    Args:
        drawing: Has the formulas.
        wanted: The shapes.
        attributes: What modules hold, and what they are to hold, by the module's name and their own.
    """
    found: dict[Any, Equation] = {}
    for name, shape in wanted.items():
        for dim, (formula, size) in enumerate(zip(drawing.sizes[name], shape, strict=True)):
            found.setdefault((formula, size), Equation(formula, size, name, dim))
    memo: dict[Formula, Any] = {}
    for kind in (int, float):
        for path, (value, new) in attributes.items():
            formula = drawing.attributes.get(path)
            if formula is not None and type(new) is kind and formula.at(drawing.dense, memo) == value:
                found.setdefault((formula, new), Equation(formula, new, ".".join(filter(None, path))))
    return list(found.values())


def solved(all_: Sequence[Equation], dense: Mapping[Where, Any]) -> Solution:
    """Values of the configuration's numbers that satisfy all equations, or an equation that none satisfy.

    Args:
        all_: The equations.
        dense: The numbers as they are, with which what is left open is tried.
    """
    values: dict[Where, Any] = {}
    is_only, pending = True, list(all_)
    while pending:
        left: list[Equation] = []
        for one in pending:
            formula = one.formula
            missing = formula.leaves - values.keys() if isinstance(formula, Formula) else ()
            if len(missing) == 1 and (answer := formula.solve(one.wanted, values)) is not None:
                is_only &= answer.is_only
                if answer.value is None:
                    return Solution(values, one, is_only)
                values[answer.place] = answer.value
                if type(answer.value) is float and not _holds(one, values):
                    values[answer.place] = math.nextafter(
                        answer.value, math.inf
                    )  # what is then cut off is the wrong way
            elif missing:
                left.append(one)
                continue
            if not _holds(one, values):
                return Solution(values, one, is_only)
        if len(left) == len(pending):
            # Nothing says more: what holds as it is stays as it is.
            is_only = False
            kept = next((one for one in left if _holds(one, {**dense, **values})), left[0])
            values |= {path: dense[path] for path in kept.formula.leaves - values.keys()}
        pending = left
    return Solution(values, None, is_only)


def _holds(equation: Equation, values: Mapping[Where, Any]) -> bool:
    formula = equation.formula
    return (formula.at(values, {}) if isinstance(formula, Formula) else formula) == equation.wanted


def out_of_proportion(drawing: Drawing, wanted: Shapes) -> str | None:
    """Says which two sizes are wanted out of a proportion that every configuration keeps.

    Returns:
        The reason; None if there is no such pair.
    """
    values = _unlike({path: drawing.dense[path] for path in drawing.leaves})
    memo: dict[Formula, Any] = {}
    dense: dict[Formula, Any] = {}
    known: dict[Any, tuple[Fraction, str, int]] = {}
    seen: set[tuple[Formula, int]] = set()
    for name, shape in wanted.items():
        for dim, formula in enumerate(drawing.sizes[name]):
            if not isinstance(formula, Formula) or (formula, shape[dim]) in seen:
                continue
            seen.add((formula, shape[dim]))
            size, grown = formula.at(drawing.dense, dense), formula.at(values, memo)
            if not size or grown is None:
                continue
            change = Fraction(shape[dim], size)
            before, other, place = known.setdefault(Fraction(grown) / size, (change, name, dim))
            if before != change:
                return (
                    f"`{other}` has shape {wanted[other]} and `{name}` {shape}, and every configuration keeps "
                    f"dimension {place} of the one and dimension {dim} of the other in proportion"
                )
    return None


def _unlike(values: Mapping[Where, Any]) -> dict[Where, Any]:
    """Other values, each multiplied by another number, where what divided another still does."""
    factor, found = 1, {}
    for prime, path in zip(_primes(), sorted(values, key=lambda path: values[path]), strict=False):
        factor *= prime
        value = values[path]
        found[path] = value * factor if type(value) is int else Fraction(value) * factor
    return found


def _primes() -> Any:
    found: list[int] = []
    number = 2
    while True:
        if all(number % one for one in found if one <= math.isqrt(number)):
            found.append(number)
            yield number
        number += 1
