"""A run that is killed and taken up again ends bit for bit where it would have ended.

A checkpoint is written between two optimizer steps and holds all that the next step depends on. It is written beside
and then moved into place, so that there is always a whole one.
"""

from __future__ import annotations

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

from netopt.distillation.report import Epoch
from netopt.errors import InvalidArgumentError, PlanMismatchError

if TYPE_CHECKING:
    from netopt.distillation.loop import Loop

__all__ = ["Checkpoint"]

VERSION = 1


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
        for generator, state in zip(generators, self.found["generators"], strict=True):
            generator.set_state(state)
        states = self.found["random"]
        put_random(states[min(rank, len(states) - 1)])

    def restore(self, loop: Loop) -> None:
        """Puts weights, optimizers, schedulers and counters to where they were."""
        if self.found is None:
            return
        found = self.found
        _put(loop.trainee, found["weights"], self.path)
        for one, state in zip(loop.optimizers, found["optimizers"], strict=True):
            one.load_state_dict(state)
        for one, state in zip(loop.schedulers, found["schedulers"], strict=True):
            one.load_state_dict(state)
        if loop.engine.scaler is not None:
            loop.engine.scaler.load_state_dict(found["scaler"])
        for name, value in found["state"].items():
            setattr(loop.state, name, [Epoch(**row) for row in value] if name == "history" else value)
        loop.watch.restore(found["sums"], found["counts"])
        loop.stopped = found["stopped"]
        if loop.targets.cache is not None and found["cache"] is not None:
            loop.targets.cache.restore(found["cache"])
        if found["best"] is not None:
            loop.keep(found["best"])

    def save(self, loop: Loop, generators: Sequence[Tensor]) -> None:
        """Writes a checkpoint, by the first process; each contributes its random states."""
        loop.watch.settle()
        random_states = loop.engine.gather(random_states_now())
        if loop.engine.rank != 0:
            return
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
            "sums": loop.watch.sums,
            "counts": loop.watch.counts,
            "stopped": "finished" if loop.stopped == "interrupted" else loop.stopped,
            "cache": None if loop.targets.cache is None else loop.targets.cache.state(),
            "best": None if loop.best is None else loop.best.values(),
            "random": random_states,
            "generators": list(generators),
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        beside = self.path.with_name(f"{self.path.name}.new")
        with beside.open("wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(self.path)


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


def _put(model: nn.Module, saved: Mapping[str, Tensor], path: Path) -> None:
    ours = values(model)
    for name in {*ours, *saved}:
        shapes = [tuple(one[name].shape) if name in one else None for one in (ours, saved)]
        if shapes[0] != shapes[1]:
            raise PlanMismatchError(
                f"{path} was written for another student: {name!r} has shape {shapes[1]} there and {shapes[0]} here; "
                "pass the student the run began with, or resume=False."
            )
    with torch.no_grad():
        for name, value in saved.items():
            ours[name].copy_(value)
