"""Autocast as the forward has entered it, for what is called again outside of it."""

from __future__ import annotations

from typing import Any

import torch

from netopt import batches

__all__ = ["autocast_now", "autocast_state"]


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
