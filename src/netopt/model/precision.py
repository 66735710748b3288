"""Autocast around a forward: what is called again outside of it, and the casts that it keeps.

Autocast keeps its casts of weights until it is left: they would hide what is written to the weights meanwhile, and
which weights an operation reads, and their weak references keep tensors from being exchanged.
"""

from __future__ import annotations

from typing import Any

import torch

from netopt import batches
from netopt.model.signals import UndoLog

__all__ = ["autocast_now", "autocast_state", "uncached"]


def uncached(log: UndoLog) -> None:
    """Has autocast forget its casts of weights, and keep none in this thread until the log is left."""
    log.callback(torch.set_autocast_cache_enabled, torch.is_autocast_cache_enabled())
    torch.set_autocast_cache_enabled(False)
    torch.clear_autocast_cache()


def autocast_state() -> tuple[Any, ...]:
    """Something that is equal where the same is autocast."""
    return tuple((torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in ("cpu", "cuda"))


def autocast_now(given: Any) -> torch.autocast:
    """The autocast of this moment, to be entered later.

    Args:
        given: Tensors on the device in question.
    """
    kind = next((tensor.device.type for _, tensor in batches.tensors(given)), "cpu")
    return torch.autocast(kind, dtype=torch.get_autocast_dtype(kind), enabled=torch.is_autocast_enabled(kind))
