"""Where batches come from, epoch by epoch.

A source yields ``(identities, batch)``: identities are the dataset's indices of the samples, where it has any, and do
not depend on the order in which a loader hands them out.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from netopt import batches
from netopt.errors import ArgumentTypeError, EmptyDataError, InvalidArgumentError, ShapeMismatchError

__all__ = ["Loaded", "Source", "Tensors", "source"]

Drawn = tuple["Tensor | None", Any]


class Source:
    """Batches from any iterable or from a function that makes one.

    Args:
        data: A re-iterable, or a function without arguments that returns an iterable.
        what: How messages call it.
    """

    def __init__(self, data: Any, what: str = "data") -> None:
        self.data, self.what = data, what

    def __len__(self) -> int:
        """How many batches an epoch has; 0 where that is not known."""
        try:
            return len(self.data)
        except (TypeError, NotImplementedError):
            return 0

    def epoch(self, skip: int = 0) -> Iterator[Drawn]:
        """Yields one epoch; the first ``skip`` batches are fetched and left out."""
        data: Any = self.data() if callable(self.data) and not isinstance(self.data, Iterable) else self.data
        for place, batch in enumerate(batches.iterate(data, what=self.what)):
            if place >= skip:
                yield None, batch

    def generators(self) -> list[torch.Generator]:
        """Returns the random generators of its own an epoch is drawn from."""
        return []


class Tensors(Source):
    """Tensors given directly, indexed without a DataLoader.

    Args:
        data: A tensor, or a tuple or mapping of tensors, samples first; nested as a batch would be.
        batch_size: Samples a batch.
        shuffle: Draw a new order every epoch.
        generator: Draws the order.
        what: How messages call it.
    """

    def __init__(
        self, data: Any, batch_size: int, *, shuffle: bool, generator: torch.Generator, what: str = "data"
    ) -> None:
        super().__init__(data, what)
        self.batch_size, self.shuffle, self.generator = batch_size, shuffle, generator
        lengths = {len(one) for _, one in batches.tensors(data)}
        if len(lengths) > 1:
            raise ShapeMismatchError(
                f"the tensors of {what} have {' and '.join(map(str, sorted(lengths)))} samples; give all as many."
            )
        self.samples = lengths.pop()
        if self.samples == 0:
            raise EmptyDataError(f"{what} has no sample; its tensors have length 0.")

    def __len__(self) -> int:
        """How many batches an epoch has."""
        return math.ceil(self.samples / self.batch_size)

    def epoch(self, skip: int = 0) -> Iterator[Drawn]:
        """Yields one epoch in a new order, the last batch as small as it may be."""
        order = torch.randperm(self.samples, generator=self.generator) if self.shuffle else torch.arange(self.samples)
        for index in order.split(self.batch_size)[skip:]:
            yield index, _indexed(self.data, index)

    def generators(self) -> list[torch.Generator]:
        """Returns the generator of the order."""
        return [self.generator]


class Loaded(Source):
    """A DataLoader, or a Dataset put into one."""

    def generators(self) -> list[torch.Generator]:
        """Returns the generators of the loader and its samplers, each once."""
        found: list[torch.Generator] = []
        holders = [self.data, getattr(self.data, "sampler", None), getattr(self.data, "batch_sampler", None)]
        holders.append(getattr(holders[-1], "sampler", None))
        for holder in holders:
            generator = getattr(holder, "generator", None)
            if isinstance(generator, torch.Generator) and all(generator is not one for one in found):
                found.append(generator)
        return found


def source(data: Any, *, batch_size: int, shuffle: bool, seed: int, epochs: float, what: str = "data") -> Source:
    """Returns the source meant by ``data``.

    Raises:
        ArgumentTypeError: It cannot be iterated for batches.
        InvalidArgumentError: It can be iterated only once and is needed more often.
        EmptyDataError: It holds no sample.
    """
    generator = torch.Generator().manual_seed(seed)
    if type(data) is TensorDataset:
        data = data.tensors
    if _direct(data):
        return Tensors(data, batch_size, shuffle=shuffle, generator=generator, what=what)
    if isinstance(data, DataLoader):
        return Loaded(data, what)
    if _indexable(data):
        if not len(data):
            raise EmptyDataError(f"{what} is an empty {type(data).__name__}; it has length 0.")
        made: DataLoader[Any] = DataLoader(data, batch_size=batch_size, shuffle=shuffle, generator=generator)
        return Loaded(made, what)
    if isinstance(data, Iterable):
        if isinstance(data, Iterator) and epochs > 1:
            raise InvalidArgumentError(
                f"{what} is a {type(data).__name__}, which can be read only once, and more than one epoch is wanted; "
                "pass a list, a DataLoader, or the function that makes the generator."
            )
        batches.iterate(data, what=what)
        return Source(data, what)
    if callable(data) and not isinstance(data, (type, torch.nn.Module)):
        return Source(data, what)
    raise ArgumentTypeError(
        f"{what} must be a DataLoader, a Dataset, tensors, an iterable of batches or a function that returns one, "
        f"not {type(data).__name__}."
    )


def _direct(data: Any) -> bool:
    """Whether ``data`` is the samples themselves: a tensor, or a tuple or mapping of nothing but tensors."""
    if isinstance(data, Tensor):
        return data.dim() > 0
    if isinstance(data, Mapping):
        return bool(data) and all(_direct(one) for one in data.values())
    return isinstance(data, tuple) and bool(data) and all(_direct(one) for one in data)


def _indexable(data: Any) -> bool:
    if isinstance(data, (IterableDataset, list, tuple, str, bytes, Mapping)):
        return False
    if isinstance(data, Dataset):
        return hasattr(data, "__len__") and hasattr(data, "__getitem__")
    # Hugging Face's datasets are no torch Dataset and look like one.
    return hasattr(data, "__getitems__") and hasattr(data, "__len__")


def _indexed(data: Any, index: Tensor) -> Any:
    if isinstance(data, Tensor):
        return data[index if data.device.type == "cpu" else index.to(data.device)]
    if isinstance(data, Mapping):
        return {key: _indexed(one, index) for key, one in data.items()}
    return tuple(_indexed(one, index) for one in data)
