"""A plan carried out on files: tensor by tensor, in the memory of one.

The safetensors format is a header (names, types, shapes, places) before the bytes, so every new size is known and
checked before anything is written, and each tensor is read, narrowed and written by itself. A file appears under its
name only when it is whole; files that are there already from an interrupted run are kept.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import shutil
import struct
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol

import torch
from torch import Tensor

from netopt import surgery
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


class Decision(Protocol):
    """What is needed of a plan."""

    @property
    def tensors(self) -> Mapping[str, Mapping[int, Tensor]]: ...
    @property
    def values(self) -> Mapping[str, Tensor]: ...
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
                header = json.loads(file.read(length))
        except (OSError, ValueError, struct.error) as error:
            raise CheckpointError(f"{path} cannot be read as a safetensors file: {error}") from error
        metadata = header.pop("__metadata__", {})
        entries = {name: Entry(one["dtype"], tuple(one["shape"]), *one["data_offsets"]) for name, one in header.items()}
        end = max((entry.stop for entry in entries.values()), default=0)
        if size != 8 + length + end:
            raise CheckpointError(
                f"{path} is truncated: it has {size} bytes and its header asks for {8 + length + end}"
            )
        return cls(path, entries, metadata, 8 + length)

    @contextmanager
    def read(self, name: str) -> Iterator[Tensor]:
        """The tensor called ``name``, mapped from the file and gone afterwards."""
        entry = self.entries[name]
        if entry.kind not in TYPES:
            raise CheckpointError(f"`{name}` in {self.path} has the type {entry.kind}, which is not known")
        if entry.start == entry.stop:
            yield torch.empty(entry.shape, dtype=TYPES[entry.kind])
            return
        start = self.offset + entry.start
        page = start - start % mmap.ALLOCATIONGRANULARITY
        with self.path.open("rb") as file, warnings.catch_warnings():
            # The mapping is read-only, and so is what is done with it.
            warnings.filterwarnings("ignore", "The given buffer is not writable")
            mapped = mmap.mmap(file.fileno(), self.offset + entry.stop - page, access=mmap.ACCESS_READ, offset=page)
            count = math.prod(entry.shape)
            yield (
                torch.frombuffer(mapped, dtype=torch.uint8, offset=start - page, count=entry.stop - entry.start)
                .view(TYPES[entry.kind])[:count]
                .view(entry.shape)
            )


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
        CheckpointError: There is none, or one is missing or truncated.
    """
    path = Path(source)
    if path.is_file():
        return Stored((Shard.open(path),), None)
    index = path / INDEX
    if index.is_file():
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    else:
        names = sorted(file.name for file in path.glob("*.safetensors"))
    if not names:
        raise CheckpointError(f"{path} is no safetensors file, and no folder with one")
    missing = next((name for name in names if not (path / name).is_file()), None)
    if missing is not None:
        raise CheckpointError(f"{path} lacks {missing}, which its index lists")
    return Stored(tuple(Shard.open(path / name) for name in names), path)


def rewrite(plan: Decision, fingerprint: str, source: str | os.PathLike[str], target: str | os.PathLike[str]) -> Path:
    """Writes ``source`` as ``plan`` leaves it to ``target``; see :meth:`netopt.Plan.apply_to_checkpoint`."""
    stored, goal = open_checkpoint(source), Path(target)
    if goal.resolve() == Path(source).resolve():
        raise CheckpointError(f"the target {goal} is the source; write to another place")
    _check(plan, stored)
    if stored.folder is None:
        goal.parent.mkdir(parents=True, exist_ok=True)
        _write(plan, fingerprint, stored.shards[0], goal)
        return goal
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
    return goal


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
    partial = target.with_name(f"{target.name}.partial")
    try:
        with partial.open("wb") as file:
            _write_header(file, entries, metadata)
            for name in entries:
                with shard.read(name) as tensor:
                    file.write(_bytes(_narrowed(plan, name, tensor)))
            file.flush()
            os.fsync(file.fileno())
        partial.replace(target)
    except OSError as error:
        raise CheckpointError(
            f"{target} could not be written: {error}; what was finished stays, and the same call goes on from there"
        ) from error
    finally:
        partial.unlink(missing_ok=True)
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


def _narrowed(plan: Decision, name: str, tensor: Tensor) -> Tensor:
    cuts = plan.tensors.get(name)
    if cuts:
        # As bytes where index_select does not know the type.
        small = surgery.narrow(tensor, cuts) if tensor.dtype.itemsize > 1 else _narrow_bytes(tensor, cuts)
    else:
        small = tensor
    if name in plan.scales:
        small = (small * plan.scales[name]).to(small.dtype)
    if name in plan.values:
        small = plan.values[name].to(small.dtype)
    return small.contiguous()


def _narrow_bytes(tensor: Tensor, cuts: Mapping[int, Tensor]) -> Tensor:
    return surgery.narrow(tensor.view(torch.uint8), cuts).view(tensor.dtype)


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
            shutil.copyfile(file, target / file.name)


def _set(config: dict[str, Any], path: tuple[Any, ...], value: Any) -> None:
    for step in path[:-1]:
        config = config.setdefault(step, {})
    config[path[-1]] = value


def _replace_text(path: Path, text: str) -> None:
    partial = path.with_name(f"{path.name}.partial")
    try:
        partial.write_text(text)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
