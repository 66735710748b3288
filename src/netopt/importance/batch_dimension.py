"""The samples of a batch: entries along the first dimension of its inputs, if that lists samples at all."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from netopt import batches

__all__ = ["as_batch", "begins_with", "sample_count", "samples_of"]


def as_batch(inputs: Any) -> Any:
    """Inputs of one forward as a batch without targets."""
    return (inputs, None) if isinstance(inputs, (tuple, list)) else inputs


def begins_with(whole: Tensor, part: Tensor) -> bool:
    """Whether the first entries of ``whole`` are ``part``, but for rounding."""
    first, size = whole[: len(part)], float(whole.abs().amax()) if whole.numel() else 0.0
    return first.shape == part.shape and torch.allclose(first, part, rtol=1e-2, atol=1e-3 * size)


def sample_count(inputs: Any) -> int:
    """How many samples a batch holds: the common length of its tensors, or 1 if there is none."""
    found = {len(tensor) for _, tensor in batches.tensors(inputs) if tensor.dim() > 0}
    return found.pop() if len(found) == 1 else 1


def samples_of(value: Any, start: int, stop: int, count: int) -> Any:
    """Samples ``start`` to ``stop`` of a batch's inputs."""
    if isinstance(value, Tensor):
        return value[start:stop] if value.dim() > 0 and len(value) == count else value
    if isinstance(value, Mapping):
        return {key: samples_of(one, start, stop, count) for key, one in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(samples_of(one, start, stop, count) for one in value)
    return value
