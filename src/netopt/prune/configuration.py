"""Keeps a model's configuration in step, so that it builds the smaller model again.

Some models (those of Hugging Face among them) are built from a ``config`` object. Which of its integers mean which size
is found by trying: a model built from the changed configuration, without memory, has to have the shapes wanted.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from torch import nn

from netopt.plan import Plan, shapes_of
from netopt.prune.building import UNSET, Drawing, Shapes, built, drawn, entries, with_changes
from netopt.prune.formulas import Where
from netopt.prune.searching import Changes, Hints, Search, distance
from netopt.prune.solving import Equation, Solution, equations, out_of_proportion, solved
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
    shapes = shapes_of(model)
    wanted = {name: after[name] for name in shapes}
    replacements = _replacements(plan)
    hints = _hints(model, plan, replacements)
    drawing = _drawing(model, config, _optional(config, hints), shapes)
    if drawing is None and distance(_built(model, config), shapes) > 0:
        return (), "the configuration does not build this model, so it was left as it is"
    varied = next((old for old, news in replacements.items() if len(news) > _SIZES), None)
    if varied is not None:
        many = len(replacements[varied])
        return (
            (),
            f"the configuration cannot express it: what had {varied} neurons has {many} different sizes; {_ADVICE}",
        )
    given = {path[2:]: value for path, value in plan.attributes if path[:2] == ("", "config")}
    decimals = _decimals(model, plan, config)
    sought = _Sought(model, plan, with_changes(config, given), wanted, decimals)
    found = None if drawing is None else _computed(sought, drawing, config, hints)
    if found is None:
        found = Search(lambda one: _built(model, one), wanted, sought.refuse).run(sought.trial, hints)
    if isinstance(found, str):
        return (), f"{found}; {_ADVICE}"
    found |= decimals
    return tuple((("", "config", *path), value) for path, value in found.items()), None


_ADVICE = "save with torch.save, or replay the plan on a fresh model"


@dataclass(frozen=True, eq=False)
class _Sought:
    """What a configuration has to build.

    Attributes:
        trial: The configuration to start from.
        wanted: The shapes.
        decimals: What is changed in any case.
    """

    model: nn.Module
    plan: Plan
    trial: Any
    wanted: Shapes
    decimals: Mapping[Where, float]

    @functools.cached_property
    def attributes(self) -> dict[tuple[str, str], tuple[Any, Any]]:
        """Numbers that modules hold, and are to hold: whole ones that the plan sets, and all that are not whole."""
        planned = {path: value for path, value in self.plan.attributes if len(path) == 2}
        found = {}
        for prefix, module in self.model.named_modules():
            for name, value in vars(module).items():
                if type(value) is float or (type(value) is int and (prefix, name) in planned):
                    found[prefix, name] = value, planned.get((prefix, name), value)
        return found

    def changes(self, values: Mapping[Where, Any]) -> Changes:
        """The values that differ from those of the configuration."""
        known = dict(entries(self.trial))
        return {path: value for path, value in values.items() if known.get(path) != value}

    @functools.cached_property
    def _refusals(self) -> dict[frozenset[Any], str | None]:
        return {}

    def refuse(self, changes: Mapping[Where, Any]) -> str | None:
        """Why a configuration with these changes is wrong: the shapes built, or what is computed anew, as scales."""
        known, key = self._refusals, frozenset(changes.items())
        if key not in known:
            fresh = built(type(self.model), with_changes(self.trial, {**changes, **self.decimals}))
            known[key] = _UNBUILT if fresh is None or shapes_of(fresh) != self.wanted else self._derived(fresh)
        return known[key]

    def _derived(self, fresh: nn.Module) -> str | None:
        modules = dict(fresh.named_modules())
        for (prefix, name), (_, wanted) in self.attributes.items():
            if type(wanted) is float and getattr(modules.get(prefix), name, wanted) != wanted:
                return f"the configuration cannot express it: `{prefix}.{name}` is computed from it, and stays"
        return None


_UNBUILT = "the configuration builds something else"


def _optional(config: Any, hints: Hints) -> dict[Where, int]:
    """Sizes that were left to a default, with the value they seem to have."""
    unset = [path for path, value in entries(config) if value is None]
    found = {path: hints.sizes.get(path[-1], max(hints.replacements)) for path in unset}
    names = {path[-1] for path in unset}
    more = {name: value for name, value in hints.sizes.items() if name not in names}
    return found | {(name,): value for name, value in more.items() if getattr(config, name, None) is None}


def _drawing(model: nn.Module, config: Any, optional: Mapping[Where, int], shapes: Shapes) -> Drawing | None:
    """How the model is computed from its configuration, with sizes that were left to a default if that is possible."""
    found = drawn(model, config, optional, shapes)
    return drawn(model, config, {}, shapes) if found is None and optional else found


def _computed(sought: _Sought, drawing: Drawing, config: Any, hints: Hints) -> Changes | str | None:
    """The changes, or why there are none, by computing; None if that does not tell."""
    why = out_of_proportion(drawing, sought.wanted)
    if why is not None:
        return f"the configuration cannot express it: {why}"
    solution = _solution(sought, drawing)
    if solution.broken is not None and solution.is_only:
        return _broken(solution.broken, drawing, solution.values, sought.wanted)
    drawings = [drawing]
    if not drawing.leaves.isdisjoint(_optional(config, hints)):
        # What can be said without writing a default down is said without.
        plain = drawn(sought.model, config, {}, shapes_of(sought.model))
        drawings = [drawing] if plain is None else [plain, drawing]
    why = None
    for one in drawings:
        solution = _solution(sought, one)
        if solution.broken is None:
            changes = sought.changes(solution.values)
            why = sought.refuse(changes)
            if why is None:
                return changes
    if solution.broken is None and solution.is_only and why is not _UNBUILT:
        return why
    found = Search(lambda one: _foretold(sought, drawings, one), sought.wanted, sought.refuse).run(sought.trial, hints)
    return None if found == _UNBUILT else found


def _solution(sought: _Sought, drawing: Drawing) -> Solution:
    return solved(equations(drawing, sought.wanted, sought.attributes), drawing.dense)


def _broken(equation: Equation, drawing: Drawing, values: Mapping[Where, Any], wanted: Shapes) -> str:
    if equation.dim is None:
        return f"the configuration cannot express it: `{equation.name}` is computed from it, and stays"
    nearest = drawing.at(values, [equation.name])[equation.name]
    return (
        f"the configuration cannot express it: `{equation.name}` has shape {wanted[equation.name]}, and the nearest "
        f"configuration gives {nearest}"
    )


def _foretold(sought: _Sought, drawings: Sequence[Drawing], config: Any) -> Shapes:
    """The shapes that a configuration will build."""
    values = {path: value for path, value in entries(config) if value is not None}
    free = drawings[-1]
    drawing = free if free.leaves <= values.keys() else drawings[0]
    return drawing.at({path: value for path, value in values.items() if path in drawing.dense}, sought.wanted)


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
    fresh = built(type(model), copy.deepcopy(config))
    return None if fresh is None else shapes_of(fresh)
