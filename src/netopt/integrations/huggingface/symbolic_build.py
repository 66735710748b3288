"""How the sizes of a model are computed from the numbers of its configuration.

Another model is built from other numbers, which remember what is computed from them. The formulas of its sizes must
also give the sizes of the model itself: what holds at two points that have little in common was not recognised by
chance.
"""

from __future__ import annotations

import copy
import functools
import itertools
import operator
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from netopt.integrations.huggingface.meta_build import Shapes, Unfilled, alone, entries, is_share, plant
from netopt.model.view import ModelView
from netopt.symbolic.formulas import Comparison, Decimal, Formula, Ledger, Where, Whole

__all__ = ["Drawing", "drawn"]

_MOST, _ANYWAY = 30, 1000
"""With more computed than so much for each tensor, and so much in any case, what was enlarged is counted in a loop."""
_STEPS = 2
"""By how many powers of two numbers are multiplied: what one is to another is then another."""


@dataclass(frozen=True, eq=False)
class Drawing:
    """Formulas of a model's sizes.

    Attributes:
        sizes: The dimensions of every tensor: formulas, and numbers no configuration changes.
        dense: The numbers of the configuration as it is.
        other: The model that was built.
        comparisons: What was asked of numbers while it was built.
    """

    sizes: Mapping[str, tuple[Any, ...]]
    dense: Mapping[Where, Any]
    other: nn.Module
    comparisons: Sequence[Comparison]

    def is_left(self, values: Mapping[Where, Any]) -> bool:
        """Whether a comparison that was alike in both models turns out otherwise, so that formulas may not hold."""
        values = {**self.dense, **values}
        return any(
            one.at(self.dense) is one.outcome is not one.at(values)
            for one in self.comparisons
            if not isinstance(one.left, Formula) or one.left.leaves <= values.keys()
            if not isinstance(one.right, Formula) or one.right.leaves <= values.keys()
        )

    @functools.cached_property
    def attributes(self) -> dict[tuple[str, str], Formula]:
        """Formulas of numbers that modules hold, by the module's name and their own."""
        return {
            (prefix, name): value.formula
            for prefix, module in self.other.named_modules()
            for name, value in vars(module).items()
            if type(value) is Whole or type(value) is Decimal
        }

    @functools.cached_property
    def leaves(self) -> frozenset[Where]:
        """The places of all numbers that sizes are computed from."""
        formulas = {one for dims in self.sizes.values() for one in dims if isinstance(one, Formula)}
        return frozenset().union(*[one.leaves for one in formulas])

    def at(self, values: Mapping[Where, Any], names: Iterable[str]) -> dict[str, tuple[Any, ...]]:
        """The shapes of tensors where numbers of the configuration have other values; None for what has no value."""
        values, memo = {**self.dense, **values}, {}
        return {
            name: tuple([one.at(values, memo) if isinstance(one, Formula) else one for one in self.sizes[name]])
            for name in names
        }


def drawn(
    kind: type[nn.Module],
    config: Any,
    optional: Mapping[Where, Any],
    *,
    shapes: Shapes,
    wanted: Shapes,
    counts: Collection[int],
    least: int,
) -> Drawing | None:
    """The formulas of a model's sizes, from building another one.

    Args:
        kind: The class of the model, which takes a configuration.
        config: Of the model; not changed.
        optional: Numbers the configuration lacks, to be built with, and what they may be now.
        shapes: Of the model.
        wanted: Shapes to be; a size that stays need not be explained.
        counts: Numbers that may say how many parts the model has, and stay.
        least: Numbers below stay too.

    Returns:
        None if nothing like the model is built, or some size is not explained.
    """
    changed, ledger = copy.deepcopy(config), Ledger(_MOST * len(shapes) + _ANYWAY)
    dense = {path: value for path, value in entries(config) if type(value) is int or (value and is_share(path))}
    sizes = {
        size for name, shape in shapes.items() for size, new in zip(shape, wanted[name], strict=True) if size != new
    }
    for path, value in _others({**dense, **optional}, sizes, counts, least).items():
        plant(changed, path, ledger.number(value, path))
    watch = _Watch(ledger, _MOST * len(shapes) + _ANYWAY)
    with alone(), watch:
        try:
            other = kind(changed)
        except Exception:
            # Whatever a constructor or a configuration raises, nothing is built from these values.
            return None
        finally:
            ledger.close()
    parameters = ModelView(other).parameters
    if parameters.keys() != shapes.keys():
        # A size left to its default may stand for parts that are not there: then no solution sets it.
        more = [watch.sizes(parameters[name]) for name in parameters.keys() - shapes.keys()]
        leaves = {leaf for dims in more for one in dims if isinstance(one, Formula) for leaf in one.leaves}
        fewer = {path: value for path, value in optional.items() if path not in leaves}
        again = {"shapes": shapes, "wanted": wanted, "counts": counts, "least": least}
        return drawn(kind, config, fewer, **again) if len(fewer) < len(optional) else None
    grown = {name: tuple(tensor.shape) for name, tensor in parameters.items()}
    sizes = {name: watch.sizes(tensor) for name, tensor in parameters.items()}
    if any(len(dims) != len(shapes[name]) for name, dims in sizes.items()):
        return None
    known = {one: size for name, dims in sizes.items() for one, size in zip(dims, shapes[name], strict=True)}
    known = {one: size for one, size in known.items() if isinstance(one, Formula)}
    dense |= _left_out(known, dense, optional)
    memo: dict[Formula, Any] = {}
    values = {one: one.at(dense, memo) for one in known}
    for name, dims in sizes.items():
        proved = [
            _proved(one, values, new, size, optional)
            for one, new, size in zip(dims, grown[name], shapes[name], strict=True)
        ]
        if any(
            one is None or (size != new and not isinstance(one, Formula))
            for one, size, new in zip(proved, shapes[name], wanted[name], strict=True)
        ):
            return None
        sizes[name] = tuple(proved)
    return Drawing(sizes, dense, other, list(ledger.comparisons.values()))


def _others(
    dense: Mapping[Where, Any], sizes: Collection[int], counts: Collection[int], least: int
) -> dict[Where, Any]:
    """Other numbers: equal where they are equal, greater where they are greater, and divided by what divides them.

    Only those that divide one of the sizes, or are divided by one, which is what may come from them.
    """
    kin = {value for value in dense.values() if any(value and not (size % value and value % size) for size in sizes)}
    changed = {
        path: value
        for path, value in dense.items()
        if value >= least and (is_share(path) or (value in kin and value not in counts))
    }
    numbers = sorted(set(changed.values()))
    factors = {value: 2 ** (1 + _STEPS * rank // len(numbers)) for rank, value in enumerate(numbers)}
    return {path: value * factors[value] if path in changed else value for path, value in dense.items()}


def _left_out(
    known: Mapping[Formula, int], dense: Mapping[Where, Any], optional: Mapping[Where, Any]
) -> dict[Where, Any]:
    """The values of numbers that the configuration lacks, as the sizes of the model tell."""
    found = dict(optional)
    for formula, size in known.items():
        if not formula.leaves <= dense.keys():
            answer = formula.solve(size, dense)
            if answer is not None and answer.value is not None:
                found[answer.place] = answer.value
    return found


def _proved(formula: Any, values: Mapping[Formula, Any], grown: int, size: int, optional: Mapping[Where, Any]) -> Any:
    """A formula that gives both a size of the model and what it grew to; the size where it is not known.

    One that does not is replaced by a multiple of another, but None is returned if it comes from a number left out.
    """
    if values.get(formula, formula) == size:
        return formula
    if isinstance(formula, Formula) and not formula.leaves.isdisjoint(optional):
        return None
    like = [one for one in values if one.value and grown % one.value == 0]
    like = [one for one in like if size * one.value == grown * (values[one] or 0)]
    if not like:
        return size
    nearest = max(like, key=lambda one: one.value)
    return Formula(operator.mul, (grown // nearest.value, nearest), grown)


class _Watch(Unfilled):
    """Notes how the sizes of tensors were computed.

    Args:
        ledger: Has the formulas.
        most: Of tensors to be made.
    """

    def __init__(self, ledger: Ledger, most: int) -> None:
        super().__init__()
        self._ledger, self._most = ledger, most
        self._made: dict[int, tuple[Tensor, tuple[Any, ...]]] = {}
        """By the tensor's id, which stays its own while it is kept alive."""
        self._stored: dict[Any, tuple[Any, ...]] = {}
        """By storage and shape, which a parameter shares with the tensor it was made of."""
        self._seen = 0

    def sizes(self, tensor: Tensor) -> tuple[Any, ...]:
        """The formulas of a tensor's dimensions, or their sizes."""
        known = self._find(tensor)
        return tuple(tensor.shape) if known is None else known

    def note(self, made: Tensor, args: Any, kwargs: Any) -> None:
        """Notes the formulas of a tensor's sizes: as they were given, else as their values tell."""
        numbers: list[Any] = []
        tensors: list[Tensor] = []
        _sort(args or kwargs.values(), numbers, tensors)
        known = [one for tensor in tensors for one in self._find(tensor) or ()]
        if not known and not self._ledger.knows_some(numbers):
            return
        formulas = [self._ledger.formula(one) for one in numbers]
        if tensors or tuple(numbers) != tuple(made.shape):
            by_size = {one.value: one for one in (*known, *formulas) if isinstance(one, Formula)}
            formulas = [by_size.get(size, size) for size in made.shape]
        self._made[id(made)] = made, tuple(formulas)
        if len(self._made) > self._most:
            raise RuntimeError(f"more than {self._most} tensors are made")

    def _find(self, tensor: Tensor) -> tuple[Any, ...] | None:
        found = self._made.get(id(tensor))
        if found is not None:
            return found[1]
        if type(tensor) is Tensor:
            return None
        for made, formulas in itertools.islice(self._made.values(), self._seen, None):
            self._stored.setdefault(_key(made), formulas)
        self._seen = len(self._made)
        return self._stored.get(_key(tensor))


def _key(tensor: Tensor) -> tuple[int, tuple[int, ...]]:
    return tensor.untyped_storage()._cdata, tuple(tensor.shape)


def _sort(values: Any, numbers: list[Any], tensors: list[Tensor]) -> None:
    """Integers and tensors among arguments, in lists and tuples too."""
    for value in values:
        kind = type(value)
        if kind is int or kind is Whole:
            numbers.append(value)
        elif isinstance(value, Tensor):
            tensors.append(value)
        elif isinstance(value, (list, tuple)):
            _sort(value, numbers, tensors)
