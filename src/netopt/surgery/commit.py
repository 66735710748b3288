"""All of it or nothing: every change is built and checked first, then done, and any failure puts everything back.

Each change can be done and undone any number of times, and its undoing is recorded before it is done, so that an
interruption anywhere ends with the model as it was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from netopt.errors import PlanMismatchError, ShapeMismatchError
from netopt.model.precision import uncached
from netopt.model.signals import UndoLog, entered
from netopt.model.view import ModelView
from netopt.surgery.attributes import Path, assignment, described, read
from netopt.surgery.optimizers import FORMER, as_optimizers, narrowed_states
from netopt.surgery.tensors import STORED, Cuts, Swap, companions, locate, retire, successor

Result = TypeVar("Result")


class Change(Protocol):
    """One step that can be taken and taken back."""

    def do(self) -> None:
        """Takes the step."""
        ...

    def undo(self) -> None:
        """Takes it back, if it was taken."""
        ...


class Operation:
    """Changes that are ready and not yet done; see :func:`prepare`."""

    def __init__(self, model: nn.Module, changes: Iterable[Change], view: ModelView | None = None) -> None:
        self.changes = tuple(changes)
        self._view = ModelView(model) if view is None else view
        self._retired: list[RemovableHandle] = []

    def run(self, finish: Callable[[], Result]) -> Result:
        """Does all changes, then ``finish``; if anything is raised meanwhile, undoes them and lets it pass.

        Args:
            finish: What has to succeed for the changes to stay: checks, measurements, the report.

        Returns:
            What ``finish`` returned.
        """

        def work() -> Result:
            result = finish()
            exchanged = [change for change in self.changes if isinstance(change, Swap)]
            FORMER.add(self._view, {id(change.tensor): change.new.shape for change in exchanged})
            for change in exchanged:
                handle = retire(change.new)
                if handle is not None:
                    self._retired.append(handle)
            return result

        return self._done(work, undone_on=BaseException)

    def dry_run(self, look: Callable[[], Result]) -> Result:
        """Does all changes, looks, and undoes them whatever happens.

        Args:
            look: Called while the changes are done.

        Returns:
            What ``look`` returned.
        """
        return self._done(look)

    def _done(self, work: Callable[[], Result], undone_on: type[BaseException] | None = None) -> Result:
        """Does all changes and what comes after; undoes them in the end, or only on an exception."""
        log = UndoLog(whole=undone_on is not None)

        def change(log: UndoLog) -> Result:
            uncached(log)
            log.callback(self._flatten, on=undone_on)
            log.callback(self._revive, on=undone_on)
            for change in self.changes:
                log.callback(change.undo, on=undone_on)
            for change in self.changes:
                change.do()
            self._flatten()
            return work()

        try:
            return log.run(change)
        except BaseException as error:
            log.close(error)  # once more, which costs nothing: debuggers interrupt where signals do not
            raise

    def _revive(self) -> None:
        for handle in self._retired:
            handle.remove()

    def _flatten(self) -> None:
        """Recurrent modules keep their weights in one block on some devices."""
        for module in self._view.modules.values():
            flatten = getattr(type(module), "flatten_parameters", None)
            if flatten is not None and any(
                parameter.is_cuda for parameter in module.parameters(recurse=False)
            ):  # pragma: no cover
                flatten(module)


@dataclass(frozen=True)
class Contents:
    """What changes of tensors besides their sizes, by name.

    Attributes:
        values: New contents of integer buffers.
        shifts: What is added to narrowed tensors.
        scales: Factors on narrowed tensors, applied after the shifts.
    """

    values: Mapping[str, Tensor] = field(default_factory=dict)
    shifts: Mapping[str, Tensor] = field(default_factory=dict)
    scales: Mapping[str, float | Tensor] = field(default_factory=dict)


def prepare(
    model: nn.Module,
    tensors: Mapping[str, Cuts],
    *,
    attributes: Iterable[tuple[Path, Any]] = (),
    contents: Contents | None = None,
    optimizer: Optimizer | Iterable[Optimizer] | None = None,
    view: ModelView | None = None,
) -> Operation:
    """Builds every new tensor, attribute and optimizer state and checks them; changes nothing.

    Args:
        model: To be operated on.
        tensors: Kept indices by tensor name and dimension.
        attributes: Path and new value of modules' and configurations' integers.
        contents: What changes of tensors besides their sizes.
        optimizer: Whose state follows; one, several or none.
        view: What the model holds, if it is listed already.

    Raises:
        PlanMismatchError: A tensor or attribute is missing, or has another shape.
        OptimizerStateError: Some optimizer state cannot be narrowed.
    """
    optimizers = as_optimizers(optimizer)
    view = ModelView(model) if view is None else view
    # Tensors born in inference mode could never be trained again.
    with entered(torch.inference_mode(False), torch.no_grad()):
        named = view.tensors
        cuts, shapes = _collect(model, tensors, named)
        replacements = _replacements(cuts, contents or Contents(), model, named)
        assignments = list(attributes)
        for path, _ in assignments:
            read(model, path, view.modules)
        assignments += described(view.modules, named, shapes, dict(assignments))
        changes: list[Change] = [*narrowed_states(optimizers, {id(tensor): (tensor, cut) for tensor, cut in cuts})]
        changes += [Swap(tensor, new) for tensor, new in replacements]
        changes += [assignment(view.modules[path[0]], path, value) for path, value in assignments]
    return Operation(model, changes, view)


def _collect(
    model: nn.Module, tensors: Mapping[str, Cuts], named: Mapping[str, Tensor]
) -> tuple[list[tuple[Tensor, Cuts]], dict[str, Sequence[int]]]:
    """Each tensor once with its cuts, however many names it has; and the shape to come under every name."""
    found: dict[int, tuple[Tensor, Cuts, str]] = {}
    after: dict[int, Sequence[int]] = {}
    last: dict[int, int] = {}
    for name, cuts in tensors.items():
        place = locate(model, name, named)
        if place is None:
            continue
        several = [place, *companions(model, *place)] if place[0].endswith(STORED) else [place]
        for label, one in several:
            known = found.get(id(one))
            if known is not None and not same_cuts(known[1], cuts):
                raise PlanMismatchError(f"`{label}` and `{known[2]}` are one tensor, and the plan cuts it differently")
            after[id(one)] = _new_shape(label, one, cuts, last)
            found[id(one)] = (one, cuts, label)
    shapes = {name: after[id(tensor)] for name, tensor in named.items() if id(tensor) in after}
    return [(tensor, cuts) for tensor, cuts, _ in found.values()], shapes


def _new_shape(name: str, tensor: Tensor, cuts: Cuts, last: dict[int, int]) -> Sequence[int]:
    """The shape to come, if the tensor has what is to be kept; ``last`` notes the largest index of what was seen."""
    shape = list(tensor.shape)
    for dim, kept in cuts.items():
        largest = last.get(id(kept))
        if largest is None:
            largest = last[id(kept)] = int(kept[-1])
        if dim >= len(shape) or largest >= shape[dim]:
            raise PlanMismatchError(
                f"the plan keeps index {largest} of dimension {dim} of `{name}`, whose shape is {tuple(tensor.shape)}"
            )
        shape[dim] = kept.shape[0]
    return shape


def same_cuts(first: Cuts, second: Cuts) -> bool:
    """Whether two cuts keep the same indices of the same dimensions."""
    return first.keys() == second.keys() and all(
        first[dim] is second[dim] or torch.equal(first[dim], second[dim]) for dim in first
    )


def _replacements(
    cuts: list[tuple[Tensor, Cuts]], contents: Contents, model: nn.Module, named: Mapping[str, Tensor]
) -> list[tuple[Tensor, Tensor]]:
    built: dict[int, tuple[Tensor, Tensor]] = {}
    shared: dict[int, list[tuple[Tensor, Tensor, Cuts]]] = {}
    for tensor, own in cuts:
        alike = shared.setdefault(_address(tensor), [])
        alias = next((new for one, new, its in alike if _is_same_view(one, tensor) and same_cuts(its, own)), None)
        new = successor(tensor, own, alias)
        built[id(tensor)] = (tensor, new)
        alike.append((tensor, new, own))
    for name, shift in contents.shifts.items():
        tensor, new = _pending(model, name, built, named)
        if new.shape != shift.shape:
            raise ShapeMismatchError(
                f"the plan adds a shift of shape {tuple(shift.shape)} to `{name}`; it will have {tuple(new.shape)}"
            )
        new.detach().add_(shift.to(new))
        built[id(tensor)] = (tensor, new)
    for name, factor in contents.scales.items():
        tensor, new = _pending(model, name, built, named)
        if isinstance(factor, Tensor) and not broadcasts(factor.shape, new.shape):
            raise ShapeMismatchError(
                f"the plan scales `{name}` by a factor of shape {tuple(factor.shape)}; it will have {tuple(new.shape)}"
            )
        new.detach().mul_(factor.to(new.device) if isinstance(factor, Tensor) else factor)
        built[id(tensor)] = (tensor, new)
    for name, value in contents.values.items():
        tensor, new = _pending(model, name, built, named)
        if new.shape != value.shape:
            raise ShapeMismatchError(
                f"the plan gives `{name}` values of shape {tuple(value.shape)}; it will have {tuple(new.shape)}"
            )
        new.detach().copy_(value)
        built[id(tensor)] = (tensor, new)
    return list(built.values())


def broadcasts(shape: Sequence[int], to: Sequence[int]) -> bool:
    """Whether a tensor of ``shape`` applies to one of shape ``to`` without making it larger."""
    return len(shape) <= len(to) and all(one in (1, size) for one, size in zip(shape[::-1], to[::-1], strict=False))


def _pending(
    model: nn.Module, name: str, built: Mapping[int, tuple[Tensor, Tensor]], named: Mapping[str, Tensor]
) -> tuple[Tensor, Tensor]:
    """The tensor called ``name`` and what it will hold."""
    place = locate(model, name, named)
    if place is None:
        raise PlanMismatchError(f"the plan sets `{name}`, which this {type(model).__name__} lacks")
    tensor = place[1]
    return built.get(id(tensor)) or (tensor, successor(tensor, {}))


def _address(tensor: Tensor) -> int:
    """Where the memory of a tensor starts; a number of its own where that is not real."""
    if tensor.layout is not torch.strided or tensor.is_meta or isinstance(tensor, FakeTensor):
        return -id(tensor)
    return tensor.data_ptr() or -id(tensor)


def _is_same_view(first: Tensor, second: Tensor) -> bool:
    """Whether tensors whose memory starts at the same place are the same view of it."""
    return (
        first.shape == second.shape
        and first.stride() == second.stride()
        and first.dtype == second.dtype
        and first.device == second.device
    )
