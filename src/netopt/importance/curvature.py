r"""What an error in a weight costs at the outputs: moments of its inputs, and of the gradients at its outputs.

Inputs are seen forwards, gradients backwards: there the gradient at a weight's outputs is what it is multiplied with.
The gradients are of the outputs times random signs, whose expected square is the change of all outputs; or of the loss.
"""

from __future__ import annotations

import contextlib
import math
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from netopt import batches
from netopt.batches import Batch, Data
from netopt.errors import MissingDataError
from netopt.importance.contractions import Contraction, ContractionWatch, Use, Uses
from netopt.importance.elimination import Consumer, eliminate, shrunk
from netopt.importance.inputs import InputWatch, Matrix
from netopt.model.kernels import Unfused
from netopt.model.parameters import Place, places
from netopt.model.ranks import add_up_all, add_up_numbers, is_shared
from netopt.model.restore import restored
from netopt.model.writes import CopyOnWrite
from netopt.progress import bar

__all__ = ["padding", "reconstruction_scores", "squares"]

aten = torch.ops.aten
ROWS_PER_COLUMN, ROWS_AT_LEAST = 6, 3000
COLUMNS_AT_MOST = 1300
"""A convolution with more columns has one moment for all entries of its kernel."""

OUTPUTS_AT_MOST = 4096
"""Of more outputs, only the squares of their gradients are kept."""

PROBES = 2

Member = tuple[str, int, Tensor]


def reconstruction_scores(
    model: nn.Module,
    members: Mapping[str, Sequence[Member]],
    sizes: Mapping[str, int],
    data: Data,
    *,
    loss_fn: Callable[[Any, Any], Tensor] | None = None,
    outputs: Callable[[Any], list[Tensor]],
    progress: bool = False,
) -> tuple[dict[str, Tensor], float]:
    """What is lost when neurons go and everything that reads them is refitted, by axis.

    Sums of the lowest scores estimate the squared change of a sample's outputs, or of its loss with ``loss_fn``.

    Args:
        model: Run in eval mode, forwards once and backwards twice on every batch, and given back as it was.
        members: Where each axis appears among the model's tensors.
        sizes: Number of neurons of each axis.
        data: Batches of inputs.
        loss_fn: If given, gradients are those of the loss.
        outputs: From the forward's result to the outputs that count.
        progress: Whether to show a progress bar.

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
    writes = CopyOnWrite(model.parameters())
    with restored(model, writes=False) as log:
        log.callback(writes.undo)
        log.enter_context(torch.inference_mode(False), Unfused(attention=False))
        with writes.saving():
            model.eval()
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        seen = _Pass(model, watched, loss_fn, outputs, writes)
        shown = bar(batches.iterate(data), "moments", shown=progress, total=batches.steps(data))
        for index, batch in enumerate(shown):
            seen.see(index, batch)
        seen.add_up()
        if not seen.gradients:
            raise MissingDataError("no output depends on the weights in a differentiable way; nothing can be scored.")
        axes = bar(sizes.items(), "elimination", shown=progress, unit="axis")
        return {name: seen.scores(members[name], size) for name, size in axes}, seen.square / seen.samples


@dataclass
class _Inputs:
    """Sums over rows of what one matrix reads, float64."""

    count: int
    total: Tensor
    moment: Tensor
    samples: int


class _Pass:
    """Moments of all weights, batch by batch."""

    def __init__(
        self,
        model: nn.Module,
        watched: Mapping[str, Place],
        loss_fn: Callable[[Any, Any], Tensor] | None,
        outputs: Callable[[Any], list[Tensor]],
        writes: CopyOnWrite,
    ) -> None:
        self.model, self.watched, self.loss_fn, self.outputs = model, watched, loss_fn, outputs
        self.writes = writes
        self.uses: dict[str, Use] = {}
        self.inputs: dict[str, _Inputs] = {}
        self.gradients: dict[str, Tensor] = {}
        self.gates: dict[str, Tensor] = {}
        self.samples = 0
        self.square = 0.0
        self.generator = torch.Generator().manual_seed(0)

    def see(self, index: int, batch: Batch) -> None:
        """Runs the model forwards once and backwards twice on a batch."""
        inputs, targets = batches.split(batch)
        count = max((len(one) for _, one in batches.tensors(inputs) if one.dim() > 0), default=1)
        uses, produced = Uses(self.model), {}
        self.mask = padding(batch)

        def visit(contraction: Contraction) -> bool:
            uses.see(contraction)
            if not contraction.reading.counts and not contraction.is_sum:
                self._add_inputs(index, count, contraction)
                produced.setdefault(contraction.reading.name, []).append(_bare(contraction))
            return False

        with _sources(self.model, inputs) as (given, sources), torch.enable_grad():
            with ContractionWatch(self.watched, visit, uses.after), self.writes.first_run():
                result = batches.feed(self.model, given if isinstance(given, (Tensor, Mapping)) else (given, None))
            self.uses = uses.found | self.uses
            found = [one for one in self.outputs(result) if one.requires_grad]
            if not found:
                return
            self.samples += count
            if self.loss_fn is None:
                self.square += squares(found, self.mask)
            loss = None if self.loss_fn is None else self.loss_fn(result, targets) * count
            passes = 1 if loss is not None else PROBES
            for turn in range(passes):
                value = self._signed(found) if loss is None else loss

                def add(name: str, gradient: Tensor) -> None:
                    self._add_gradient(name, gradient, passes, count, produced)

                with _GradientWatch(self.watched, add):
                    torch.autograd.grad(value, sources, retain_graph=turn < passes - 1, allow_unused=True)

    def add_up(self) -> None:
        """Takes in what other processes have seen."""
        if not is_shared():
            return
        self.gradients, self.gates = add_up_all(self.gradients), add_up_all(self.gates)
        self.samples, self.square = round(add_up_numbers(self.samples)[0]), add_up_numbers(self.square)[0]
        counts = {name: torch.tensor([one.count, one.samples]) for name, one in self.inputs.items()}
        totals, moments = (
            add_up_all({name: getattr(one, part) for name, one in self.inputs.items()}) for part in ("total", "moment")
        )
        self.inputs = {
            name: _Inputs(int(count), totals[name], moments[name], int(samples))
            for name, (count, samples) in add_up_all(counts).items()
        }

    def _signed(self, found: Sequence[Tensor]) -> Tensor:
        """The outputs times random signs; those of padding count for nothing."""
        total = found[0].new_zeros(())
        for one in found:
            signs = torch.randint(0, 2, one.shape, generator=self.generator).to(one) * 2 - 1
            mask = self.mask
            if mask is not None and one.dim() >= 2 and one.shape[:2] == mask.shape:
                signs = signs * mask.to(one).view(*mask.shape, *[1] * (one.dim() - 2))
            total = total + (one * signs).sum()
        return total

    def _add_inputs(self, index: int, count: int, seen: Contraction) -> None:
        name, matrix = seen.reading.name, seen.reading.matrix
        rows = torch.arange(seen.count, device=seen.output.device)
        if seen.reading.convolution is None and self.mask is not None and self.mask.numel() == len(rows):
            rows = rows[self.mask.flatten().to(rows.device).bool()]
        wanted = (ROWS_PER_COLUMN * min(matrix.columns, COLUMNS_AT_MOST) + ROWS_AT_LEAST) // 4
        if len(rows) > wanted:
            seed = torch.Generator().manual_seed(zlib.crc32(f"{name} {index}".encode()))
            rows = rows[torch.randperm(len(rows), generator=seed)[:wanted].sort().values.to(rows.device)]
        with torch.no_grad():
            x = seen.inputs(rows)
            x = x.to(torch.promote_types(x.dtype, torch.float32))
            if _is_wide(matrix):
                x = x.unflatten(2, (-1, matrix.size[-1])).flatten(1, 2)
            known = self.inputs.get(name)
            positions = max(1, seen.count // max(count, 1))
            found = _Inputs(
                x.shape[1],
                x.double().sum(1).cpu(),
                (x.mT @ x).double().cpu(),
                min(len(rows), count * min(positions, 16)),
            )
            if known is None:
                self.inputs[name] = found
            elif known.moment.shape == found.moment.shape:
                known.count += found.count
                known.total += found.total
                known.moment += found.moment
                known.samples += found.samples

    def _add_gradient(
        self, name: str, gradient: Tensor, passes: int, count: int, produced: dict[str, list[Contraction]]
    ) -> None:
        """Adds a gradient at the outputs of a weight, ``(groups, rows, outputs)``."""
        gradient = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
        width = gradient.shape[-1]
        moment = gradient.square().sum(1) if width > OUTPUTS_AT_MOST else gradient.mT @ gradient
        known = self.gradients.get(name)
        moment = moment.double().cpu() / passes
        self.gradients[name] = moment if known is None or known.shape != moment.shape else known + moment
        several = produced.get(name, [])
        if len(several) != 1 or several[0].count != gradient.shape[1] or gradient.shape[1] % count:
            return
        values = several[0].outputs(torch.arange(gradient.shape[1], device=gradient.device))
        change = (gradient * values).unflatten(1, (count, -1)).sum(2)
        gate = torch.einsum("gni,gnj->gij", change, change) if width <= OUTPUTS_AT_MOST else change.square().sum(1)
        known = self.gates.get(name)
        gate = gate.double().cpu() / passes
        self.gates[name] = gate if known is None or known.shape != gate.shape else known + gate

    # From moments to scores.

    def scores(self, members: Sequence[Member], size: int) -> Tensor:
        """One score for each neuron of an axis."""
        consumers = [one for member in members for one in self._consumers(member, size)]
        return eliminate(consumers, size) if consumers else self._gated(members, size)

    def _consumers(self, member: Member, size: int) -> Iterator[Consumer]:
        """The matrices that read an axis along this dimension of a weight."""
        name, dim, positions = member
        use, inputs, gradient = self.uses.get(name), self.inputs.get(name), self.gradients.get(name)
        if use is None or inputs is None or gradient is None or len(use.matrices) != 1:
            return
        matrix = use.matrices[0]
        owners = self._owners(name, matrix, dim, positions)
        if gradient.shape[:2] != matrix.size[:2] or not bool((owners == owners[:, :1]).all()):
            return
        owner, groups = owners[:, 0].cpu(), matrix.size[0]
        if groups > 1 and bool((owner == owner[:, :1]).all()):
            return  # a channel by itself: what it makes of the axis is read elsewhere
        taps = math.prod(matrix.size[2:-1]) if _is_wide(matrix) else 1
        owner = owner.unflatten(1, (taps, -1))[:, 0]
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
        return torch.empty_like(parameter).copy_(self.watched[name].value)

    def _owners(self, name: str, matrix: Matrix, dim: int, positions: Tensor) -> Tensor:
        """The axis's position of every entry of a matrix, -1 where it has none."""
        parameter = self.watched[name].parameter.detach()
        shape = [-1 if index == dim else 1 for index in range(parameter.dim())]
        spread = positions.to(parameter.device).view(shape).expand(parameter.shape)
        return matrix.rows(torch.empty_like(parameter, dtype=torch.int64).copy_(spread))

    def _gated(self, members: Sequence[Member], size: int) -> Tensor:
        """Of an axis that no matrix reads: the squared change of the outputs, to first order, when a neuron is zero."""
        for name, dim, positions in members:
            gate, use = self.gates.get(name), self.uses.get(name)
            if gate is None or use is None or len(use.matrices) != 1:
                continue
            owners = self._owners(name, use.matrices[0], dim, positions).cpu()
            if gate.shape[:2] != owners.shape[:2] or not bool((owners == owners[:, :, :1]).all()):
                continue
            total = torch.zeros(size, dtype=torch.float64)
            for group, owner in enumerate(owners[:, :, 0]):
                here = torch.nonzero(owner >= 0).flatten()
                if gate.dim() == 2:
                    total.index_add_(0, owner[here], gate[group][here])
                    continue
                spread = torch.zeros(size, len(owner), dtype=torch.float64)
                spread[owner[here], here] = 1
                total += ((spread @ gate[group]) * spread).sum(1)
            return total / self.samples
        # Nothing is known of it but its weights.
        total = torch.zeros(size, dtype=torch.float64)
        for name, dim, positions in members:
            if name in self.watched:
                squares = self._value(name).double().square().movedim(dim, 0).flatten(1).sum(1).cpu()
                here = positions >= 0
                total.index_add_(0, positions[here], squares[here])
        return total


class _GradientWatch(InputWatch):
    """Calls ``add`` with a weight's name and the gradient at its outputs, during a backward pass."""

    def __init__(self, watched: Mapping[str, Place], add: Callable[[str, Tensor], None]) -> None:
        self._add = add
        super().__init__(watched, self._product_seen)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = super().__torch_dispatch__(func, types, args, kwargs)
        if func is aten.convolution_backward.default:
            found = self._find(args[2])
            if found is not None:
                gradient, groups = args[0], args[9]
                split = gradient.unflatten(1, (groups, -1)).movedim(2, -1).movedim(1, 0)
                self._add(found[1].name, split.flatten(1, -2))
        return out

    def _product_seen(self, reading: Any) -> None:
        if reading.counts or reading.convolution is not None:
            return
        groups = reading.matrix.size[0]
        self._add(reading.name, reading.inputs if groups > 1 else reading.inputs.flatten(0, -2)[None])


@contextlib.contextmanager
def _sources(model: nn.Module, inputs: Any) -> Iterator[tuple[Any, list[Tensor]]]:
    """The inputs, and the tensors that gradients are taken of so that they pass everything behind the inputs."""
    sources: list[Tensor] = []
    device = batches.device_of(model)
    if device is not None:
        inputs = batches.move(inputs, device)

    def lent(value: Any) -> Any:
        if isinstance(value, Tensor) and value.is_floating_point():
            sources.append(value.detach().clone().requires_grad_())
            return sources[-1]
        if isinstance(value, Mapping):
            return {key: lent(one) for key, one in value.items()}
        if isinstance(value, (tuple, list)):
            return type(value)([lent(one) for one in value])
        return value

    given = lent(inputs)
    tables = [one.weight for one in model.modules() if isinstance(one, (nn.Embedding, nn.EmbeddingBag))]
    chosen = tables or ([] if sources else model.parameters())
    sources += [one.requires_grad_() for one in chosen if one.is_floating_point()]
    try:
        yield given, sources
    finally:
        for parameter in model.parameters():
            parameter.requires_grad_(False)


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


def _bare(seen: Contraction) -> Contraction:
    """The same without its inputs."""
    return replace(seen, output=seen.output.detach())


def squares(found: Sequence[Tensor], mask: Tensor | None) -> float:
    """The sum of squares of outputs, those of padding left out."""
    total = 0.0
    for one in found:
        square = one.detach().double().square()
        if mask is not None and one.dim() > 1 and one.shape[:2] == mask.shape:
            square = square * mask.to(square).view(*mask.shape, *[1] * (one.dim() - 2))
        total += float(square.sum())
    return total


def padding(batch: Batch) -> Tensor | None:
    """Where a batch of texts holds tokens and no padding, if it says so as transformers do."""
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    return mask if isinstance(mask, Tensor) and mask.dim() == 2 else None
