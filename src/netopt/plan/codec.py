"""Indices and integer tensors as short text.

A half-random choice among thousands is shortest as a bitmap, a contiguous one as ranges; equal ones are stored once.
"""

from __future__ import annotations

import base64
import zlib
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["IndexCodec", "decode", "encode", "pack", "unpack"]


def encode(kept: Tensor) -> str:
    """Ascending indices as ranges or as a bitmap, whichever is shorter.

    Example:
        >>> encode(torch.tensor([0, 1, 2, 7]))
        '0-2,7'
    """
    numbers = kept.numpy()
    starts = np.flatnonzero(np.diff(numbers, prepend=-2) != 1)
    ends = np.append(starts[1:], len(numbers)) - 1
    ranges = ",".join(
        str(first) if first == last else f"{first}-{last}"
        for first, last in zip(numbers[starts], numbers[ends], strict=True)
    )
    bits = np.zeros(int(numbers[-1]) + 1 if len(numbers) else 0, dtype=bool)
    bits[numbers] = True
    bitmap = "b:" + base64.b64encode(np.packbits(bits).tobytes()).decode()
    return min(ranges, bitmap, key=len)


def decode(text: str) -> Tensor:
    """The indices that :func:`encode` wrote."""
    if text.startswith("b:"):
        bits = np.unpackbits(np.frombuffer(base64.b64decode(text[2:]), dtype=np.uint8))
        return torch.from_numpy(np.flatnonzero(bits))
    parts = [part.partition("-") for part in text.split(",") if part]
    spans = [torch.arange(int(first), int(last or first) + 1) for first, _, last in parts]
    return torch.cat(spans) if spans else torch.empty(0, dtype=torch.int64)


class IndexCodec:
    """Index lists stored once each and referred to by place."""

    def __init__(self, entries: Iterable[str] = ()) -> None:
        self.entries = list(entries)
        self._places = {entry: place for place, entry in enumerate(self.entries)}

    def add(self, kept: Tensor) -> int:
        """The place of ``kept``, stored now if it is new."""
        text = encode(kept)
        if text not in self._places:
            self._places[text] = len(self.entries)
            self.entries.append(text)
        return self._places[text]

    def tensors(self) -> list[Tensor]:
        """All index lists, by place."""
        return [decode(entry) for entry in self.entries]


def pack(tensor: Tensor) -> dict[str, Any]:
    """A tensor of integers as text: shape, dtype, and compressed values."""
    numbers = np.ascontiguousarray(tensor.cpu().numpy())
    return {
        "shape": list(tensor.shape),
        "dtype": str(numbers.dtype),
        "zlib": base64.b64encode(zlib.compress(numbers.tobytes())).decode(),
    }


def unpack(data: dict[str, Any]) -> Tensor:
    """The tensor that :func:`pack` wrote."""
    flat = np.frombuffer(zlib.decompress(base64.b64decode(data["zlib"])), dtype=data["dtype"])
    return torch.from_numpy(flat.copy()).reshape(data["shape"])
