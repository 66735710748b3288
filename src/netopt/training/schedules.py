"""How much of the final amount is removed after a share of the way: functions from progress to a fraction, by name."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeAlias

from netopt.errors import ArgumentTypeError, InvalidArgumentError, UnknownNameError

__all__ = ["SCHEDULES", "Schedule", "fraction", "resolve"]

Schedule: TypeAlias = str | Callable[[float], float]
"""A name of :data:`SCHEDULES`, or a function from progress in ``[0, 1]`` to the fraction of the final amount."""


def constant(_: float) -> float:
    """Everything at the first step."""
    return 1.0


def linear(progress: float) -> float:
    """The same share at each step."""
    return progress


def cubic(progress: float) -> float:
    r"""Most at the start, :math:`1 - (1 - t)^3` (Zhu and Gupta, 2017, https://arxiv.org/abs/1710.01878)."""
    return 1 - (1 - progress) ** 3


def cosine(progress: float) -> float:
    r"""Slow at both ends, :math:`(1 - \cos \pi t) / 2`."""
    return (1 - math.cos(math.pi * progress)) / 2


def onecycle(progress: float) -> float:
    r"""A logistic curve, steepest after a third of the way (Hubens et al., 2021, https://arxiv.org/abs/2107.02086)."""
    steepness, offset = 14.0, 5.0
    return (1 + math.exp(offset - steepness)) / (1 + math.exp(offset - steepness * progress))


SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": constant,
    "linear": linear,
    "cubic": cubic,
    "cosine": cosine,
    "onecycle": onecycle,
}


def resolve(schedule: Schedule) -> Callable[[float], float]:
    """The function of a schedule.

    Raises:
        UnknownNameError: There is no schedule of this name.
        ArgumentTypeError: It is neither a name nor a function.

    Example:
        >>> resolve("linear")(0.25)
        0.25
    """
    if isinstance(schedule, str):
        if schedule not in SCHEDULES:
            raise UnknownNameError.of("schedule", schedule, SCHEDULES)
        return SCHEDULES[schedule]
    if not callable(schedule):
        raise ArgumentTypeError(f"schedule must be a name or a function of progress, not {type(schedule).__name__}.")
    return schedule


def fraction(schedule: Callable[[float], float], progress: float) -> float:
    """The schedule at ``progress``, exactly 1 at the end.

    Raises:
        InvalidArgumentError: The schedule leaves ``[0, 1]``.
    """
    if progress >= 1:
        return 1.0
    value = float(schedule(progress))
    if not 0 <= value <= 1:
        raise InvalidArgumentError(f"the schedule is {value:g} at progress {progress:g}; it must stay in [0, 1].")
    return value
