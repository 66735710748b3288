"""A plan carried out on files, in the memory of a few blocks of a tensor.

The safetensors format is a header (names, types, shapes, places) before the bytes, so every new size is known and
checked before anything is written, and each tensor is read, narrowed and written some rows at a time. A file appears
under its name only when it is whole; files that are there already from an interrupted run are kept.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import shutil
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np
import torch
from torch import Tensor

from netopt.errors import CheckpointError, PlanMismatchError

__all__ = ["Stored", "open_checkpoint", "rewrite"]

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
BLOCK = 1 << 18
"""Bytes read at a time: what fits in a cache is judged and narrowed without being written to memory in between."""
_PLAIN = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Decision(Protocol):
    """What is needed of a plan."""

    @property
    def tensors(self) -> Mapping[str, Mapping[int, Tensor]]: ...
    @property
    def values(self) -> Mapping[str, Tensor]: ...
    @property
    def shifts(self) -> Mapping[str, Tensor]: ...
    @property
    def scales(self) -> Mapping[str, float | Tensor]: ...
    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]: ...
    @property
    def unsaved(self) -> tuple[str, ...]: ...
    @property
    def attributes(self) -> tuple[tuple[tuple[Any, ...], Any], ...]: ...


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

    @classmethod
    def open(cls, path: Path) -> Shard:
        """Reads the header and checks that the bytes it promises are there.

        Raises:
            CheckpointError: The file is no safetensors file, or is truncated.
        """
        try:
            size = path.stat().st_size
            with path.open("rb") as file:
                (length,) = struct.unpack("<Q", file.read(8))
                if length > size:
                    raise ValueError(f"a header of {length} bytes in a file of {size}")
                header = json.loads(file.read(length))
            metadata = header.pop("__metadata__", {})
            entries = {
                name: Entry(one["dtype"], tuple(one["shape"]), *one["data_offsets"]) for name, one in header.items()
            }
        except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
            raise CheckpointError(f"{path} cannot be read as a safetensors file: {error}") from error
        end = max((entry.stop for entry in entries.values()), default=0)
        if size != 8 + length + end:
            raise CheckpointError(
                f"{path} is truncated: it has {size} bytes and its header asks for {8 + length + end}"
            )
        for name, entry in entries.items():
            dtype = TYPES.get(entry.kind)
            if dtype is not None and entry.stop - entry.start != math.prod(entry.shape) * dtype.itemsize:
                raise CheckpointError(
                    f"{path} is broken: `{name}` {entry.shape} of {entry.kind} has {entry.stop - entry.start} bytes"
                )
        return cls(path, entries, metadata, 8 + length)

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
        wanted = memoryview(_bytes(part))
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
    index, listed = path / INDEX, {}
    if index.is_file():
        listed = json.loads(index.read_text())["weight_map"]
    names = sorted(set(listed.values()) or {file.name for file in path.glob("*.safetensors")})
    if not names:
        raise CheckpointError(f"{path} is no safetensors file, and no folder with one")
    missing = next((name for name in names if not (path / name).is_file()), None)
    if missing is not None:
        raise CheckpointError(f"{path} lacks {missing}, which its index lists")
    shards = {name: Shard.open(path / name) for name in names}
    absent = next((name for name, file in listed.items() if name not in shards[file].entries), None)
    if absent is not None:
        raise CheckpointError(f"{path / listed[absent]} lacks `{absent}`, which the index lists there")
    return Stored(tuple(shards.values()), path)


def rewrite(plan: Decision, fingerprint: str, source: str | os.PathLike[str], target: str | os.PathLike[str]) -> Path:
    """Writes ``source`` as ``plan`` leaves it to ``target``; see :meth:`netopt.Plan.apply_to_checkpoint`."""
    stored, goal = open_checkpoint(source), Path(target)
    if goal.resolve() == Path(source).resolve():
        raise CheckpointError(f"the target {goal} is the source; write to another place")
    _check(plan, stored)
    try:
        _write_all(plan, fingerprint, stored, goal)
    except OSError as error:
        raise CheckpointError(
            f"{goal} could not be written: {error}; what was finished stays, and the same call goes on from there"
        ) from error
    return goal


def _write_all(plan: Decision, fingerprint: str, stored: Stored, goal: Path) -> None:
    """Writes every file of ``stored`` that is not there yet."""
    if stored.folder is None:
        goal.parent.mkdir(parents=True, exist_ok=True)
        _write(plan, fingerprint, stored.shards[0], goal)
        return
    goal.mkdir(parents=True, exist_ok=True)
    total, weight_map = 0, {}
    for shard in stored.shards:
        entries = _write(plan, fingerprint, shard, goal / shard.path.name)
        total += sum(entry.stop - entry.start for entry in entries.values())
        weight_map.update(dict.fromkeys(entries, shard.path.name))
    _copy_rest(plan, stored.folder, goal)
    if (stored.folder / INDEX).is_file():
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        _replace_text(goal / INDEX, json.dumps(index, indent=2, sort_keys=True) + "\n")


def _check(plan: Decision, stored: Stored) -> None:
    """Everything that can be wrong is found before a byte is written."""
    places = stored.places
    for name in plan.tensors:
        if name not in places:
            if name in plan.unsaved:
                continue
            raise PlanMismatchError(f"the plan cuts `{name}`, and the checkpoint has no tensor of that name")
        shape = places[name].entries[name].shape
        if name in plan.shapes and plan.shapes[name] != shape:
            raise PlanMismatchError(
                f"`{name}` has shape {shape} in the checkpoint and {plan.shapes[name]} in the model of the plan"
            )
        for dim, kept in plan.tensors[name].items():
            if dim >= len(shape) or int(kept[-1]) >= shape[dim]:
                raise PlanMismatchError(f"the plan keeps index {int(kept[-1])} of dimension {dim} of `{name}` {shape}")


def _planned(plan: Decision, shard: Shard) -> dict[str, Entry]:
    """The entries the new file will have."""
    entries, end = {}, 0
    for name, old in sorted(shard.entries.items(), key=lambda item: item[1].start):
        cuts = plan.tensors.get(name, {})
        shape = tuple(len(cuts[dim]) if dim in cuts else size for dim, size in enumerate(old.shape))
        count = math.prod(old.shape)
        width = (old.stop - old.start) // count if count else 0
        entries[name] = Entry(old.kind, shape, end, end + width * math.prod(shape))
        end = entries[name].stop
    return entries


def _write(plan: Decision, fingerprint: str, shard: Shard, target: Path) -> dict[str, Entry]:
    entries = _planned(plan, shard)
    metadata = {**shard.metadata, "netopt.plan": fingerprint, "netopt.source_bytes": str(shard.path.stat().st_size)}
    if target.is_file() and _is_whole(target, entries, metadata):
        return entries
    with _partial(target) as partial, partial.open("wb") as file:
        _write_header(file, entries, metadata)
        for name in entries:
            for part in _parts(plan, shard, name):
                file.write(_bytes(part))
        file.flush()
        os.fsync(file.fileno())
    return entries


def _is_whole(target: Path, entries: Mapping[str, Entry], metadata: Mapping[str, str]) -> bool:
    """Whether an earlier run has written this file."""
    try:
        found = Shard.open(target)
    except CheckpointError:
        return False
    return dict(found.entries) == dict(entries) and dict(found.metadata) == dict(metadata)


def _write_header(file: IO[bytes], entries: Mapping[str, Entry], metadata: Mapping[str, str]) -> None:
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    for name, one in entries.items():
        header[name] = {"dtype": one.kind, "shape": list(one.shape), "data_offsets": [one.start, one.stop]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(struct.pack("<Q", len(text)) + text)


def _parts(plan: Decision, shard: Shard, name: str) -> Iterator[Tensor]:
    """The new tensor called ``name``, part by part as it lies in memory."""
    dtype = shard.dtype(name)
    if name in plan.values:
        yield plan.values[name].to(dtype).contiguous()
        return
    cuts, entry = plan.tensors.get(name, {}), shard.entries[name]
    shape = tuple(len(cuts[dim]) if dim in cuts else size for dim, size in enumerate(entry.shape))
    shift, factor = (_spread(values.get(name), shape) for values in (plan.shifts, plan.scales))
    for place, part in _narrowed(shard, name, cuts):
        shifted = part if shift is None else (part + shift[place]).to(dtype)
        scaled = shifted if factor is None else (shifted * factor[place]).to(dtype)
        yield scaled.contiguous()


def _spread(value: float | Tensor | None, shape: tuple[int, ...]) -> Tensor | None:
    return None if value is None else torch.as_tensor(value).expand(shape)


def _narrowed(shard: Shard, name: str, cuts: Mapping[int, Tensor]) -> Iterator[tuple[tuple[Any, ...], Tensor]]:
    """What stays of a tensor, part by part, each with its place in the new tensor."""
    shape, width = shard.entries[name].shape, shard.dtype(name).itemsize
    if not shape:
        yield (), shard.read(name)
        return
    # The rows are of the first dimension of which one index is no more than a block; those before go one by one.
    rows = 0
    while rows < len(shape) - 1 and math.prod(shape[rows + 1 :]) * width > BLOCK:
        rows += 1
    kept = [cuts.get(dim, torch.arange(size)) for dim, size in enumerate(shape[: rows + 1])]
    length = math.prod(shape[rows + 1 :])
    inner = {dim - rows: indices for dim, indices in cuts.items() if dim > rows}
    for outer in itertools.product(*(range(len(one)) for one in kept[:rows])):
        start = 0
        for dim, place in enumerate(outer):
            start = start * shape[dim] + int(kept[dim][place])
        done = 0
        for chosen in _near(kept[rows], max(1, BLOCK // max(length * width, 1))):
            first, count = int(chosen[0]), int(chosen[-1] - chosen[0]) + 1
            block = shard.read(name, (start * shape[rows] + first) * length, (count, *shape[rows + 1 :]))
            own = inner if len(chosen) == count else {0: chosen - first, **inner}
            yield (*outer, slice(done, done + len(chosen))), _narrow(block, own)
            done += len(chosen)


def _near(kept: Tensor, span: int) -> Iterator[Tensor]:
    """Ascending indices in groups, each within ``span`` of its first."""
    while len(kept):
        count = int(torch.searchsorted(kept, kept[0] + span))
        yield kept[:count]
        kept = kept[count:]


def _narrow(tensor: Tensor, cuts: Mapping[int, Tensor]) -> Tensor:
    # As integers of the same width, which numpy knows whatever the type, and takes faster than torch selects.
    numbers = tensor.view(_PLAIN[tensor.dtype.itemsize]).numpy()
    for dim, kept in cuts.items():
        numbers = np.take(numbers, kept.numpy(), axis=dim)
    return torch.from_numpy(numbers).view(tensor.dtype)


def _bytes(tensor: Tensor) -> memoryview:
    flat: Any = tensor.reshape(-1).view(torch.uint8).numpy()
    return memoryview(flat)


def _copy_rest(plan: Decision, source: Path, target: Path) -> None:
    """Configuration, tokenizer and whatever else lies beside the weights."""
    changes = {path[2:]: value for path, value in plan.attributes if path[:2] == ("", "config")}
    for file in source.iterdir():
        if not file.is_file() or file.suffix == ".safetensors" or file.name == INDEX:
            continue
        if file.name == "config.json" and changes:
            config = json.loads(file.read_text())
            for path, value in changes.items():
                _set(config, path, value)
            _replace_text(target / file.name, json.dumps(config, indent=2, sort_keys=True) + "\n")
        else:
            with _partial(target / file.name) as partial:
                shutil.copyfile(file, partial)


def _set(config: dict[str, Any], path: tuple[Any, ...], value: Any) -> None:
    for step in path[:-1]:
        config = config.setdefault(step, {})
    config[path[-1]] = value


def _replace_text(path: Path, text: str) -> None:
    with _partial(path) as partial:
        partial.write_text(text)


@contextmanager
def _partial(target: Path) -> Iterator[Path]:
    """A file beside ``target`` that takes its place once it is whole, and is gone otherwise."""
    partial = target.with_name(f"{target.name}.partial")
    try:
        yield partial
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)
