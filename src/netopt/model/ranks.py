"""Sums over processes: what each has seen of its own data, as if one had seen all of it.

Where ``torch.distributed`` is initialized for several processes, all of them make the same calls on copies of one
model, as in data-parallel training; otherwise nothing happens here.
"""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Mapping
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from netopt.errors import InvalidArgumentError

__all__ = ["add_up", "add_up_all", "add_up_numbers", "check_alike", "gathered", "is_shared"]

Key = TypeVar("Key", bound=Hashable)


def is_shared() -> bool:
    """Whether there are several processes."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def add_up(tensor: Tensor) -> Tensor:
    """Adds a tensor up over all processes; every one has it, of the same shape."""
    if not is_shared():
        return tensor
    total = tensor.detach().clone().contiguous()
    # A backend of accelerators alone cannot add what is in host memory.
    device = torch.device("cpu") if dist.get_backend() != "nccl" else torch.device("cuda", torch.cuda.current_device())
    moved = total.to(device)
    dist.all_reduce(moved)
    return moved.to(tensor.device)


def add_up_numbers(*numbers: float) -> list[float]:
    """Adds numbers up over all processes."""
    return add_up(torch.tensor(numbers, dtype=torch.float64)).tolist() if is_shared() else [*numbers]


def gathered(value: Any) -> list[Any]:
    """What every process has, in their order; small things."""
    if not is_shared():
        return [value]
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found


def add_up_all(tensors: Mapping[Key, Tensor], device: torch.device | None = None) -> dict[Key, Tensor]:
    """Adds tensors up over all processes, by key; what a process lacks is zero there, on ``device``."""
    if not is_shared():
        return dict(tensors)
    shapes: dict[Key, tuple[Any, ...]] = {}
    for one in gathered({key: (tuple(value.shape), value.dtype) for key, value in tensors.items()}):
        shapes |= {key: form for key, form in one.items() if key not in shapes}
    found = {}
    for key, (shape, dtype) in shapes.items():
        own = tensors.get(key)
        fits = own is not None and tuple(own.shape) == shape
        found[key] = add_up(own if own is not None and fits else torch.zeros(shape, dtype=dtype, device=device))
    return found


def check_alike(tensors: Mapping[str, Tensor | Mapping[int, Tensor]], what: str) -> None:
    """Raises an `InvalidArgumentError`, in every process, unless all have decided the same."""
    if not is_shared():
        return
    digest = hashlib.sha256()
    for name, value in tensors.items():
        for key, one in (value if isinstance(value, Mapping) else {-1: value}).items():
            digest.update(f"{name} {key}".encode())
            digest.update(one.detach().cpu().contiguous().numpy().tobytes())
    if len(set(gathered(digest.hexdigest()))) > 1:
        raise InvalidArgumentError(
            f"the {dist.get_world_size()} processes would prune different {what}; give all of them the same weights, "
            "the same arguments, and a criterion that draws no random numbers of its own."
        )
