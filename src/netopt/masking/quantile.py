"""The exact threshold that removes a given number of entries, found in one pass.

A sample says between which two values the threshold lies; one pass over cache-sized chunks keeps what is above them,
counts what is below, and gathers the few in between, among which the threshold is found exactly. Where the sample
misleads (periodic or constant tensors) the bracket is bisected over the bit patterns of the scores: at most one pass a
bit, whatever the distribution.

Of entries with equal scores those are kept that come first, in the order of the tensors and of the entries in each.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from netopt.errors import NonFiniteError

__all__ = ["Scores", "convert", "keep_above", "keep_best"]

SAMPLE = 1 << 18
CHUNK = 1 << 16
DEVICE_CHUNK = 1 << 22
SERIAL = 1 << 15
DEVIATIONS = 6


def convert(source: Tensor, target: np.ndarray) -> None:
    """Copies a tensor of one dimension into an array of another dtype.

    On a CPU in pieces that torch gives to one thread: to wake others for a cache-sized chunk costs more than they save.
    """
    whole = torch.from_numpy(target)
    piece = SERIAL if source.device.type == "cpu" else max(len(source), 1)
    for start in range(0, len(source), piece):
        whole[start : start + piece].copy_(source[start : start + piece])


@dataclass(frozen=True, eq=False)
class Scores:
    """The scores of one tensor, computed as they are read.

    Attributes:
        tensor: The scores, or with ``magnitude`` the weights themselves.
        magnitude: Whether a score is the absolute value of the tensor's entry.
        alive: ``False`` for entries that are removed already, and go first; of the tensor's shape.
        name: What to call the tensor in messages.
    """

    tensor: Tensor
    magnitude: bool = False
    alive: Tensor | None = None
    name: str = "scores"
    _flat: list[Tensor] = field(default_factory=list, repr=False)

    @property
    def size(self) -> int:
        """The number of entries."""
        return self.tensor.numel()

    def read(self, start: int, stop: int, buffer: np.ndarray) -> np.ndarray:
        """Returns the scores from ``start`` to ``stop``, in row-major order; in ``buffer`` unless they lie ready."""
        part = self._flattened[start:stop]
        ready = part.device.type == "cpu" and part.dtype == torch.from_numpy(buffer).dtype
        if ready and not self.magnitude and self.alive is None:
            return part.numpy()
        target = buffer[: stop - start]
        if ready and self.magnitude:
            np.abs(part.numpy(), out=target)
        else:
            convert(part, target)
            if self.magnitude:
                np.abs(target, out=target)
        if self.alive is not None:
            np.maximum(target, np.finfo(target.dtype).min, out=target)
            np.copyto(target, -np.inf, where=~self.alive.reshape(-1)[start:stop].cpu().numpy())
        return target

    def materialize(self) -> Tensor:
        """Returns the scores as one tensor, minus infinity where removed already.

        Raises:
            NonFiniteError: a score is NaN.
        """
        wide = torch.promote_types(self.tensor.dtype, torch.float32)
        scores = self.tensor.detach().to(wide)
        scores = scores.abs() if self.magnitude else scores
        if torch.isnan(scores).any():
            raise _nan(self.name)
        if self.alive is None:
            return scores
        return scores.clamp(min=torch.finfo(wide).min).masked_fill(~self.alive, -math.inf)

    @property
    def _flattened(self) -> Tensor:
        if not self._flat:
            self._flat.append(self.tensor.detach().reshape(-1))
        return self._flat[0]


@dataclass
class _Population:
    """All scores together, as one long sequence read chunk by chunk."""

    scores: Sequence[Scores]

    def __post_init__(self) -> None:
        double = any(one.tensor.dtype in (torch.float64, torch.int64, torch.int32) for one in self.scores)
        self.dtype = np.dtype(np.float64 if double else np.float32)
        self.size = sum(one.size for one in self.scores)
        away = any(one.tensor.device.type != "cpu" for one in self.scores)
        self.chunk = DEVICE_CHUNK if away else CHUNK
        self.buffer = np.empty(self.chunk, self.dtype)
        self.flags = np.empty(self.chunk, np.bool_)

    def chunks(self) -> Iterator[tuple[int, int, np.ndarray]]:
        """Yields which tensor, where in it, and the scores."""
        for number, one in enumerate(self.scores):
            for start in range(0, one.size, self.chunk):
                yield number, start, one.read(start, min(start + self.chunk, one.size), self.buffer)

    def sampled(self) -> np.ndarray:
        """Reads every so many entries, the stride odd so that it walks through every column of a power of two."""
        stride = max(self.size // SAMPLE, 1) | 1
        found: list[Tensor] = []
        offset = 0
        for one in self.scores:
            part = one._flattened[offset::stride]
            part = part.to("cpu", torch.from_numpy(self.buffer).dtype, copy=True)
            part = part.abs_() if one.magnitude else part
            if one.alive is not None:
                part.clamp_(min=float(np.finfo(self.dtype).min))
                part[~one.alive.reshape(-1)[offset::stride].cpu()] = -math.inf
            found.append(part)
            offset = (offset - one.size) % stride
        return torch.cat(found).numpy()

    def count_up_to(self, bound: float) -> int:
        """Counts the scores that are at most ``bound``."""
        value = self.dtype.type(bound)
        total = 0
        for _, _, part in self.chunks():
            total += int(np.count_nonzero(np.less_equal(part, value, out=self.flags[: len(part)])))
        return total


def keep_best(scores: Sequence[Scores], remove: int) -> list[Tensor]:
    """Keeps all but the ``remove`` lowest of all scores together.

    Args:
        scores: The scores of each tensor; they are compared in float32, or in float64 if any of them is.
        remove: How many entries to remove, exactly.

    Returns:
        For each tensor a boolean mask of its shape, on its device, ``True`` for what is kept.

    Raises:
        NonFiniteError: a score is NaN; the message names the tensor.

    Example:
        >>> keep_best([Scores(torch.tensor([3.0, 1.0, 2.0, 1.0]))], remove=1)
        [tensor([ True,  True,  True, False])]
    """
    population = _Population(scores)
    masks = [torch.empty(one.size, dtype=torch.bool) for one in scores]
    if remove <= 0 or remove >= population.size:
        _check_nan(population)
        for mask in masks:
            mask.fill_(remove <= 0)
        return _shaped(masks, scores)
    limit = max(SAMPLE, population.size // 16)
    low, high = _first_bracket(population, remove)
    found = _split(population, masks, low, high, limit)
    if not found.settles(remove):
        low, high = _bisect(population, remove, found, limit)
        found = _split(population, masks, low, high, limit)
    if found.overflowed:
        _keep_first_equal(population, masks, low, found.below + found.inside - remove)
    else:
        _settle(found, masks, remove - found.below)
    return _shaped(masks, scores)


def keep_above(scores: Sequence[Scores], threshold: float) -> list[Tensor]:
    """Removes every entry whose score is below ``threshold``; what is equal to it is kept.

    Example:
        >>> keep_above([Scores(torch.tensor([-3.0, 1.0]), magnitude=True)], 2.0)
        [tensor([ True, False])]
    """
    population = _Population(scores)
    masks = [torch.empty(one.size, dtype=torch.bool) for one in scores]
    bound = population.dtype.type(threshold)
    for number, start, part in population.chunks():
        _refuse_nan(part, scores[number].name)
        np.greater_equal(part, bound, out=masks[number].numpy()[start : start + len(part)])
    return _shaped(masks, scores)


@dataclass
class _Split:
    """What one pass found: how many are below the bracket, and what is inside."""

    low: float
    high: float
    below: int = 0
    inside: int = 0
    overflowed: bool = False
    tensors: list[int] = field(default_factory=list)
    positions: list[np.ndarray] = field(default_factory=list)
    values: list[np.ndarray] = field(default_factory=list)

    def settles(self, remove: int) -> bool:
        """Whether the wanted threshold lies inside, and what is inside says which entries go."""
        hit = self.below < remove <= self.below + self.inside
        return hit and (not self.overflowed or self.low == self.high)


def _first_bracket(population: _Population, remove: int) -> tuple[float, float]:
    if population.size <= SAMPLE:
        return -math.inf, math.inf
    sample = np.sort(population.sampled())
    count, wanted = len(sample), remove / population.size
    spread = DEVIATIONS * math.sqrt(count * wanted * (1 - wanted)) + 1
    low, high = math.floor(count * wanted - spread), math.ceil(count * wanted + spread)
    return (
        float(sample[low]) if low >= 0 else -math.inf,
        float(sample[high]) if high < count else math.inf,
    )


def _split(population: _Population, masks: list[Tensor], low: float, high: float, limit: int) -> _Split:
    """Writes what is above the bracket into the masks, counts what is below, and gathers what is inside."""
    found = _Split(low, high)
    bottom, top = population.dtype.type(low), population.dtype.type(high)
    targets = [mask.numpy() for mask in masks]
    for number, start, part in population.chunks():
        size = len(part)
        _refuse_nan(part, population.scores[number].name)
        above, flags = targets[number][start : start + size], population.flags[:size]
        np.greater(part, top, out=above)
        np.greater_equal(part, bottom, out=flags)
        np.logical_xor(flags, above, out=flags)
        inside = np.count_nonzero(flags)
        found.below += size - int(np.count_nonzero(above)) - inside
        found.inside += inside
        found.overflowed = found.overflowed or found.inside > limit
        if found.overflowed or not inside:
            continue
        positions = np.flatnonzero(flags)
        found.tensors.append(number)
        found.values.append(part[positions])
        found.positions.append(positions + start)
    if found.overflowed:
        found.positions.clear()
        found.values.clear()
    return found


def _bisect(population: _Population, remove: int, found: _Split, limit: int) -> tuple[float, float]:
    """Narrows the bracket over the bit patterns until few enough entries, or equal ones only, are inside."""
    order = _Order(population.dtype)
    low, high = order.number(-math.inf), order.number(math.inf)
    below, up_to = 0, population.size
    if found.below >= remove:
        high, up_to = order.number(found.low) - 1, found.below
    elif found.below + found.inside < remove:
        low, below = order.number(found.high) + 1, found.below + found.inside
    else:
        low, high = order.number(found.low), order.number(found.high)
        below, up_to = found.below, found.below + found.inside
    while low < high and up_to - below > limit:
        middle = (low + high) // 2
        count = population.count_up_to(order.value(middle))
        if count >= remove:
            high, up_to = middle, count
        else:
            low, below = middle + 1, count
    return order.value(low), order.value(high)


class _Order:
    """Numbers the floats of a dtype in their order, so that they can be bisected."""

    def __init__(self, dtype: np.dtype) -> None:
        self.float = dtype
        self.int = np.dtype(np.int64 if dtype.itemsize == 8 else np.int32)
        self.bits = 8 * dtype.itemsize

    def number(self, value: float) -> int:
        bits = int(np.array(value, self.float).view(self.int))
        return bits if bits >= 0 else -(bits + (1 << (self.bits - 1)))

    def value(self, number: int) -> float:
        bits = number if number >= 0 else -number - (1 << (self.bits - 1))
        return float(np.array(bits, self.int).view(self.float))


def _settle(found: _Split, masks: list[Tensor], remove: int) -> None:
    """Removes the ``remove`` lowest of the gathered entries, and keeps the others."""
    values = np.concatenate(found.values)
    threshold = np.partition(values, remove - 1)[remove - 1]
    spare = int(np.count_nonzero(values <= threshold)) - remove
    keep = values > threshold
    keep[np.flatnonzero(values == threshold)[:spare]] = True
    first = 0
    for number, positions in zip(found.tensors, found.positions, strict=True):
        masks[number].numpy()[positions] = keep[first : first + len(positions)]
        first += len(positions)


def _keep_first_equal(population: _Population, masks: list[Tensor], value: float, spare: int) -> None:
    """Keeps the first ``spare`` entries that are equal to ``value``."""
    equal = population.dtype.type(value)
    for number, start, part in population.chunks():
        if spare <= 0:
            return
        positions = np.flatnonzero(part == equal)[:spare]
        masks[number].numpy()[positions + start] = True
        spare -= len(positions)


def _refuse_nan(part: np.ndarray, name: str) -> None:
    # The smallest of some numbers is NaN if any of them is.
    if part.size and np.isnan(part.min()):
        raise _nan(name)


def _nan(name: str) -> NonFiniteError:
    return NonFiniteError(f"{name!r} holds NaN, so its entries cannot be ranked; repair or exclude it.")


def _check_nan(population: _Population) -> None:
    for number, _, part in population.chunks():
        _refuse_nan(part, population.scores[number].name)


def _shaped(masks: list[Tensor], scores: Sequence[Scores]) -> list[Tensor]:
    return [mask.view(one.tensor.shape).to(one.tensor.device) for mask, one in zip(masks, scores, strict=True)]
