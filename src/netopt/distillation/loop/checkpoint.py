"""A run that is killed and taken up again ends bit for bit where it would have ended.

A checkpoint is written between two optimizer steps and holds all that the next step depends on. It is written beside
and then moved into place, so that there is always a whole one. What is sharded over processes lies in a folder beside
the file that names it, and a folder goes only when another has taken its place.
"""

from __future__ import annotations

import glob
import os
import random
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from netopt.distillation.data import shards
from netopt.distillation.report import Epoch
from netopt.errors import InvalidArgumentError, PlanMismatchError

if TYPE_CHECKING:
    from netopt.distillation.loop.loop import Loop

__all__ = ["Checkpoint"]

VERSION = 2


class Checkpoint:
    """The file a run is taken up from.

    Args:
        path: Where it is written.
        every: Optimizer steps between two; ``None`` for one at the end of every epoch.
        resume: Whether to take up what is there.
    """

    def __init__(self, path: str | Path, every: int | None, resume: bool) -> None:
        self.path, self.every = Path(path), every
        self.found: dict[str, Any] | None = None
        if resume and self.path.exists():
            found: dict[str, Any] = torch.load(self.path, weights_only=True, map_location="cpu")
            if found.get("version") != VERSION:
                raise InvalidArgumentError(f"{self.path} is no checkpoint of this version; start without resume.")
            self.found = found

    @property
    def cache(self) -> Path:
        """The folder the teacher's outputs are kept in, so that they are the same after a restart."""
        return self.path.with_name(f"{self.path.name}.cache")

    @property
    def seed(self) -> int | None:
        """What the run began with, or ``None`` if it begins now."""
        return None if self.found is None else self.found["seed"]

    @property
    def place(self) -> tuple[int, int]:
        """The epoch to go on in, and how many of its batches have been used."""
        return (0, 0) if self.found is None else (self.found["state"]["epoch"], self.found["state"]["drawn"])

    def clear(self) -> None:
        """Removes the folder of the teacher's outputs: before a new run, and once there is nothing to take up."""
        shutil.rmtree(self.cache, ignore_errors=True)

    def due(self, step: int) -> bool:
        """Whether to write one after this step."""
        return self.every is not None and step % self.every == 0

    def restore_random(self, rank: int, generators: Sequence[torch.Generator]) -> None:
        """Puts generators to where the epoch began, and the global random states to where the run was."""
        if self.found is None:
            return
        ranks = self.found["ranks"]
        own = ranks[min(rank, len(ranks) - 1)]
        for generator, state in zip(generators, own["generators"], strict=True):
            generator.set_state(state)
        put_random(own["random"])

    def restore(self, loop: Loop) -> None:
        """Puts weights, optimizers, schedulers and counters to where they were."""
        if self.found is None:
            return
        found = self._whole(loop)
        _put(loop.trainee, found["weights"], self.path)
        for one, state in zip(loop.optimizers, found["optimizers"], strict=True):
            one.load_state_dict(state)
        for one, state in zip(loop.schedulers, found["schedulers"], strict=True):
            one.load_state_dict(state)
        if loop.engine.scaler is not None:
            loop.engine.scaler.load_state_dict(found["scaler"])
        for name, value in found["state"].items():
            setattr(loop.state, name, [Epoch(**row) for row in value] if name == "history" else value)
        self._restore_sums(loop, found["ranks"])
        loop.stopped = found["stopped"]
        if loop.targets.cache is not None and found["cache"] is not None:
            loop.targets.cache.restore(found["cache"])
        if found["best"] is not None:
            loop.keep(found["best"])

    def _restore_sums(self, loop: Loop, ranks: Sequence[Mapping[str, Any]]) -> None:
        """Puts back what each process has added up of the epoch; among another number of them the first has it all."""
        if len(ranks) != loop.engine.world:
            mine = ranks if loop.engine.rank == 0 else []
        else:
            mine = [ranks[loop.engine.rank]]
        sums = torch.zeros_like(loop.watch.sums)
        for one in mine:
            sums += one["sums"].to(sums.device)
        counts = [sum(column) for column in zip(*(one["counts"] for one in mine), strict=True)]
        loop.watch.restore(sums, counts or [0] * len(sums))

    def _whole(self, loop: Loop) -> dict[str, Any]:
        """Returns what was found, with what is sharded read by all processes."""
        assert self.found is not None, "there is something to take up"
        ours = values(loop.trainee)
        stepped = [[one for group in each.param_groups for one in group["params"]] for each in loop.optimizers]

        def like(path: str) -> Tensor:
            kind, *rest = path.removeprefix("/").split("/")
            if kind == "optimizers":
                # .../number of the optimizer/state/number of the parameter/name
                return torch.zeros_like(stepped[int(rest[0])][int(rest[2])].detach())
            name = rest[0] if kind == "weights" else f"student.{rest[0]}"
            if name not in ours:
                raise _stranger(self.path, name, "is sharded", "not")
            return torch.zeros_like(ours[name])

        return shards.read(self.found, self.path.with_name(str(self.found["shards"])), like)

    def save(self, loop: Loop, generators: Sequence[Tensor]) -> None:
        """Writes a checkpoint: what is whole by the first process, what is sharded by all, random states of each."""
        loop.watch.settle()
        own = {"random": random_states_now(), "generators": list(generators)}
        ranks = loop.engine.gather({**own, "sums": loop.watch.sums.cpu(), "counts": loop.watch.counts})
        scaler = loop.engine.scaler
        state = asdict(loop.state)
        state["history"] = [{**row, "terms": dict(row["terms"])} for row in state["history"]]
        content = {
            "version": VERSION,
            "seed": loop.source.seed,
            "weights": values(loop.trainee),
            "optimizers": [one.state_dict() for one in loop.optimizers],
            "schedulers": [one.state_dict() for one in loop.schedulers],
            "scaler": None if scaler is None else scaler.state_dict(),
            "state": state,
            "stopped": "finished" if loop.stopped == "interrupted" else loop.stopped,
            "cache": None if loop.targets.cache is None else loop.targets.cache.state(),
            "best": loop.best,
            "ranks": ranks,
            "shards": None,
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        content, parts = shards.take_apart(content)
        if parts:
            place = loop.state.epoch, loop.state.drawn, loop.state.step
            folder = self.path.with_name(f"{self.path.name}.{'-'.join(map(str, place))}.shards")
            if loop.engine.rank == 0:
                shutil.rmtree(folder, ignore_errors=True)
            loop.engine.wait()
            shards.write(parts, folder)
            content["shards"] = folder.name
        if loop.engine.rank == 0:
            self._write(content)

    def _write(self, content: Mapping[str, Any]) -> None:
        beside = self.path.with_name(f"{self.path.name}.new")
        with beside.open("wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(self.path)
        for folder in self.path.parent.glob(f"{glob.escape(self.path.name)}.*.shards"):
            if folder.name != content["shards"]:
                shutil.rmtree(folder, ignore_errors=True)


def values(model: nn.Module) -> dict[str, Tensor]:
    """Returns parameters and all buffers by name, buffers that a state dict leaves out included."""
    return {name: one.detach() for name, one in (*model.named_parameters(), *model.named_buffers())}


def random_states_now() -> dict[str, Any]:
    """Returns the global random states as plain values."""
    name, keys, *rest = np.random.get_state()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
        "python": random.getstate(),
        "numpy": (str(name), [int(key) for key in np.asarray(keys)], *(float(one) for one in rest)),
    }


def put_random(states: Mapping[str, Any]) -> None:
    """Sets the global random states to what :func:`random_states_now` returned."""
    torch.set_rng_state(states["torch"])
    if states["cuda"]:
        torch.cuda.set_rng_state_all(states["cuda"])
    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, place, has_gauss, cached = states["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), int(place), int(has_gauss), cached))


def _stranger(path: Path, name: str, there: str, here: Any) -> PlanMismatchError:
    return PlanMismatchError(
        f"{path} was written for another student: {name!r} {there} there and {here} here; "
        "pass the student the run began with, or resume=False."
    )


def _put(model: nn.Module, saved: Mapping[str, Tensor], path: Path) -> None:
    ours = values(model)
    for name in {*ours, *saved}:
        shapes = [tuple(one[name].shape) if name in one else None for one in (ours, saved)]
        if shapes[0] != shapes[1]:
            raise _stranger(path, name, f"has shape {shapes[1]}", shapes[0])
    with torch.no_grad():
        for name, value in saved.items():
            ours[name].copy_(value)
