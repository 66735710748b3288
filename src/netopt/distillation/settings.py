"""What a call of :func:`netopt.distill` was given, as four values: data, goal, schedule, run.

Numbers and combinations of arguments are checked when the values are made, before anything is looked at.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from netopt.errors import ArgumentTypeError, InvalidArgumentError

if TYPE_CHECKING:
    from netopt.distillation.loop.optimizing import OptimizerLike, SchedulerLike
    from netopt.distillation.loop.validation import Metric
    from netopt.distillation.loss.hints import Hints
    from netopt.distillation.loss.labels import Labels
    from netopt.distillation.loss.objective import SoftLoss
    from netopt.distillation.loss.outputs import Picker
    from netopt.distillation.loss.teachers import Forward

__all__ = ["Data", "Goal", "Run", "Schedule", "pair"]


@dataclass(frozen=True)
class Data:
    """What is learnt from, and what validates."""

    train: Any
    batch_size: int
    labels: Labels
    ignore_index: int
    cache: Any
    validation: Any
    metric: Metric

    def __post_init__(self) -> None:
        _check_number("batch_size", self.batch_size, whole=True)
        if self.validation is None and self.metric is not None:
            raise InvalidArgumentError("metric needs validation=, the data to measure it on.")
        if not (self.metric is None or callable(self.metric) or self.metric in ("loss", "accuracy")):
            raise InvalidArgumentError(f"metric must be None, 'loss', 'accuracy' or a function, not {self.metric!r}.")


@dataclass(frozen=True)
class Goal:
    """What is minimised, and which outputs it compares; ``forward`` and ``output`` are pairs (student, teacher)."""

    loss: SoftLoss
    temperature: float
    hard: float
    hints: Hints
    teacher_weights: Iterable[float] | None
    forward: tuple[Forward, Forward]
    output: tuple[Picker, Picker]

    def __post_init__(self) -> None:
        _check_number("temperature", self.temperature)
        if isinstance(self.hard, bool) or not isinstance(self.hard, (int, float)):
            raise ArgumentTypeError(f"hard must be a number in [0, 1], not {self.hard!r}.")
        if not 0 <= self.hard <= 1:
            raise InvalidArgumentError(f"hard must lie in [0, 1], not {self.hard}.")


@dataclass(frozen=True)
class Schedule:
    """How long to train, and how to step."""

    epochs: int
    steps: int | None
    optimizer: OptimizerLike
    lr: float | None
    scheduler: SchedulerLike
    accumulate: int
    clip: float | None
    patience: int | None
    keep_best: bool | None

    def __post_init__(self) -> None:
        for name in ("epochs", "accumulate"):
            _check_number(name, getattr(self, name), whole=True)
        for name in ("steps", "patience"):
            _check_number(name, getattr(self, name), whole=True, optional=True)
        for name in ("lr", "clip"):
            _check_number(name, getattr(self, name), optional=True)

    def total(self, batches: int) -> int:
        """How many steps there will be with so many batches an epoch; 0 where that is not known."""
        return self.steps or -(-batches // self.accumulate) * self.epochs


@dataclass(frozen=True)
class Run:
    """Where and how the call runs."""

    amp: Any
    engine: Any
    checkpoint: str | Path | None
    checkpoint_every: int | None
    resume: bool
    callbacks: Sequence[Callable[..., Any]]
    seed: int | None
    progress: bool

    def __post_init__(self) -> None:
        _check_number("checkpoint_every", self.checkpoint_every, whole=True, optional=True)
        if self.checkpoint is None and (self.resume or self.checkpoint_every is not None):
            raise InvalidArgumentError("resume and checkpoint_every need checkpoint=, the path of the file.")
        if self.seed is not None and (isinstance(self.seed, bool) or not isinstance(self.seed, int)):
            raise ArgumentTypeError(f"seed must be an int or None, not {self.seed!r}.")


def pair(value: Any, name: str) -> tuple[Any, Any]:
    """Returns ``value`` for student and teacher, whether it was given for both or as a pair.

    Raises:
        InvalidArgumentError: a sequence of another length.
    """
    if not isinstance(value, (tuple, list)):
        return value, value
    if len(value) != 2:
        raise InvalidArgumentError(f"{name} must be one entry for both models or a pair (student, teacher).")
    return value[0], value[1]


def _check_number(name: str, value: Any, *, whole: bool = False, optional: bool = False) -> None:
    if value is None and optional:
        return
    if isinstance(value, bool) or not isinstance(value, (int,) if whole else (int, float)):
        raise ArgumentTypeError(f"{name} must be {'an int' if whole else 'a number'}, not {value!r}.")
    if not 0 < value < math.inf:
        raise InvalidArgumentError(f"{name} must be positive and finite, not {value}.")
