"""A loader like the caller's that also yields the indices of a batch's samples.

The caller's loader is not touched: the copy draws from the same samplers and generators in the same order, through the
same workers and collation, and hands out the same batches, or this process's share of them. Of plain tensors it takes a
batch's rows at once, where the caller's fetches and collates them one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset, default_collate

__all__ = ["gathers", "indexed_loader"]


class _Idle:
    """An index drawn only because a share is empty."""

    def __init__(self, index: Any) -> None:
        self.index = index


class _Indexed(Dataset[Any]):
    """A dataset whose samples come a batch at a time, with their indices and whether they are idle."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __getitems__(self, keys: Sequence[Any]) -> tuple[Sequence[Any], bool, Any]:
        idle = isinstance(keys[0], _Idle)
        keys = [keys[0].index] if idle else keys
        fetch = getattr(self.dataset, "__getitems__", None)
        return keys, idle, [self.dataset[key] for key in keys] if fetch is None else fetch(keys)

    def __getattr__(self, name: str) -> Any:
        # What workers look for on the dataset is found on the caller's.
        if name == "dataset" or name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.dataset, name)


class _Collate:
    """Collates samples as the caller's loader does, and their indices into a tensor."""

    def __init__(self, collate: Callable[[Any], Any]) -> None:
        self.collate = collate

    def __call__(self, fetched: Any) -> tuple[Tensor | None, bool, Any]:
        keys, idle, samples = fetched
        return _indices(keys), idle, self.collate(samples)


class _Rows(_Indexed):
    """Plain tensors, of which a batch is taken at once, collated already."""

    def __getitems__(self, keys: Sequence[Any]) -> tuple[Any, bool, Any]:
        idle = isinstance(keys[0], _Idle)
        keys = [keys[0].index] if idle else keys
        index = _indices(keys)
        if index is None:
            return keys, idle, default_collate([self.dataset[key] for key in keys])
        return index, idle, [one.index_select(0, index) for one in self.dataset.tensors]


def _as_it_is(batch: Any) -> Any:
    return batch


def _indices(keys: Sequence[Any]) -> Tensor | None:
    """Returns a dataset's keys as a tensor, or ``None`` if they are no indices."""
    if isinstance(keys, Tensor):
        return keys
    try:
        index = torch.tensor(keys)
    except (TypeError, ValueError, RuntimeError):
        return None
    return index if index.dtype is torch.int64 and index.dim() == 1 and min(keys) >= 0 else None


class _Share:
    """Every n-th index of each batch; the first one, marked, where that is none."""

    def __init__(self, sampler: Any, share: tuple[int, int]) -> None:
        self.sampler, self.share = sampler, share

    def __iter__(self) -> Iterator[list[Any]]:
        rank, world = self.share
        for batch in self.sampler:
            keys = list(batch)
            yield keys[rank::world] or [_Idle(keys[0])]

    def __len__(self) -> int:
        return len(self.sampler)


def gathers(loader: DataLoader[Any]) -> bool:
    """Whether a loader does no more than to collate rows of tensors in host memory."""
    dataset = loader.dataset
    plain = type(loader) is DataLoader and type(dataset) is TensorDataset and loader.collate_fn is default_collate
    return plain and all(
        one.device.type == "cpu" and one.layout is torch.strided for one in getattr(dataset, "tensors", ())
    )


def indexed_loader(loader: DataLoader[Any], share: tuple[int, int]) -> DataLoader[Any] | None:
    """Returns a loader of ``(indices, idle, batch)``, or ``None`` if the caller's is no plain one.

    Args:
        loader: The caller's.
        share: Which share of every batch is this process's, and of how many.
    """
    if type(loader) is not DataLoader or loader.batch_sampler is None or isinstance(loader.dataset, IterableDataset):
        return None
    rows = gathers(loader)
    return DataLoader(
        (_Rows if rows else _Indexed)(loader.dataset),
        batch_sampler=_Share(loader.batch_sampler, share) if share[1] > 1 else loader.batch_sampler,
        num_workers=loader.num_workers,
        collate_fn=_Collate(_as_it_is if rows else loader.collate_fn),
        pin_memory=loader.pin_memory,
        timeout=loader.timeout,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
        generator=loader.generator,
        prefetch_factor=loader.prefetch_factor,
        persistent_workers=loader.persistent_workers,
    )
