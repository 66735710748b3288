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
from netopt.prune.solving import Equation, equations, out_of_proportion, solved
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
    drawings = _drawings(model, config, hints, shapes, wanted)
    if not drawings and distance(_built(model, config), shapes) > 0:
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
    found = _computed(sought, drawings, hints)
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
    def attributes(self) -> dict[tuple[str, str], Any]:
        """Numbers that modules are to hold: those the plan sets, and all that are not whole."""
        planned = dict(self.plan.attributes)
        found = {path: value for path, value in planned.items() if len(path) == 2 and type(value) is int}
        for prefix, module in self.model.named_modules():
            for name, value in vars(module).items():
                if type(value) is float:
                    found[prefix, name] = planned.get((prefix, name), value)
        return found

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
        for (prefix, name), wanted in self.attributes.items():
            if type(wanted) is float and getattr(modules.get(prefix), name, wanted) != wanted:
                return f"the configuration cannot express it: `{prefix}.{name}` is computed from it, and stays"
        return None


_UNBUILT = "the configuration builds something else"


def _drawings(model: nn.Module, config: Any, hints: Hints, shapes: Shapes, wanted: Shapes) -> list[Drawing]:
    """How the model is computed from its configuration, as it is, and with sizes that were left to a default."""
    known = dict(entries(config))
    unset = {path: hints.sizes.get(path[-1], max(hints.replacements)) for path, value in known.items() if value is None}
    names = {path[-1] for path in unset}
    optional = unset | {
        (name,): value
        for name, value in hints.sizes.items()
        if name not in names and getattr(config, name, None) is None
    }
    free = drawn(type(model), config, optional, wanted) if optional else None
    if free is not None and free.shapes == shapes and free.leaves.isdisjoint(optional):
        return [free]
    dense = drawn(type(model), config, {}, wanted)
    if dense is None or dense.shapes != shapes:
        return []
    return [dense] if free is None or free.shapes.keys() != shapes.keys() else [dense, free]


def _computed(sought: _Sought, drawings: Sequence[Drawing], hints: Hints) -> Changes | str | None:
    """The changes, or why there are none, by computing; None if that does not tell."""
    if not drawings:
        return None
    found = _solved(sought, drawings)
    if isinstance(found, dict):
        return found
    # What was refused by formulas that are guessed is not refused before they are known to be right.
    certain = [_certain(sought, drawing) for drawing in drawings]
    if None in certain:
        return None
    right = [one for one in certain if one is not None]
    if any(one is not other for one, other in zip(right, drawings, strict=True)):
        found = _solved(sought, right)
    if found is not None:
        return found
    found = Search(lambda one: _foretold(sought, right, one), sought.wanted, sought.refuse).run(sought.trial, hints)
    return None if found == _UNBUILT else found


def _solved(sought: _Sought, drawings: Sequence[Drawing]) -> Changes | str | None:
    """The changes, or why there are none; None if equations do not tell."""
    why = out_of_proportion(drawings[-1], sought.wanted)
    if why is not None:
        return f"the configuration cannot express it: {why}"
    known = dict(entries(sought.trial))
    refusals: list[str | None] = []
    for drawing in drawings:
        solution = solved(equations(drawing, sought.wanted, sought.attributes), drawing.values())
        if solution.broken is None:
            changes = {path: value for path, value in solution.values.items() if known.get(path) != value}
            why = sought.refuse(changes)
            if why is None:
                return changes
            refusals.append(None if why is _UNBUILT or not solution.is_only else why)
        else:
            refusals.append(
                _broken(solution.broken, drawing, solution.values, sought.wanted) if solution.is_only else None
            )
    return None if None in refusals else refusals[-1]


def _broken(equation: Equation, drawing: Drawing, values: Mapping[Where, Any], wanted: Shapes) -> str:
    if equation.dim is None:
        return f"the configuration cannot express it: `{equation.name}` is computed from it, and stays"
    nearest = drawing.at(values, [equation.name])[equation.name]
    return (
        f"the configuration cannot express it: `{equation.name}` has shape {wanted[equation.name]}, and the nearest "
        f"configuration gives {nearest}"
    )


def _certain(sought: _Sought, drawing: Drawing) -> Drawing | None:
    """The drawing with formulas that give what is built with other numbers; None if they cannot be found."""
    if drawing.is_sure:
        return drawing
    values = drawing.values()
    numbers = sorted({values[path] for path in drawing.doubtful if path in values})
    others = {
        path: value * 2 ** (numbers.index(value) + 1) for path, value in values.items() if path in drawing.doubtful
    }
    fresh = built(type(sought.model), with_changes(sought.trial, {**values, **others}))
    return None if fresh is None else drawing.corrected(others, shapes_of(fresh))


def _foretold(sought: _Sought, drawings: Sequence[Drawing], config: Any) -> Shapes:
    """The shapes that a configuration will build."""
    dense = drawings[-1].values()
    values = {path: value for path, value in entries(config) if value is not None and path in dense}
    drawing = drawings[-1] if drawings[-1].leaves <= values.keys() else drawings[0]
    return drawing.at(values, list(sought.wanted))


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
