"""Which axes may lose neurons: those that are free, included and not excluded."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, TypeAlias

from torch import nn

from netopt.axes import KINDS, Axes, Axis
from netopt.axes.layout import OUTPUT
from netopt.errors import NothingToPruneError, SelectorError
from netopt.importance.scoring import ScoredAxes
from netopt.model.view import ModelView
from netopt.selectors import Selector, matches

__all__ = ["AxisSelector", "candidates", "choices", "explain", "fits", "holding", "names_of", "scored"]

AxisSelector: TypeAlias = Selector | Callable[[Axis], bool] | Sequence[Any]
"""A selector, or a predicate of an :class:`~netopt.axes.Axis`, or the name or pattern of axes, or several of these."""


def candidates(
    model: nn.Module | ModelView, axes: Axes, include: AxisSelector = None, exclude: AxisSelector = None
) -> tuple[list[Axis], dict[str, str]]:
    """The axes that may lose neurons, and why the others may not.

    A module's neurons are its outputs: naming it means the axes it makes, or scales and shifts (a normalisation), and
    not those it reads. A pattern means the axes whose names it fits, so those that are first made there: the residual
    width, which every block adds to, is made by the embedding.

    Raises:
        SelectorError: An entry selects nothing.
        NothingToPruneError: No axis is left; the message lists the reasons.
    """
    view = ModelView.of(model)
    if not axes.free and not view.parameters:
        raise NothingToPruneError(f"{type(view.model).__name__} has no parameters, so it has no neurons to remove.")
    if include is not None and not _entries(include):
        raise SelectorError("include is empty, so nothing would be touched; leave it out to include everything.")
    included, excluded = _resolve(view, axes, include, "include"), _resolve(view, axes, exclude, "exclude")
    chosen, kept_out = [], {}
    for axis in axes:
        if axis.frozen is not None:
            kept_out[axis.name] = axis.frozen
        elif include is not None and not included(axis):
            kept_out[axis.name] = "is not included"
        elif excluded(axis):
            kept_out[axis.name] = "is excluded"
        else:
            chosen.append(axis)
    if not chosen:
        raise NothingToPruneError(explain(axes, kept_out))
    return chosen, kept_out


def scored(axes: Axes, chosen: Sequence[Axis]) -> ScoredAxes:
    """The chosen axes as criteria see them."""
    members = {axis.name: axes.members(axis) for axis in chosen}
    return ScoredAxes({axis.name: axis.size for axis in chosen}, members, lambda name: axes.taps(axes[name]))


def explain(axes: Axes, kept_out: dict[str, str], shown: int = 12) -> str:
    """Why nothing can be removed, axis by axis."""
    by_hand = {"is not included", "is excluded"}
    what = "frozen, not included or excluded" if by_hand & set(kept_out.values()) else "frozen"
    rows = [f"  {name}  ({axes[name].size})  {reason}" for name, reason in list(kept_out.items())[:shown]]
    more = [f"  ... and {len(kept_out) - shown} more"] if len(kept_out) > shown else []
    head = f"all {len(kept_out)} axes of this model are {what}, so there is nothing to remove."
    return "\n".join([head, *rows, *more])


def holding(axes: Axes, kept_out: Mapping[str, str], shown: int = 2) -> str:
    """What keeps the most weights from going, and what to write where that is only that a result shows it."""
    named = [axes[name] for name in kept_out if axes[name].kind is not None]
    most = sorted(named, key=lambda axis: -axis.size * len(axis.members))[:shown]
    if not most:
        return ""
    rows = [f"`{axis.name}` ({axis.kind}, {axis.size}) {kept_out[axis.name]}" for axis in most]
    seen = any(OUTPUT in kept_out[axis.name] for axis in most)
    way = "; outputs= names the results that must keep their shape, such as outputs='logits'" if seen else ""
    return f". What stays: {', '.join(rows)}{way}"


def names_of(view: ModelView, axes: Axes) -> dict[str, set[str]]:
    """By axis, the dotted names whose choice means it: the layers that make it, and the vectors that lie along it."""
    dims = {name: tensor.dim() for name, tensor in view.tensors.items()}
    names = {axis.name: {axis.name, axis.name.partition("/")[0]} for axis in axes}
    makers = {}
    # A layer, or a parameter that no layer of torch's holds, makes axes.
    for maker in {part for name in dims for part in (name, name.rpartition(".")[0])}:
        made = axes.made_by(maker)
        if len(made) == 1:
            makers[maker] = made[0].name
    for axis in axes:
        base = axis.name.partition("/")[0]
        for member in axis.members:
            layer = member.tensor.rpartition(".")[0]
            made_here = axis.name in (makers.get(layer), makers.get(member.tensor)) or layer == base
            if dims.get(member.tensor) == 1 or made_here:
                names[axis.name].add(member.tensor)
    return names


def _entries(selector: AxisSelector) -> list[Any]:
    if selector is None:
        return []
    several = isinstance(selector, (list, tuple, set, frozenset))
    return list(selector) if several else [selector]  # pyright: ignore[reportArgumentType]


def _resolve(view: ModelView, axes: Axes, selector: AxisSelector, what: str) -> Callable[[Axis], bool]:
    if not _entries(selector):
        return lambda _: False
    tests, rest = [], []
    names = names_of(view, axes)
    for entry in _entries(selector):
        test = _of_axis(axes, entry)
        if test is not None:
            tests.append(test)
        if test is None or (isinstance(entry, str) and _is_layer(view.model, entry)):
            rest.append(entry)
    try:
        named = matches(rest, view.model, what=what)
    except SelectorError as error:
        raise SelectorError(f"{error} {choices(axes)}") from error
    return lambda axis: any(test(axis) for test in tests) or any(named(name) for name in names[axis.name])


def fits(axis: Axis, pattern: str) -> bool:
    """Whether a name, a pattern or a kind means an axis: ``"h.0.mlp"``, ``"*.mlp*"``, ``"heads"``, ``"*/heads"``."""
    if axis.name.startswith(f"{pattern}."):
        return True
    aliases = (axis.name, axis.kind or "", f"{axis.name.partition('/')[0]}/{axis.kind}")
    return any(name == pattern or (_is_pattern(pattern) and fnmatchcase(name, pattern)) for name in aliases if name)


def _is_pattern(entry: str) -> bool:
    return any(sign in entry for sign in "*?[")


def choices(axes: Axes, shown: int = 6) -> str:
    """The axes of a model and their kinds, for the message of an error."""
    kinds = [kind for kind in KINDS if any(axis.kind == kind for axis in axes.free)]
    names = [axis.name for axis in axes.free]
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    of_kinds = f"; kinds: {', '.join(kinds)}" if kinds else ""
    return f"Axes that can shrink: {', '.join(names[:shown])}{more}{of_kinds}."


def _of_axis(axes: Axes, entry: Any) -> Callable[[Axis], bool] | None:
    """The entry as a question about an axis, if it is one."""
    if isinstance(entry, str):
        fitting = {axis.name for axis in axes if fits(axis, entry)}
        return (lambda axis: axis.name in fitting) if fitting else None
    if callable(entry) and not isinstance(entry, (type, nn.Module)) and _arguments(entry) == 1:
        return lambda axis: bool(entry(axis))
    return None


def _arguments(function: Callable[..., Any]) -> int:
    try:
        return len(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        return 0


def _is_layer(model: nn.Module, entry: str) -> bool:
    """Whether a name is that of one layer or tensor, not of a part of the model that holds several."""
    modules = dict(model.named_modules(remove_duplicate=False))
    if entry in modules:
        return not any(modules[entry].children())
    return entry in ModelView(model).tensors
