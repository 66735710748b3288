"""A loader like the caller's that also says which samples a batch is made of.

The caller's loader is not touched: the copy draws from the same samplers and generators in the same order, through the
same workers and collation, and hands out the same batches, or this process's share of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

__all__ = ["indexed_loader"]


class _Idle:
    """An index drawn only because a share is empty."""

    def __init__(self, index: Any) -> None:
        self.index = index


class _Indexed(Dataset[Any]):
    """A dataset whose samples come with their index."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __getitem__(self, index: Any) -> tuple[Any, Any]:
        return index, self.dataset[index.index if isinstance(index, _Idle) else index]

    def __getattr__(self, name: str) -> Any:
        # What workers look for on the dataset is found on the caller's.
        if name == "dataset" or (name.startswith("__") and name != "__getitems__"):
            raise AttributeError(name)
        if name == "__getitems__":
            fetch = self.dataset.__getitems__
            return lambda keys: list(
                zip(keys, fetch([k.index if isinstance(k, _Idle) else k for k in keys]), strict=True)
            )
        return getattr(self.dataset, name)


class _Collate:
    """Collates samples as the caller's loader does, and their indices into a tensor."""

    def __init__(self, collate: Callable[[list[Any]], Any]) -> None:
        self.collate = collate

    def __call__(self, samples: Sequence[tuple[Any, Any]]) -> tuple[Tensor | None, bool, Any]:
        keys = [key for key, _ in samples]
        idle = any(isinstance(key, _Idle) for key in keys)
        keys = [key.index if isinstance(key, _Idle) else key for key in keys]
        plain = all(isinstance(key, int) and key >= 0 for key in keys)
        return torch.tensor(keys) if plain else None, idle, self.collate([sample for _, sample in samples])


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


def indexed_loader(loader: DataLoader[Any], share: tuple[int, int]) -> DataLoader[Any] | None:
    """Returns a loader of ``(indices, idle, batch)``, or ``None`` if the caller's is no plain one.

    Args:
        loader: The caller's.
        share: Which share of every batch is this process's, and of how many.
    """
    if type(loader) is not DataLoader or loader.batch_sampler is None or isinstance(loader.dataset, IterableDataset):
        return None
    return DataLoader(
        _Indexed(loader.dataset),
        batch_sampler=_Share(loader.batch_sampler, share) if share[1] > 1 else loader.batch_sampler,
        num_workers=loader.num_workers,
        collate_fn=_Collate(loader.collate_fn),
        pin_memory=loader.pin_memory,
        timeout=loader.timeout,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
        generator=loader.generator,
        prefetch_factor=loader.prefetch_factor,
        persistent_workers=loader.persistent_workers,
    )
