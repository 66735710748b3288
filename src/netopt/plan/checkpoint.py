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
from pathlib import Path, PurePath
from typing import IO, Any, Protocol

import numpy as np
import torch
from torch import Tensor

from netopt.errors import CheckpointError, PlanMismatchError
from netopt.plan.files import checksum, partial, replace
from netopt.plan.shards import BLOCK, INDEX, Entry, Shard, Stored, read_mapping, view_bytes
from netopt.surgery.commit import broadcasts

__all__ = ["CONFIG", "is_dense", "rewrite"]

CONFIG = "config.json"
CONFIGS = {CONFIG: "config", "generation_config.json": "generation_config"}
"""Files beside the weights, and what a model calls what they hold."""
_WEIGHTS = (".safetensors", ".h5", ".msgpack", ".onnx", ".onnx_data", ".ot", ".gguf", ".ckpt", ".pt", ".pth")
_ELSEWHERE = {".git", ".cache", "onnx", "openvino"}
"""Folders that hold the history, or the weights in another format."""
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
                file.write(view_bytes(part))
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
    config = read_mapping(folder / file)
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
