"""Which sample is this? Told by its content, in one pass over a batch.

Every sample is hashed to 128 bits: its words times fixed odd numbers, summed modulo 2^64, in two lanes. That is no
cryptography, and for accidents it is plenty.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from netopt import batches

__all__ = ["model_fingerprint", "sample_fingerprints", "signature"]

_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def inputs_of(batch: Any) -> list[tuple[str, Tensor]]:
    """Returns the input tensors of a batch, without its labels, by path."""
    inputs = batches.split(batch)[0]
    if isinstance(inputs, Mapping):
        inputs = {key: value for key, value in inputs.items() if key != "labels"}
    return batches.tensors(inputs)


def signature(batch: Any) -> tuple[Any, ...] | None:
    """Returns names, shapes and dtypes of one sample's inputs; ``None`` if they are not one row a sample."""
    found = inputs_of(batch)
    lengths = {one.shape[0] if one.dim() else -1 for _, one in found}
    if len(lengths) != 1 or -1 in lengths:
        return None
    return tuple((path, tuple(one.shape[1:]), str(one.dtype)) for path, one in found)


def sample_fingerprints(batch: Any) -> Tensor:
    """Returns a hash of each sample's inputs, ``(samples, 2)``, int64, in host memory.

    Example:
        >>> x = torch.arange(6.0).reshape(3, 2)
        >>> a, b = sample_fingerprints(x), sample_fingerprints(x.flip(0))
        >>> torch.equal(a, b.flip(0)), len({tuple(row) for row in a.tolist()})
        (True, 3)
    """
    total: Tensor | None = None
    for place, (_, tensor) in enumerate(inputs_of(batch)):
        words = _words(tensor)
        lanes = torch.stack([(words * _odd(words.shape[1], 2 * place + lane)).sum(1) for lane in range(2)], dim=1)
        total = lanes if total is None else total + lanes
    assert total is not None, "a batch without tensors has no signature"
    return total


def model_fingerprint(models: Iterable[nn.Module]) -> str:
    """Returns a hash of the models' parameters and buffers."""
    digest = hashlib.blake2b(digest_size=16)
    for model in models:
        for name, tensor in model.state_dict().items():
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            if isinstance(tensor, Tensor) and tensor.numel():
                digest.update(sample_fingerprints(tensor.detach().reshape(1, -1)).numpy().tobytes())
    return digest.hexdigest()


def _words(tensor: Tensor) -> Tensor:
    flat = tensor.detach().to("cpu").reshape(len(tensor), -1)
    if flat.is_complex():
        flat = torch.view_as_real(flat).flatten(1)
    return flat.contiguous().view(_WORDS[flat.element_size()]).long()


@functools.lru_cache(maxsize=64)
def _odd(length: int, lane: int) -> Tensor:
    generator = torch.Generator().manual_seed(0x5EED + lane)
    return torch.randint(-(2**62), 2**62, (length,), generator=generator) * 2 + 1
