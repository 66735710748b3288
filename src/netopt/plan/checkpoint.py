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
from dataclasses import dataclass
from pathlib import Path, PurePath, PurePosixPath
from typing import IO, Any, Protocol

import numpy as np
import torch
from torch import Tensor

from netopt.errors import CheckpointError, PlanMismatchError
from netopt.plan.files import checksum, inside, partial, replace
from netopt.surgery.commit import broadcasts

__all__ = ["Stored", "is_dense", "open_checkpoint", "rewrite"]

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
CONFIG = "config.json"
CONFIGS = {CONFIG: "config", "generation_config.json": "generation_config"}
"""Files beside the weights, and what a model calls what they hold."""
_WEIGHTS = (".safetensors", ".h5", ".msgpack", ".onnx", ".onnx_data", ".ot", ".gguf", ".ckpt", ".pt", ".pth")
_ELSEWHERE = {".git", ".cache", "onnx", "openvino"}
"""Folders that hold the history, or the weights in another format."""
LONGEST = 100_000_000
LARGEST = 1 << 62
"""Bytes of a header, and entries of a tensor, at most."""
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
    found = _json(index).get("weight_map")
    if not isinstance(found, dict) or not all(isinstance(file, str) for file in found.values()):
        raise CheckpointError(f"{index} is broken: `weight_map` is no mapping from tensors to files")
    return {name: inside(file, index) for name, file in found.items()}


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} is broken: it holds no mapping")
    return found


def rewrite(
    plan: Decision,
    fingerprint: str,
    stored: Stored,
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    names: Mapping[str, str | None] | None = None,
) -> Path:
    """Writes ``stored``, read from ``source``, as ``plan`` leaves it; see :meth:`netopt.Plan.apply_to_checkpoint`.

    With ``names``, tensors get other names, and those without one are left out.
    """
    goal = Path(target)
    if goal.resolve() == Path(source).resolve():
        raise CheckpointError(f"the target {goal} is the source; write to another place")
    _check(plan, stored)
    for file in CONFIGS:
        _configured(plan, stored.folder, file)
    try:
        _write_all(plan, fingerprint, stored, goal, names or {})
    except OSError as error:
        raise CheckpointError(
            f"{goal} could not be written: {error}; what was finished stays, and the same call goes on from there"
        ) from error
    return goal


def _write_all(plan: Decision, fingerprint: str, stored: Stored, goal: Path, names: Mapping[str, str | None]) -> None:
    """Writes every file of ``stored`` that is not there yet."""
    if stored.folder is None:
        goal.parent.mkdir(parents=True, exist_ok=True)
        _write(plan, fingerprint, stored.shards[0], goal, names)
        return
    goal.mkdir(parents=True, exist_ok=True)
    total, weight_map = 0, {}
    for shard in stored.shards:
        target = goal / shard.name
        target.parent.mkdir(parents=True, exist_ok=True)
        if not target.parent.resolve().is_relative_to(goal.resolve()):
            raise CheckpointError(f"{target.parent} is a link that leads out of {goal}; remove it")
        if all(names.get(name, name) is None for name in shard.entries):
            continue
        entries = _write(plan, fingerprint, shard, target, names)
        total += sum(entry.stop - entry.start for entry in entries.values())
        weight_map.update(dict.fromkeys(entries, str(shard.name)))
    _copy_rest(plan, stored.folder, goal)
    if (stored.folder / INDEX).is_file():
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        replace(goal / INDEX, _text(index))


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
    _check_values(plan, places)


def _check_values(plan: Decision, places: Mapping[str, Shard]) -> None:
    for name, shard in places.items():
        shard.dtype(name)
        shape = _shape_after(plan, name, shard.entries[name])
        value = plan.values.get(name)
        if value is not None and tuple(value.shape) != shape:
            raise PlanMismatchError(f"the plan gives `{name}` values of {tuple(value.shape)}; it will have {shape}")
        for what in (plan.shifts.get(name), plan.scales.get(name)):
            if isinstance(what, Tensor) and not broadcasts(what.shape, shape):
                raise PlanMismatchError(
                    f"the plan shifts or scales `{name}` {shape} by a tensor of {tuple(what.shape)}"
                )


def _shape_after(plan: Decision, name: str, entry: Entry) -> tuple[int, ...]:
    cuts = plan.tensors.get(name, {})
    return tuple(len(cuts[dim]) if dim in cuts else size for dim, size in enumerate(entry.shape))


def _planned(plan: Decision, shard: Shard, names: Mapping[str, str | None]) -> dict[str, Entry]:
    """The entries the new file will have, by the names they had."""
    entries, end = {}, 0
    for name, old in sorted(shard.entries.items(), key=lambda item: item[1].start):
        if names.get(name, name) is None:
            continue
        shape = _shape_after(plan, name, old)
        count = math.prod(old.shape)
        width = (old.stop - old.start) // count if count else 0
        entries[name] = Entry(old.kind, shape, end, end + width * math.prod(shape))
        end = entries[name].stop
    return entries


def _write(
    plan: Decision, fingerprint: str, shard: Shard, target: Path, names: Mapping[str, str | None]
) -> dict[str, Entry]:
    planned = _planned(plan, shard, names)
    entries = {names.get(name) or name: entry for name, entry in planned.items()}
    # What is there is known by what it was made from: a source of equal names and sizes has another hash.
    metadata = {**shard.metadata, "netopt.plan": fingerprint, "netopt.source": checksum(shard.path)}
    if target.is_file() and not target.is_symlink() and _is_whole(target, entries, metadata):
        return entries
    with partial(target) as file:
        _write_header(file, entries, metadata)
        for name in planned:
            for part in _parts(plan, shard, name):
                file.write(_bytes(part))
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
    cuts, shape = plan.tensors.get(name, {}), _shape_after(plan, name, shard.entries[name])
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
    for file in source.iterdir():
        if not file.is_file() or is_dense(PurePath(file.name)):
            continue
        config = _configured(plan, source, file.name) if file.name in CONFIGS else None
        if config is not None:
            replace(target / file.name, _text(config))
        else:
            with file.open("rb") as old, partial(target / file.name) as new:
                shutil.copyfileobj(old, new)


def is_dense(name: PurePath) -> bool:
    """Whether a file of a checkpoint holds its weights, in whatever format; those in subfolders are other modules'."""
    if len(name.parts) > 1:
        return name.parts[0] in _ELSEWHERE
    return name.suffix in _WEIGHTS or name.name == INDEX or name.name.startswith(("pytorch_model", "tf_model"))


def _configured(plan: Decision, folder: Path | None, file: str) -> dict[str, Any] | None:
    """A configuration beside the weights as the plan leaves it, or None where it stays or there is none."""
    start = "", CONFIGS[file]
    changes = {path[2:]: value for path, value in plan.attributes if path[:2] == start and len(path) > 2}
    if folder is None or not changes or not (folder / file).is_file():
        return None
    config = _json(folder / file)
    for path, value in changes.items():
        holder: Any = config
        try:
            for step in path[:-1]:
                holder = holder.setdefault(step, {}) if isinstance(holder, dict) else holder[step]
            holder[path[-1]] = value
        except (TypeError, IndexError, KeyError) as error:
            named = ".".join(map(str, path))
            raise PlanMismatchError(f"the plan sets `{named}`, which {folder / file} has no place for") from error
    return config


def _text(value: Any) -> bytes:
    return (json.dumps(value, indent=2, sort_keys=True) + "\n").encode()
