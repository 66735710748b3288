"""Where batches come from, epoch by epoch, and which share of them is this process's.

A source yields batches with the identities of their samples: the dataset's indices, where it has any, which do not
depend on the order in which a loader hands them out. Among several processes a batch is the *global* batch, and each
takes every n-th sample of it, so that the number of processes changes nothing; data that comes divided already is
taken as it is.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from netopt import batches
from netopt.distillation.data.loaders import gathers, indexed_loader
from netopt.errors import ArgumentTypeError, EmptyDataError, InvalidArgumentError, ShapeMismatchError
from netopt.model.restore import preserve_random_state

__all__ = ["Drawn", "Loaded", "Source", "Tensors", "source"]


class Drawn(NamedTuple):
    """One batch, as drawn.

    Args:
        identities: The dataset's indices of the samples, or ``None``.
        batch: What the data yielded, or this process's share of it.
        idle: Whether the share is empty, and the batch a stand-in that counts for nothing.
    """

    identities: Tensor | None
    batch: Any
    idle: bool = False


class Source:
    """Batches from any iterable or from a function that makes one.

    Args:
        data: A re-iterable, or a function without arguments that returns an iterable.
        what: How messages call it.
        share: This process and how many there are.
    """

    divided = False
    """Whether each process draws batches of its own, and maybe not equally many."""
    samples = 0
    """How many samples the dataset has whose indices are identities; 0 without them."""
    fixed = False
    """Whether a sample is the same every time it is drawn."""
    whole: Any = None
    """All samples at once, where they are at hand, in the form of a batch."""
    seed = 0
    """What processes that share batches draw them by."""

    def __init__(self, data: Any, what: str, share: tuple[int, int]) -> None:
        self.data, self.what, self.share = data, what, share

    def __len__(self) -> int:
        """How many batches an epoch has; 0 where that is not known."""
        try:
            return len(self.data)
        except (TypeError, NotImplementedError):
            return 0

    def epoch(self, number: int) -> Iterator[Drawn]:
        """Yields epoch ``number``."""
        data: Any = self.data() if callable(self.data) and not isinstance(self.data, Iterable) else self.data
        _tell(data, number)
        for batch in batches.iterate(data, what=self.what):
            yield self._drawn(batch)

    def begin(self, number: int, skip: int = 0) -> Iterator[Drawn]:
        """Yields an epoch without its first ``skip`` batches, in an order that depends on seed and number alone.

        So it is the same in all processes that share its batches, and in one that takes up where another was killed.
        """
        drawn = self.epoch(number)
        with preserve_random_state():
            seed_all(self.seed + number)
            # What is skipped is fetched all the same, by the workers and generators that have fetched it before.
            first = next(islice(drawn, max(0, skip - 1), None), None)
            state = torch.get_rng_state()
        if first is None:
            return
        if not skip:
            yield first
        if type(self) is not Source or self.share[1] == 1:
            yield from drawn
            return
        # An iterator of the caller's may draw at random all along, and every process has to draw the same.
        while True:
            with preserve_random_state():
                torch.set_rng_state(state)
                following = next(drawn, None)
                state = torch.get_rng_state()
            if following is None:
                return
            yield following

    def generators(self) -> list[torch.Generator]:
        """Returns the caller's random generators that an epoch is drawn from."""
        return []

    def _drawn(self, batch: Any) -> Drawn:
        rank, world = self.share
        if world == 1 or self.divided:
            return Drawn(None, batch)
        size = batch_length(batch)
        index = torch.arange(rank, size, world)
        return Drawn(
            None, _taken(batch, index if len(index) else torch.zeros(1, dtype=torch.long), size), not len(index)
        )


class Tensors(Source):
    """Tensors given directly, indexed without a DataLoader.

    Args:
        data: A tensor, or a tuple or mapping of tensors, samples first; nested as a batch would be.
        what: How messages call it.
        share: This process and how many there are.
        batch_size: Samples a batch.
        shuffle: Draw a new order every epoch.
    """

    fixed = True

    def __init__(
        self,
        data: Any,
        what: str,
        share: tuple[int, int],
        *,
        batch_size: int,
        shuffle: bool,
    ) -> None:
        super().__init__(data, what, share)
        self.batch_size, self.shuffle = batch_size, shuffle
        lengths = {len(one) for _, one in batches.tensors(data)}
        if len(lengths) > 1:
            raise ShapeMismatchError(
                f"the tensors of {what} have {' and '.join(map(str, sorted(lengths)))} samples; give all as many."
            )
        self.samples = lengths.pop()
        if self.samples == 0:
            raise EmptyDataError(f"{what} has no sample; its tensors have length 0.")
        self.whole = data

    def __len__(self) -> int:
        """How many batches an epoch has."""
        return math.ceil(self.samples / self.batch_size)

    def epoch(self, number: int) -> Iterator[Drawn]:
        """Yields one epoch in a new order, the last batch as small as it may be."""
        rank, world = self.share
        # The same order as of the global generator, which need not be put back then.
        generator = torch.Generator().manual_seed(self.seed + number)
        order = torch.randperm(self.samples, generator=generator) if self.shuffle else torch.arange(self.samples)
        take = _taker(self.data)
        for whole in order.split(self.batch_size):
            if world == 1:
                yield Drawn(whole, take(whole))
                continue
            index = whole[rank::world]
            idle = not len(index)
            index = whole[:1] if idle else index
            yield Drawn(index, take(index), idle)

    def begin(self, number: int, skip: int = 0) -> Iterator[Drawn]:
        """Yields an epoch without its first ``skip`` batches."""
        return islice(self.epoch(number), skip, None) if skip else self.epoch(number)


class Loaded(Source):
    """A DataLoader, or a Dataset put into one.

    Args:
        data: The loader.
        what: How messages call it.
        share: This process and how many there are.
        tagged: Whether samples' indices are wanted.
    """

    def __init__(self, data: DataLoader[Any], what: str, share: tuple[int, int], *, tagged: bool) -> None:
        super().__init__(data, what, share)
        self.divided = share[1] > 1 and _is_divided(data)
        divide = share[1] > 1 and not self.divided
        wanted = tagged or divide or gathers(data)
        self.indexed = indexed_loader(data, share if divide else (0, 1)) if wanted else None
        if self.indexed is not None:
            self.samples = len(self.data.dataset) if hasattr(self.data.dataset, "__len__") else 0

    def epoch(self, number: int) -> Iterator[Drawn]:
        """Yields epoch ``number`` in the loader's own order."""
        if self.indexed is None:
            yield from super().epoch(number)
            return
        _tell(self.data, number)
        for identities, idle, batch in batches.iterate(self.indexed, what=self.what):
            if identities is None:
                self.samples = 0
            yield Drawn(identities, batch, idle)

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


def source(
    data: Any,
    *,
    batch_size: int,
    shuffle: bool,
    seed: int,
    once: bool,
    what: str = "data",
    share: tuple[int, int] = (0, 1),
    tagged: bool = False,
) -> Source:
    """Returns the source meant by ``data``.

    Args:
        data: As given to :func:`netopt.distill`.
        batch_size: Samples a batch, where batches are made here.
        shuffle: Whether to draw a new order every epoch, where batches are made here.
        seed: Of that order.
        once: Whether one epoch is enough.
        what: How messages call it.
        share: This process and how many there are.
        tagged: Whether samples' indices are wanted.

    Raises:
        ArgumentTypeError: It cannot be iterated for batches.
        InvalidArgumentError: It can be iterated only once and is needed more often.
        EmptyDataError: It holds no sample.
    """
    found = _source(data, batch_size=batch_size, shuffle=shuffle, once=once, what=what, share=share, tagged=tagged)
    found.seed = seed
    return found


def _source(
    data: Any, *, batch_size: int, shuffle: bool, once: bool, what: str, share: tuple[int, int], tagged: bool
) -> Source:
    if type(data) is TensorDataset:
        data = data.tensors
    if _direct(data):
        return Tensors(data, what, share, batch_size=batch_size, shuffle=shuffle)
    if isinstance(data, DataLoader):
        return Loaded(data, what, share, tagged=tagged)
    if _indexable(data):
        if not len(data):
            raise EmptyDataError(f"{what} is an empty {type(data).__name__}; it has length 0.")
        made: DataLoader[Any] = DataLoader(data, batch_size=batch_size, shuffle=shuffle)
        return Loaded(made, what, share, tagged=tagged)
    if isinstance(data, Iterable):
        if isinstance(data, Iterator) and not once:
            raise InvalidArgumentError(
                f"{what} is a {type(data).__name__}, which can be read only once, and more than one epoch is wanted; "
                "pass a list, a DataLoader, or the function that makes the generator."
            )
        batches.iterate(data, what=what)
        return Source(data, what, share)
    if callable(data) and not isinstance(data, (type, torch.nn.Module)):
        return Source(data, what, share)
    raise ArgumentTypeError(
        f"{what} must be a DataLoader, a Dataset, tensors, an iterable of batches or a function that returns one, "
        f"not {type(data).__name__}."
    )


def seed_all(seed: int) -> None:
    """Seeds torch, Python and numpy."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    if torch.accelerator.is_available():
        torch.manual_seed(seed)
    else:
        # What the above does as well, for devices that are not there, takes longer than a step of a small net.
        torch.default_generator.manual_seed(seed)


def batch_length(batch: Any) -> int:
    """Returns how many samples a batch has: the length of its first tensor."""
    for _, tensor in batches.tensors(batch):
        if tensor.dim():
            return len(tensor)
    return 0


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


def _is_divided(loader: DataLoader[Any]) -> bool:
    """Whether a loader hands each process samples of its own: by its sampler, or because an engine has prepared it."""
    samplers = loader.sampler, getattr(loader.batch_sampler, "sampler", None), loader.batch_sampler
    divided = any(getattr(one, "num_replicas", 1) > 1 or hasattr(one, "process_index") for one in samplers)
    return divided or type(loader).__module__.startswith("accelerate")


def _tell(data: Any, number: int) -> None:
    """Lets data that shuffles by epoch, a `DistributedSampler` say, know which one begins."""
    inner = getattr(getattr(data, "batch_sampler", None), "sampler", None)
    for one in (data, getattr(data, "sampler", None), inner):
        tell: Any = getattr(one, "set_epoch", None)
        if tell is not None:
            tell(number)
            return


def _taker(data: Any) -> Callable[[Tensor], Any]:
    """Returns what takes samples out of tensors given directly; how they are nested is looked at once."""
    if isinstance(data, Tensor):
        if data.device.type == "cpu":
            return partial(data.index_select, 0)
        return lambda index: data.index_select(0, index.to(data.device))
    if isinstance(data, Mapping):
        named = {key: _taker(one) for key, one in data.items()}
        return lambda index: {key: take(index) for key, take in named.items()}
    parts = [_taker(one) for one in data]
    if hasattr(data, "_fields"):
        return lambda index: type(data)(*[take(index) for take in parts])
    return lambda index: type(data)([take(index) for take in parts])


def _taken(data: Any, index: Tensor, length: int) -> Any:
    """Returns the samples at ``index`` of every tensor that has one row a sample."""
    if isinstance(data, Tensor):
        if data.dim() == 0 or len(data) != length:
            return data
        return data.index_select(0, index if data.device.type == "cpu" else index.to(data.device))
    if isinstance(data, Mapping):
        return {key: _taken(one, index, length) for key, one in data.items()}
    if isinstance(data, (tuple, list)):
        parts = [_taken(one, index, length) for one in data]
        return type(data)(*parts) if hasattr(data, "_fields") else type(data)(parts)
    return data
