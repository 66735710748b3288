"""Where batches come from, epoch by epoch, and which share of them is this process's.

A source yields batches with the identities of their samples: the dataset's indices, where it has any, which do not
depend on the order in which a loader hands them out. Among several processes a batch is the *global* batch, and each
takes every n-th sample of it, so that the number of processes changes nothing; data that comes divided already is
taken as it is.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from netopt import batches
from netopt.distillation.data.loaders import gathers, indexed_loader
from netopt.errors import EmptyDataError, InvalidArgumentError
from netopt.model.restore import preserve_random_state

__all__ = ["Drawn", "Loaded", "Sampling", "Source", "Tensors", "source"]


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
        data: Any = self.data() if batches.is_factory(self.data) else self.data
        _set_epoch(data, number)
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
        self.samples = batches.count_samples(data, what)
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
        _set_epoch(self.data, number)
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


class Sampling(NamedTuple):
    """How batches are drawn.

    Args:
        batch_size: Samples a batch, where batches are made here.
        seed: Of the order, where batches are made here.
        share: This process and how many there are.
        shuffle: Whether to draw a new order every epoch, where batches are made here.
        once: Whether one epoch is enough.
        tagged: Whether samples' indices are wanted.
    """

    batch_size: int
    seed: int
    share: tuple[int, int] = (0, 1)
    shuffle: bool = False
    once: bool = False
    tagged: bool = False


def source(data: Any, how: Sampling, what: str = "data") -> Source:
    """Returns the source meant by ``data``, as given to :func:`netopt.distill` and called ``what`` in messages.

    Raises:
        ArgumentTypeError: It cannot be iterated for batches.
        InvalidArgumentError: It can be iterated only once and is needed more often.
        EmptyDataError: It holds no sample.
    """
    found = _source(data.tensors if type(data) is TensorDataset else data, how, what)
    found.seed = how.seed
    return found


def _source(data: Any, how: Sampling, what: str) -> Source:
    if batches.is_samples(data):
        return Tensors(data, what, how.share, batch_size=how.batch_size, shuffle=how.shuffle)
    if isinstance(data, DataLoader):
        return Loaded(data, what, how.share, tagged=how.tagged)
    if batches.is_dataset(data):
        if not len(data):
            raise EmptyDataError(f"{what} is an empty {type(data).__name__}; it has length 0.")
        made: DataLoader[Any] = DataLoader(data, batch_size=how.batch_size, shuffle=how.shuffle)
        return Loaded(made, what, how.share, tagged=how.tagged)
    if isinstance(data, Iterator) and not how.once:
        raise InvalidArgumentError(
            f"{what} is a {type(data).__name__}, which can be read only once, and more than one epoch is wanted; "
            "pass a list, a DataLoader, or the function that makes the generator."
        )
    if not batches.is_factory(data):
        batches.iterate(data, what=what)
    return Source(data, what, how.share)


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


def _is_divided(loader: DataLoader[Any]) -> bool:
    """Whether a loader hands each process samples of its own: by its sampler, or because an engine has prepared it."""
    samplers = loader.sampler, getattr(loader.batch_sampler, "sampler", None), loader.batch_sampler
    divided = any(getattr(one, "num_replicas", 1) > 1 or hasattr(one, "process_index") for one in samplers)
    return divided or type(loader).__module__.startswith("accelerate")


def _set_epoch(data: Any, number: int) -> None:
    """Sets the epoch of data that shuffles by it, such as a `DistributedSampler`."""
    inner = getattr(getattr(data, "batch_sampler", None), "sampler", None)
    for one in (data, getattr(data, "sampler", None), inner):
        setter: Any = getattr(one, "set_epoch", None)
        if setter is not None:
            setter(number)
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
