"""Keeps a model's configuration in step, so that it builds the smaller model again.

Some models (those of Hugging Face among them) are built from a ``config`` object. Which of its integers mean which size
is found by trying: a model built from the changed configuration, without memory, has to have the shapes wanted.
"""

from __future__ import annotations

import copy
import inspect
import math
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from netopt.plan import Plan, shapes_of
from netopt.restore import random_state_kept
from netopt.surgery import Path, read

__all__ = ["configured"]

_ROUNDS = 12
_SIZES = 6
"""With more different sizes in place of one, layers differ, and a configuration has one size for all of them."""

_UNSET = ("dim", "inner", "size")
Shapes = Mapping[str, tuple[int, ...]]


def configured(model: nn.Module, plan: Plan) -> tuple[tuple[tuple[Path, float], ...], str | None]:
    """Values of the model's configuration with which its constructor gives the smaller shapes.

    Args:
        model: Before the surgery.
        plan: What is going to be done.

    Returns:
        New values to add to the plan's attributes, and why the configuration cannot express the smaller model; the
        reason is ``None`` if it can, or if there is no configuration to keep.
    """
    config = getattr(model, "config", None)
    if not plan.tensors or not hasattr(config, "to_dict") or not _built_from_config(type(model)):
        return (), None
    wanted = {name: plan.shapes_after[name] for name in shapes_of(model)}
    dense = _built(model, config)
    if dense is None or _distance(dense, shapes_of(model)) > 0:
        return (), "the configuration does not build this model, so it was left as it is"
    trial = copy.deepcopy(config)
    for path, value in plan.attributes:
        if path[:2] == ("", "config"):
            _set(trial, path[2:], value)
    replacements = _replacements(plan)
    varied = next((old for old, news in replacements.items() if len(news) > _SIZES), None)
    if varied is not None:
        many = len(replacements[varied])
        return (
            (),
            f"the configuration cannot express it: what had {varied} neurons has {many} different sizes; {_ADVICE}",
        )
    found = _search(model, trial, wanted, replacements)
    if isinstance(found, dict):
        found |= _decimals(model, plan, config)
        derived = _derived(model, plan, {**{path[2:]: value for path, value in plan.attributes}, **found}, config)
        found = derived or found
    if not isinstance(found, dict):
        return (), found
    return tuple((("", "config", *path), value) for path, value in found.items()), None


def _search(
    model: nn.Module, trial: Any, wanted: Shapes, replacements: Mapping[int, set[int]]
) -> dict[tuple[str, ...], float] | str:
    """Changes the integer that brings the shapes nearest, until they are right; else the first that is wrong."""
    changed: dict[tuple[str, ...], float] = {}
    distance = _distance(_built(model, trial), wanted)
    for _ in range(_ROUNDS):
        nearer = _nearer(model, trial, wanted, replacements, distance) if distance else None
        if nearer is None:
            break
        distance, paths, new = nearer
        for path in paths:
            _set(trial, path, new)
            changed[path] = new
    if distance == 0:
        return changed
    built = _built(model, trial) or {}
    name = next((name for name in wanted if built.get(name) != wanted[name]), "")
    return (
        f"the configuration cannot express it: `{name}` has shape {wanted.get(name)}, and the nearest configuration "
        f"gives {built.get(name)}; {_ADVICE}"
    )


def _nearer(
    model: nn.Module, trial: Any, wanted: Shapes, replacements: Mapping[int, set[int]], distance: float
) -> tuple[float, tuple[tuple[str, ...], ...], int] | None:
    """The move that brings the shapes nearest, and how near; None if no move brings them nearer."""
    best: tuple[float, tuple[tuple[str, ...], ...], int] | None = None
    for moves in _moves(trial, replacements):
        for paths, new in moves:
            other = copy.deepcopy(trial)
            for path in paths:
                _set(other, path, new)
            reached = _distance(_built(model, other), wanted)
            if reached < (best[0] if best else distance):
                best = (reached, paths, new)
        if best is not None:
            break
    return best


def _moves(
    config: Any, replacements: Mapping[int, set[int]]
) -> Iterator[list[tuple[tuple[tuple[str, ...], ...], int]]]:
    """First every integer alone set to a size that replaces it, then all that are equal together."""
    known = list(_integers(config))
    every = set().union(*replacements.values())
    yield [
        ((path,), new)
        for path, value in known
        for new in sorted(every if value is None else replacements.get(value, set()))
    ]
    together = []
    for old, news in replacements.items():
        equal = tuple(path for path, value in known if value == old)
        if len(equal) > 1:
            together += [(equal, new) for new in sorted(news)]
    yield together


def _decimals(model: nn.Module, plan: Plan, config: Any) -> dict[tuple[str, ...], float]:
    """Numbers of the configuration that became an attribute (an epsilon) which the plan changes."""
    changes: dict[float, set[float]] = {}
    for path, value in plan.attributes:
        if isinstance(value, float):
            changes.setdefault(read(model, path), set()).add(value)
    return {
        (name,): next(iter(changes[value]))
        for name, value in vars(config).items()
        if type(value) is float and len(changes.get(value, ())) == 1
    }


def _derived(model: nn.Module, plan: Plan, changes: Mapping[Any, Any], config: Any) -> str | None:
    """What the constructor computes from the sizes, and would compute anew: buffers that are not saved, and scales."""
    persistent = model.state_dict(keep_vars=True).keys()
    lost = next((name for name, _ in model.named_buffers() if name in plan.tensors and name not in persistent), None)
    if lost is not None:
        return f"the configuration cannot express it: `{lost}` is computed from it, and has lost entries; {_ADVICE}"
    trial = copy.deepcopy(config)
    for path, value in changes.items():
        if path and hasattr(trial, str(path[0])):
            _set(trial, path, value)
    with random_state_kept(), torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fresh = dict(type(model)(trial).named_modules())  # pyright: ignore[reportCallIssue]
    planned = {path: value for path, value in plan.attributes if isinstance(value, float)}
    for prefix, module in model.named_modules():
        for name, value in vars(module).items():
            wanted = planned.get((prefix, name), value)
            if type(value) is float and getattr(fresh.get(prefix), name, wanted) != wanted:
                return (
                    f"the configuration cannot express it: `{prefix}.{name}` is computed from it, and stays; {_ADVICE}"
                )
    return None


_ADVICE = "save with torch.save, or replay the plan on a fresh model"


def _replacements(plan: Plan) -> dict[int, set[int]]:
    """New sizes by old size: of axes, and of dimensions that several axes make up."""
    found: dict[int, set[int]] = {}
    for cut in plan.axes:
        found.setdefault(cut.size, set()).add(len(cut.kept))
    for name, dims in plan.tensors.items():
        for dim, kept in dims.items():
            found.setdefault(plan.shapes[name][dim], set()).add(len(kept))
    return {old: {new for new in news if new != old} for old, news in found.items()}


def _built_from_config(kind: type) -> bool:
    parameters = list(inspect.signature(kind.__init__).parameters.values())[1:]
    required = [one for one in parameters if one.default is one.empty and one.kind is one.POSITIONAL_OR_KEYWORD]
    return [one.name for one in required] == ["config"]


def _built(model: nn.Module, config: Any) -> dict[str, tuple[int, ...]] | None:
    """Shapes of the model this configuration builds, without memory; None if it builds none."""
    with random_state_kept(), torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return shapes_of(type(model)(copy.deepcopy(config)))  # pyright: ignore[reportCallIssue]
        except (
            ValueError,
            TypeError,
            RuntimeError,
            AttributeError,
            AssertionError,
            ZeroDivisionError,
            NotImplementedError,
        ):
            return None


def _distance(built: Shapes | None, wanted: Shapes) -> float:
    """How far shapes are from those wanted: 0 if equal, infinite if other tensors are built."""
    if built is None or built.keys() != wanted.keys():
        return math.inf
    total = 0.0
    for name, shape in wanted.items():
        if len(built[name]) != len(shape):
            return math.inf
        total += sum(abs(math.log(one / other)) for one, other in zip(built[name], shape, strict=True) if one and other)
    return total


def _integers(config: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], int | None]]:
    """The integers of a configuration and of those inside it; None where a size is left to a default."""
    for name, value in vars(config).items():
        if name.startswith("_"):
            continue
        if type(value) is int and value > 1:
            yield (*path, name), value
        elif value is None and any(word in name for word in _UNSET):
            yield (*path, name), None
        elif hasattr(value, "to_dict") and len(path) < 2:
            yield from _integers(value, (*path, name))


def _set(config: Any, path: tuple[Any, ...], value: float) -> None:
    for name in path[:-1]:
        config = config[name] if isinstance(config, (Mapping, list)) else getattr(config, name)
    if isinstance(config, (dict, list)):
        config[path[-1]] = value
    else:
        setattr(config, path[-1], value)
