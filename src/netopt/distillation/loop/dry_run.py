"""Before anything is trained, everything is looked at once."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from netopt.distillation.data.sources import Drawn
from netopt.distillation.loop.student import Trainee, evaluating
from netopt.distillation.loss.objective import Objective
from netopt.distillation.loss.outputs import Picker, check_shapes
from netopt.distillation.loss.targets import Targets
from netopt.distillation.loss.teachers import Forward, local
from netopt.errors import ArgumentTypeError, InvalidArgumentError, NonFiniteError
from netopt.model.restore import restored

__all__ = ["check_finite", "check_numbers", "check_student", "dry_run"]

OPTIONAL = {"steps", "patience", "lr", "clip"}


def dry_run(
    student: nn.Module,
    forward: Forward,
    picker: Picker,
    first: Drawn,
    targets: Targets,
    objective: Objective,
    seed: int,
    whole: Any = None,
) -> Trainee:
    """Runs all models on the first batch, and returns the student ready to be trained.

    Outputs are compared, losses are asked what they average over, projections are made. The student is in eval mode
    meanwhile, so that no buffer of it changes, and no random state does.

    Raises:
        ShapeMismatchError: student and teacher say tensors of different shapes.
    """
    terms = objective.hints
    with restored(student) as log:
        log.enter_context(evaluating(student))
        batch, target = targets.prepare(first, train=False)
        probe = Trainee(student, terms, forward, picker)
        with probe.listening(), targets.engine.autocast():
            record = probe.record(batch)
        for place, theirs in enumerate(target.records):
            assert isinstance(theirs.output, torch.Tensor), "nothing comes from the cache yet"
            check_shapes(
                record.output, theirs.output, "the teacher" if len(target.records) == 1 else f"teacher {place}"
            )
        objective.learn(target)
        targets.learn(first, target, whole)
        generator = torch.Generator().manual_seed(seed)
        for term in terms:
            term.learn(*term.pair(record.features, target.records[0].features), generator)
    return Trainee(student, terms, forward, picker)


def check_numbers(*, whole: Mapping[str, Any], real: Mapping[str, Any], hard: Any, seed: Any) -> None:
    """Raises unless every number is of its kind and in its range."""
    for name, value in {**whole, **real}.items():
        if value is None and name in OPTIONAL:
            continue
        allowed = (int,) if name in whole else (int, float)
        if isinstance(value, bool) or not isinstance(value, allowed):
            raise ArgumentTypeError(f"{name} must be {'an int' if name in whole else 'a number'}, not {value!r}.")
        if not 0 < value < math.inf:
            raise InvalidArgumentError(f"{name} must be positive and finite, not {value}.")
    if isinstance(hard, bool) or not isinstance(hard, (int, float)):
        raise ArgumentTypeError(f"hard must be a number in [0, 1], not {hard!r}.")
    if not 0 <= hard <= 1:
        raise InvalidArgumentError(f"hard must lie in [0, 1], not {hard}.")
    if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int)):
        raise ArgumentTypeError(f"seed must be an int or None, not {seed!r}.")


def check_student(student: Any) -> None:
    """Raises unless ``student`` is a module with finite weights, some of which can be trained."""
    if not isinstance(student, nn.Module):
        raise ArgumentTypeError(f"student must be a module, not {type(student).__name__}.")
    if not any(True for _ in student.parameters()):
        raise InvalidArgumentError(f"the student, a {type(student).__name__}, has no parameters to train.")
    if not any(one.requires_grad for one in student.parameters()):
        raise InvalidArgumentError(
            "every parameter of the student is frozen, so there is nothing to train; call student.requires_grad_(True)."
        )
    check_finite(student, "before training", "load finite weights")


def check_finite(student: nn.Module, when: str, hint: str) -> None:
    """Raises if a parameter of ``student`` holds NaN or infinity."""
    for name, parameter in student.named_parameters():
        # A sum is finite only if all is, and quicker than to look at each.
        held = local(parameter.detach())
        if parameter.is_floating_point() and not bool(held.sum().isfinite() or torch.isfinite(held).all()):
            raise NonFiniteError(f"the student's {name!r} holds NaN or infinity {when}; {hint}.")
