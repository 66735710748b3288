"""Builds models from configurations without memory, and notes how their sizes are computed from its numbers."""

from __future__ import annotations

import copy
import functools
import itertools
import operator
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from netopt.prune.formulas import Formula, Ledger, Where, Whole, formula_of
from netopt.restore import random_state_kept

__all__ = ["SHARES", "UNSET", "Drawing", "Shapes", "built", "drawn", "entries", "set_at", "with_changes"]

Shapes: TypeAlias = Mapping[str, tuple[int, ...]]

UNSET = ("dim", "inner", "size")
"""Words in the names of sizes, which may be left to a default."""
SHARES = ("ratio", "mult", "expan")
"""Words in the names of ratios of sizes."""


def with_changes(config: Any, changes: Mapping[Where, Any]) -> Any:
    """A copy of a configuration with some values changed."""
    config = copy.deepcopy(config)
    for path, value in changes.items():
        set_at(config, path, value)
    return config


def built(kind: Callable[[Any], nn.Module], config: Any) -> nn.Module | None:
    """The model this configuration builds, without memory; None if it builds none.

    Args:
        kind: The class of the model.
        config: May be kept and changed by the model.
    """
    with _without_memory(), _Unfilled():
        try:
            return kind(config)
        except Exception:
            # Whatever a constructor or a configuration raises, nothing is built from these values.
            return None


@dataclass(frozen=True, eq=False)
class Drawing:
    """How a model's sizes are computed from the numbers of a configuration.

    Attributes:
        shapes: As built.
        sizes: The dimensions of every tensor: formulas, and numbers no configuration changes.
        attributes: Formulas of numbers that modules hold, by the module's name and their own.
        is_sure: Whether every formula is known, and none only guessed.
        doubtful: Places of the numbers in formulas that are only guessed.
    """

    shapes: Shapes
    sizes: Mapping[str, tuple[Any, ...]]
    attributes: Mapping[tuple[str, str], Formula]
    is_sure: bool
    doubtful: frozenset[Where]

    @functools.cached_property
    def leaves(self) -> frozenset[Where]:
        """The places of all numbers that sizes are computed from."""
        return frozenset().union(
            *(one.leaves for dims in self.sizes.values() for one in dims if isinstance(one, Formula))
        )

    def values(self) -> dict[Where, Any]:
        """The numbers that sizes are computed from."""
        found = {}
        for dims in self.sizes.values():
            for one in dims:
                if isinstance(one, Formula):
                    _collect(one, found)
        return found

    def at(self, values: Mapping[Where, Any], names: Sequence[str]) -> dict[str, tuple[Any, ...]]:
        """The shapes of tensors where numbers of the configuration have other values."""
        memo: dict[Formula, Any] = {}
        return {
            name: tuple([one.at(values, memo) if isinstance(one, Formula) else one for one in self.sizes[name]])
            for name in names
        }

    def corrected(self, values: Mapping[Where, Any], shapes: Shapes) -> Drawing | None:
        """The drawing whose formulas give the shapes that were built with other values; None if there is none.

        A wrong formula is replaced by a multiple of one that is right.
        """
        if not self.sizes.keys() <= shapes.keys():
            return None
        memo: dict[Formula, Any] = {}
        known = dict.fromkeys(one for dims in self.sizes.values() for one in dims if isinstance(one, Formula))
        sizes = {}
        for name, dims in self.sizes.items():
            right = []
            for one, old, new in zip(dims, self.shapes[name], shapes[name], strict=True):
                found = one
                if (one.at(values, memo) if isinstance(one, Formula) else one) != new:
                    found = next((base for base in known if base.at(values, memo) * old == new * base.value), None)
                    if found is None or old % found.value:
                        return None
                    found = Formula(operator.mul, (old // found.value, found), old)
                right.append(found)
            sizes[name] = tuple(right)
        return replace(self, sizes=sizes, is_sure=True, doubtful=frozenset())


def _collect(formula: Formula, found: dict[Where, Any]) -> None:
    if formula.operation is None:
        found[formula.operands] = formula.value
        return
    for one in formula.operands:
        if isinstance(one, Formula):
            _collect(one, found)


def drawn(
    kind: Callable[[Any], nn.Module], config: Any, optional: Mapping[Where, Any], wanted: Shapes
) -> Drawing | None:
    """How the model that is built from a configuration depends on it; None if nothing is built.

    Args:
        kind: The class of the model.
        config: Not changed.
        optional: Numbers the configuration lacks, to be built with.
        wanted: Shapes, of which those that are to change need a formula.
    """
    ledger = Ledger()
    config = copy.deepcopy(config)
    for path, value in list(entries(config)):
        if value is not None and (type(value) is int or any(word in str(part) for part in path for word in SHARES)):
            _plant(config, path, ledger.number(value, path))
    for path, value in optional.items():
        _plant(config, path, ledger.number(value, path))
    watch = _Watch(ledger)
    with _without_memory(), watch:
        try:
            model = kind(config)
        except Exception:
            return None
    parameters = dict(model.named_parameters(remove_duplicate=False))
    sizes = {name: watch.sizes(tensor, wanted.get(name)) for name, tensor in parameters.items()}
    attributes = {}
    for prefix, module in model.named_modules():
        for name, value in vars(module).items():
            formula = formula_of(value)
            if formula is not None:
                attributes[prefix, name] = formula
    shapes = {name: tuple(tensor.shape) for name, tensor in parameters.items()}
    return Drawing(shapes, sizes, attributes, ledger.is_sure, frozenset(ledger.doubtful))


@contextmanager
def _without_memory() -> Iterator[None]:
    with random_state_kept(), torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


class _Unfilled(TorchFunctionMode):
    """Leaves out what fills tensors that have no memory, which is most of what building them takes."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs every call but those that only write into their first argument."""
        kwargs = kwargs or {}
        filled = args[0] if args else kwargs.get("tensor")
        if isinstance(filled, Tensor):
            name = getattr(func, "__name__", "")
            if name.endswith("_") and not name.endswith("__") and name not in _SHAPED and filled.is_meta:
                return filled
        made = func(*args, **kwargs)
        if isinstance(made, Tensor):
            self._note(made, args, kwargs)
        return made

    def _note(self, made: Tensor, args: Any, kwargs: Any) -> None:
        """Looks at what a call made."""


_SHAPED = frozenset(["requires_grad_", "resize_", "squeeze_", "unsqueeze_", "t_", "transpose_", "set_", "detach_"])


class _Watch(_Unfilled):
    """Notes how the sizes of tensors were computed."""

    def __init__(self, ledger: Ledger) -> None:
        super().__init__()
        self._ledger = ledger
        self._made: dict[int, _Made] = {}
        """By the tensor's id, which stays its own while it is kept alive."""
        self._stored: dict[Any, _Made] = {}
        """By storage and shape, which a parameter shares with the tensor it was made of."""
        self._seen = 0

    def sizes(self, parameter: Tensor, wanted: Sequence[int] | None) -> tuple[Any, ...]:
        """The formulas of a parameter's dimensions, or their sizes."""
        made = self._find(parameter)
        formulas = tuple(parameter.shape) if made is None else made.formulas
        if made is not None and made.is_guess:
            for one in formulas:
                if isinstance(one, Formula):
                    self._ledger.doubt(one)
        if wanted is None or len(wanted) != len(formulas):
            return formulas
        return tuple(
            [
                one if isinstance(one, Formula) or one == size else self._ledger.guessed(one)
                for one, size in zip(formulas, wanted, strict=True)
            ]
        )

    def _note(self, made: Tensor, args: Any, kwargs: Any) -> None:
        numbers: list[Any] = []
        tensors: list[Tensor] = []
        _sort(args, numbers, tensors)
        if not args:
            _sort(kwargs.values(), numbers, tensors)
        if not tensors:
            if any(type(one) is Whole for one in numbers):
                formulas = tuple([self._ledger.formula(one) for one in numbers])
                is_all = tuple(numbers) == tuple(made.shape)
                self._made[id(made)] = _Made(made, formulas) if is_all else self._guessed(made, formulas)
            elif numbers and self._ledger.has_plain(numbers):
                formulas = tuple([self._ledger.formula(one) for one in numbers])
                self._made[id(made)] = self._guessed(made, formulas)
            return
        known = [
            one for tensor in tensors for found in [self._find(tensor)] if found is not None for one in found.formulas
        ]
        if known or any(type(one) is Whole for one in numbers):
            self._made[id(made)] = self._guessed(made, [*known, *map(self._ledger.formula, numbers)])

    def _guessed(self, made: Tensor, formulas: Sequence[Any]) -> _Made:
        """What sizes are known by their values alone."""
        by_size = {one.value: one for one in formulas if isinstance(one, Formula)}
        return _Made(made, tuple([by_size.get(size, size) for size in made.shape]), is_guess=True)

    def _find(self, tensor: Tensor) -> _Made | None:
        found = self._made.get(id(tensor))
        if found is not None or type(tensor) is Tensor:
            return found
        for made in itertools.islice(self._made.values(), self._seen, None):
            self._stored.setdefault(_key(made.tensor), made)
        self._seen = len(self._made)
        return self._stored.get(_key(tensor))


@dataclass(frozen=True, eq=False)
class _Made:
    """A tensor, and how its sizes were computed."""

    tensor: Tensor
    formulas: tuple[Any, ...]
    is_guess: bool = False


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


def entries(config: Any, path: Where = ()) -> Iterator[tuple[Where, Any]]:
    """The numbers of a configuration, of lists in it and of those inside it; None where a size is left to a default."""
    for name, value in vars(config).items():
        if name.startswith("_"):
            continue
        if type(value) in (int, float):
            yield (*path, name), value
        elif value is None and any(word in name for word in UNSET):
            yield (*path, name), None
        elif isinstance(value, (list, tuple)):
            yield from (((*path, name, place), one) for place, one in enumerate(value) if type(one) in (int, float))
        elif hasattr(value, "to_dict") and len(path) < 2:
            yield from entries(value, (*path, name))


def set_at(config: Any, path: Where, value: Any) -> None:
    """Sets one value of a configuration, in its lists and tuples and in what is inside it."""
    _set(config, path, value, setattr)


def _plant(config: Any, path: Where, value: Any) -> None:
    """Sets one value without asking the configuration, which may want nothing but plain numbers."""
    _set(config, path, value, lambda holder, step, one: vars(holder).__setitem__(step, one))


def _set(config: Any, path: Where, value: Any, assign: Callable[[Any, Any, Any], None]) -> None:
    holders = [config]
    for step in path[:-1]:
        holders.append(_get(holders[-1], step))
    for holder, step in zip(reversed(holders), reversed(path), strict=True):
        if not isinstance(holder, tuple):
            if isinstance(holder, (dict, list)):
                holder[step] = value
            else:
                assign(holder, step, value)
            return
        value = type(holder)([*holder[:step], value, *holder[step + 1 :]])


def _get(holder: Any, step: Any) -> Any:
    return holder[step] if isinstance(holder, (Mapping, list, tuple)) else getattr(holder, step)
