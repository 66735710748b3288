"""The axes of a model, as its user sees them.

An :class:`Axis` is a solved unknown: a name, a size, the tensor dimensions it appears in, and whether and why it is
frozen or inexact. :class:`Axes` is the sequence of them, and answers what a plan needs to know: which indices of which
tensor a choice of neurons keeps, which counts are possible, and what the model's integers become.
"""

from __future__ import annotations

import html
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, overload

import torch
from torch import Tensor

from netopt.axes.indices import indices, labels
from netopt.axes.kinds import kinds_of
from netopt.axes.layout import LAYOUTS, Atom, Layout, SizeReason, atoms, count, freeze, mark_inexact, resolve
from netopt.axes.names import distinct, layer_of
from netopt.axes.solver import CountSolver
from netopt.axes.tracing.dims import DimTracer, Work
from netopt.axes.tracing.implicit_sizes import bind_implicit_sizes
from netopt.errors import UnknownNameError, nearest
from netopt.model.calls import Call
from netopt.symbolic import DimSize, Expression, Term, leaf, leaves, substitute


class Member(NamedTuple):
    """One dimension of one parameter or buffer in which an axis appears.

    Attributes:
        tensor: Dotted name of the tensor, its first if it has several.
        dim: The dimension, counted from the left.
    """

    tensor: str
    dim: int

    def __str__(self) -> str:
        return f"{self.tensor}:{self.dim}"


class Assignment(NamedTuple):
    """The new value of an integer a model holds.

    Attributes:
        path: The module's dotted name, the attribute, then items or attributes below it.
        value: What it becomes.
    """

    path: tuple[str | int, ...]
    value: int


class Tap(NamedTuple):
    """A place where the activations of an axis are read by a contraction.

    Attributes:
        call: The torch call that contracts.
        argument: Which of its arguments holds the activations; keyword arguments count after positional ones.
        dim: The dimension contracted over.
        positions: For each index of that dimension the position of the axis, or -1.
    """

    call: Call
    argument: int
    dim: int
    positions: Tensor


@dataclass(frozen=True)
class Axis:
    """An index space shared by every tensor dimension that must shrink together; its positions are neurons.

    Attributes:
        name: The layer that makes it, followed by what it counts where a layer makes several.
        size: Number of neurons.
        members: Where it appears.
        exact: Whether removing neurons computes the same function as masking them.
        inexact: Why it does not, or ``None``.
        frozen: Why no neuron can be removed, or ``None``.
        kind: What its neurons are, such as ``"heads"`` or ``"width"``, or ``None`` where no operation tells.
    """

    name: str
    size: int
    members: tuple[Member, ...]
    frozen: str | None = None
    inexact: str | None = None
    kind: str | None = None

    @property
    def exact(self) -> bool:
        """Whether removing neurons of this axis computes the same function as masking them."""
        return self.inexact is None

    @property
    def scales(self) -> bool:
        """Whether it is inexact because its size is used as a number, which may scale what is computed."""
        return isinstance(self.inexact, SizeReason)

    def __str__(self) -> str:
        return f"{self.name} ({self.size})"


@dataclass
class _Group:
    """The unknowns behind one axis: one atom, or the single positions of an axis that a permutation took apart."""

    atoms: list[Atom]
    members: list[Member] = field(default_factory=list)

    @property
    def size(self) -> int:
        return sum(atom.size for atom in self.atoms)


class Axes(Sequence[Axis]):
    """Every axis of a model, in the order its tensors are held.

    Index with a number, with an axis's name, or with the name of a layer for the axis of its outputs.

    Attributes:
        operations: How many operations ran.
        unknown: Names of the operations that had no rule.
        steady: For each result that counts, which of its sizes depend on no values; ``None`` if none of them does.
    """

    def __init__(self, trace: DimTracer, readings: Sequence[Any], results: Sequence[Sequence[Layout]]) -> None:
        self._tensors = {name: tuple(tensor.shape) for name, tensor in trace.members.items()}
        self._dims: dict[str, list[Layout]] = {
            name: [resolve(dim.layout) for dim in _peek(trace, tensor)] for name, tensor in trace.members.items()
        }
        self._makes = dict(trace.makes)
        self._pointers = dict(trace.pointers)
        self._pointed = {name: trace.members[name].detach().cpu().clone() for name in trace.pointers}
        self._work = trace.work
        self.operations = trace.operations
        self.unknown = tuple(sorted(trace.unknown))
        found = self._appearances(trace)
        self._freeze_rest(trace, found)
        groups = self._group(found, {atom for layout in trace.kernels for atom in atoms(layout)})
        free = {index: group.atoms for index, group in enumerate(groups) if all(a.frozen is None for a in group.atoms)}
        self._counts = CountSolver(free, trace.constraints)
        for index, why in self._counts.unshrinkable().items():
            _set(groups[int(str(index))].atoms, "frozen", why)
        self._mark_numbers(trace, groups)
        kinds = kinds_of(trace, [group.atoms for group in groups])
        names = self._name(groups, kinds)
        self._axes = tuple(
            Axis(
                name,
                group.size,
                tuple(group.members),
                frozen=next((atom.frozen for atom in group.atoms if atom.frozen), None),
                inexact=next((atom.inexact for atom in group.atoms if atom.inexact), None),
                kind=kind,
            )
            for name, kind, group in zip(names, kinds, groups, strict=True)
        )
        self._groups = {axis.name: group for axis, group in zip(self._axes, groups, strict=True)}
        self._index = {axis.name: index for index, axis in enumerate(self._axes)}
        self._readings = readings
        self.steady = self._steady(results) if trace.by_value else None

    # Building.

    def _appearances(self, trace: DimTracer) -> dict[Atom, list[Member]]:
        """Where each atom appears, in the order of the tensors; what is of no use is frozen."""
        found: dict[Atom, list[Member]] = {}
        for name, dims in self._dims.items():
            is_touched = name in trace.touched
            for dim, layout in enumerate(dims):
                member = Member(name, dim)
                for atom in (layout,) if type(layout) is Atom else atoms(layout):
                    members = found.setdefault(atom, [])
                    if not members or members[-1] is not member:
                        members.append(member)
                    if not is_touched and atom.frozen is None:
                        atom.frozen = "is not used by the forward"
        return found

    def _freeze_rest(self, trace: DimTracer, found: Mapping[Atom, list[Member]]) -> None:
        read = {atom for layout in trace.selected for atom in atoms(layout)}
        for layout in trace.sliced:
            for atom in atoms(layout):
                if atom not in read:
                    freeze(atom, "is passed over by a slice of a weight, at these inputs")
        for atom, members in found.items():
            # Parameters come first.
            if members[0].tensor not in trace.parameters:
                freeze(atom, "belongs to no parameter")
        bind_implicit_sizes(trace.implicit_sizes, trace.constraints)

    def _group(self, found: Mapping[Atom, list[Member]], kernels: set[Atom]) -> list[_Group]:
        groups: list[_Group] = []
        bundles: dict[tuple[Any, ...], _Group] = {}
        for atom, members in found.items():
            if atom in kernels or atom.size == 0:
                continue
            if atom.size == 1 and not atom.unit:
                if all(self._dims[member.tensor][member.dim].size == 1 for member in members):
                    continue
                freeze(atom, "is a position that is singled out")
            if atom.size > 1:
                groups.append(_Group([atom], members))
                continue
            key = (tuple(members), atom.frozen)
            if key not in bundles:
                bundles[key] = _Group([], members)
                groups.append(bundles[key])
            bundles[key].atoms.append(atom)
        return groups

    def _steady(self, results: Sequence[Sequence[Layout]]) -> tuple[tuple[bool, ...], ...]:
        """For each result, which dimensions hold an axis: their sizes stay, others may depend on values."""
        held = {atom for group in self._groups.values() for atom in group.atoms}
        return tuple(tuple(any(atom in held for atom in atoms(layout)) for layout in layouts) for layouts in results)

    def _mark_numbers(self, trace: DimTracer, groups: Sequence[_Group]) -> None:
        """A size used as a number makes its axes inexact."""
        for number, where in trace.constraints.numbers:
            why = SizeReason(f"has a size that the forward computes with, at {where}")
            for one in leaves(number):
                if isinstance(one, DimSize):
                    mark_inexact(one.layout, why)
                else:
                    for key in self._counts.groups_of(one):
                        _set(groups[int(str(key))].atoms, "inexact", why)

    def _name(self, groups: Sequence[_Group], kinds: Sequence[str | None]) -> list[str]:
        made: dict[Atom, str] = {}
        self._layers: dict[str, list[Atom]] = defaultdict(list)
        for tensor in self._tensors:
            layer = layer_of(tensor) if tensor in self._makes else ""
            for layout in self._makes.get(tensor, ()):
                for atom in atoms(layout):
                    made.setdefault(atom, layer)
                    self._layers[layer].append(atom)
        bases = []
        for group in groups:
            base = next((made[atom] for atom in group.atoms if atom in made), None)
            bases.append(base if base is not None else f"{layer_of(group.members[0].tensor)}.in")
        attributes: dict[int, str] = {}
        for attribute, term in self._counts.bound_attributes():
            if isinstance(term, Expression) and term.operation is None and isinstance(term.key, int):
                attributes.setdefault(term.key, str(attribute.path[-1]))
        return distinct(bases, kinds, attributes)

    # Reading.

    @overload
    def __getitem__(self, key: int | str) -> Axis: ...
    @overload
    def __getitem__(self, key: slice) -> Sequence[Axis]: ...
    def __getitem__(self, key: int | str | slice) -> Axis | Sequence[Axis]:
        """An axis by its position, its name, or the name of the layer whose outputs it is.

        Raises:
            UnknownNameError: No axis has this name and no layer of this name makes exactly one.
        """
        if not isinstance(key, str):
            return self._axes[key]
        if key in self._index:
            return self._axes[self._index[key]]
        found = self.made_by(key)
        if len(found) == 1:
            return found[0]
        if found:
            listing = ", ".join(repr(axis.name) for axis in found)
            raise UnknownNameError(f"layer {key!r} makes {len(found)} axes; name one of {listing}.")
        hint = nearest(key, [*self._index, *self._layers])
        raise UnknownNameError(f"no axis is called {key!r}, and no layer of this name makes one. {hint}".rstrip())

    def __len__(self) -> int:
        return len(self._axes)

    def __iter__(self) -> Iterator[Axis]:
        return iter(self._axes)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Axes) and self._axes == other._axes

    __hash__ = None  # type: ignore[assignment]

    @property
    def free(self) -> tuple[Axis, ...]:
        """The axes whose neurons can be removed."""
        return tuple(axis for axis in self._axes if axis.frozen is None)

    @property
    def frozen(self) -> tuple[Axis, ...]:
        """The axes that must stay as they are, each with its reason."""
        return tuple(axis for axis in self._axes if axis.frozen is not None)

    def __str__(self) -> str:
        width = max((len(axis.name) for axis in self._axes), default=4)
        rows = [f"{'axis':<{width}}  {'kind':<9}  {'size':>6}  {'members':>7}  state"]
        rows.extend(
            f"{axis.name:<{width}}  {axis.kind or '-':<9}  {axis.size:>6}  {len(axis.members):>7}  {_state(axis)}"
            for axis in self._axes
        )
        return "\n".join(rows)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        cells = "".join(
            f"<tr><td>{html.escape(axis.name)}</td><td>{axis.kind or ''}</td><td>{axis.size}</td>"
            f"<td>{html.escape(', '.join(map(str, axis.members)))}</td><td>{html.escape(_state(axis))}</td></tr>"
            for axis in self._axes
        )
        return f"<table><tr><th>axis</th><th>kind</th><th>size</th><th>members</th><th>state</th></tr>{cells}</table>"

    # Planning.

    def members(self, axis: Axis) -> list[tuple[str, int, Tensor]]:
        """For each appearance of ``axis``: tensor name, dimension, and the axis's position at each index (-1: none)."""
        group = self._groups[axis.name]
        known: dict[Layout, list[Tensor]] = {}
        found = []
        for tensor, dim in axis.members:
            layout = self._dims[tensor][dim]
            if layout not in known:
                known[layout] = labels(layout, group.atoms)
            found += [(tensor, dim, positions) for positions in known[layout]]
        return found

    def feasible(self, counts: Mapping[str, int]) -> dict[str, int]:
        """The counts nearest to those wanted that satisfy every equation between the model's integers.

        Args:
            counts: Wanted number of neurons by axis name; free axes not named keep their size.

        Returns:
            A possible count for every free axis.
        """
        wanted = {self._index[self[name].name]: int(value) for name, value in counts.items()}
        for index, axis in enumerate(self._axes):
            if axis.frozen is not None:
                wanted.pop(index, None)
        found = self._counts.nearest(wanted)
        return {axis.name: found[index] for index, axis in enumerate(self._axes) if axis.frozen is None}

    def satisfying(self, choices: Iterable[Mapping[str, int]]) -> list[Mapping[str, int]]:
        """The choices of counts that satisfy every constraint among the axes they name."""
        return [one for one in choices if self._counts.holds({self._index[name]: n for name, n in one.items()})]

    def tensor_indices(self, kept: Mapping[str, Tensor]) -> dict[str, dict[int, Tensor]]:
        """Which indices of which tensor dimension remain when these neurons are kept.

        Args:
            kept: Sorted positions to keep, by axis name; axes not named keep all.

        Returns:
            Kept indices by tensor name and dimension, of the dimensions that shrink.
        """
        chosen = self._chosen(kept)
        result: dict[str, dict[int, Tensor]] = {}
        # Dimensions with one layout share one tensor of indices; most layouts are one atom.
        known: dict[Layout, Tensor | None] = {}
        for name, dims in self._dims.items():
            for dim, layout in enumerate(dims):
                if layout not in known:
                    known[layout] = indices(layout, chosen) if any(atom in chosen for atom in atoms(layout)) else None
                left = known[layout]
                if left is not None:
                    result.setdefault(name, {})[dim] = left
        return result

    def size_terms(self) -> dict[str, tuple[Term, ...]]:
        """The size of every dimension of every tensor as a term whose leaves are names of free axes."""
        return {
            tensor: tuple(substitute(self._counts.layout(layout), self._named) for layout in dims)
            for tensor, dims in self._dims.items()
        }

    def attribute_terms(self) -> dict[tuple[str | int, ...], Term]:
        """The integers of the model that follow from counts, by path, as terms whose leaves are names of free axes."""
        bound = ((place.path, term) for place, term in self._counts.bound_attributes())
        known = ((path, term) for path, term in bound if all(isinstance(key, int) for key in leaves(term)))
        return {path: substitute(term, self._named) for path, term in known}

    def attribute_equations(self) -> list[tuple[Term, Term]]:
        """What sizes and the integers of the model must fulfil together: a term in counts equals one in integers.

        The leaves of the first are names of free axes, those of the second :class:`~netopt.symbolic.AttributeRef`.
        """
        return [(substitute(count, self._named), number) for count, number in self._counts.attribute_equations()]

    def _named(self, one: Expression) -> Term:
        """An unknown of the solver under the name of its axis."""
        assert isinstance(one.key, int)
        return leaf(self._axes[one.key].name, one.value)

    def attribute_values(self, counts: Mapping[str, int]) -> list[Assignment]:
        """What the integers of the model become when axes have ``counts`` neurons; only those that change."""
        full = self._counts.nearest({self._index[self[name].name]: int(value) for name, value in counts.items()})
        return [Assignment(place.path, value) for place, value in self._counts.assignments(full)]

    def macs(self, counts: Mapping[str, int] | None = None) -> int:
        """Multiply-accumulates of the traced forward, were its axes to have ``counts`` neurons.

        By the formulas of torch's flop counter on the shapes that would be, without running anything.

        Args:
            counts: Number of neurons by axis name; axes not named keep theirs.
        """
        sizes: dict[Atom, int] = {}
        for name, number in (counts or {}).items():
            group = self._groups[self[name].name]
            for index, atom in enumerate(group.atoms):
                sizes[atom] = int(number) if len(group.atoms) == 1 else int(index < number)
        return sum(int(work_of(work, sizes)) for work in self._work) // 2

    def made_by(self, layer: str) -> tuple[Axis, ...]:
        """The axes of a layer's outputs: none, one, or several, as where it makes heads times head-dim."""
        made = {id(atom) for one in self._layers.get(layer, ()) for atom in atoms(one)}
        return tuple(axis for axis in self._axes if any(id(atom) in made for atom in self._groups[axis.name].atoms))

    def values(self, kept: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What integer buffers become whose entries are positions of an axis.

        Args:
            kept: Sorted positions to keep, by axis name; axes not named keep all.

        Returns:
            New values by tensor name, in the tensor's dtype, of the buffers that change.
        """
        chosen = self._chosen(kept)
        result: dict[str, Tensor] = {}
        for name, layout in self._pointers.items():
            if any(atom in chosen for atom in atoms(layout)):
                moved = torch.full((layout.size,), -1)
                remaining = indices(layout, chosen)
                moved[remaining] = torch.arange(len(remaining))
                old = self._pointed[name]
                result[name] = moved[old[indices(self._dims[name][0], chosen)].long()].to(old.dtype)
        return result

    def taps(self, axis: Axis) -> list[Tap]:
        """Where the activations of ``axis`` are read by a contraction, in the order of the forward."""
        group = self._groups[axis.name]
        wanted = set(group.atoms)
        return [
            Tap(reading.call, reading.argument, reading.dim, found)
            for reading in self._readings
            if not wanted.isdisjoint(atoms(reading.layout))
            for found in labels(reading.layout, group.atoms)
        ]

    def _chosen(self, kept: Mapping[str, Tensor]) -> dict[Atom, Tensor]:
        chosen: dict[Atom, Tensor] = {}
        for name, positions in kept.items():
            group = self._groups[self[name].name]
            if len(group.atoms) == 1:
                chosen[group.atoms[0]] = positions
            else:
                stay = set(positions.tolist())
                for index, atom in enumerate(group.atoms):
                    chosen[atom] = torch.arange(1 if index in stay else 0)
        return chosen


def _peek(trace: DimTracer, tensor: Tensor) -> Any:
    """The dimensions of a member, without counting it as used."""
    known = trace._info(tensor)
    assert known is not None
    return known.dims


def work_of(work: Work, sizes: dict[Atom, int]) -> int:
    """What an operation costs once atoms have these sizes."""

    def shape(value: Any) -> Any:
        kind = type(value)
        if (kind is not tuple and kind is not list) or not value:
            return value
        first = type(value[0])
        if first in LAYOUTS:
            return tuple(
                [
                    sizes.get(one, one.size) if type(one) is Atom and one.bound is None else count(one, sizes)
                    for one in value
                ]
            )
        return value if first is int else kind([shape(one) for one in value])

    named = {name: shape(value) for name, value in work.kwargs.items()} if work.kwargs else {}
    return work.formula(*shape(work.args), **named, out_val=shape(work.result))


def _set(atoms_: Iterable[Atom], attribute: str, why: str) -> None:
    for atom in atoms_:
        if getattr(atom, attribute) is None:
            setattr(atom, attribute, why)


def _state(axis: Axis) -> str:
    if axis.frozen is not None:
        return f"frozen: {axis.frozen}"
    return "free" if axis.inexact is None else f"free, not exact: {axis.inexact}"


__all__ = ["Assignment", "Axes", "Axis", "Member", "Tap"]
