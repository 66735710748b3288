"""How the integers a model keeps about its own sizes are changed and put back.

A path names a module, an attribute, and items below it; what is immutable on the way (a tuple, a size) is rebuilt
around the new value.
"""

from __future__ import annotations

import types
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from netopt.errors import PlanMismatchError
from netopt.model.descriptions import QUOTIENTS, ROWS_OF, dimension, stored_under
from netopt.surgery.tensors import may_step, step_into

Path = tuple[Any, ...]
"""Module's dotted name ("" is the model), attribute, then items or attributes below it."""

_ABSENT = object()


def show(path: Path) -> str:
    """A path as a reader writes it: ``norm.normalized_shape[0]``."""
    text = ".".join(part for part in path[:2] if part)
    for item in path[2:]:
        text += f".{item}" if isinstance(item, str) and item.isidentifier() else f"[{item!r}]"
    return text


def read(model: nn.Module, path: Path, modules: Mapping[str, nn.Module] | None = None) -> Any:
    """The value at ``path``; None for an entry that a configuration does not have yet and may be given.

    Args:
        model: To be looked through.
        path: Where the value is.
        modules: Its modules by dotted name, if they are listed already.

    Raises:
        PlanMismatchError: The model has nothing there, or something else than a plain value.
    """
    holder: Any = None
    try:
        holder = model.get_submodule(path[0]) if modules is None else modules[path[0]]
        for step in path[1:-1]:
            holder = step_into(holder, step)
        found = step_into(holder, path[-1]) if not _may_be_given(holder, path[-1]) else None
    except (AttributeError, KeyError, IndexError, StopIteration, TypeError, ValueError) as error:
        raise PlanMismatchError(f"the plan sets `{show(path)}`, which this {type(model).__name__} lacks") from error
    if callable(found) or isinstance(found, (Tensor, types.ModuleType, Mapping)):
        raise PlanMismatchError(
            f"the plan sets `{show(path)}`, which is no number of this {type(model).__name__} but a "
            f"{type(found).__name__}"
        )
    return found


def _may_be_given(holder: Any, step: Any) -> bool:
    """Whether this is an entry that a configuration, which takes any, lacks."""
    # A module looks for an attribute it lacks among all its members.
    is_module = isinstance(holder, nn.Module)
    named = isinstance(step, str) and may_step(holder, step)
    return not is_module and named and hasattr(holder, "to_dict") and not hasattr(holder, step)


class Assignment:
    """One value at one path, of a module; doing and undoing may be interrupted anywhere and be called again."""

    def __init__(self, module: nn.Module, path: Path, value: Any) -> None:
        self.path = path
        self.value = value
        self._module = module
        self._old: Any = _ABSENT
        self._place: tuple[Any, Any] | None = None
        self._was_own = True

    def do(self) -> None:
        """Puts the new value in."""
        holders: list[Any] = [self._module]
        for step in self.path[1:-1]:
            holders.append(step_into(holders[-1], step))
        value: Any = self.value
        for holder, step in zip(reversed(holders), reversed(self.path[1:]), strict=True):
            if not isinstance(holder, tuple):
                self._remember(holder, step)
                _set(holder, step, value)
                return
            value = _with_item(holder, int(step), value)

    def undo(self) -> None:
        """Puts back the very object that was there."""
        if self._place is None:
            return
        holder, step = self._place
        if self._was_own:
            _set(holder, step, self._old)
        elif step in vars(holder):
            del vars(holder)[step]

    def _remember(self, holder: Any, step: Any) -> None:
        if _may_be_given(holder, step):
            self._was_own, self._place = False, (holder, step)
            return
        self._old = step_into(holder, step)
        if not isinstance(holder, (Mapping, list)):
            # A default on the class is only shadowed: undoing takes the shadow away. Properties and slots are set back.
            self._was_own = step in getattr(holder, "__dict__", {}) or not _plain_class_attribute(holder, step)
        self._place = (holder, step)


class Entry:
    """One entry of a dictionary gets a new value; doing and undoing may be called again."""

    def __init__(self, holder: dict[str, Any], key: str, new: Any) -> None:
        self._holder, self._key, self._new = holder, key, new
        self._old = holder[key]

    def do(self) -> None:
        """Puts the new value in."""
        self._holder[self._key] = self._new

    def undo(self) -> None:
        """Puts the old value back."""
        self._holder[self._key] = self._old


def assignment(module: nn.Module, path: Path, value: Any) -> Assignment | Entry:
    """The change that puts ``value`` at ``path``, which begins at ``module``."""
    own, kind = vars(module), type(module)
    is_own = len(path) == 2 and type(own.get(path[1])) is int
    # By far the most. Setting an attribute comes down to this, unless the class has a say.
    if is_own and kind.__setattr__ is nn.Module.__setattr__ and not hasattr(kind, path[1]):
        return Entry(own, path[1], value)
    return Assignment(module, path, value)


def _plain_class_attribute(holder: Any, name: str) -> bool:
    found = getattr(type(holder), name, _ABSENT)
    return found is not _ABSENT and not hasattr(found, "__set__") and hasattr(holder, "__dict__")


def _set(holder: Any, step: Any, value: Any) -> None:
    if isinstance(holder, (dict, list)):
        holder[step] = value
    elif getattr(getattr(type(holder), "__dataclass_params__", None), "frozen", False):
        object.__setattr__(holder, step, value)
    else:
        setattr(holder, str(step), value)


def _with_item(holder: tuple[Any, ...], index: int, value: Any) -> tuple[Any, ...]:
    items = [*holder[:index], value, *holder[index + 1 :]]
    make = getattr(type(holder), "_make", type(holder))
    return make(items)


def described(
    modules: Mapping[str, nn.Module],
    named: Mapping[str, Tensor],
    shapes: Mapping[str, Sequence[int]],
    taken: Mapping[Path, Any],
) -> Iterator[tuple[Path, int]]:
    """Describing integers that are true now and will not be once the tensors have these shapes.

    Args:
        modules: Of the model before the surgery, by dotted name; one that has several under each.
        named: Its parameters and buffers, by dotted name.
        shapes: Shape to come of each tensor that changes, by name.
        taken: Paths the plan sets itself, with what it sets.
    """
    owners = {name.rpartition(".")[0] for name in shapes}
    owners |= {f".{name}".partition(".parametrizations.")[0].lstrip(".") for name in owners if "parametriz" in name}
    set_here: dict[Any, set[Any]] = {}
    for path in taken:
        set_here.setdefault(path[0], set()).add(path[1])
    seen: set[int] = set()
    for prefix, module in modules.items():
        if id(module) in seen or (prefix not in owners and prefix not in set_here):
            continue
        seen.add(id(module))
        settled = set_here.get(prefix, set())
        if settled:
            yield from _quotients(module, prefix, taken, settled)
        if prefix in owners:
            yield from _said_by(module, prefix, named, shapes, taken, settled)


def _said_by(
    module: nn.Module,
    prefix: str,
    named: Mapping[str, Tensor],
    shapes: Mapping[str, Sequence[int]],
    taken: Mapping[Path, Any],
    settled: Collection[Any],
) -> Iterator[tuple[Path, int]]:
    """The integers of one module that describe its tensors; ``settled`` are those decided already."""
    own, start = vars(module), f"{prefix}." if prefix else ""
    for attribute in [attribute for attribute in own if attribute in ROWS_OF and attribute not in settled]:
        stored = own[attribute]
        for row in ROWS_OF[attribute] if type(stored) is int else ():
            name = stored_under(module, row.tensor)
            full = None if name is None else _shrinking(start + name, row.tensor, shapes)
            if full is None:
                continue
            dim = dimension(row, module, stored, named[full].shape)
            if dim is None:
                continue
            groups = taken.get((prefix, "groups"), getattr(module, "groups", 1)) if row.grouped else 1
            becomes = shapes[full][dim] * groups
            if becomes != stored:
                yield (prefix, attribute), becomes
            break


def _shrinking(name: str, tensor: str, shapes: Mapping[str, Sequence[int]]) -> str | None:
    """The tensor of this name if it shrinks, or another that the same parametrization computes with and that does."""
    if name in shapes:
        return name
    before, found, _ = name.rpartition(f"parametrizations.{tensor}.")
    return next((other for other in shapes if found and other.startswith(before + found)), None)


def _quotients(
    module: nn.Module, prefix: str, taken: Mapping[Path, Any], settled: Collection[Any]
) -> Iterator[tuple[Path, int]]:
    for attribute, dividend, divisor in QUOTIENTS:
        if attribute not in vars(module):
            continue
        own = {name: vars(module).get(name) for name in (attribute, dividend, divisor)}
        known = {name: value for name, value in own.items() if type(value) is int}
        if (
            (prefix, dividend) not in taken
            or attribute in settled
            or len(known) < len(own)
            or known[attribute] != known[dividend] // known[divisor]
        ):
            continue
        will = known | {name: taken[prefix, name] for name in known if (prefix, name) in taken}
        if will[dividend] // will[divisor] != known[attribute]:
            yield (prefix, attribute), will[dividend] // will[divisor]
