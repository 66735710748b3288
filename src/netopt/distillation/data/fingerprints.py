"""Which sample is this: a hash of its content, in one pass over a batch.

Every sample is hashed to 128 bits: its words times fixed odd numbers, summed modulo 2^64, in two lanes. That is no
cryptography, and for accidents it is plenty.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from netopt import batches

__all__ = ["data_fingerprints", "model_fingerprint", "row_checksums", "sample_fingerprints", "signature"]

AT_ONCE = 2**22
SALT = 0x5EED5EED
_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def inputs_of(batch: Any) -> list[tuple[str, Tensor]]:
    """Returns the input tensors of a batch, without its labels, by path."""
    # A batch of more entries has a forward of the caller's own, which may read any of them.
    inputs = batch if isinstance(batch, (tuple, list)) and len(batch) > 2 else batches.split(batch)[0]
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
    return _fingerprints([tensor for _, tensor in inputs_of(batch)])


def _fingerprints(tensors: Sequence[Tensor]) -> Tensor:
    total: Tensor | None = None
    for place, tensor in enumerate(tensors):
        words = _words(tensor)
        lanes = torch.stack([_weighed(words, 2 * place + lane) for lane in range(2)], dim=1)
        total = lanes if total is None else total + lanes
    assert total is not None, "a batch without tensors has no signature"
    return total


def _lane(tensor: Tensor, lane: int) -> Tensor:
    return _weighed(_words(tensor), lane)


def _weighed(words: Tensor, lane: int) -> Tensor:
    return (words * _odd(words.shape[1], lane)).sum(1)


def data_fingerprints(data: Any) -> Tensor:
    """Returns :func:`sample_fingerprints` of samples given all at once, however many there are.

    Example:
        >>> x = torch.arange(6.0).reshape(3, 2)
        >>> torch.equal(data_fingerprints(x), sample_fingerprints(x))
        True
    """
    found = inputs_of(data)
    width = sum(one[:1].numel() for _, one in found)
    blocks = zip(*(one.split(max(1, AT_ONCE // max(1, width))) for _, one in found), strict=True)
    return torch.cat([_fingerprints(block) for block in blocks])


def row_checksums(tensors: Sequence[Tensor]) -> Tensor:
    """Returns a checksum of each row of several tensors together, ``(rows,)``, int64; of zeros it is not zero."""
    return sum((_lane(one, 2 * place) for place, one in enumerate(tensors)), torch.full((len(tensors[0]),), SALT))


def model_fingerprint(models: Iterable[nn.Module]) -> str:
    """Returns a hash of the models' layers, parameters and buffers."""
    digest = hashlib.blake2b(digest_size=16)
    for model in models:
        digest.update(repr(model).encode())
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            if tensor.numel():
                digest.update(_fingerprints([_whole(tensor).reshape(1, -1)]).numpy().tobytes())
    return digest.hexdigest()


def _whole(tensor: Tensor) -> Tensor:
    full: Any = getattr(tensor, "full_tensor", None)
    return (tensor if full is None else full()).detach()


def _words(tensor: Tensor) -> Tensor:
    flat = tensor.detach().to("cpu").reshape(len(tensor), math.prod(tensor.shape[1:]))
    if flat.is_complex():
        flat = torch.view_as_real(flat).flatten(1)
    return flat.contiguous().view(_WORDS[flat.element_size()]).long()


@functools.lru_cache(maxsize=64)
def _odd(length: int, lane: int) -> Tensor:
    generator = torch.Generator().manual_seed(0x5EED + lane)
    return torch.randint(-(2**62), 2**62, (length,), generator=generator) * 2 + 1
