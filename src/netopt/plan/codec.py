"""Indices and integer tensors as short text.

A half-random choice among thousands is shortest as a bitmap, a contiguous one as ranges; equal ones are stored once.
"""

from __future__ import annotations

import base64
import math
import zlib
from typing import Any

import numpy as np
import torch
from torch import Tensor

from netopt.errors import InvalidArgumentError

__all__ = ["Budget", "IndexCodec", "decode", "encode", "pack", "unpack"]

MOST = 1 << 24
LARGEST = 1 << 28
"""Indices that the ranges of a plan unfold to, and bytes that a tensor in it takes, at most."""
WHOLE = ("bool", "uint8", "int8", "int16", "int32", "int64")
KINDS = (*WHOLE, "float16", "float32", "float64")


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


class Budget:
    """How many indices the ranges of one file may unfold to: a few characters can state any number of them."""

    def __init__(self, count: int = MOST) -> None:
        self._left = count

    def take(self, count: int, where: str) -> None:
        """Takes ``count`` of them.

        Raises:
            InvalidArgumentError: There are not so many left.
        """
        self._left -= count
        if self._left < 0:
            raise InvalidArgumentError(f"`{where}` unfolds to more than {MOST} indices, with those before it")


def decode(text: str, where: str = "indices", size: int | None = None, budget: Budget | None = None) -> Tensor:
    """The indices that :func:`encode` wrote.

    Args:
        text: Ranges, or a bitmap.
        where: What to call them in messages.
        size: Of the dimension; all indices are below it.
        budget: What ranges may unfold to, together with others.

    Raises:
        InvalidArgumentError: The text is neither, or states an index that is not below ``size``.
    """
    if text.startswith("b:"):
        bits = np.unpackbits(np.frombuffer(_bytes(text[2:], where), dtype=np.uint8))
        return torch.from_numpy(np.flatnonzero(bits))
    spans = [_span(part, where, size) for part in text.split(",") if part]
    (budget or Budget()).take(sum(last + 1 - first for first, last in spans), where)
    return torch.cat([torch.arange(first, last + 1) for first, last in spans]) if spans else torch.empty(0).long()


def _span(part: str, where: str, size: int | None) -> tuple[int, int]:
    first, dash, last = part.partition("-")
    ends = [first, last] if dash else [first, first]
    if not all(one.isascii() and one.isdigit() and len(one) < 19 for one in ends):
        raise InvalidArgumentError(f"`{where}` has the range {part[:40]!r}, which is none")
    low, high = map(int, ends)
    if high < low or (size is not None and high >= size):
        of = "" if size is None else f" of {size} entries"
        raise InvalidArgumentError(f"`{where}` has the range {part[:40]!r}{of}")
    return low, high


def _bytes(text: Any, where: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (ValueError, TypeError) as error:
        raise InvalidArgumentError(f"`{where}` is no base64 text: {error}") from None


class IndexCodec:
    """Index lists stored once each and referred to by place."""

    def __init__(self) -> None:
        self.entries: list[str] = []
        self._places: dict[str, int] = {}

    def add(self, kept: Tensor) -> int:
        """The place of ``kept``, stored now if it is new."""
        text = encode(kept)
        if text not in self._places:
            self._places[text] = len(self.entries)
            self.entries.append(text)
        return self._places[text]


def pack(tensor: Tensor) -> dict[str, Any]:
    """A tensor of integers as text: shape, dtype, and compressed values."""
    numbers = np.ascontiguousarray(tensor.cpu().numpy())
    return {
        "shape": list(tensor.shape),
        "dtype": str(numbers.dtype),
        "zlib": base64.b64encode(zlib.compress(numbers.tobytes())).decode(),
    }


def unpack(data: Any, where: str = "tensor") -> Tensor:
    """The tensor that :func:`pack` wrote.

    Raises:
        InvalidArgumentError: A field is missing or broken, or the values are not as many as the shape says.
    """
    known = data if isinstance(data, dict) else {}
    shape, kind, text = known.get("shape"), known.get("dtype"), known.get("zlib")
    if not isinstance(shape, list) or not all(type(one) is int and 0 <= one < LARGEST for one in shape):
        raise InvalidArgumentError(f"`{where}.shape` is no list of sizes")
    if kind not in KINDS:
        raise InvalidArgumentError(f"`{where}.dtype` is none of {', '.join(KINDS)}")
    packed, size = _bytes(text, f"{where}.zlib"), math.prod(shape) * np.dtype(kind).itemsize
    if size > LARGEST:
        raise InvalidArgumentError(f"`{where}.shape` {shape} is of {size} bytes, more than a plan holds")
    reader = zlib.decompressobj()
    try:
        values = reader.decompress(packed, size + 1)
    except zlib.error as error:
        raise InvalidArgumentError(f"`{where}.zlib` cannot be decompressed: {error}") from None
    if len(values) != size or not reader.eof:
        raise InvalidArgumentError(f"`{where}.zlib` does not hold the {size} bytes of a {kind} tensor of shape {shape}")
    return torch.from_numpy(np.frombuffer(values, dtype=kind).copy()).reshape(shape)
