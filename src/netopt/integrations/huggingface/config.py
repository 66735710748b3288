"""Keeps a model's configuration in step, so that it builds the smaller model again.

Some models (those of Hugging Face among them) are built from a ``config`` object. How they come to their sizes is
learned by building another one, and what the configuration has to be is computed from that, or else found by trying. A
model built from the changed configuration, without memory, has to have the shapes wanted.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

from torch import nn

from netopt.integrations.huggingface.meta_build import Shapes, built, entries, is_size, with_changes
from netopt.integrations.huggingface.searching import Changes, Hints, Search, distance
from netopt.integrations.huggingface.solve import Equation, Solution, equations, out_of_proportion, solved
from netopt.integrations.huggingface.symbolic_build import Drawing, drawn
from netopt.plan import Plan, shapes_of
from netopt.surgery import Path, read
from netopt.symbolic.formulas import Where

__all__ = ["configured"]

_SIZES = 6
"""With more different sizes in place of one, layers differ, and a configuration has one size for all of them."""
_LEAST = (2, 17)
"""From where on numbers are enlarged, first and if that fails: what is small may count parts in other ways."""
_CANNOT = "the configuration cannot express it"
_ADVICE = "save with torch.save, or replay the plan on a fresh model"
_OTHER = "the configuration builds something else"


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
    modules = dict(model.named_modules())
    lost = next((name for name in _unsaved_buffers(modules) if name in plan.tensors), None)
    if lost is not None:
        return (), f"{_CANNOT}: `{lost}` is computed from it, and has lost entries; {_ADVICE}"
    after, shapes = plan.shapes_after, shapes_of(model)
    decimals = _decimals(model, plan, config)
    given = {path[2:]: value for path, value in plan.attributes if path[:2] == ("", "config")}
    wanted = {name: after[name] for name in shapes}
    sought = _Sought(type(model), plan, modules, config, with_changes(config, given), shapes, wanted, decimals)
    drawing = sought.draw(sought.optional)
    found = None if drawing is None else _computed(sought, drawing)
    if found is None:
        found = _searched(sought)
    if isinstance(found, str):
        return (), found if found == _UNKNOWN else f"{found}; {_ADVICE}"
    found |= decimals
    return tuple((("", "config", *path), value) for path, value in found.items()), None


_UNKNOWN = "the configuration does not build this model, so it was left as it is"


@dataclass(frozen=True, eq=False)
class _Sought:
    """What a configuration has to build.

    Attributes:
        kind: The class of the model.
        plan: What is going to be done.
        modules: Of the model, by name.
        config: Of the model.
        trial: The configuration to start from.
        shapes: Of the model.
        wanted: The shapes to be.
        decimals: What is changed in any case.
    """

    kind: type[nn.Module]
    plan: Plan
    modules: Mapping[str, nn.Module]
    config: Any
    trial: Any
    shapes: Shapes
    wanted: Shapes
    decimals: Mapping[Where, float]
    _refusals: dict[frozenset[Any], str | None] = field(default_factory=dict)

    @functools.cached_property
    def attributes(self) -> dict[tuple[str, str], tuple[Any, Any]]:
        """Numbers that modules hold, and are to hold: whole ones that the plan sets, and all that are not whole."""
        planned = {path: value for path, value in self.plan.attributes if len(path) == 2}
        return {
            (prefix, name): (value, planned.get((prefix, name), value))
            for prefix, module in self.modules.items()
            for name, value in vars(module).items()
            if type(value) is float or (type(value) is int and (prefix, name) in planned)
        }

    @functools.cached_property
    def said(self) -> dict[str, int]:
        """What modules say of their own sizes, by the name of the attribute, where all of them agree."""
        sizes: dict[str, set[int]] = {}
        for module in self.modules.values():
            for name, value in vars(module).items():
                if type(value) is int and is_size(name):
                    sizes.setdefault(name, set()).add(value)
        return {name: next(iter(values)) for name, values in sizes.items() if len(values) == 1}

    @functools.cached_property
    def optional(self) -> dict[Where, int]:
        """Sizes that were left to a default, with the value they seem to have."""
        unset = [path for path, value in entries(self.config) if value is None]
        names = {path[-1] for path in unset}
        most = max(size for shape in self.shapes.values() for size in shape) if unset else 0
        return {path: self.said.get(path[-1], most) for path in unset} | {
            (name,): value
            for name, value in self.said.items()
            if name not in names and getattr(self.config, name, None) is None
        }

    @functools.cached_property
    def hints(self) -> Hints:
        """What the plan tells of the values to try."""
        ratios: dict[str, set[Fraction]] = {}
        for cut in self.plan.axes:
            # Neurons of one layer multiply: heads are groups times heads of a group.
            known = ratios.setdefault(cut.name.partition("/")[0], set())
            known |= {Fraction(len(cut.kept), cut.size)} | {one * Fraction(len(cut.kept), cut.size) for one in known}
        return Hints(_replacements(self.plan), set().union(*ratios.values()), self.said)

    def draw(self, optional: Mapping[Where, int]) -> Drawing | None:
        """How the model is computed from its configuration, with some sizes that were left to a default."""
        lengths = {len(part._modules) for part in self.modules.values() if "0" in part._modules}
        counts = lengths | {length + 1 for length in lengths}  # one of them may be apart
        for least in _LEAST:
            found = drawn(
                self.kind, self.config, optional, shapes=self.shapes, wanted=self.wanted, counts=counts, least=least
            )
            if found is not None:
                return found
        return None

    def solve(self, drawing: Drawing) -> Solution:
        """The values that give what is wanted."""
        known = {path: value for path, value in entries(self.trial) if path in drawing.dense and value is not None}
        return solved(equations(drawing, self.wanted, self.attributes), {**drawing.dense, **known})

    def stands(self, drawing: Drawing, values: Mapping[Where, Any]) -> bool:
        """Whether formulas say what is built from these values, or nothing is, although comparisons turn out anew."""
        if not drawing.is_left(values):
            return True
        fresh = self._fresh(values)
        return fresh is None or shapes_of(fresh) == drawing.at(values, self.shapes)

    def build(self, config: Any) -> Shapes | None:
        """The shapes of the model that a configuration builds."""
        fresh = built(self.kind, copy.deepcopy(config))
        return None if fresh is None else shapes_of(fresh)

    def refuse(self, changes: Mapping[Where, Any]) -> str | None:
        """Why a configuration with these changes is wrong: the shapes built, or what is computed anew, as scales."""
        known, key = self._refusals, frozenset(changes.items())
        if key not in known:
            fresh = self._fresh({**changes, **self.decimals})
            known[key] = _OTHER if fresh is None or shapes_of(fresh) != self.wanted else self._computed_anew(fresh)
        return known[key]

    def _fresh(self, changes: Mapping[Where, Any]) -> nn.Module | None:
        try:
            config = with_changes(self.trial, changes)
        except Exception:  # a configuration may refuse a value
            return None
        return built(self.kind, config)

    @functools.cached_property
    def _anew(self) -> dict[str, nn.Module]:
        """The parts of the model that the configuration builds as it is."""
        fresh = built(self.kind, copy.deepcopy(self.config))
        return {} if fresh is None else dict(fresh.named_modules())

    def _chosen_anew(self, modules: Mapping[str, nn.Module]) -> str | None:
        """Names what the configuration chose by a size, as an activation, and now chooses otherwise."""
        for prefix, module in self.modules.items():
            before, after = _choices(module), _choices(modules.get(prefix))
            for name in [name for name, value in before.items() if after.get(name, value) != value]:
                # What someone has set since the model was built is no choice of the configuration.
                if _choices(self._anew.get(prefix)).get(name) == before[name]:
                    path = ".".join(filter(None, (prefix, name)))
                    return f"{_CANNOT}: `{path}` is chosen by it, and stays"
        return None

    def _computed_anew(self, fresh: nn.Module) -> str | None:
        modules = dict(fresh.named_modules())
        chosen = self._chosen_anew(modules)
        if chosen is not None:
            return chosen
        for path, (_, wanted) in self.attributes.items():
            if type(wanted) is float and getattr(modules.get(path[0]), path[1], wanted) != wanted:
                return f"{_CANNOT}: `{'.'.join(filter(None, path))}` is computed from it, and stays"
        return None


def _choices(module: nn.Module | None) -> dict[str, Any]:
    """What a module is, under no name, and the flags and texts it holds."""
    held = {} if module is None else vars(module)
    flags = {name: value for name, value in held.items() if type(value) in (bool, str) and name != "training"}
    return {"": None if module is None else type(module), **flags}


def _computed(sought: _Sought, drawing: Drawing) -> Changes | str | None:
    """The changes, or why there are none, by computing; None if that does not tell."""
    solution = sought.solve(drawing)
    if solution.broken is not None and not sought.stands(drawing, solution.values):
        return None
    why = out_of_proportion(drawing, sought.wanted)
    if why is not None:
        return f"{_CANNOT}: {why}"
    known, optional = dict(entries(sought.trial)), sought.optional.keys()
    if solution.broken is None:
        changes = {path: value for path, value in solution.values.items() if known.get(path) != value}
        # What can be said without writing a default down is said without.
        plain = {path: value for path, value in changes.items() if path not in optional}
        for some in (plain, changes):
            why = sought.refuse(some)
            if why is None:
                return some
        if solution.is_only and why != _OTHER:
            return why
    elif solution.is_only:
        return _broken(solution.broken, drawing, solution.values, sought.wanted)
    plainly = None if drawing.leaves.isdisjoint(optional) else sought.draw({})
    drawings = [drawing] if plainly is None else [plainly, drawing]
    search = Search(lambda one: _foretold(sought, drawings, one), sought.wanted, sought.refuse)
    found = search.run(sought.trial, sought.hints)
    return None if found == _OTHER else found


def _broken(equation: Equation, drawing: Drawing, values: Mapping[Where, Any], wanted: Shapes) -> str:
    if equation.dim is None:
        target = "stays" if type(equation.wanted) is float else f"is to be {equation.wanted}"
        return f"{_CANNOT}: `{equation.name}` is computed from it, and {target}"
    nearest = drawing.at(values, [equation.name])[equation.name]
    return (
        f"{_CANNOT}: `{equation.name}` has shape {wanted[equation.name]}, and the nearest configuration gives {nearest}"
    )


def _foretold(sought: _Sought, drawings: Sequence[Drawing], config: Any) -> Shapes | None:
    """The shapes that a configuration will build."""
    values = {path: value for path, value in entries(config) if value is not None}
    drawing = drawings[-1] if drawings[-1].leaves <= values.keys() else drawings[0]
    shapes = drawing.at({path: value for path, value in values.items() if path in drawing.dense}, sought.wanted)
    possible = all(type(size) is int and size >= 0 for shape in shapes.values() for size in shape)
    return shapes if possible else None


def _searched(sought: _Sought) -> Changes | str:
    """The changes, or why there are none, by building models."""
    if distance(sought.build(sought.config), sought.shapes) > 0:
        return _UNKNOWN
    hints = sought.hints
    varied = next((old for old, news in hints.replacements.items() if len(news) > _SIZES), None)
    if varied is not None:
        many = len(hints.replacements[varied])
        return f"{_CANNOT}: what had {varied} neurons has {many} different sizes"
    found = Search(sought.build, sought.wanted, sought.refuse).run(sought.trial, hints)
    return f"{_CANNOT}: {_OTHER}" if found == _OTHER else found


def _unsaved_buffers(modules: Mapping[str, nn.Module]) -> Iterator[str]:
    """Names of buffers that a saved model lacks."""
    for prefix, module in modules.items():
        for name in module._non_persistent_buffers_set:
            yield f"{prefix}.{name}" if prefix else name


def _decimals(model: nn.Module, plan: Plan, config: Any) -> dict[Where, float]:
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
