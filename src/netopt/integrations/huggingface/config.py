"""Keeps a model's configuration in step, so that it builds the smaller model again.

How a model comes to its sizes is learned by building another one from symbolic numbers; what the configuration has to
be is solved from that. A solution is believed once the changed configuration passes its own validation, and a model
built from it, without memory, has the shapes wanted; where there is none, the configuration cannot express the model.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import inspect
import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from netopt.axes import Axes
from netopt.integrations.huggingface.meta_build import ConfigPath, Shapes, build, entries, is_size, with_changes
from netopt.integrations.huggingface.solve import SizeEquation, equations, out_of_proportion, solve
from netopt.integrations.huggingface.symbolic_build import ShapeFormulas, Target, derive_formulas, exact_value
from netopt.plan import Plan, shapes_of
from netopt.plan.hooks import Note
from netopt.surgery import read
from netopt.symbolic import leaves

__all__ = ["CANNOT", "LOADS", "build_formulas", "follow", "kept_numbers", "takes_config", "unsaved_buffers", "validate"]

_LEAST = (2, 17)
"""From where on numbers are enlarged, first and if that fails: what is small may count parts in other ways."""
CANNOT = "does not load with from_pretrained, it cannot express this"
_ADVICE = "prune with loadable=True, save with torch.save, or replay the plan on a fresh model"
_POWERS = (-0.5, 0.5, -1.0)
"""Of sizes, in which the scale of attention is written."""
LOADS = "loads with from_pretrained"
_UNKNOWN = "does not load with from_pretrained: it does not build this model, so it was left as it is"


def follow(model: nn.Module, plan: Plan, axes: Axes) -> tuple[Plan, Note | None]:
    """Adds to a plan what the model's configuration becomes, so that its constructor gives the smaller shapes.

    Args:
        model: Before the surgery.
        plan: What is going to be done.
        axes: Of the model.

    Returns:
        The plan with new values of the configuration, and a note of whether it can express the smaller model, or why
        not; ``None`` if there is no configuration to keep.
    """
    config = getattr(model, "config", None)
    if not plan.tensors or not hasattr(config, "to_dict") or not takes_config(type(model)):
        return plan, None
    modules = dict(model.named_modules())
    lost = next((name for name in unsaved_buffers(modules) if name in plan.tensors), None)
    if lost is not None:
        return plan, Note(f"{CANNOT}: `{lost}` is computed from it, and has lost entries; {_ADVICE}", False)
    given = {path[2:]: value for path, value in plan.attributes if path[:2] == ("", "config")}
    floats = _floats(model, plan, config)
    trial, used = with_changes(config, given), _used(axes)
    search = _Rebuild(type(model), plan, modules, config, trial, shapes_of(model), floats, used)
    found = search.changes()
    if isinstance(found, str):
        return plan, Note(found if found == _UNKNOWN else f"{CANNOT}: {found}; {_ADVICE}", False)
    more = tuple((("", "config", *path), value) for path, value in {**found, **floats}.items())
    return dataclasses.replace(plan, attributes=(*plan.attributes, *more)), Note(LOADS, True)


def _used(axes: Axes) -> set[tuple[str | int, ...]]:
    """Paths of the integers of which the forward makes sizes."""
    alone = [leaves(number) for _, number in axes.attribute_equations()]
    return {one.path for keys in alone if len(keys) == 1 for one in keys} | {*axes.attribute_terms()}


@dataclass(frozen=True, eq=False)
class _Rebuild:
    """A model that a changed configuration has to build.

    Attributes:
        kind: The class of the model.
        plan: What is going to be done.
        modules: Of the model, by name.
        config: Of the model.
        trial: The configuration to start from: with what the plan changes.
        shapes: Of the model.
        floats: What is changed in any case.
        used: Paths of the integers of which the forward makes sizes.
    """

    kind: type[nn.Module]
    plan: Plan
    modules: Mapping[str, nn.Module]
    config: Any
    trial: Any
    shapes: Shapes
    floats: Mapping[ConfigPath, float]
    used: Collection[tuple[str | int, ...]]

    def changes(self) -> dict[ConfigPath, Any] | str:
        """The changes, or why there are none."""
        formulas = self._formulas()
        if formulas is None:
            fresh = build(self.kind, copy.deepcopy(self.config))
            if fresh is None or shapes_of(fresh) != self.shapes:
                return _UNKNOWN
            return "how sizes come from it does not show in a larger model"
        known = {path: value for path, value in entries(self.trial) if path in formulas.dense and value is not None}
        system = equations(formulas, self.wanted, self.attributes)
        system += kept_numbers(self.modules[""], formulas)
        solution = solve(system, {**formulas.dense, **known})
        why = out_of_proportion(formulas, self.wanted)
        if why is not None:
            return why
        if solution.broken is not None:
            return self._broken(solution.broken, formulas, solution.values)
        before = dict(entries(self.trial))
        changes = {path: value for path, value in solution.values.items() if before.get(path) != value}
        # A size that was left to its default is set only where it has to be.
        unset = {path: value for path, value in changes.items() if path not in self.optional}
        for some in (unset, changes):
            why = self._refuse(some)
            if why is None:
                return some
        return why or ""

    def _formulas(self) -> ShapeFormulas | None:
        """How the model is computed from its configuration."""
        return _derive(self.kind, self.config, self.modules, self.shapes, self.wanted, self.optional)

    @functools.cached_property
    def wanted(self) -> Shapes:
        """The shapes to be."""
        after = self.plan.shapes_after
        return {name: after[name] for name in self.shapes}

    @functools.cached_property
    def attributes(self) -> dict[tuple[str, str], tuple[Any, Any]]:
        """Numbers of modules and what they are to be: integers that the forward uses, and all floats."""
        planned = {path: value for path, value in self.plan.attributes if len(path) == 2}
        return {
            (prefix, name): (value, planned.get((prefix, name), value))
            for prefix, module in self.modules.items()
            for name, value in vars(module).items()
            if type(value) is float or (type(value) is int and (prefix, name) in {*planned, *self.used})
        }

    @functools.cached_property
    def optional(self) -> dict[ConfigPath, int]:
        """Sizes that were left to a default, with the value they seem to have."""
        return _optional(self.config, self.modules, self.shapes)

    def _broken(self, equation: SizeEquation, formulas: ShapeFormulas, values: Mapping[ConfigPath, Any]) -> str:
        if equation.dim is None:
            target = "stays" if type(equation.wanted) is float else f"is to be {equation.wanted}"
            return f"`{equation.name}` is computed from it, and {target}"
        nearest = formulas.at(values, [equation.name])[equation.name]
        return (
            f"`{equation.name}` has shape {self.wanted[equation.name]}, and the nearest configuration gives {nearest}"
        )

    def _refuse(self, changes: Mapping[ConfigPath, Any]) -> str | None:
        """Why a configuration with these changes is wrong."""
        try:
            config = with_changes(self.trial, {**changes, **self.floats})
            validate(config)
        except Exception as error:  # a configuration may refuse a value, by any exception
            why = str(error).strip() or type(error).__name__
            return f"it is refused by its own validation, {why.splitlines()[-1].strip()!r}"
        fresh = build(self.kind, config)
        if fresh is None:
            return "no model is built from the changed configuration"
        built = shapes_of(fresh)
        name = next((name for name, shape in self.wanted.items() if built.get(name) != shape), None)
        if name is not None:
            return f"`{name}` has shape {self.wanted[name]}, and the nearest configuration gives {built.get(name)}"
        modules = dict(fresh.named_modules())
        return self._chosen_anew(modules) or self._computed_anew(modules)

    def _chosen_anew(self, modules: Mapping[str, nn.Module]) -> str | None:
        """Names what the configuration chose by a size, as an activation, and now chooses otherwise."""
        for prefix, module in self.modules.items():
            before, after = _choices(module), _choices(modules.get(prefix))
            for name in [name for name, value in before.items() if after.get(name, value) != value]:
                # What someone has set since the model was built is no choice of the configuration.
                if _choices(self._as_built.get(prefix)).get(name) == before[name]:
                    return f"`{'.'.join(filter(None, (prefix, name)))}` is chosen by it, and stays"
        return None

    @functools.cached_property
    def _as_built(self) -> dict[str, nn.Module]:
        """The modules of the model that the configuration builds as it is."""
        fresh = build(self.kind, copy.deepcopy(self.config))
        return {} if fresh is None else dict(fresh.named_modules())

    def _computed_anew(self, modules: Mapping[str, nn.Module]) -> str | None:
        for path, (_, wanted) in self.attributes.items():
            if getattr(modules.get(path[0]), path[1], wanted) != wanted:
                return f"`{'.'.join(filter(None, path))}` is computed from it, and stays"
        return None


def build_formulas(model: nn.Module, wanted: Shapes) -> ShapeFormulas | None:
    """How the sizes of a model follow from its configuration; None where some that is to change is not explained.

    Args:
        model: With a configuration.
        wanted: Shapes to be.
    """
    modules, shapes = dict(model.named_modules()), shapes_of(model)
    config: Any = model.config
    return _derive(type(model), config, modules, shapes, wanted, _optional(config, modules, shapes))


def kept_numbers(model: nn.Module, formulas: ShapeFormulas) -> list[SizeEquation]:
    """What must keep its value, because a float is computed from it: the float itself, or a size it is a power of."""
    others, found = dict(formulas.other.named_modules()), []
    for prefix, module in model.named_modules():
        other = vars(others[prefix]) if prefix in others else {}
        for name, value in vars(module).items():
            if type(value) is float and other.get(name, value) != value:
                where, known = ".".join(filter(None, (prefix, name))), formulas.attributes.get((prefix, name))
                of = _powers(value, vars(module), float(other[name]), other)
                terms = [formulas.attribute(prefix, one) for one in of] if known is None else [known]
                found += [
                    SizeEquation(one, float(exact_value(one, formulas.dense)), where)
                    for one in terms
                    if one is not None
                ]
    return found


def _powers(value: float, held: Mapping[str, Any], other: float, others: Mapping[str, Any]) -> list[str]:
    """The sizes a module holds of which a float is a power, in two models."""
    sizes = [name for name, one in held.items() if type(one) is int and one > 1 and name in others]
    return [
        name
        for name in sizes
        if any(_near(value, held[name] ** power) and _near(other, int(others[name]) ** power) for power in _POWERS)
    ]


def _near(one: float, other: float) -> bool:
    return math.isclose(one, other, rel_tol=1e-12)


def _derive(
    kind: type[nn.Module],
    config: Any,
    modules: Mapping[str, nn.Module],
    shapes: Shapes,
    wanted: Shapes,
    optional: Mapping[ConfigPath, int],
) -> ShapeFormulas | None:
    lengths = {len(part._modules) for part in modules.values() if "0" in part._modules}
    counts = lengths | {length + 1 for length in lengths}  # one of them may be apart
    targets = [Target(shapes, wanted, counts, least) for least in _LEAST]
    derived = (derive_formulas(kind, config, optional, target) for target in targets)
    return next((one for one in derived if one is not None), None)


def _optional(config: Any, modules: Mapping[str, nn.Module], shapes: Shapes) -> dict[ConfigPath, int]:
    """Sizes that were left to a default, with the value they seem to have: that of modules, where all agree."""
    held: dict[str, set[int]] = {}
    for module in modules.values():
        for name, value in vars(module).items():
            if type(value) is int and is_size(name):
                held.setdefault(name, set()).add(value)
    known = {name: next(iter(values)) for name, values in held.items() if len(values) == 1}
    unset = [path for path, value in entries(config) if value is None]
    most = max(size for shape in shapes.values() for size in shape) if unset else 0
    return {path: known.get(path[-1], most) for path in unset} | {
        (name,): value
        for name, value in known.items()
        if name not in {path[-1] for path in unset} and getattr(config, name, None) is None
    }


def validate(config: Any) -> None:
    """Runs the checks that ``save_pretrained`` runs, those of sub-configurations too."""
    if hasattr(config, "validate"):
        config.validate()
    for value in vars(config).values():
        if hasattr(value, "to_dict") and hasattr(value, "validate"):
            validate(value)


def _choices(module: nn.Module | None) -> dict[str, Any]:
    """What a module is, under no name, and the flags and texts it holds."""
    held = {} if module is None else vars(module)
    flags = {name: value for name, value in held.items() if type(value) in (bool, str) and name != "training"}
    return {"": None if module is None else type(module), **flags}


def unsaved_buffers(modules: Mapping[str, nn.Module]) -> Iterator[str]:
    """Names of buffers that a saved model lacks."""
    for prefix, module in modules.items():
        for name in module._non_persistent_buffers_set:
            yield f"{prefix}.{name}" if prefix else name


def _floats(model: nn.Module, plan: Plan, config: Any) -> dict[ConfigPath, float]:
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


def takes_config(kind: type) -> bool:
    """Whether a class is built from a configuration alone."""
    parameters = list(inspect.signature(kind.__init__).parameters.values())[1:]
    required = [one for one in parameters if one.default is one.empty and one.kind is one.POSITIONAL_OR_KEYWORD]
    return [one.name for one in required] == ["config"]
