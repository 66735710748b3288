"""One batch through everything before anything is trained, so that what does not fit shows at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from netopt.distillation.data.sources import Drawn, Source
from netopt.distillation.loop.optimizing import overlaps
from netopt.distillation.loop.student import Trainee
from netopt.distillation.loop.validation import Validation
from netopt.distillation.loss.objective import Objective
from netopt.distillation.loss.outputs import check_shapes
from netopt.distillation.loss.targets import Targets
from netopt.distillation.loss.teachers import Shared, local
from netopt.errors import InvalidArgumentError, NonFiniteError
from netopt.model.checks import FLOAT8, check_model
from netopt.model.restore import restored
from netopt.model.writes import CopyOnWrite

__all__ = ["Lesson", "check_finite", "check_student", "dry_run"]


class Lesson(NamedTuple):
    """What is learnt: from which batches, what of them, by which measure, and how well.

    Args:
        source: Where batches come from.
        targets: What the student should return.
        objective: What is minimised.
        validation: Scores the student after every epoch, or ``None``.
    """

    source: Source
    targets: Targets
    objective: Objective
    validation: Validation | None


def dry_run(
    trainee: Trainee, lesson: Lesson, first: Drawn, shared: Sequence[Sequence[Shared]], writes: CopyOnWrite
) -> None:
    """Runs all models on the first batch: compares outputs, tries the caller's losses, makes the hints' projections.

    The student is in the modes it trains in; its buffers, and all random states, are as before afterwards. What a
    teacher writes into its parameters is saved by ``writes``.

    Raises:
        ShapeMismatchError: student and teacher return tensors of different shapes.
        InvalidArgumentError: a teacher reads what training would change, or a model returns several outputs.
    """
    targets, objective = lesson.targets, lesson.objective
    with restored(trainee.student) as log:
        log.enter_context(torch.no_grad())
        with writes.saving():
            batch, target = targets.prepare(first, train=False)
        targets.check_apart(first.batch, shared)
        with trainee.hooked(), targets.engine.autocast():
            record = trainee.record(batch)
        for place, theirs in enumerate(target.records):
            assert isinstance(theirs.output, torch.Tensor), "nothing comes from the cache yet"
            who = "the teacher" if len(target.records) == 1 else f"teacher {place}"
            check_shapes(record.output, theirs.output, who)
        objective.learn(target)
        targets.learn(first, target, lesson.source.whole)
        generator = torch.Generator().manual_seed(lesson.source.seed)
        for term in objective.hints:
            term.learn(*term.pair(record.features, target.records[0].features), generator)


def check_student(student: Any) -> None:
    """Raises unless ``student`` is a module with finite weights, some of which can be trained."""
    check_model(student, "student")
    if not any(True for _ in student.parameters()):
        raise InvalidArgumentError(f"the student, a {type(student).__name__}, has no parameters to train.")
    if not any(one.requires_grad for one in student.parameters()):
        raise InvalidArgumentError(
            "every parameter of the student is frozen, so there is nothing to train; call student.requires_grad_(True)."
        )
    for name, one in student.named_parameters():
        if one.requires_grad and one.layout is not torch.strided:
            raise InvalidArgumentError(
                f"the student's {name!r} is a sparse tensor, which optimizers do not step; make it dense, with "
                ".to_dense(), or freeze it with requires_grad_(False)."
            )
        if one.requires_grad and overlaps(one):
            raise InvalidArgumentError(
                f"several entries of the student's {name!r}, of shape {tuple(one.shape)} and strides {one.stride()}, "
                "are one number in memory, so it cannot be stepped; give it memory of its own with .clone(), or freeze "
                "it with requires_grad_(False)."
            )
    check_finite(student, "before training", "load finite weights")


def check_finite(student: nn.Module, when: str, hint: str) -> None:
    """Raises if a parameter of ``student`` holds NaN or infinity."""
    for name, parameter in student.named_parameters():
        # A sum is finite only if all is, and quicker than to look at each.
        held = local(parameter.detach())
        held = held.float() if held.dtype in FLOAT8 else held
        if parameter.is_floating_point() and not bool(held.sum().isfinite() or torch.isfinite(held).all()):
            raise NonFiniteError(f"the student's {name!r} holds NaN or infinity {when}; {hint}.")
