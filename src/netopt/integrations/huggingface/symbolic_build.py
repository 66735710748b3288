"""How the sizes of a model are computed from the numbers of its configuration.

Another model is built from other, symbolic numbers. The expressions of its sizes must also give the sizes of the model
itself: what holds at two points that have little in common was not recognised by chance.
"""

from __future__ import annotations

import copy
import functools
import itertools
import operator
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from netopt.integrations.huggingface.meta_build import (
    ConfigPath,
    NoInit,
    Shapes,
    entries,
    is_ratio,
    isolated,
    set_directly,
)
from netopt.model.view import ModelView
from netopt.symbolic import (
    SYMBOLIC,
    Constraints,
    Expression,
    SymbolicFloat,
    SymbolicInt,
    Term,
    divide_exactly,
    expression_of,
    leaves,
    plain,
)

__all__ = ["ShapeFormulas", "Target", "derive_formulas", "exact_value"]

_MOST, _ANYWAY = 30, 1000
"""With more numbers computed than so many a tensor, and so many in any case, a loop is filling a table."""
_STEPS = 2
"""By how many powers of two numbers are multiplied, so that no two stay in proportion."""
_EVERYWHERE = 4
"""Up to this, a plain number is taken for itself."""


@dataclass(frozen=True)
class Target:
    """What a configuration has to build.

    Attributes:
        shapes: Of the model as it is.
        wanted: To be; a size that stays need not be explained.
        counts: Numbers that may say how many parts the model has, and stay.
        least: Numbers below stay too.
    """

    shapes: Shapes
    wanted: Shapes
    counts: Collection[int]
    least: int


@dataclass(frozen=True, eq=False)
class ShapeFormulas:
    """A model's sizes as functions of the numbers of its configuration.

    Attributes:
        sizes: The dimensions of every tensor: expressions, and numbers that no configuration changes.
        dense: The numbers of the configuration as it is.
        other: The model that was built from other numbers.
        converted: Expressions of whole numbers in that model that Python made plain, by value.
    """

    sizes: Mapping[str, tuple[Term, ...]]
    dense: Mapping[ConfigPath, Any]
    other: nn.Module
    converted: Mapping[int, Expression]

    @functools.cached_property
    def attributes(self) -> dict[tuple[str, str], Expression]:
        """Expressions of numbers that modules hold, by the module's name and their own."""
        return {
            (prefix, name): value.expression
            for prefix, module in self.other.named_modules()
            for name, value in vars(module).items()
            if type(value) in SYMBOLIC
        }

    def attribute(self, prefix: str, name: str) -> Expression | None:
        """The expression of one number that a module holds, if its value was recognised too."""
        known = self.attributes.get((prefix, name))
        if known is None:
            holder = dict(self.other.named_modules()).get(prefix)
            value = None if holder is None else vars(holder).get(name)
            known = self.converted.get(value) if type(value) is int else None
        return known

    @functools.cached_property
    def leaves(self) -> frozenset[ConfigPath]:
        """The paths of all numbers that sizes are computed from."""
        return frozenset().union(*[leaves(one) for dims in self.sizes.values() for one in dims])

    def at(self, values: Mapping[ConfigPath, Any], names: Iterable[str]) -> dict[str, tuple[Any, ...]]:
        """The shapes of tensors where numbers of the configuration differ; None for a size that is undefined."""
        values, memo = {**self.dense, **values}, {}
        return {name: tuple([exact_value(one, values, memo) for one in self.sizes[name]]) for name in names}


def exact_value(term: Term, values: Mapping[ConfigPath, Any], memo: dict[int, Any] | None = None) -> Any:
    """The value of a term without rounding, as the numbers that formulas are tried on may be large."""
    return term.at(values, memo, divide_exactly) if isinstance(term, Expression) else term


def derive_formulas(
    kind: type[nn.Module], config: Any, optional: Mapping[ConfigPath, Any], target: Target
) -> ShapeFormulas | None:
    """The formulas of a model's sizes, from building another one.

    Args:
        kind: The class of the model, which takes a configuration.
        config: Of the model; not changed.
        optional: Numbers the configuration lacks, to be built with, and what they may be now.
        target: The shapes that are and are to be.

    Returns:
        None if another model has other tensors, or some size that changes is not explained.
    """
    dense = {path: value for path, value in entries(config) if type(value) is int or (value and is_ratio(path))}
    numbers = _BuildNumbers(_MOST * len(target.shapes) + _ANYWAY)
    watch = _build(kind, config, _enlarged({**dense, **optional}, target), numbers)
    if watch is None:
        return None
    parameters = ModelView(watch.built).parameters
    if parameters.keys() != target.shapes.keys():
        # A size left to its default may stand for parts that are not there: then it stays unset.
        more = [watch.sizes(parameters[name]) for name in parameters.keys() - target.shapes.keys()]
        used = frozenset().union(*[leaves(one) for dims in more for one in dims])
        fewer = {path: value for path, value in optional.items() if path not in used}
        return derive_formulas(kind, config, fewer, target) if len(fewer) < len(optional) else None
    sizes = {name: watch.sizes(tensor) for name, tensor in parameters.items()}
    grown = {name: tuple(tensor.shape) for name, tensor in parameters.items()}
    if any(len(dims) != len(target.shapes[name]) for name, dims in sizes.items()):
        return None
    known = {
        one: size
        for name, dims in sizes.items()
        for one, size in zip(dims, target.shapes[name], strict=True)
        if isinstance(one, Expression)
    }
    dense |= _left_out(known, dense, optional)
    memo: dict[int, Any] = {}
    values = {one: exact_value(one, dense, memo) for one in known}
    for name, dims in sizes.items():
        rows = zip(dims, grown[name], target.shapes[name], target.wanted[name], strict=True)
        proved = [_prove(one, values, new, size, size == to_be, optional) for one, new, size, to_be in rows]
        sizes[name] = tuple([one for one in proved if one is not None])
        if len(sizes[name]) < len(proved):
            return None
    return ShapeFormulas(sizes, dense, watch.built, numbers.converted)


def _enlarged(dense: Mapping[ConfigPath, Any], target: Target) -> dict[ConfigPath, Any]:
    """Other numbers: equal where they are equal, greater where they are greater, and divided by what divides them.

    Only those that divide a size that changes, or are divided by one, which is what may come from them.
    """
    sizes = {
        size
        for name, shape in target.shapes.items()
        for size, new in zip(shape, target.wanted[name], strict=True)
        if size != new
    }
    kin = {value for value in dense.values() if any(value and not (size % value and value % size) for size in sizes)}
    changed = {
        path: value
        for path, value in dense.items()
        if value >= target.least and (is_ratio(path) or (value in kin and value not in target.counts))
    }
    ranked = sorted(set(changed.values()))
    factors = {value: 2 ** (1 + _STEPS * rank // len(ranked)) for rank, value in enumerate(ranked)}
    return {path: value * factors[value] if path in changed else value for path, value in dense.items()}


def _left_out(
    known: Mapping[Expression, int], dense: Mapping[ConfigPath, Any], optional: Mapping[ConfigPath, Any]
) -> dict[ConfigPath, Any]:
    """The values of numbers that the configuration lacks, as they follow from the sizes of the model."""
    found = dict(optional)
    for formula, size in known.items():
        if not formula.leaves <= dense.keys():
            solution = formula.solve(size, dense)
            if solution is not None and solution.value is not None:
                found[solution.key] = solution.value
    return found


def _prove(
    formula: Term,
    values: Mapping[Expression, Any],
    grown: int,
    size: int,
    stays: bool,
    optional: Mapping[ConfigPath, Any],
) -> Term | None:
    """A term that gives both a size of the model and what it grew to; the size where none is known and it stays.

    One that does not is replaced by a multiple of another, unless it comes from a number left out.
    """
    if (values.get(formula, formula) if isinstance(formula, Expression) else formula) == size:
        found: Term = formula
    elif not leaves(formula).isdisjoint(optional):
        return None
    else:
        like = [one for one in values if one.value and grown % one.value == 0]
        like = [one for one in like if size * one.value == grown * (values[one] or 0)]
        nearest = max(like, key=lambda one: one.value, default=None)
        found = size if nearest is None else Expression(operator.mul, (grown // nearest.value, nearest), grown)
    return found if stays or isinstance(found, Expression) else None


class _BuildNumbers(Constraints):
    """What symbolic numbers record while a model is built.

    A number that Python made plain (``int(width / heads)``) is recognised by its value.

    Args:
        most: Of numbers to be computed; further ones are plain.
    """

    def __init__(self, most: int) -> None:
        super().__init__()
        self.converted: dict[int, Expression] = {}
        self._left = most

    def guard(self, compare: Callable[[Any, Any], Any], left: Any, right: Any, outcome: bool) -> None:
        """Comparisons need not keep their outcome: what they lead to is seen in the model that is built in the end."""

    def note_number(self, number: Any) -> None:
        """Numbers may be used in any way."""

    def convert(self, number: Any, operation: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """A conversion to a plain number, which is recognised from then on."""
        expression = number.expression
        value = operation(expression.value, *args, **kwargs)
        if type(value) is int and value > _EVERYWHERE and self.is_recording:
            same = type(expression.value) is int
            self.converted[value] = expression if same else Expression(operation, (expression,), value)
        return value

    def result(self, expression: Expression, make: Callable[[Expression, Constraints], Any]) -> Any:
        """A number that knows its expression, as long as not too many are computed."""
        self._left -= 1
        if self._left < 0:
            self.close()
        return make(expression, self) if self.is_recording else expression.value

    def term(self, number: Any) -> Term:
        """The expression of a number, which may be plain."""
        if type(number) is int:
            return self.converted.get(number, number)
        return expression_of(number)

    def knows_some(self, numbers: Sequence[Any]) -> bool:
        """Whether some of these have expressions."""
        return any(type(one) is SymbolicInt for one in numbers) or not self.converted.keys().isdisjoint(numbers)


def _build(
    kind: type[nn.Module], config: Any, values: Mapping[ConfigPath, Any], numbers: _BuildNumbers
) -> _Watch | None:
    changed = copy.deepcopy(config)
    for path, value in values.items():
        symbolic = SymbolicInt if type(value) is int else SymbolicFloat
        set_directly(changed, path, symbolic(value, path, numbers))
    watch = _Watch(numbers)
    with isolated(), watch:
        try:
            watch.built = kind(changed)
        except Exception:  # a constructor is the user's, and may raise anything for these values
            return None
        finally:
            numbers.close()
    return watch


class _Watch(NoInit):
    """Notes how the sizes of tensors were computed."""

    built: nn.Module

    def __init__(self, numbers: _BuildNumbers) -> None:
        super().__init__()
        self._numbers = numbers
        self._made: dict[int, tuple[Tensor, tuple[Term, ...]]] = {}
        """By the tensor's id, which stays its own while it is kept alive."""
        self._stored: dict[Any, tuple[Term, ...]] = {}
        """By storage and shape, which a parameter shares with the tensor it was made of."""
        self._seen = 0

    def sizes(self, tensor: Tensor) -> tuple[Term, ...]:
        """The terms of a tensor's dimensions."""
        known = self._find(tensor)
        return tuple(tensor.shape) if known is None else known

    def note(self, made: Tensor, args: Any, kwargs: Any) -> None:
        """Notes the terms of a tensor's sizes: as they were given, else as their values tell."""
        given: list[Any] = []
        tensors: list[Tensor] = []
        _sort(args or kwargs.values(), given, tensors)
        known = [one for tensor in tensors for one in self._find(tensor) or ()]
        if not known and not self._numbers.knows_some(given):
            return
        terms = [self._numbers.term(one) for one in given]
        if tensors or tuple(map(plain, given)) != tuple(made.shape):
            by_size = {one.value: one for one in (*known, *terms) if isinstance(one, Expression)}
            terms = [by_size.get(size, size) for size in made.shape]
        self._made[id(made)] = made, tuple(terms)

    def _find(self, tensor: Tensor) -> tuple[Term, ...] | None:
        found = self._made.get(id(tensor))
        if found is not None:
            return found[1]
        if type(tensor) is Tensor:
            return None
        for made, terms in itertools.islice(self._made.values(), self._seen, None):
            self._stored.setdefault(_key(made), terms)
        self._seen = len(self._made)
        return self._stored.get(_key(tensor))


def _key(tensor: Tensor) -> tuple[int, tuple[int, ...]]:
    return tensor.untyped_storage()._cdata, tuple(tensor.shape)


def _sort(values: Any, numbers: list[Any], tensors: list[Tensor]) -> None:
    """Integers and tensors among arguments, in lists and tuples too."""
    for value in values:
        kind = type(value)
        if kind is int or kind is SymbolicInt:
            numbers.append(value)
        elif isinstance(value, Tensor):
            tensors.append(value)
        elif isinstance(value, (list, tuple)):
            _sort(value, numbers, tensors)
