"""Safetensors files, read as far as their headers: which tensors there are, and where their bytes lie."""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import Tensor

from netopt.errors import CheckpointError
from netopt.plan.files import inside

__all__ = ["BLOCK", "INDEX", "Entry", "Shard", "Stored", "open_checkpoint", "read_mapping", "view_bytes"]

TYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
LONGEST = 100_000_000
LARGEST = 1 << 62
"""Bytes of a header, and entries of a tensor, at most."""
BLOCK = 1 << 18
"""Bytes read at a time: what fits in a cache is judged and narrowed without being written to memory in between."""


@dataclass(frozen=True)
class Entry:
    """One tensor of a file: its type, its shape and where its bytes lie behind the header."""

    kind: str
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True)
class Shard:
    """One safetensors file, read as far as its header."""

    path: Path
    entries: Mapping[str, Entry]
    metadata: Mapping[str, str]
    offset: int
    name: PurePosixPath
    """Its place below the checkpoint's folder."""

    @classmethod
    def open(cls, path: Path, name: PurePosixPath | None = None) -> Shard:
        """Reads the header and checks it, and that the bytes it promises are there.

        Raises:
            CheckpointError: The file is no safetensors file, or is truncated; the field is named.
        """
        try:
            size = path.stat().st_size
            with path.open("rb") as file:
                start = file.read(8)
                (length,) = struct.unpack("<Q", start) if len(start) == 8 else (0,)
                if not 2 <= length <= min(size - 8, LONGEST):
                    raise ValueError(f"a header of {length} bytes in a file of {size}")
                header = json.loads(file.read(length).decode())
            entries, metadata = _entries(header)
        except (OSError, ValueError, RecursionError) as error:
            raise CheckpointError(f"{path} cannot be read as a safetensors file: {error}") from error
        end = max((entry.stop for entry in entries.values()), default=0)
        if size != 8 + length + end:
            raise CheckpointError(
                f"{path} is truncated: it has {size} bytes and its header asks for {8 + length + end}"
            )
        for tensor, entry in entries.items():
            dtype = TYPES.get(entry.kind)
            if dtype is not None and entry.stop - entry.start != math.prod(entry.shape) * dtype.itemsize:
                raise CheckpointError(
                    f"{path} is broken: `{tensor}` {entry.shape} of {entry.kind} has {entry.stop - entry.start} bytes"
                )
        return cls(path, entries, metadata, 8 + length, name or PurePosixPath(path.name))

    def dtype(self, name: str) -> torch.dtype:
        """The type of the tensor called ``name``.

        Raises:
            CheckpointError: It is not known.
        """
        kind = self.entries[name].kind
        if kind not in TYPES:
            raise CheckpointError(f"`{name}` in {self.path} has the type {kind}, which is not known")
        return TYPES[kind]

    def read(self, name: str, start: int = 0, shape: tuple[int, ...] | None = None) -> Tensor:
        """The tensor called ``name``, or a part of it that lies in one piece.

        Args:
            name: Of an entry.
            start: How many numbers come before the part.
            shape: Of the part; of the whole tensor by default.

        Raises:
            CheckpointError: The file cannot be read, or holds less than its header says.
        """
        entry, dtype = self.entries[name], self.dtype(name)
        part = torch.empty(entry.shape if shape is None else shape, dtype=dtype)
        wanted = memoryview(view_bytes(part))
        try:
            with self.path.open("rb", buffering=0) as file:
                file.seek(self.offset + entry.start + start * dtype.itemsize)
                while wanted:
                    count = file.readinto(wanted)
                    if not count:
                        raise CheckpointError(f"{self.path} is truncated: `{name}` ends too early")
                    wanted = wanted[count:]
        except OSError as error:
            raise CheckpointError(f"{self.path} cannot be read: {error}") from error
        return part

    def blocks(self, name: str) -> Iterator[tuple[slice, Tensor]]:
        """The tensor called ``name``, some rows at a time."""
        shape = self.entries[name].shape
        if not shape:
            yield slice(None), self.read(name)
            return
        row = math.prod(shape[1:])
        step = max(1, BLOCK // max(row * self.dtype(name).itemsize, 1))
        for start in range(0, shape[0], step):
            count = min(step, shape[0] - start)
            yield slice(start, start + count), self.read(name, start * row, (count, *shape[1:]))


def _entries(header: Any) -> tuple[dict[str, Entry], dict[str, str]]:
    """The tensors of a header and its metadata; ValueError names the field that is broken."""
    if not isinstance(header, dict):
        raise ValueError("its header is no mapping")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(one, str) for one in metadata.values()):
        raise ValueError("`__metadata__` is no mapping of texts")
    entries = {name: _entry(name, one) for name, one in header.items()}
    end = 0
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].stop)):
        if entry.start != end:
            raise ValueError(f"`{name}.data_offsets` begin at {entry.start}, and what is before them ends at {end}")
        end = entry.stop
    return entries, metadata


def _entry(name: str, field: Any) -> Entry:
    known = field if isinstance(field, dict) else {}
    kind = known.get("dtype")
    if not isinstance(kind, str):
        raise ValueError(f"`{name}.dtype` is no text")
    shape, offsets = (_sizes(known.get(key), f"{name}.{key}") for key in ("shape", "data_offsets"))
    if math.prod(one for one in shape if one) > LARGEST:
        raise ValueError(f"`{name}.shape` is larger than any tensor")
    if len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ValueError(f"`{name}.data_offsets` are no two places, one after the other")
    return Entry(kind, tuple(shape), *offsets)


def _sizes(value: Any, what: str) -> list[int]:
    if not isinstance(value, list) or not all(type(one) is int and 0 <= one <= LARGEST for one in value):
        raise ValueError(f"`{what}` is no list of sizes")
    return value


@dataclass(frozen=True)
class Stored:
    """A checkpoint in one or several safetensors files."""

    shards: tuple[Shard, ...]
    folder: Path | None

    @property
    def places(self) -> dict[str, Shard]:
        """The file each tensor is in."""
        return {name: shard for shard in self.shards for name in shard.entries}


def open_checkpoint(source: str | os.PathLike[str]) -> Stored:
    """Reads the headers of a safetensors file, or of all in a folder (those its index lists, if it has one).

    Raises:
        CheckpointError: There is none, or one is missing, truncated or without a tensor that the index lists.
    """
    path = Path(source)
    if path.is_file():
        return Stored((Shard.open(path),), None)
    listed = _listed(path / INDEX) if (path / INDEX).is_file() else {}
    # What lies beside the one file of a model is another format of it, or an adapter.
    whole = {PurePosixPath(SINGLE)} if (path / SINGLE).is_file() else set()
    names = sorted({*listed.values()} or whole or {PurePosixPath(file.name) for file in path.glob("*.safetensors")})
    if not names:
        raise CheckpointError(f"{path} is no safetensors file, and no folder with one")
    missing = next((name for name in names if not (path / name).is_file()), None)
    if missing is not None:
        raise CheckpointError(f"{path} lacks {missing}, which its index lists")
    shards = {name: Shard.open(path / name, name) for name in names}
    absent = next((name for name, file in listed.items() if name not in shards[file].entries), None)
    if absent is not None:
        raise CheckpointError(f"{path / listed[absent]} lacks `{absent}`, which the index lists there")
    return Stored(tuple(shards.values()), path)


def _listed(index: Path) -> dict[str, PurePosixPath]:
    """The file of each tensor, as an index has it."""
    found = read_mapping(index).get("weight_map")
    if not isinstance(found, dict) or not all(isinstance(file, str) for file in found.values()):
        raise CheckpointError(f"{index} is broken: `weight_map` is no mapping from tensors to files")
    return {name: inside(file, index) for name, file in found.items()}


def read_mapping(path: Path) -> dict[str, Any]:
    """A JSON file that holds a mapping.

    Raises:
        CheckpointError: It cannot be read, or holds something else.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} is broken: it holds no mapping")
    return found


def view_bytes(tensor: Tensor) -> memoryview:
    """The memory of a tensor."""
    flat: Any = tensor.reshape(-1).view(torch.uint8).numpy()
    return memoryview(flat)
