r"""What an error in a weight costs at the outputs: moments of its inputs, and of the gradients at its outputs."""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from netopt.errors import MissingDataError
from netopt.importance.activations import float_outputs
from netopt.importance.contractions import Contraction
from netopt.importance.differentiation import Differentiation
from netopt.importance.elimination import Consumer, eliminate, shrunk
from netopt.importance.inputs import Matrix, filled_like
from netopt.importance.scoring import Member, ScoredAxes, Scoring
from netopt.model.parameters import places
from netopt.model.ranks import add_up_all, add_up_numbers
from netopt.progress import bar

__all__ = ["reconstruction_scores"]

ROWS_PER_COLUMN, ROWS_AT_LEAST = 6, 3000
COLUMNS_AT_MOST = 1300
"""A convolution with more columns has one moment for all entries of its kernel."""

OUTPUTS_AT_MOST = 4096
"""Of more outputs, only the squares of their gradients are kept."""


def reconstruction_scores(model: nn.Module, axes: ScoredAxes, scoring: Scoring) -> tuple[dict[str, Tensor], float]:
    """What is lost when neurons go and everything that reads them is refitted, by axis.

    Sums of the lowest scores estimate the squared change of a sample's outputs, or of its loss with ``loss_fn``.

    Args:
        model: Run in eval mode, forwards once and backwards twice on every batch, and given back as it was.
        axes: Whose neurons are scored.
        scoring: The data; with ``loss_fn`` gradients are those of the loss, else those of ``outputs``.

    Returns:
        Scores, and the outputs' sum of squares, a sample; 0 with ``loss_fn``.

    Raises:
        MissingDataError: No output depends on any weight in a differentiable way.
    """
    watched = {
        name: place
        for name, place in places(model).items()
        if place.parameter.is_floating_point() and place.parameter.dim() > 1
    }
    seen = _Moments(axes.members, axes.sizes, model, watched, scoring.loss_fn, scoring.outputs or float_outputs)
    assert scoring.data is not None
    seen.run(scoring.data, scoring.progress)
    if not seen.is_differentiable:
        raise MissingDataError("no output depends on the weights in a differentiable way; nothing can be scored.")
    shown = bar(axes.sizes.items(), "elimination", shown=scoring.progress, unit="axis")
    return {name: seen.scores(axes.members[name], size) for name, size in shown}, seen.square / seen.samples


@dataclass
class _Inputs:
    """Sums over rows of what one matrix reads, float64."""

    count: int
    total: Tensor
    moment: Tensor
    samples: int


class _Moments(Differentiation):
    """Moments of the weights that read an axis, batch by batch, and gates of those that make one nothing reads."""

    def __init__(self, members: Mapping[str, Sequence[Member]], sizes: Mapping[str, int], *args: Any) -> None:
        super().__init__(*args)
        self.members, self.sizes = members, sizes
        self.readers: dict[tuple[str, Matrix], bool] = {}
        self.inputs: dict[str, _Inputs] = {}
        self.gradients: dict[str, Tensor] = {}
        self.gates: dict[str, Tensor] = {}
        self.gated: set[str] | None = None
        self.is_differentiable = False

    def see_inputs(self, seen: Contraction) -> None:
        if self._is_reader(seen.reading.name, seen.reading.matrix):
            self._add_inputs(seen)

    def see_gradient(self, name: str, gradient: Tensor) -> None:
        self.is_differentiable = True
        if self.gated is None:
            self.gated = self._gated_names()
        gradient = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
        if name in self.inputs:
            self._add_gradient(name, gradient)
        if name in self.gated:
            self._add_gate(name, gradient, self.produced.get(name, []))

    def add_up(self) -> None:
        super().add_up()
        self.is_differentiable = bool(add_up_numbers(self.is_differentiable)[0])
        self.gradients, self.gates = add_up_all(self.gradients), add_up_all(self.gates)
        counts = {name: torch.tensor([one.count, one.samples]) for name, one in self.inputs.items()}
        totals, moments = (
            add_up_all({name: getattr(one, part) for name, one in self.inputs.items()}) for part in ("total", "moment")
        )
        self.inputs = {
            name: _Inputs(int(count), totals[name], moments[name], int(samples))
            for name, (count, samples) in add_up_all(counts).items()
        }

    def _add_inputs(self, seen: Contraction) -> None:
        name, matrix = seen.reading.name, seen.reading.matrix
        rows = torch.arange(seen.count, device=seen.output.device)
        if seen.reading.convolution is None and self.mask is not None and self.mask.numel() == len(rows):
            rows = rows[self.mask.flatten().to(rows.device).bool()]
        wanted = (ROWS_PER_COLUMN * min(matrix.columns, COLUMNS_AT_MOST) + ROWS_AT_LEAST) // 4
        if len(rows) > wanted:
            seed = torch.Generator().manual_seed(zlib.crc32(f"{name} {self.batch}".encode()))
            rows = rows[torch.randperm(len(rows), generator=seed)[:wanted].sort().values.to(rows.device)]
        with torch.no_grad():
            x = seen.inputs(rows)
            x = x.to(torch.promote_types(x.dtype, torch.float32))
            if _is_wide(matrix):
                x = x.unflatten(2, (-1, matrix.size[-1])).flatten(1, 2)
            known = self.inputs.get(name)
            positions = max(1, seen.count // max(self.count, 1))
            found = _Inputs(
                x.shape[1],
                x.double().sum(1).cpu(),
                (x.mT @ x).double().cpu(),
                min(len(rows), self.count * min(positions, 16)),
            )
            if known is None:
                self.inputs[name] = found
            elif known.moment.shape == found.moment.shape:
                known.count += found.count
                known.total += found.total
                known.moment += found.moment
                known.samples += found.samples

    def _add_gradient(self, name: str, gradient: Tensor) -> None:
        """Adds a gradient at the outputs of a weight, ``(groups, rows, outputs)``."""
        wide = gradient.shape[-1] > OUTPUTS_AT_MOST
        moment = (gradient.square().sum(1) if wide else gradient.mT @ gradient).double().cpu() / self.passes
        known = self.gradients.get(name)
        self.gradients[name] = moment if known is None or known.shape != moment.shape else known + moment

    def _add_gate(self, name: str, gradient: Tensor, produced: Sequence[Contraction]) -> None:
        count = self.count
        if len(produced) != 1 or produced[0].count != gradient.shape[1] or gradient.shape[1] % count:
            return
        values = produced[0].outputs(torch.arange(gradient.shape[1], device=gradient.device))
        change = gradient * values
        if self.loss_fn is None:  # whose gradients would cancel between the positions of a sample
            change = change.unflatten(1, (count, -1)).sum(2)
        wide = gradient.shape[-1] > OUTPUTS_AT_MOST
        gate = change.square().sum(1) if wide else torch.einsum("gni,gnj->gij", change, change)
        gate, known = gate.double().cpu() / self.passes, self.gates.get(name)
        self.gates[name] = gate if known is None or known.shape != gate.shape else known + gate

    def _is_reader(self, name: str, matrix: Matrix) -> bool:
        """Whether this matrix reads an axis that is scored."""
        key = name, matrix
        if key not in self.readers:
            mine = [(one, self.sizes[axis]) for axis, found in self.members.items() for one in found if one[0] == name]
            self.readers[key] = any(self._reads(one, matrix, size) for one, size in mine)
        return self.readers[key]

    def _reads(self, member: Member, matrix: Matrix, size: int) -> bool:
        """Whether a matrix of this weight reads an axis along this dimension."""
        owner = self._columns_owned(member, matrix)
        return owner is not None and any(_columns(one, size) is not None for one in owner)

    def _gated_names(self) -> set[str]:
        """The weights that make an axis which no matrix reads."""

        def reads(member: Member, size: int) -> bool:
            use = self.uses.get(member[0])
            return use is not None and any(self._reads(member, one, size) for one in use.matrices)

        return {
            name
            for axis, found in self.members.items()
            if not any(reads(one, self.sizes[axis]) for one in found)
            for name, _, _ in found
        }

    # From moments to scores.

    def scores(self, members: Sequence[Member], size: int) -> Tensor:
        """One score for each neuron of an axis."""
        consumers = [one for member in members for one in self._consumers(member, size)]
        return eliminate(consumers, size) if consumers else self._gated(members, size)

    def _consumers(self, member: Member, size: int) -> Iterator[Consumer]:
        """The matrices that read an axis along this dimension of a weight."""
        name = member[0]
        use, inputs, gradient = self.uses.get(name), self.inputs.get(name), self.gradients.get(name)
        if use is None or inputs is None or gradient is None or len(use.matrices) != 1:
            return
        matrix = use.matrices[0]
        owner = self._columns_owned(member, matrix)
        if gradient.shape[:2] != matrix.size[:2] or owner is None:
            return
        groups, taps = matrix.size[0], math.prod(matrix.size[2:-1]) if _is_wide(matrix) else 1
        weight = matrix.rows(self._value(name)).double().cpu().unflatten(2, (taps, -1))
        for group in range(groups):
            columns = _columns(owner[group], size)
            if columns is None:
                continue
            rows = weight[group].unbind(1)
            curvature = torch.stack([_seen_through(gradient[group], one) for one in rows]).sum(0) / self.samples
            mean, moment = inputs.total[group] / inputs.count, inputs.moment[group] / inputs.count
            if use.offset is not None:
                moment = moment - torch.outer(mean, mean)
            yield Consumer(curvature, shrunk(moment, max(inputs.samples, 2)), columns)

    def _value(self, name: str) -> Tensor:
        parameter = self.watched[name].parameter.detach()
        return filled_like(parameter, 0).copy_(self.watched[name].value)

    def _columns_owned(self, member: Member, matrix: Matrix) -> Tensor | None:
        """The axis's position of each column, ``(groups, columns)``; ``None`` if the axis is not along the columns."""
        owners = self._owners(member[0], matrix, member[1], member[2])
        if not bool((owners == owners[:, :1]).all()):
            return None
        owner = owners[:, 0].cpu()
        if matrix.size[0] > 1 and bool((owner == owner[:, :1]).all()):
            return None  # a channel by itself: what it makes of the axis is read elsewhere
        taps = math.prod(matrix.size[2:-1]) if _is_wide(matrix) else 1
        return owner.unflatten(1, (taps, -1))[:, 0]

    def _owners(self, name: str, matrix: Matrix, dim: int, positions: Tensor) -> Tensor:
        """The axis's position of every entry of a matrix, -1 where it has none."""
        parameter = self.watched[name].parameter.detach()
        shape = [-1 if index == dim else 1 for index in range(parameter.dim())]
        spread = positions.to(parameter.device).view(shape).expand(parameter.shape)
        return matrix.rows(filled_like(parameter, 0, torch.int64).copy_(spread))

    def _gate(self, member: Member, size: int) -> Tensor | None:
        """The part of the weight that makes an axis along this dimension, times the number of samples."""
        name, dim, positions = member
        gate, use = self.gates.get(name), self.uses.get(name)
        if gate is None or use is None or len(use.matrices) != 1:
            return None
        owners = self._owners(name, use.matrices[0], dim, positions).cpu()
        if gate.shape[:2] != owners.shape[:2] or not bool((owners == owners[:, :, :1]).all()):
            return None
        total = torch.zeros(size, dtype=torch.float64)
        for group, owner in enumerate(owners[:, :, 0]):
            here = torch.nonzero(owner >= 0).flatten()
            if gate.dim() == 2:
                total.index_add_(0, owner[here], gate[group][here])
                continue
            spread = torch.zeros(size, len(owner), dtype=torch.float64)
            spread[owner[here], here] = 1
            total += ((spread @ gate[group]) * spread).sum(1)
        return total

    def _gated(self, members: Sequence[Member], size: int) -> Tensor:
        """Of an axis that no matrix reads: the squared change of the outputs, to first order, when a neuron is zero.

        Queries and keys each show all of what their product changes.
        """
        found = [gate for member in members if (gate := self._gate(member, size)) is not None]
        if found:
            return torch.stack(found).sum(0) / min(len(found), 2) / self.samples
        # Nothing is known of it but its weights.
        total = torch.zeros(size, dtype=torch.float64)
        for name, dim, positions in members:
            if name in self.watched:
                squares = self._value(name).double().square().movedim(dim, 0).flatten(1).sum(1).cpu()
                here = positions >= 0
                total.index_add_(0, positions[here], squares[here])
        return total


def _columns(owner: Tensor, size: int) -> Tensor | None:
    """Which columns each neuron owns, ``(size, columns of one)``; ``None`` if some own more than others."""
    here = torch.nonzero(owner >= 0).flatten()
    if not len(here) or len(here) % size:
        return None
    each = len(here) // size
    if not bool((torch.bincount(owner[here], minlength=size) == each).all()):
        return None
    return here[torch.sort(owner[here], stable=True).indices].view(size, each).cpu()


def _seen_through(moment: Tensor, rows: Tensor) -> Tensor:
    """A moment of outputs, or its diagonal alone, as one of the columns of a matrix."""
    return rows.T @ (moment[:, None] * rows if moment.dim() == 1 else moment @ rows)


def _is_wide(matrix: Matrix) -> bool:
    return len(matrix.size) > 3 and matrix.columns > COLUMNS_AT_MOST
