"""One call trains a student on the outputs of a teacher."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from netopt import batches
from netopt.distillation.data.fingerprints import model_fingerprint
from netopt.distillation.data.sources import Drawn, Sampling, Source, seed_all, source
from netopt.distillation.loop.checkpoint import Checkpoint
from netopt.distillation.loop.dry_run import Lesson, check_finite, check_student, dry_run
from netopt.distillation.loop.engines import engine_for, precision
from netopt.distillation.loop.interrupts import Interruption
from netopt.distillation.loop.loop import Loop
from netopt.distillation.loop.optimizing import (
    OptimizerLike,
    SchedulerLike,
    Stepper,
    fused,
    optimizers_for,
    scheduler_for,
)
from netopt.distillation.loop.student import Trainee, lend, modes, undo_on_error
from netopt.distillation.loop.validation import Metric, Validation
from netopt.distillation.loss.cache import Cache, TeacherCache, cache_for
from netopt.distillation.loss.hints import Hints, hint_terms
from netopt.distillation.loss.labels import Labelling, Labels, is_causal
from netopt.distillation.loss.objective import Objective, SoftLoss
from netopt.distillation.loss.outputs import Picker
from netopt.distillation.loss.targets import Targets
from netopt.distillation.loss.teachers import Forward, Runner, as_teachers, shared_tensors
from netopt.distillation.report import DistillationReport
from netopt.distillation.settings import Data, Goal, Run, Schedule, pair
from netopt.errors import InvalidArgumentError
from netopt.model.restore import random_state, restored
from netopt.model.signals import UndoLog
from netopt.model.writes import CopyOnWrite

__all__ = ["distill"]


def distill(
    student: nn.Module,
    teacher: nn.Module | Sequence[nn.Module],
    data: Any,
    *,
    epochs: int = 1,
    steps: int | None = None,
    batch_size: int = 64,
    loss: SoftLoss = "mse",
    temperature: float = 4.0,
    hard: float = 0.0,
    labels: Labels = None,
    ignore_index: int = -100,
    hints: Hints = None,
    teacher_weights: Iterable[float] | None = None,
    forward: Callable[..., Any] | tuple[Forward, Forward] | None = None,
    output: Picker | tuple[Picker, Picker] = None,
    optimizer: OptimizerLike = None,
    lr: float | None = None,
    scheduler: SchedulerLike = None,
    accumulate: int = 1,
    clip: float | None = None,
    amp: Any = None,
    validation: Any = None,
    metric: Metric = None,
    patience: int | None = None,
    keep_best: bool | None = None,
    cache: Any = "auto",
    engine: Any = None,
    checkpoint: str | Path | None = None,
    checkpoint_every: int | None = None,
    resume: bool = False,
    callbacks: Sequence[Callable[..., Any]] = (),
    seed: int | None = None,
    progress: bool = True,
) -> DistillationReport:
    r"""Trains ``student``, in place, to return what ``teacher`` returns.

    The base loss is the squared error summed over outputs and averaged over samples; the data needs no labels. The
    teacher runs in eval mode without gradients and is bit for bit unchanged afterwards. Training flags, gradients,
    hooks and random states are as they were before; only the student's weights and buffers, and the optimizer passed
    in, have changed. If one of this library's errors is raised, they have not either.

    Args:
        student: Any module. Sub-modules in eval mode (a frozen batch norm) stay in it, unless all of it is; parameters
            that need no gradient stay as they are.
        teacher: Any module, or several, whose losses are averaged by ``teacher_weights``.
        data: A DataLoader, a Dataset, tensors (``x`` or ``(x, y)``, shuffled and cut into batches here), any iterable
            of batches, or a function that returns one. A batch is a tensor, ``(inputs, targets)`` or a dict.
        epochs: Passes over the data.
        steps: Optimizer steps instead, over as many epochs as it takes.
        batch_size: Samples a batch, where batches are made here.
        loss: A name of :func:`netopt.distillation.loss.losses.names`, a loss such as
            ``losses.kl.using(standardize=True)``,
            a function of ``(student_output, teacher_output)``, or a mapping of these to weights.
        temperature: Softening :math:`T` of the losses on distributions, which are multiplied by :math:`T^2`.
        hard: Weight in [0, 1] of the labels' term; the others weigh ``1 - hard``. Class indices give cross-entropy,
            real values squared error. A label of -1 means unlabelled.
        labels: Where labels are: a key of the batch, a function of it, or by default its targets.
        ignore_index: Positions with this label count in no term.
        hints: ``{"student.layer": "teacher.layer"}``, with :class:`netopt.distillation.Hint` for other kinds than
            ``"hint"``; or the plan of the pruning that made the student. Of several teachers the first is meant.
        teacher_weights: One a teacher, by default equal.
        forward: ``(model, batch) -> result``, for both, or a pair for student and teacher.
        output: Path or function that finds the output in a result, for both, or a pair for student and teacher; needed
            where a result holds several outputs and none called ``logits``, ``out`` or ``last_hidden_state``.
        optimizer: An optimizer of the student's parameters, or a function that makes one of a list of parameters; by
            default AdamW.
        lr: Learning rate of the default optimizer, 0.001 if not given.
        scheduler: Stepped after every optimizer step: a scheduler, a function of the optimizer, or ``"cosine"``.
        accumulate: Batches a step. Means run over the items of the whole step, so this equals one larger batch.
        clip: Largest norm of the gradient.
        amp: ``"bf16"`` or ``"fp16"`` for autocast; losses are in float32 regardless.
        validation: Data in any form, or a function of the student that returns a number, higher being better.
        metric: On validation data: ``None`` for the loss, ``"accuracy"``, or a function of ``(output, targets)``.
        patience: Stop after this many epochs without a better validation.
        keep_best: Put the best weights back at the end; by default if ``validation`` is given.
        cache: ``"auto"`` keeps the teacher's outputs where samples come back; ``False`` never, ``True`` always, and a
            :class:`netopt.distillation.Cache` sets how.
        engine: A Hugging Face ``Accelerator`` or a Lightning ``Fabric``.
        checkpoint: File to write between steps, so that a killed run can be taken up; outputs kept of the teacher go
            into a folder beside it.
        checkpoint_every: Optimizer steps between two checkpoints; by default one after every epoch.
        resume: Take up the run of the checkpoint, if there is one; all other arguments must be the same.
        callbacks: Called as ``(student, epoch)`` after every epoch; a true result stops.
        seed: Makes the call reproducible by itself; otherwise it follows the global random state.
        progress: Show a bar.

    Returns:
        History by epoch and term, validation, times, and why training stopped. Ctrl-C stops it after the step under
        way, with the report and a usable student.

    Raises:
        ShapeMismatchError: student and teacher return tensors of different shapes.
        InvalidArgumentError: the teacher reads a tensor that would be trained, a model returns several outputs and
            ``output`` names none, or an argument cannot be meant.
        CheckpointError: a file cannot be read or written, or there is no room for it, or another run has it.
        NonFiniteError: the loss is NaN or infinite.
        EmptyDataError: the data yields no batch.

    References:
        Do Deep Nets Really Need to be Deep? (Ba and Caruana, 2014), https://arxiv.org/abs/1312.6184

    Example:
        >>> teacher, student = nn.Linear(4, 2), nn.Linear(4, 2)
        >>> x = torch.randn(256, 4, generator=torch.Generator().manual_seed(0))
        >>> report = distill(student, teacher, x, epochs=40, lr=0.03, seed=0, progress=False)
        >>> report.stopped, report.steps, report.loss < 1e-3
        ('finished', 160, True)
    """

    def train(stack: UndoLog) -> DistillationReport:
        interruption = stack.enter_context(Interruption())
        setup = _Setup(
            student,
            teacher,
            Data(data, batch_size, labels, ignore_index, cache, validation, metric),
            Goal(loss, temperature, hard, hints, teacher_weights, pair(forward, "forward"), pair(output, "output")),
            Schedule(epochs, steps, optimizer, lr, scheduler, accumulate, clip, patience, keep_best),
            Run(amp, engine, checkpoint, checkpoint_every, resume, callbacks, seed, progress),
        )
        setup.open_checkpoint(stack)
        setup.borrow(stack)
        lesson = setup.lesson(stack)
        states, drawn = setup.begin(lesson.source)
        trainee, first = setup.dry_run(lesson, next(drawn, None), stack)
        stepper = setup.stepper(trainee, lesson, stack)
        loop = Loop(trainee, lesson, stepper, setup.schedule, setup.run, setup.saved)
        report = loop.run(chain(first, drawn), states, interruption)
        setup.finish(report)
        return report

    return UndoLog().run(train)


class _Setup:
    """What a call is set up from: the arguments, checked, and what follows from them at once."""

    def __init__(self, student: Any, teacher: Any, data: Data, goal: Goal, schedule: Schedule, run: Run) -> None:
        check_student(student)
        self.student, self.data, self.goal, self.schedule, self.run = student, data, goal, schedule, run
        self.teachers, shares = as_teachers(teacher, goal.teacher_weights)
        self.shared = [shared_tensors(student, one, schedule.optimizer) for one in self.teachers]
        self.objective = Objective(
            goal.loss,
            temperature=goal.temperature,
            hard=goal.hard,
            teachers=shares,
            hints=hint_terms(goal.hints, student, self.teachers[0]),
        )
        self.machine = engine_for(run.engine, student, precision(run.amp))
        self.saved: Checkpoint | None = None

    def open_checkpoint(self, stack: UndoLog) -> None:
        """Takes the checkpoint's file for this call alone, and reads it if there is a run to take up."""
        if self.run.checkpoint is None:
            return
        self.saved = Checkpoint(self.run.checkpoint, self.run.checkpoint_every)
        self.saved.open(stack, self.machine, self.run.resume)

    def borrow(self, stack: UndoLog) -> None:
        """Enters the contexts that give everything back, and puts the student into the modes it learns in."""
        own = self.schedule.optimizer if isinstance(self.schedule.optimizer, Optimizer) else None
        stack.callback(random_state())
        stack.enter_context(restored(*self.teachers, rng=False, writes=False))
        trained = set(self.student.parameters())
        self.writes = CopyOnWrite(one for teacher in self.teachers for one in {*teacher.parameters()} - trained)
        stack.callback(self.writes.undo)
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        undo_on_error(stack, self.student, own, self.schedule.scheduler)
        lend(stack, self.student, own)
        for part, flag in modes(self.student).items():
            part.training = flag

    def lesson(self, stack: UndoLog) -> Lesson:
        """Returns the data, what the student should return, the loss, and the validation."""
        if self.run.seed is not None:
            seed_all(self.run.seed)
        seed = int(self.machine.agreed(torch.randint(2**31, ()).item()))
        seed = seed if self.saved is None or self.saved.seed is None else self.saved.seed
        how = Sampling(self.data.batch_size, seed, (self.machine.rank, self.machine.world))
        found, cache = self._source(how, stack)
        own = set(self.student.modules())
        (_, forward), (_, picker) = self.goal.forward, self.goal.output
        targets = Targets(
            [Runner(one, forward, picker, own.intersection(one.modules())) for one in self.teachers],
            [one.hint.layer for one in self.objective.hints],
            Labelling(self.data.labels, self.data.ignore_index, is_causal(self.student)),
            self.machine,
            cache,
        )
        stack.enter_context(targets.hooked())
        return Lesson(found, targets, self.objective, self._validation(targets, how))

    def _source(self, how: Sampling, stack: UndoLog) -> tuple[Source, TeacherCache | None]:
        """Returns where batches come from, and what keeps the teachers' outputs if that is wanted."""
        steps = self.schedule.steps
        kept = cache_for(self.data.cache, None if self.saved is None else self.saved.cache)
        once = steps is not None or self.schedule.epochs == 1
        found = source(self.data.train, how._replace(shuffle=True, once=once, tagged=kept is not None))
        again = not once if steps is None else not 0 < steps <= len(found)
        return found, self._cache(kept, found, stack) if kept and (again or self.data.cache != "auto") else None

    def _cache(self, kept: Cache, found: Source, stack: UndoLog) -> TeacherCache:
        """Returns the cache, which ``stack`` closes; processes on one machine share it, where samples have indices."""
        about = {}
        folder = self.machine.shared_folder() if found.samples and kept.path is None else None
        if kept.path is not None:
            # Of a function no more than its name is known; that it finds the same is tried on the first batch.
            picker = self.goal.output[1]
            about = {
                "teachers": model_fingerprint(self.teachers),
                "output": str(getattr(picker, "__qualname__", picker)),
            }
        cache = TeacherCache(kept, found, self.objective, about=about, folder=folder)
        stack.callback(cache.close)
        return cache

    def _validation(self, targets: Targets, how: Sampling) -> Validation | None:
        """Returns what scores the student, or ``None``."""
        validation, metric = self.data.validation, self.data.metric
        if validation is None:
            if self.schedule.patience is not None or self.schedule.keep_best:
                raise InvalidArgumentError("patience and keep_best need validation=, which is not given.")
            return None
        if metric is None and batches.is_factory(validation):
            return Validation(validation, None, targets, self.objective)
        return Validation(source(validation, how, "validation"), metric, targets, self.objective)

    def begin(self, found: Source) -> tuple[list[torch.Tensor], Iterator[Drawn]]:
        """Returns the states of the caller's generators where the epoch begins, and what is left of it."""
        if self.machine.world > 1:
            # Every process has dropout of its own.
            seed_all(found.seed + 1 + self.machine.rank)
        generators = found.generators()
        if self.saved is not None:
            self.saved.restore_random(self.machine.rank, generators)
        states = [one.get_state() for one in generators]
        return states, found.begin(*((0, 0) if self.saved is None else self.saved.place))

    def dry_run(self, lesson: Lesson, first: Drawn | None, stack: UndoLog) -> tuple[Trainee, list[Drawn]]:
        """Returns the student ready to be trained, after one batch has been through everything; and that batch."""
        (forward, _), (picker, _), hints = self.goal.forward, self.goal.output, self.objective.hints
        if first is not None:
            dry_run(Trainee(self.student, hints, forward, picker), lesson, first, self.shared, self.writes)
        # Only now do the hints have their projections.
        trainee = Trainee(self.student, hints, forward, picker)
        stack.enter_context(trainee.hooked())
        stack.callback(self.machine.close)
        if lesson.validation is not None:
            lesson.validation.dry_run(trainee)
        return trainee, [] if first is None else [first]

    def stepper(self, trainee: Trainee, lesson: Lesson, stack: UndoLog) -> Stepper:
        """Returns the optimizers and schedulers, and the engine they step in."""
        optimizers = optimizers_for(self.schedule.optimizer, self.schedule.lr, trainee, self.teachers)
        stack.enter_context(fused(optimizers))
        steps = self.schedule.total(len(lesson.source))
        return Stepper(self.machine, optimizers, scheduler_for(self.schedule.scheduler, optimizers, steps))

    def finish(self, report: DistillationReport) -> None:
        """Removes what was kept for taking the run up again once it is done, and looks at the weights."""
        self.machine.wait()
        if self.saved is not None and self.machine.rank == 0 and report.stopped != "interrupted":
            self.saved.clear()
        check_finite(self.student, "after the last step", "lower lr, or set clip=1.0")
