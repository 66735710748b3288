"""How much the outputs change when one axis alone is cut: measured, where an estimate sums up what it cannot see.

Neurons are cut by zeros in what reads them, and the rest of it takes their place as well as it can, from moments of the
inputs known already; then some samples are run, and everything is put back.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from netopt import batches
from netopt.batches import Batch
from netopt.errors import ForwardError
from netopt.importance.contractions import Offset
from netopt.importance.elimination import RIDGE, Consumer
from netopt.importance.inputs import Matrix
from netopt.model.parameters import Place

__all__ = ["Producer", "Reader", "Trials", "calibrated"]

DEPTHS = (0.25, 0.5)
"""Shares of an axis that are cut."""

SAMPLES = (8, 256)
"""At least, and at most so many samples are run."""

FORWARDS = 10
"""All trials together may take about so many forwards of all data, unless that is fewer than the least samples."""


@dataclass(frozen=True)
class Reader:
    """A matrix that reads an axis, as :class:`Consumer`, and where it is in the model.

    Attributes:
        place: The parameter.
        matrix: As which matrix it is read.
        group: Which group of it.
        taps: How many entries of a kernel share the consumer's moment.
        consumer: Moments and columns.
        mean: Of each column.
        offset: Where a constant can be added to the outputs.
    """

    place: Place
    matrix: Matrix
    group: int
    taps: int
    consumer: Consumer
    mean: Tensor
    offset: Offset | None


@dataclass(frozen=True)
class Producer:
    """A matrix that makes an axis which no matrix reads.

    Attributes:
        place: The parameter.
        matrix: As which matrix it is read.
        owner: The axis's position of each output, ``(groups, outputs)``.
        offset: Where a constant is added to the outputs.
    """

    place: Place
    matrix: Matrix
    owner: Tensor
    offset: Offset | None


class Trials:
    """Some samples, what the model makes of them, and how far that changes.

    Args:
        model: In eval mode; its values are changed during a trial.
        data: Batches, of which the first samples are used.
        outputs: From the forward's result to the outputs that count.
        number: How many trials there will be.
        samples: How many samples all data have.
    """

    def __init__(
        self,
        model: nn.Module,
        data: Sequence[Batch],
        outputs: Callable[[Any], list[Tensor]],
        number: int,
        samples: int,
    ) -> None:
        self.model, self.outputs = model, outputs
        self.vectors = dict(itertools.chain(model.named_parameters(), model.named_buffers()))
        least, most = SAMPLES
        wanted = min(max(FORWARDS * samples // max(number, 1), least), most)
        self.inputs: list[Any] = []
        self.masks: list[Tensor | None] = []
        self.count = 0
        for batch in data:
            if self.count < wanted:
                self._take(batch, wanted - self.count)
        self.wanted = [self._run(one) for one in self.inputs]
        self.scale = self._total(self.wanted) / max(self.count, 1)

    def change(self, readers: Sequence[Reader], producers: Sequence[Producer], gone: Tensor) -> float:
        """The squared change of all outputs of a sample, on average, when the neurons ``gone`` are cut."""
        with self._changed([*readers, *producers], gone):
            found = [self._run(one) for one in self.inputs]
        pairs = zip(found, self.wanted, strict=True)
        lost = [[one - other for one, other in zip(*pair, strict=True)] for pair in pairs]
        return self._total(lost) / max(self.count, 1)

    def _take(self, batch: Batch, wanted: int) -> None:
        inputs, _ = batches.split(batch)
        count = max((len(one) for _, one in batches.tensors(inputs) if one.dim() > 0), default=1)
        part = inputs
        if count > wanted:
            part = _first(inputs, wanted, count)
            try:
                found = self._run(part)
            except ForwardError:
                part, found = inputs, []
            if any(len(one) != wanted for one in found):
                part = inputs  # the first dimension lists no samples
        self.inputs.append(part)
        mask = part.get("attention_mask") if isinstance(part, Mapping) else None
        self.masks.append(mask if isinstance(mask, Tensor) and mask.dim() == 2 else None)
        self.count += min(count, wanted) if part is not inputs else count

    def _run(self, inputs: Any) -> list[Tensor]:
        with torch.no_grad():
            result = batches.feed(self.model, inputs if not isinstance(inputs, (tuple, list)) else (inputs, None))
            return [one.detach().clone() for one in self.outputs(result)]

    def _total(self, several: Sequence[Sequence[Tensor]]) -> float:
        total = 0.0
        for found, mask in zip(several, self.masks, strict=True):
            for one in found:
                square = one.double().square()
                if mask is not None and one.dim() > 1 and one.shape[:2] == mask.shape:
                    square = square * mask.to(square).view(*mask.shape, *[1] * (one.dim() - 2))
                total += float(square.sum())
        return total

    @contextmanager
    def _changed(self, places: Sequence[Reader | Producer], gone: Tensor) -> Iterator[None]:
        before: dict[int, tuple[Tensor, Tensor]] = {}

        def note(tensor: Tensor) -> Tensor:
            if id(tensor) not in before:
                before[id(tensor)] = (tensor, tensor.detach().clone())
            return tensor.detach()

        try:
            with torch.no_grad():
                for one in places:
                    if isinstance(one, Reader):
                        self._cut(one, gone, note)
                    else:
                        self._silence(one, gone, note)
            yield
        finally:
            with torch.no_grad():
                for tensor, value in before.values():
                    tensor.copy_(value)

    def _cut(self, reader: Reader, gone: Tensor, note: Callable[[Tensor], Tensor]) -> None:
        parameter = note(reader.place.parameter)
        rows = reader.matrix.rows(parameter)
        weight = rows[reader.group].double().cpu().unflatten(1, (reader.taps, -1))
        moment, columns = reader.consumer.moment, reader.consumer.columns[gone].flatten()
        stay = torch.ones(len(moment), dtype=torch.bool)
        stay[columns] = False
        own = moment[stay][:, stay]
        own.diagonal().add_(RIDGE * own.diagonal().mean() + 1e-12)
        shares = torch.linalg.solve(own, moment[stay][:, columns])
        lost = weight[:, :, columns]
        weight[:, :, stay] += lost @ shares.T
        weight[:, :, columns] = 0
        new = rows.clone()
        new[reader.group] = weight.flatten(1).to(rows)
        reader.matrix.write(parameter, new)
        if reader.offset is not None:
            constant = (lost @ (reader.mean[columns] - shares.T @ reader.mean[stay])).sum(1)
            width = reader.matrix.size[1]
            start = reader.offset.start + reader.group * width
            vector = note(self.vectors[reader.offset.name])
            vector[start : start + width] += (-1 if reader.offset.mean else 1) * constant.to(vector)

    def _silence(self, producer: Producer, gone: Tensor, note: Callable[[Tensor], Tensor]) -> None:
        parameter = note(producer.place.parameter)
        off = torch.isin(producer.owner, gone.to(producer.owner.device))
        rows = producer.matrix.rows(parameter).clone()
        rows[off] = 0
        producer.matrix.write(parameter, rows)
        if producer.offset is not None and not producer.offset.mean:
            vector = note(self.vectors[producer.offset.name])
            vector[producer.offset.start : producer.offset.stop][off.flatten()] = 0


def calibrated(scores: Tensor, changes: Mapping[int, float]) -> Tensor:
    """Scores whose sums over the lowest are what was seen to change when these went; their order stays.

    Args:
        scores: Of the neurons of one axis; sums over the lowest are the predicted changes.
        changes: For numbers of neurons removed, lowest scores first, the change that was measured.

    Example:
        >>> calibrated(torch.tensor([1.0, 2.0, 3.0, 4.0]), {2: 6.0}).tolist()
        [2.0, 4.0, 6.0, 8.0]
    """
    order = torch.sort(scores, stable=True).indices
    predicted = torch.cat([scores.new_zeros(1), scores[order].cumsum(0)]).double()
    new, start, seen, slope = predicted.clone(), 0, 0.0, 1.0
    for count, change in sorted(changes.items()):
        rise, risen = float(predicted[count] - predicted[start]), max(change - seen, 0.0)
        slope = risen / rise if rise > 0 else slope
        new[start : count + 1] = seen + slope * (predicted[start : count + 1] - predicted[start])
        start, seen = count, seen + risen
    new[start:] = seen + slope * (predicted[start:] - predicted[start])
    rises = torch.cummax(new.diff(), 0).values
    # Never equal, so that the order stays.
    rises += torch.arange(len(scores)) * 1e-12 * max(float(rises[-1]), 1e-300)
    return torch.empty(len(scores), dtype=torch.float64).index_copy_(0, order, rises)


def _first(value: Any, wanted: int, count: int) -> Any:
    """The first samples of a batch's inputs."""
    if isinstance(value, Tensor):
        return value[:wanted] if value.dim() > 0 and len(value) == count else value
    if isinstance(value, Mapping):
        return {key: _first(one, wanted, count) for key, one in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)([_first(one, wanted, count) for one in value])
    return value
