"""Keeps a model's configuration in step, so that it builds the smaller model again.

Some models (those of Hugging Face among them) are built from a ``config`` object. Which of its integers mean which size
is found by trying: a model built from the changed configuration, without memory, has to have the shapes wanted.
"""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from netopt.plan import Plan, shapes_of
from netopt.prune.searching import UNSET, Hints, Search, distance, set_at
from netopt.restore import random_state_kept
from netopt.surgery import Path, read

__all__ = ["configured"]

_SIZES = 6
"""With more different sizes in place of one, layers differ, and a configuration has one size for all of them."""


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
    persistent = model.state_dict(keep_vars=True).keys()
    lost = next((name for name, _ in model.named_buffers() if name in plan.tensors and name not in persistent), None)
    if lost is not None:
        return (), f"the configuration cannot express it: `{lost}` is computed from it, and has lost entries; {_ADVICE}"
    after = plan.shapes_after
    wanted = {name: after[name] for name in shapes_of(model)}
    dense = _built(model, config)
    if dense is None or distance(dense, shapes_of(model)) > 0:
        return (), "the configuration does not build this model, so it was left as it is"
    trial = copy.deepcopy(config)
    for path, value in plan.attributes:
        if path[:2] == ("", "config"):
            set_at(trial, path[2:], value)
    replacements = _replacements(plan)
    varied = next((old for old, news in replacements.items() if len(news) > _SIZES), None)
    if varied is not None:
        many = len(replacements[varied])
        return (
            (),
            f"the configuration cannot express it: what had {varied} neurons has {many} different sizes; {_ADVICE}",
        )
    given = {path[2:]: value for path, value in plan.attributes if path[:2] == ("", "config")}
    decimals = _decimals(model, plan, config)
    search = Search(
        lambda one: _built(model, one), wanted, lambda found: _derived(model, plan, given | found | decimals, config)
    )
    found = search.run(trial, _hints(model, plan, replacements))
    if isinstance(found, str):
        return (), f"{found}; {_ADVICE}"
    found |= decimals
    return tuple((("", "config", *path), value) for path, value in found.items()), None


def _hints(model: nn.Module, plan: Plan, replacements: Mapping[int, set[int]]) -> Hints:
    """What the plan tells of the values to try."""
    ratios: dict[str, set[Fraction]] = {}
    for cut in plan.axes:
        # Neurons of one layer multiply: heads are groups times heads of a group.
        known = ratios.setdefault(cut.name.partition("/")[0], set())
        known |= {Fraction(len(cut.kept), cut.size)} | {one * Fraction(len(cut.kept), cut.size) for one in known}
    sizes: dict[str, set[int]] = {}
    for module in model.modules():
        for name, value in vars(module).items():
            if type(value) is int and any(word in name for word in UNSET):
                sizes.setdefault(name, set()).add(value)
    alike = {name: next(iter(values)) for name, values in sizes.items() if len(values) == 1}
    return Hints(replacements, set().union(*ratios.values()), alike)


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
    """What the constructor computes from the sizes, and would compute anew: scales."""
    trial = copy.deepcopy(config)
    for path, value in changes.items():
        set_at(trial, path, value)
    with random_state_kept(), torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fresh = dict(type(model)(trial).named_modules())  # pyright: ignore[reportCallIssue]
    planned = {path: value for path, value in plan.attributes if isinstance(value, float)}
    for prefix, module in model.named_modules():
        for name, value in vars(module).items():
            wanted = planned.get((prefix, name), value)
            if type(value) is float and getattr(fresh.get(prefix), name, wanted) != wanted:
                return f"the configuration cannot express it: `{prefix}.{name}` is computed from it, and stays"
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
    with random_state_kept(), torch.device("meta"), _Unfilled(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return shapes_of(type(model)(copy.deepcopy(config)))  # pyright: ignore[reportCallIssue]
        except (
            ValueError,
            TypeError,
            RuntimeError,
            AttributeError,
            AssertionError,
            LookupError,
            ZeroDivisionError,
            NotImplementedError,
        ):
            return None


class _Unfilled(TorchFunctionMode):
    """Leaves out what fills tensors that have no memory, which is most of what building them takes."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs every call but those that only write into their first argument."""
        kwargs = kwargs or {}
        filled = args[0] if args else kwargs.get("tensor")
        name = getattr(func, "__name__", "")
        writes = name.endswith("_") and not name.endswith("__") and name not in _SHAPED
        if writes and isinstance(filled, Tensor) and filled.is_meta:
            return filled
        return func(*args, **kwargs)


_SHAPED = frozenset(["requires_grad_", "resize_", "squeeze_", "unsqueeze_", "t_", "transpose_", "set_", "detach_"])
