"""What to keep, decided and not yet done.

A plan is a value made of names, dimensions and integers: it can be printed, compared, saved, and carried out on any
model that has the same names and shapes, without running it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import html
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path as FilePath
from types import MappingProxyType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from netopt import surgery
from netopt.errors import InvalidArgumentError, PlanMismatchError
from netopt.model.view import ModelView
from netopt.plan import schema
from netopt.plan.checkpoint import rewrite
from netopt.plan.codec import IndexCodec, pack
from netopt.plan.files import JSONFile
from netopt.plan.shards import open_checkpoint
from netopt.plan.wrapped import innermost, renaming
from netopt.surgery.attributes import Path, show

__all__ = ["AxisCut", "Plan", "shapes_of"]

Key = TypeVar("Key")


@dataclass(frozen=True, eq=False)
class AxisCut:
    """What a plan keeps of one axis: a row of the plan."""

    name: str
    size: int
    kept: Tensor
    """Positions that stay, ascending."""
    exact: bool = True
    reason: str | None = None
    """Why removing is not the same as masking here, if it is not."""

    def __str__(self) -> str:
        return f"{self.name}: {self.size} -> {len(self.kept)}"


@dataclass(frozen=True, eq=False)
class Plan(JSONFile):
    """What to keep of a model's tensors, as names and indices; immutable.

    Args:
        tensors: Kept indices, ascending, of each narrowed dimension, by tensor name and dimension.
        attributes: New values of integers that modules and configurations hold. A path is a module's dotted name (the
            model's own is ""), an attribute, and the items below it: ``(("blocks.0.attn", "num_heads"), 5)``.
        values: New contents of integer buffers whose entries point into something narrowed.
        shifts: What is added to narrowed tensors, by name: constants of removed neurons, folded into what reads them.
        scales: Factors, applied last, that compensate for what a smaller size would change, by tensor name: numbers, or
            tensors that broadcast to the narrowed tensor.
        axes: The axes behind the tensors, one row each.
        shapes: Shapes of the parameters, and of the buffers narrowed, of the model the plan was made for; a plan with
            none fits every model that has its tensors.
        predicted: Parameters, MACs and bytes before and after; where scores say it, ``"output_change"``, the squared
            change of the outputs as a share of their squares.
        unsaved: Names among the tensors that a saved model may lack: buffers that are not saved, second names of ties.

    Example:
        >>> net = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> plan = Plan({"0.weight": {0: [0, 2]}, "0.bias": {0: [0, 2]}, "2.weight": {1: [0, 2]}})
        >>> plan.apply(net)
        >>> net[0].out_features, tuple(net[2].weight.shape)
        (2, (2, 2))
    """

    tensors: Mapping[str, Mapping[int, Tensor]]
    attributes: tuple[tuple[Path, Any], ...] = ()
    values: Mapping[str, Tensor] = field(default_factory=dict)
    scales: Mapping[str, float | Tensor] = field(default_factory=dict)
    axes: tuple[AxisCut, ...] = ()
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    predicted: Mapping[str, float] = field(default_factory=dict)
    unsaved: tuple[str, ...] = ()
    shifts: Mapping[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        seen: dict[int, tuple[Any, Tensor]] = {}
        tensors: dict[str, Mapping[int, Tensor]] = {}
        for name, dims in sorted(self.tensors.items()):
            own: dict[int, Tensor] = {}
            for dim, kept in sorted(dims.items()) if len(dims) > 1 else dims.items():
                if id(kept) not in seen:  # what several dimensions share is checked once and stays shared
                    seen[id(kept)] = (kept, _indices(kept, name, dim))
                own[int(dim)] = seen[id(kept)][1]
            if own:
                tensors[name] = MappingProxyType(own)
        normal: dict[str, Any] = {
            "tensors": MappingProxyType(tensors),
            "attributes": tuple(
                (tuple(path), value) for path, value in sorted(self.attributes, key=lambda one: repr(one[0]))
            ),
            "values": MappingProxyType(dict(self.values)),
            "scales": MappingProxyType(dict(self.scales)),
            "axes": tuple(self.axes),
            "shapes": MappingProxyType({name: tuple(shape) for name, shape in self.shapes.items()}),
            "predicted": MappingProxyType(dict(self.predicted)),
            "unsaved": tuple(sorted(self.unsaved)),
            "shifts": MappingProxyType(dict(self.shifts)),
        }
        for name, value in normal.items():
            object.__setattr__(self, name, value)

    @property
    def exact(self) -> bool:
        """Whether the smaller model computes what the masked model computes: every axis that is cut is exact."""
        return all(axis.exact for axis in self.axes)

    @property
    def fingerprint(self) -> str:
        """A short name of the model the plan was made for: a hash of its parameters' names and shapes."""
        text = json.dumps(sorted((name, shape) for name, shape in self.shapes.items()))
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @property
    def shapes_after(self) -> dict[str, tuple[int, ...]]:
        """The same shapes as ``shapes`` once the plan is carried out."""
        after = {}
        for name, shape in self.shapes.items():
            dims = self.tensors.get(name, {})
            after[name] = tuple(len(dims[dim]) if dim in dims else size for dim, size in enumerate(shape))
        return after

    def apply(self, model: nn.Module, optimizer: Optimizer | Iterable[Optimizer] | None = None) -> None:
        """Removes from ``model``, in place, everything the plan does not keep; all of it or nothing.

        The model is not run. Parameters stay the same objects; gradients, masks of ``torch.nn.utils.prune`` and the
        state of ``optimizer`` are narrowed with them.

        Args:
            model: One with the names and shapes of the model the plan was made for: the same model, a copy, an average
                of its weights, one freshly built.
            optimizer: One or several whose state follows.

        Raises:
            PlanMismatchError: Some tensor or attribute is missing or has another shape; the message names the first.
            OptimizerStateError: Some optimizer state cannot be narrowed.
        """
        return self.prepare(model, optimizer).run(lambda: None)

    def prepare(
        self, model: nn.Module | ModelView, optimizer: Optimizer | Iterable[Optimizer] | None = None
    ) -> surgery.Operation:
        """Everything :meth:`apply` needs, built and checked, with nothing changed yet."""
        view = ModelView.of(model)
        plan = self._fitted(view)
        plan._check(view)
        return surgery.prepare(
            view.model,
            plan.tensors,
            attributes=plan.attributes,
            contents=surgery.Contents(plan.values, plan.shifts, plan.scales),
            optimizer=optimizer,
            view=view,
        )

    def apply_to_checkpoint(self, source: str | os.PathLike[str], target: str | os.PathLike[str]) -> FilePath:
        """Writes a checkpoint of safetensors files as the plan leaves it, some rows of a tensor at a time.

        A few blocks of a quarter of a MiB are in memory, whatever the size of a tensor. Names, shapes and files are
        checked before anything is written; each file appears whole or not at all, and after an interruption the same
        call goes on from the files that are there. Other files of the folder are copied, and sizes in ``config.json``
        follow.

        Args:
            source: A safetensors file, or a folder with one or several and, if several, their index.
            target: The file or folder to write, another than ``source``.

        Returns:
            The path of the target.

        Raises:
            PlanMismatchError: A tensor of the plan is missing or has another shape.
            CheckpointError: A file is missing, truncated, or cannot be written.
        """
        stored = open_checkpoint(source)
        known = stored.places
        missing = [name for name in self.tensors if name not in known and name not in self.unsaved]
        rename = renaming({*self.tensors} - {*self.unsaved}, known) if missing else None
        plan = self if rename is None else self._renamed(rename, innermost([""]))
        return rewrite(plan, self._digest(), stored, source, target)

    def check(self, model: nn.Module) -> None:
        """Compares names and shapes with ``model``.

        Raises:
            PlanMismatchError: They differ; the message names the first difference.
        """
        view = ModelView(model)
        self._fitted(view)._check(view)

    def _check(self, view: ModelView) -> None:
        if not self.shapes:
            return
        found, model = shapes_of(view, self.shapes), view.model
        if found == dict(self.shapes):
            return
        if found == self.shapes_after:
            raise PlanMismatchError(f"this {type(model).__name__} has the plan's sizes already: it was carried out")
        for name, shape in self.shapes.items():
            if name not in found:
                raise PlanMismatchError(
                    f"the plan was made for a model with `{name}` {shape}; this {type(model).__name__} lacks it"
                )
            if found[name] != shape:
                raise PlanMismatchError(
                    f"`{name}` has shape {found[name]} here and {shape} in the model the plan was made for"
                )
        extra = next((name for name in found if name not in self.shapes), None)
        if extra is not None:
            raise PlanMismatchError(
                f"this {type(model).__name__} has `{extra}` {found[extra]}, which the model the plan was made for lacks"
            )

    def _fitted(self, view: ModelView) -> Plan:
        """The plan under the names of ``view``, where one of the two models is in wrappers that the other is not in."""
        known = {*shapes_of(view), *view.buffers}
        if known.issuperset(self.tensors):
            return self
        if not any(name.endswith("_mask") for name in view.buffers) and self._masks:
            return self.without_masks()._fitted(view)
        rename = renaming({*self.tensors, *self.shapes}, known)
        return self if rename is None else self._renamed(rename, innermost(view.modules))

    @property
    def _masks(self) -> set[str]:
        """Names of the masks that were on the model the plan was made for."""
        return {name for name in self.tensors if f"{name.removesuffix('_mask')}_orig" in self.tensors}

    def without_masks(self) -> Plan:
        """The same plan for the model without the masks of ``torch.nn.utils.prune`` that it was made with."""
        gone = self._masks
        names = {f"{name.removesuffix('_mask')}_orig": name.removesuffix("_mask") for name in gone}
        fields = ("tensors", "values", "scales", "shapes", "shifts")
        left = {
            field: {name: one for name, one in getattr(self, field).items() if name not in gone} for field in fields
        }
        return dataclasses.replace(self, **left).renamed(names)

    def renamed(self, names: Mapping[str, str]) -> Plan:
        """The same plan for files in which tensors have other names, given by those of the model."""
        return self._renamed(lambda name: names.get(name, name), lambda module: module)

    def _renamed(self, rename: Callable[[str], str], rename_module: Callable[[str], str]) -> Plan:
        fields = ("tensors", "values", "scales", "shapes", "shifts")
        return Plan(
            **{field: {rename(name): one for name, one in getattr(self, field).items()} for field in fields},
            attributes=tuple(((rename_module(path[0]), *path[1:]), value) for path, value in self.attributes),
            axes=self.axes,
            predicted=self.predicted,
            unsaved=tuple(rename(name) for name in self.unsaved),
        )

    def merge(self, other: Plan) -> Plan:
        """One plan for this one and ``other``, made for the same model and cutting other axes.

        Raises:
            PlanMismatchError: They were made for different models, or decide about one thing differently.
        """
        if self.shapes and other.shapes and self.fingerprint != other.fingerprint:
            raise PlanMismatchError("the plans were made for different models; plans made one after the other: then()")
        tensors = {name: dict(dims) for name, dims in self.tensors.items()}
        for name, dims in other.tensors.items():
            _unite(tensors.setdefault(name, {}), dims, f"`{name}`", "dimension")
        attributes = dict(self.attributes)
        _unite(attributes, dict(other.attributes), "attributes", "path")
        values, scales, shifts = dict(self.values), dict(self.scales), dict(self.shifts)
        _unite(values, other.values, "values", "tensor")
        _unite(shifts, other.shifts, "shifts", "tensor")
        _unite(scales, other.scales, "scales", "tensor")
        known = {axis.name for axis in self.axes}
        return Plan(
            tensors,
            tuple(attributes.items()),
            values,
            scales,
            (*self.axes, *(axis for axis in other.axes if axis.name not in known)),
            dict(self.shapes) | dict(other.shapes),
            unsaved=tuple({*self.unsaved, *other.unsaved}),
            shifts=shifts,
        )

    def then(self, later: Plan) -> Plan:
        """One plan for this one followed by ``later``, which was made for the model this one leaves.

        Raises:
            PlanMismatchError: ``later`` was made for another model.
        """
        after = self.shapes_after
        common = after.keys() & later.shapes.keys()
        wrong = next((name for name in sorted(common) if after[name] != later.shapes[name]), None)
        if wrong is not None:
            raise PlanMismatchError(
                f"`{wrong}` has shape {after[wrong]} after the first plan, and the second expects {later.shapes[wrong]}"
            )
        tensors = {name: dict(dims) for name, dims in self.tensors.items()}
        for name, dims in later.tensors.items():
            own = tensors.setdefault(name, {})
            for dim, kept in dims.items():
                own[dim] = own[dim][kept] if dim in own else kept
        values = {
            name: surgery.narrow(value, later.tensors.get(name, {})) for name, value in self.values.items()
        } | dict(later.values)
        scales: dict[str, Any] = {
            name: _cut_factor(factor, later.tensors.get(name, {})) for name, factor in self.scales.items()
        }
        shifts: dict[str, Any] = {
            name: _cut_factor(shift, later.tensors.get(name, {})) for name, shift in self.shifts.items()
        }
        for name, shift in later.shifts.items():
            # What is added after the first factor is added before it here.
            shifts[name] = shifts.get(name, 0.0) + shift / scales.get(name, 1.0)
        for name, factor in later.scales.items():
            scales[name] = scales.get(name, 1.0) * factor
        axes = {axis.name: axis for axis in self.axes}
        for axis in later.axes:
            first = axes.get(axis.name)
            axes[axis.name] = axis if first is None else _followed(first, axis)
        shapes = dict(self.shapes) | {name: s for name, s in later.shapes.items() if name not in self.shapes}
        attributes = tuple((dict(self.attributes) | dict(later.attributes)).items())
        unsaved = tuple({*self.unsaved, *later.unsaved})
        return Plan(tensors, attributes, values, scales, tuple(axes.values()), shapes, unsaved=unsaved, shifts=shifts)

    def with_prediction(self, predicted: Mapping[str, float]) -> Plan:
        """The same plan with sizes before and after."""
        plan = object.__new__(Plan)
        plan.__dict__.update(self.__dict__, predicted=MappingProxyType(dict(predicted)))
        return plan

    def to_dict(self) -> dict[str, Any]:
        """The plan in what JSON knows; indices are ranges or bitmaps, whichever is shorter, and stored once."""
        pool = IndexCodec()
        return {
            "format": "netopt.plan",
            "version": schema.VERSION,
            "tensors": {
                name: {str(dim): pool.add(kept) for dim, kept in dims.items()} for name, dims in self.tensors.items()
            },
            "attributes": [[list(path), value] for path, value in self.attributes],
            "values": {name: pack(value) for name, value in self.values.items()},
            "scales": {
                name: pack(factor) if isinstance(factor, Tensor) else factor for name, factor in self.scales.items()
            },
            "axes": [{**vars(axis), "kept": pool.add(axis.kept)} for axis in self.axes],
            "shapes": {name: list(shape) for name, shape in self.shapes.items()},
            "predicted": dict(self.predicted),
            "unsaved": list(self.unsaved),
            "shifts": {name: pack(shift) for name, shift in self.shifts.items()},
            "indices": pool.entries,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Plan:
        """The plan that :meth:`to_dict` wrote.

        Raises:
            InvalidArgumentError: The data is no plan, of a version this library does not know, or broken; the field is
                named.
        """
        read = schema.fields(data)
        return cls(**{**read, "axes": tuple(AxisCut(**row) for row in read["axes"])})

    def __eq__(self, other: object) -> bool:
        return self.to_dict() == other.to_dict() if isinstance(other, Plan) else NotImplemented

    def __hash__(self) -> int:
        return int(self._digest(), 16)

    def _digest(self) -> str:
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()[:16]

    def __reduce__(self) -> tuple[Any, ...]:
        return (Plan.from_dict, (self.to_dict(),))

    def _rows(self) -> list[tuple[str, str, str]]:
        if self.axes:
            notes = [axis.reason or "" if axis.exact else f"inexact: {axis.reason}" for axis in self.axes]
            counts = [f"{axis.size} -> {len(axis.kept)}" for axis in self.axes]
            return list(zip([axis.name for axis in self.axes], counts, notes, strict=True))
        return [
            (
                f"{name}[{dim}]",
                f"{self.shapes[name][dim]} -> {len(kept)}" if name in self.shapes else f"{len(kept)}",
                "",
            )
            for name, dims in self.tensors.items()
            for dim, kept in dims.items()
        ]

    def _heading(self) -> str:
        made_for = f", made for model {self.fingerprint}" if self.shapes else ""
        return f"Plan: {len(self.axes) or len(self.tensors)} {'axes' if self.axes else 'tensors'}{made_for}"

    def __str__(self) -> str:
        rows = self._rows()
        widths = [max((len(row[column]) for row in rows), default=0) for column in range(2)]
        lines = [f"  {name:<{widths[0]}}  {change:<{widths[1]}}  {note}".rstrip() for name, change, note in rows]
        lines += [f"  {show(path)} = {value}" for path, value in self.attributes]
        return "\n".join([self._heading(), *lines])

    def __repr__(self) -> str:
        return f"<{self._heading()}>"

    def _repr_html_(self) -> str:
        rows = "".join(
            "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in self._rows()
        )
        head = "<tr><th>axis</th><th>neurons</th><th></th></tr>"
        return f"<p>{html.escape(self._heading())}</p><table>{head}{rows}</table>"


def shapes_of(model: nn.Module | ModelView, also: Iterable[str] = ()) -> dict[str, tuple[int, ...]]:
    """Shapes of the model's parameters by the names they have without masks, and of the buffers named in ``also``."""
    view = ModelView.of(model)
    shapes = {}
    for name, tensor in view.parameters.items():
        masked = name.endswith("_orig") and _has_mask(view.model, name)
        shapes[name.removesuffix("_orig") if masked else name] = tuple(tensor.shape)
    for name in also:
        if name not in shapes:
            found = view.buffers[name] if name in view.buffers else surgery.find_tensor(view.model, name)
            if found is not None:
                shapes[name] = tuple(found.shape)
    return shapes


def _has_mask(model: nn.Module, name: str) -> bool:
    return surgery.find_tensor(model, f"{name.removesuffix('_orig')}_mask") is not None


def _indices(kept: Tensor | Sequence[int], name: str, dim: int) -> Tensor:
    """The kept indices of one dimension, checked."""
    indices = torch.as_tensor(kept, dtype=torch.int64, device="cpu").detach().clone()
    if indices.dim() != 1 or not indices.shape[0]:
        raise InvalidArgumentError(f"dimension {dim} of `{name}` needs a list of one or more kept indices")
    numbers = indices.numpy()
    if numbers[0] < 0 or bool((numbers[1:] <= numbers[:-1]).any()):
        raise InvalidArgumentError(f"the kept indices of dimension {dim} of `{name}` must ascend from 0 or more")
    return indices


def _same(first: Any, second: Any) -> bool:
    if isinstance(first, Tensor):
        return torch.equal(first, second)
    return first == second


def _unite(mine: dict[Key, Any], theirs: Mapping[Key, Any], what: str, kind: str) -> None:
    for key, value in theirs.items():
        if key in mine and not _same(mine[key], value):
            raise PlanMismatchError(f"the plans differ in {what}, {kind} {key}, so they cannot be merged")
        mine[key] = value


def _cut_factor(factor: float | Tensor, cuts: Mapping[int, Tensor]) -> float | Tensor:
    """A factor for a tensor that is narrowed further."""
    if not isinstance(factor, Tensor):
        return factor
    return surgery.narrow(factor, {dim: kept for dim, kept in cuts.items() if factor.shape[dim] > 1})


def _followed(first: AxisCut, later: AxisCut) -> AxisCut:
    exact = first.exact and later.exact
    return AxisCut(first.name, first.size, first.kept[later.kept], exact, first.reason or later.reason)
