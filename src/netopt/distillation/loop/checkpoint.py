"""A run that is killed and taken up again ends bit for bit where it would have ended.

A checkpoint is written between two optimizer steps and holds all that the next step depends on. It is written beside
and then moved into place, so that there is always a whole one. What is sharded over processes lies in a folder beside
the file that names it, and a folder goes only when another has taken its place.

A file is read whole and proven before anything is changed: every entry has a checksum, which is the file's own schema.
What is proven to be written by us is then compared with the call at hand, and only then put in its place.
"""

from __future__ import annotations

import glob
import random
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from netopt.distillation.files import exclusive, written
from netopt.distillation.loop import shards
from netopt.distillation.loop.checksums import checksums, difference
from netopt.distillation.report import Epoch
from netopt.errors import CheckpointError, NetoptError, PlanMismatchError
from netopt.model.signals import UndoLog

if TYPE_CHECKING:
    from netopt.distillation.loop.engines import Engine
    from netopt.distillation.loop.loop import Loop

__all__ = ["Checkpoint"]

VERSION = 3


class Checkpoint:
    """The file a run is taken up from.

    Args:
        path: Where it is written.
        every: Optimizer steps between two; ``None`` for one at the end of every epoch.
    """

    def __init__(self, path: str | Path, every: int | None) -> None:
        self.path, self.every = Path(path), every
        self.found: dict[str, Any] | None = None

    def open(self, stack: UndoLog, engine: Engine, resume: bool) -> None:
        """Takes the file for this run alone, until ``stack`` is left, and reads it if there is a run to ``resume``.

        Raises:
            CheckpointError: another process has it, or it is not what was written.
        """
        refusal = ""
        if engine.rank == 0:
            try:
                stack.enter_context(exclusive(self.path))
            except CheckpointError as error:
                refusal = str(error)
        refusal = engine.gather(refusal)[0]
        if refusal:
            raise CheckpointError(refusal)
        if resume and self.path.exists():
            self.found = _read(self.path)
        elif engine.rank == 0:
            self.clear()
        engine.wait()

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
        if len(generators) != len(own["generators"]):
            raise self._stranger(f"data that draws from {len(own['generators'])} generators", len(generators))
        with self._fitting("ranks"):
            for generator, state in zip(generators, own["generators"], strict=True):
                generator.set_state(state)
            put_random(own["random"])

    def restore(self, loop: Loop) -> None:
        """Puts weights, optimizers, schedulers and counters to where they were.

        Raises:
            PlanMismatchError: they belong to another student, or another optimizer.
            CheckpointError: they cannot be put there.
        """
        if self.found is None:
            return
        with self._fitting("shards"):
            found = self._whole(loop)
        self._check(loop, found)
        with self._fitting("optimizers"):
            for one, state in zip(loop.optimizers, found["optimizers"], strict=True):
                one.load_state_dict(state)
        with self._fitting("schedulers"):
            for one, state in zip(loop.schedulers, found["schedulers"], strict=True):
                one.load_state_dict(state)
        with self._fitting("state"):
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
        with self._fitting("weights"):
            _put(loop.trainee, found["weights"])

    def _check(self, loop: Loop, found: Mapping[str, Any]) -> None:
        """Raises a `PlanMismatchError` unless what was found fits the student and what steps it."""
        ours = values(loop.trainee)
        for name in sorted({*ours, *found["weights"]}):
            here, there = (tuple(one[name].shape) if name in one else None for one in (ours, found["weights"]))
            if here != there:
                raise self._stranger(f"a student whose {name!r} has shape {there}", here)
        if len(loop.schedulers) != len(found["schedulers"]):
            raise self._stranger(f"{len(found['schedulers'])} schedulers", len(loop.schedulers))
        groups = [_groups(one.state_dict()) for one in loop.optimizers]
        saved = [_groups(one) for one in found["optimizers"]]
        if groups != saved:
            raise self._stranger(f"optimizers of {saved}", groups)
        if (loop.engine.scaler is None) != (found["scaler"] is None):
            raise self._stranger("another amp", loop.engine.amp)

    def _stranger(self, there: str, here: Any) -> PlanMismatchError:
        return PlanMismatchError(
            f"{self.path} was written for another student or other arguments: for {there}, and here it is {here}; pass "
            "what the run began with, or resume=False."
        )

    @contextmanager
    def _fitting(self, field: str) -> Iterator[None]:
        try:
            yield
        except NetoptError:
            raise
        except Exception as error:  # an optimizer's or scheduler's own loading may raise anything
            raise CheckpointError(
                f"{field!r} of {self.path} does not fit ({type(error).__name__}: {error}); pass what the run began "
                "with, or resume=False."
            ) from error

    def _restore_sums(self, loop: Loop, ranks: Sequence[Mapping[str, Any]]) -> None:
        """Puts back what each process has added up of the epoch; among another number of them the first has it all."""
        if len(ranks) != loop.engine.world:
            mine = ranks if loop.engine.rank == 0 else []
        else:
            mine = [ranks[loop.engine.rank]]
        sums = torch.zeros_like(loop.meter.sums)
        for one in mine:
            sums += one["sums"].to(sums.device)
        counts = [sum(column) for column in zip(*(one["counts"] for one in mine), strict=True)]
        loop.meter.restore(sums, counts or [0] * len(sums))

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
                raise self._stranger(f"a student with a sharded {name!r}", "without")
            return torch.zeros_like(ours[name])

        return shards.read(self.found, self.path.with_name(str(self.found["shards"])), like)

    def save(self, loop: Loop, generators: Sequence[Tensor]) -> None:
        """Writes a checkpoint: what is whole by the first process, what is sharded by all, random states of each."""
        loop.meter.settle()
        own = {"random": random_states_now(), "generators": list(generators)}
        ranks = loop.engine.gather({**own, "sums": loop.meter.sums.cpu(), "counts": loop.meter.counts})
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
        with written(self.path) as file:
            torch.save({**content, "checksums": checksums(content)}, file)
        for folder in self.path.parent.glob(f"{glob.escape(self.path.name)}.*.shards"):
            if folder.name != content["shards"]:
                shutil.rmtree(folder, ignore_errors=True)


def _read(path: Path) -> dict[str, Any]:
    """Returns what was written into ``path``, proven.

    Raises:
        CheckpointError: it cannot be read, or some entry is not what was written.
    """
    again = "start without resume, or bring the file back"
    try:
        found: Any = torch.load(path, weights_only=True, map_location="cpu")
    except Exception as error:  # of a broken file torch and pickle may raise anything
        reason = str(error).strip().splitlines()
        raise CheckpointError(
            f"{path} cannot be read ({type(error).__name__}: {reason[0] if reason else ''}); {again}."
        ) from error
    version = found.get("version") if isinstance(found, dict) else None
    if not isinstance(version, int) or version != VERSION:
        raise CheckpointError(f"{path} is no checkpoint of version {VERSION}: 'version' is {version!r}; {again}.")
    wrong = difference(found, found.pop("checksums", None))
    if wrong:
        raise CheckpointError(f"{path} is damaged: {wrong}; {again}.")
    return found


def _groups(state: Mapping[str, Any]) -> list[str]:
    return [f"{len(one['params'])} parameters by {', '.join(sorted(one))}" for one in state["param_groups"]]


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


def _put(model: nn.Module, saved: Mapping[str, Tensor]) -> None:
    ours = values(model)
    with torch.no_grad():
        for name, value in saved.items():
            ours[name].copy_(value)
