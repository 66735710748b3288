"""Builds models from configurations without memory, and notes how their sizes are computed from its numbers."""

from __future__ import annotations

import copy
import functools
import itertools
import operator
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from netopt.prune.formulas import Formula, Ledger, Where, Whole, formula_of
from netopt.restore import random_state_kept
from netopt.surgery import named_parameters_and_buffers

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
        sizes: The dimensions of every tensor: formulas, and numbers no configuration changes.
        attributes: Formulas of numbers that modules hold, by the module's name and their own.
        dense: The numbers of the configuration as it is.
    """

    sizes: Mapping[str, tuple[Any, ...]]
    attributes: Mapping[tuple[str, str], Formula]
    dense: Mapping[Where, Any]

    @functools.cached_property
    def leaves(self) -> frozenset[Where]:
        """The places of all numbers that sizes are computed from."""
        formulas = {one for dims in self.sizes.values() for one in dims if isinstance(one, Formula)}
        return frozenset().union(*[one.leaves for one in formulas])

    def at(self, values: Mapping[Where, Any], names: Iterable[str]) -> dict[str, tuple[Any, ...]]:
        """The shapes of tensors where numbers of the configuration have other values."""
        values, memo = {**self.dense, **values}, {}
        return {
            name: tuple([one.at(values, memo) if isinstance(one, Formula) else one for one in self.sizes[name]])
            for name in names
        }


def drawn(model: nn.Module, config: Any, optional: Mapping[Where, Any], shapes: Shapes) -> Drawing | None:
    """How a model depends on its configuration, from building another one, and what the model itself has.

    The other one is built from other numbers, alike where they are alike and larger where they are larger, so that what
    divides another still does. A size that is then not what the model has comes from where another size comes from that
    grew as much.

    Args:
        model: Its class takes a configuration.
        config: Not changed.
        optional: Numbers the configuration lacks, to be built with.
        shapes: The model's.

    Returns:
        None if nothing like the model is built, or some size is not explained.
    """
    ledger, config, dense = Ledger(), copy.deepcopy(config), dict(optional)
    dense |= {
        path: value for path, value in entries(config) if type(value) is int or (value is not None and _is_share(path))
    }
    counts = {len(part._modules) for part in model.modules()}
    for path, value in _enlarged(dense, counts).items():
        _plant(config, path, ledger.number(value, path))
    watch = _Watch(ledger, _MOST * len(model.state_dict(keep_vars=True)))
    with _without_memory(), watch:
        try:
            other = type(model)(config)  # pyright: ignore[reportCallIssue]
        except Exception:
            return None
    parameters = named_parameters_and_buffers(other)[0]
    if parameters.keys() != shapes.keys():
        return None
    sizes = _explained({name: watch.sizes(tensor) for name, tensor in parameters.items()}, parameters, dense, shapes)
    attributes = {}
    for prefix, module in other.named_modules():
        for name, value in vars(module).items():
            formula = formula_of(value)
            if formula is not None:
                attributes[prefix, name] = formula
    return None if sizes is None else Drawing(sizes, attributes, dense)


def _is_share(path: Where) -> bool:
    return any(word in str(part) for part in path for word in SHARES)


def _enlarged(dense: Mapping[Where, Any], counts: Collection[int]) -> dict[Where, Any]:
    """Other numbers; those that may count modules, and that may switch something off, stay."""
    changed = {path: value for path, value in dense.items() if value > 1 and (value not in counts or _is_share(path))}
    numbers = sorted(set(changed.values()))
    factors = {value: 2 ** (1 + _STEPS * rank // len(numbers)) for rank, value in enumerate(numbers)}
    return {path: value * factors[value] if path in changed else value for path, value in dense.items()}


_MOST = 4
"""With so many times as many tensors as the model has, what is built is another: something counted is a size too."""
_STEPS = 4
"""By how many different factors numbers are multiplied: what is divided by another changes with it."""


def _explained(
    sizes: Mapping[str, tuple[Any, ...]], built_: Mapping[str, Tensor], dense: Mapping[Where, Any], shapes: Shapes
) -> dict[str, tuple[Any, ...]] | None:
    """The formulas, with others for those that do not give the shapes of the model; None if there is none."""
    memo: dict[Formula, Any] = {}
    known = dict.fromkeys([one for dims in sizes.values() for one in dims if isinstance(one, Formula)])
    found = {}
    for name, dims in sizes.items():
        right = []
        if len(dims) != len(shapes[name]):
            return None
        for one, size, grown in zip(dims, shapes[name], built_[name].shape, strict=True):
            if (one.at(dense, memo) if isinstance(one, Formula) else one) == size:
                right.append(one)
                continue
            like = next((base for base in known if base.at(dense, memo) * grown == size * base.value), None)
            if like is None or grown % like.value:
                return None
            right.append(Formula(operator.mul, (grown // like.value, like), grown))
        found[name] = tuple(right)
    return found


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
        if isinstance(made, Tensor) and made is not filled:
            self._note(made, args, kwargs)
        return made

    def _note(self, made: Tensor, args: Any, kwargs: Any) -> None:
        """Looks at what a call made."""


_SHAPED = frozenset(["requires_grad_", "resize_", "squeeze_", "unsqueeze_", "t_", "transpose_", "set_", "detach_"])


class _Watch(_Unfilled):
    """Notes how the sizes of tensors were computed.

    Args:
        ledger: Has the formulas.
        most: With more tensors than this made from sizes with formulas, the model is not what was to be built.
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

    def _note(self, made: Tensor, args: Any, kwargs: Any) -> None:
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
            raise RuntimeError("more is built than there was")

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
