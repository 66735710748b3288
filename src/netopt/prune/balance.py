r"""A basis of heads in which few positions carry most of what attention computes; the model computes the same.

Within a head, values are read by the output projection alone, and queries and keys by one another alone. For any
invertible :math:`A` the rows :math:`A P` on one side and :math:`A^{-\top} Q` on the other give the same product. The
balanced :math:`A` makes the moments of both sides the same diagonal matrix: cutting positions is then the best
approximation of low rank there is, and what is cut tells how much is lost.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from netopt import batches
from netopt.axes import Axes, Axis, find_axes
from netopt.batches import Data, Inputs, tensors
from netopt.importance.activations import recordable
from netopt.importance.contractions import Contraction, ContractionWatch, Use, Uses
from netopt.model.kernels import Unfused
from netopt.model.parameters import Place, places
from netopt.model.restore import restored
from netopt.model.signals import UndoLog, entered
from netopt.prune.repair import calibration

__all__ = ["BalanceReport", "balance_heads"]

TOLERANCE = 1e-3
"""Outputs that differ by less, as a share of their norm, are the same to rounding."""

DAMPENING = 1e-4
"""Of the mean moment, added to all."""


@dataclass(frozen=True)
class BalanceReport:
    """What became of the axes of head positions.

    Attributes:
        spread: For each axis that was balanced, how much of its product is carried by the better half of its positions.
        left: For each that stays as it was, the reason.
    """

    spread: Mapping[str, float]
    left: Mapping[str, str]

    def __str__(self) -> str:
        lines = [f"balanced: {len(self.spread)} of {len(self.spread) + len(self.left)} axes of head positions"]
        lines += [f"  {name}  {share:.1%} on the better half" for name, share in self.spread.items()]
        return "\n".join([*lines, *(f"  {name}  {why}" for name, why in self.left.items())])


def balance_heads(model: nn.Module, example_inputs: Inputs, data: Data) -> BalanceReport:
    r"""Changes the basis of values, and of queries and keys, within each head, in place; the outputs stay the same.

    Head positions cost less afterwards: call it before :func:`netopt.prune_neurons` or
    :func:`netopt.prune.allocation.reconstruction_scores`. Queries and keys that are rotated by their position or
    normalised stay as they are, and so does what cannot be shown to compute the same on ``example_inputs``.

    Args:
        model: A model with attention; an optimizer's state would belong to the old basis.
        example_inputs: Of one forward call.
        data: Calibration batches.

    Raises:
        EmptyDataError: ``data`` holds no batch.

    References:
        Principal component analysis in linear systems (Moore, 1981), https://doi.org/10.1109/TAC.1981.1102568;
        MoDeGPT (Lin et al., 2024), https://arxiv.org/abs/2408.09632

    Example:
        >>> import netopt
        >>> layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval()
        >>> x = torch.randn(8, 5, 16)
        >>> before = layer(x)
        >>> report = netopt.balance_heads(layer, x, [x])
        >>> len(report.spread), torch.allclose(layer(x), before, atol=1e-4)
        (2, True)
    """
    held = calibration(data)
    with torch.inference_mode(False):
        example_inputs = recordable(example_inputs)
        axes = find_axes(model, example_inputs)
    with entered(torch.inference_mode(False), torch.no_grad()):
        found = _Balance(model, axes, example_inputs)
        if not found.pairs:
            return BalanceReport({}, found.left)
        found.see(held)
        return UndoLog().run(found.change)


@dataclass(frozen=True)
class _Side:
    """Tensors in which an axis appears on one side of its product: a weight, and the bias added to what it makes."""

    weight: str
    dims: Mapping[str, int]
    reads: bool


@dataclass(frozen=True)
class _Pair:
    axis: Axis
    sides: tuple[_Side, _Side]
    heads: Axis | None


class _Balance:
    def __init__(self, model: nn.Module, axes: Axes, example_inputs: Inputs) -> None:
        self.model, self.axes, self.inputs = model, axes, example_inputs
        self.weights: dict[str, Place] = {
            name: place for name, place in places(model).items() if place.mask is None and place.parameter.dim() > 1
        }
        self.tensors = dict(model.named_parameters())
        self.moments: dict[str, Tensor] = {}
        self.left: dict[str, str] = {}
        self.uses = self._survey()
        chosen = [axis for axis in axes if axis.kind == "head_dim" and axis.frozen is None]
        self.pairs = [pair for axis in chosen if (pair := self._pair(axis)) is not None]

    def _survey(self) -> dict[str, Use]:
        uses = Uses(self.model)
        with restored(self.model) as log:
            log.enter_context(Unfused(attention=False))
            self.model.eval()
            with ContractionWatch(self.weights, uses.see, uses.after):
                batches.call(self.model, self.inputs)
        return uses.found

    def _pair(self, axis: Axis) -> _Pair | None:
        """The two sides of an axis's product; ``None``, and the reason noted, if there are not two alone."""
        dims = {member.tensor: member.dim for member in axis.members}
        used = [name for name in dims if name in self.weights and name in self.uses and self.uses[name].count == 1]
        biases = {name: use.offset.name for name in used if (use := self.uses[name]).offset is not None}
        sides = []
        for name in used:
            reads = self._is_read(name, dims[name])
            own = {name: dims[name]}
            if not reads and biases.get(name) in dims:
                own[biases[name]] = dims[biases[name]]
            sides.append(_Side(name, own, reads))
        covered = {name for side in sides for name in side.dims}
        if len(axis.members) != len(dims) or len(sides) != 2 or covered != dims.keys() or sides[0].reads:
            self.left[axis.name] = "is used by more than the two sides of a product"
            return None
        for heads in self.axes:
            if heads.kind in ("heads", "kv_heads") and all(self._along(heads, side) is not None for side in sides):
                return _Pair(axis, (sides[0], sides[1]), heads)
        return _Pair(axis, (sides[0], sides[1]), None)

    def _is_read(self, name: str, dim: int) -> bool:
        """Whether a weight is multiplied along this dimension, instead of making it."""
        matrix, parameter = self.uses[name].matrices[0], self.weights[name].parameter.detach()
        shape = [-1 if index == dim else 1 for index in range(parameter.dim())]
        spread = torch.arange(parameter.shape[dim]).to(parameter.device).view(shape).expand(parameter.shape)
        rows = matrix.rows(torch.empty_like(parameter, dtype=torch.int64).copy_(spread))
        return bool((rows == rows[:, :1]).all())

    def _along(self, axis: Axis, side: _Side) -> Tensor | None:
        """The axis's position at each index of the dimension of a side's weight."""
        for name, dim, positions in self.axes.members(axis):
            if name == side.weight and dim == side.dims[name]:
                return positions
        return None

    def see(self, held: Sequence[batches.Batch]) -> None:
        """Adds up moments of what makes the first side, and the second, or reads it."""
        watched = {side.weight: self.weights[side.weight] for pair in self.pairs for side in pair.sides}
        reads = {side.weight: side.reads for pair in self.pairs for side in pair.sides}

        def add(seen: Contraction) -> bool:
            if not seen.is_sum:
                rows = torch.arange(seen.count, device=seen.output.device)
                found = (seen.inputs(rows) if reads[seen.reading.name] else seen.outputs(rows))[0]
                moment = (found.mT @ found).double().cpu()
                self.moments[seen.reading.name] = self.moments.get(seen.reading.name, 0) + moment
            return False

        with restored(self.model) as log:
            log.enter_context(Unfused(attention=False))
            self.model.eval()
            for batch in held:
                with ContractionWatch(watched, add):
                    batches.feed(self.model, batch)

    def change(self, log: UndoLog) -> BalanceReport:
        """Changes every axis, and takes back what does not compute the same."""
        before = self._outputs()
        spread: dict[str, float] = {}
        for pair in self.pairs:
            names = {name for side in pair.sides for name in side.dims}
            old = {name: self.tensors[name].detach().clone() for name in names}
            log.callback(self._write, old, on=BaseException)
            share = self._balance(pair)
            if share is None or not _agree(before, self._outputs()):
                self._write(old)
                self.left[pair.axis.name] = "does not compute the same in another basis"
            else:
                spread[pair.axis.name] = share
        return BalanceReport(spread, self.left)

    def _write(self, values: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            for name, value in values.items():
                self.tensors[name].copy_(value)

    def _outputs(self) -> list[Tensor]:
        with restored(self.model):
            self.model.eval()
            return [
                one.double() for _, one in tensors(batches.call(self.model, self.inputs)) if one.is_floating_point()
            ]

    def _balance(self, pair: _Pair) -> float | None:
        """Changes the basis of every head; the share of the better half, ``None`` where heads do not fit together."""
        first, second = (list(self._blocks(pair, side)) for side in pair.sides)
        if {len(one) for blocks in (first, second) for one in blocks} != {pair.axis.size}:
            return None
        owners = [[owner for owner, _ in self._numbered(pair, side)] for side in pair.sides]
        size, best, whole = pair.axis.size, 0.0, 0.0
        for head in dict.fromkeys(owners[0]):
            mine = [one for owner, one in zip(owners[0], first, strict=True) if owner == head]
            other = [one for owner, one in zip(owners[1], second, strict=True) if owner == head]
            if not other:
                return None
            if not self._is_seen(pair):
                return None
            left = self._moment(pair.sides[0], pair.sides[1], mine, other)
            if not all(bool(torch.isfinite(one).all()) and float(one.trace()) > 0 for one in left):
                return None
            change, values = balanced(*left)
            inverse = torch.linalg.inv(change).T
            for side, blocks, matrix in zip(pair.sides, (mine, other), (change, inverse), strict=True):
                for name, dim in side.dims.items():
                    self._multiply(self.tensors[name].detach(), dim, blocks, matrix)
            best, whole = best + float(values[: (size + 1) // 2].sum()), whole + float(values.sum())
        return best / max(whole, 1e-300)

    def _moment(
        self, first: _Side, second: _Side, mine: Sequence[Tensor], other: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """What either side is, seen from the axis: what it brings, or what it is multiplied with."""
        if second.reads:  # what values become is known where it is read
            weight = self.tensors[second.weight].detach().double().cpu()
            weight = weight.movedim(second.dims[second.weight], 0).flatten(1)
            return self._blocks_of(second, other), torch.stack([weight[at] @ weight[at].T for at in other]).sum(0)
        return self._blocks_of(first, mine), self._blocks_of(second, other)

    def _is_seen(self, pair: _Pair) -> bool:
        first, second = pair.sides
        return second.weight in self.moments and (second.reads or first.weight in self.moments)

    def _blocks_of(self, side: _Side, blocks: Sequence[Tensor]) -> Tensor:
        moment = self.moments[side.weight]
        return torch.stack([moment[at][:, at] for at in blocks]).sum(0)

    def _blocks(self, pair: _Pair, side: _Side) -> Iterator[Tensor]:
        return (block for _, block in self._numbered(pair, side))

    def _numbered(self, pair: _Pair, side: _Side) -> Iterator[tuple[int, Tensor]]:
        """Indices along a side's weight in the order of the axis's positions, head by head, and whose they are."""
        along = self._along(pair.axis, side)
        heads = None if pair.heads is None else self._along(pair.heads, side)
        assert along is not None
        owner = torch.zeros_like(along) if heads is None else heads
        for head in range(int(owner.max()) + 1):
            here = torch.nonzero((along >= 0) & (owner == head)).flatten()
            ordered = here[torch.sort(along[here], stable=True).indices]
            times = len(here) // pair.axis.size
            for turn in range(times):
                yield head, ordered.view(-1, max(times, 1))[:, turn] if len(here) % pair.axis.size == 0 else here

    @staticmethod
    def _multiply(tensor: Tensor, dim: int, blocks: Sequence[Tensor], matrix: Tensor) -> None:
        moved = tensor.movedim(dim, 0)
        for block in blocks:
            at = block.to(tensor.device)
            moved[at] = torch.tensordot(matrix.to(tensor.device), moved[at].double(), 1).to(tensor.dtype)


def balanced(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    r"""The :math:`A` that makes :math:`A M_1 A^\top` and :math:`A^{-\top} M_2 A^{-1}` the same diagonal, large first.

    Example:
        >>> x, y = torch.randn(9, 4).double(), torch.randn(9, 4).double()
        >>> change, values = balanced(x.T @ x, y.T @ y)
        >>> torch.allclose(change @ x.T @ x @ change.T, torch.diag(values), rtol=0.01, atol=0.01)
        True
    """
    first, second = (one + DAMPENING * one.diagonal().mean() * torch.eye(len(one)).to(one) for one in (first, second))
    factor = torch.linalg.cholesky(first)
    squares, vectors = torch.linalg.eigh(factor.T @ second @ factor)
    values, vectors = squares.flip(0).clamp(min=1e-300).sqrt(), vectors.flip(1)
    return values.sqrt()[:, None] * (vectors.T @ torch.linalg.inv(factor)), values


def _agree(before: Sequence[Tensor], after: Sequence[Tensor]) -> bool:
    pairs = zip(before, after, strict=True)
    return all(float((one - two).norm()) <= TOLERANCE * float(one.norm()) + 1e-12 for one, two in pairs)
