"""One call trains a student on what a teacher says."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from netopt.distillation.data.cache import Cache, TeacherCache, cache_for
from netopt.distillation.data.fingerprints import model_fingerprint
from netopt.distillation.data.sources import Drawn, Source, seed_all, source
from netopt.distillation.loop.checkpoint import Checkpoint
from netopt.distillation.loop.dry_run import check_finite, check_numbers, check_student, dry_run
from netopt.distillation.loop.engines import Engine, engine_for, precision
from netopt.distillation.loop.interrupts import Interruption
from netopt.distillation.loop.loop import Loop, Settings
from netopt.distillation.loop.optimizing import OptimizerLike, SchedulerLike, fused, optimizers_for, scheduler_for
from netopt.distillation.loop.student import Trainee, lend, modes, undo_on_error
from netopt.distillation.loop.validation import Metric, Validation
from netopt.distillation.loss.hints import Hints, hint_terms
from netopt.distillation.loss.objective import Objective, SoftLoss
from netopt.distillation.loss.outputs import Picker, is_causal
from netopt.distillation.loss.targets import Labels, Targets
from netopt.distillation.loss.teachers import Forward, as_teachers, check_apart
from netopt.distillation.report import DistillationReport
from netopt.errors import InvalidArgumentError
from netopt.model.restore import restored
from netopt.model.signals import UndoLog

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
    r"""Trains ``student``, in place, to say what ``teacher`` says.

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
        output: Path or function that finds the output in a result, for both, or a pair for student and teacher.
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
            :class:`netopt.distillation.Cache` says how.
        engine: A Hugging Face ``Accelerator`` or a Lightning ``Fabric``.
        checkpoint: File to write between steps, so that a killed run can be taken up; outputs kept of the teacher go
            into a folder beside it.
        checkpoint_every: Optimizer steps between two checkpoints; by default one after every epoch.
        resume: Take up the run of the checkpoint, if there is one; all other arguments must be the same.
        callbacks: Called as ``(student, epoch)`` after every epoch; a true answer stops.
        seed: Makes the call reproducible by itself; otherwise it follows the global random state.
        progress: Show a bar.

    Returns:
        History by epoch and term, validation, times, and why training stopped. Ctrl-C stops it after the step under
        way, with the report and a usable student.

    Raises:
        ShapeMismatchError: student and teacher say tensors of different shapes.
        InvalidArgumentError: student and teacher share what would be trained, or an argument cannot be meant.
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
    whole = {"epochs": epochs, "steps": steps, "batch_size": batch_size, "accumulate": accumulate, "patience": patience}
    check_numbers(whole=whole, real={"temperature": temperature, "lr": lr, "clip": clip}, hard=hard, seed=seed)
    check_student(student)
    teachers, shares = as_teachers(teacher, teacher_weights)
    check_apart(student, teachers)
    runs, pickers = _pair(forward, "forward"), _pair(output, "output")
    terms = hint_terms(hints, student, teachers[0])
    objective = Objective(loss, temperature=temperature, hard=hard, teachers=shares, hints=terms)
    machine = engine_for(engine, student, precision(amp))
    saved = _checkpoint(checkpoint, checkpoint_every, resume, machine)
    with UndoLog() as stack:
        interruption = stack.enter_context(Interruption())
        _lend(stack, student, teachers, optimizer, scheduler)
        if seed is not None:
            seed_all(seed)
        base = int(machine.agreed(torch.randint(2**31, ()).item()))
        base = base if saved is None or saved.seed is None else saved.seed
        common: dict[str, Any] = {"batch_size": batch_size, "seed": base, "share": (machine.rank, machine.world)}
        drawn_from, kept = _source(data, cache, epochs, steps, saved, common)
        held = None if kept is None else _held(kept, teachers, drawn_from, machine, objective, stack)
        targets = Targets(
            teachers,
            forward=runs[1],
            picker=pickers[1],
            layers=[one.hint.layer for one in terms],
            labels=labels,
            ignore_index=ignore_index,
            causal=is_causal(student),
            engine=machine,
            cache=held,
        )
        stack.enter_context(targets.listening())
        checked = _validation(validation, metric, targets, objective, common)
        if checked is None and (patience is not None or keep_best):
            raise InvalidArgumentError("patience and keep_best need validation=, which is not given.")
        keeps = checked is not None if keep_best is None else keep_best
        states, drawn = _begin(drawn_from, saved, machine)
        first = next(drawn, None)
        trainee = Trainee(student, terms, runs[0], pickers[0])
        if first is not None:
            trainee = dry_run(student, runs[0], pickers[0], first, targets, objective, base, drawn_from.whole)
        stack.enter_context(trainee.listening())
        stack.callback(machine.close)
        if checked is not None:
            checked.dry_run(trainee)
        optimizers = optimizers_for(optimizer, lr, trainee, teachers)
        stack.enter_context(fused(optimizers))
        loop = Loop(
            trainee,
            targets,
            objective,
            drawn_from,
            machine,
            optimizers=optimizers,
            schedulers=scheduler_for(scheduler, optimizers, steps or -(-len(drawn_from) // accumulate) * epochs),
            settings=Settings(epochs, steps, accumulate, clip, patience, keeps),
            validation=checked,
            callbacks=tuple(callbacks),
            interruption=interruption,
            checkpoint=saved,
            generators=states,
            progress=progress,
        )
        return _run(loop, drawn if first is None else chain([first], drawn))


def _lend(stack: UndoLog, student: nn.Module, teachers: Sequence[nn.Module], optimizer: Any, scheduler: Any) -> None:
    """Enters the contexts that give everything back, and puts the student into the modes it learns in."""
    own = optimizer if isinstance(optimizer, Optimizer) else None
    stack.enter_context(restored(*teachers), torch.inference_mode(False), torch.enable_grad())
    undo_on_error(stack, student, own, scheduler)
    lend(stack, student, own)
    for part, flag in modes(student).items():
        part.training = flag


def _source(
    data: Any, cache: Any, epochs: int, steps: int | None, saved: Checkpoint | None, common: Mapping[str, Any]
) -> tuple[Source, Cache | None]:
    """Returns where batches come from, and how the teachers' outputs are kept if that is wanted."""
    kept = cache_for(cache, None if saved is None else saved.cache)
    once = steps is not None or epochs == 1
    found = source(data, shuffle=True, once=once, tagged=kept is not None, **common)
    again = not once if steps is None else not 0 < steps <= len(found)
    return found, kept if again or cache != "auto" else None


def _run(loop: Loop, drawn: Iterator[Drawn]) -> DistillationReport:
    """Trains, from where a checkpoint says if there is one, and removes that when all is done."""
    saved, machine = loop.checkpoint, loop.engine
    if saved is not None:
        saved.restore(loop)
    report = loop.run(drawn)
    machine.wait()
    if saved is not None and machine.rank == 0 and report.stopped != "interrupted":
        saved.clear()
    check_finite(loop.trainee.student, "after the last step", "lower lr, or set clip=1.0")
    return report


def _begin(drawn_from: Source, saved: Checkpoint | None, machine: Engine) -> tuple[list[torch.Tensor], Iterator[Drawn]]:
    """Returns the states of the caller's generators where the epoch begins, and what is left of it."""
    if machine.world > 1:
        # Every process has dropout of its own.
        seed_all(drawn_from.seed + 1 + machine.rank)
    generators = drawn_from.generators()
    if saved is not None:
        saved.restore_random(machine.rank, generators)
    states = [one.get_state() for one in generators]
    return states, drawn_from.begin(*((0, 0) if saved is None else saved.place))


def _held(
    kept: Cache,
    teachers: Sequence[nn.Module],
    drawn_from: Source,
    machine: Engine,
    objective: Objective,
    stack: UndoLog,
) -> TeacherCache:
    """Returns the cache, which ``stack`` closes; processes on one machine share it, where samples have indices."""
    folder = machine.shared_folder() if drawn_from.samples and kept.path is None else None

    def make() -> TeacherCache:
        return TeacherCache(
            kept,
            teachers=model_fingerprint(teachers) if kept.path is not None else "",
            samples=drawn_from.samples,
            fixed=drawn_from.fixed,
            temperature=objective.temperature,
            condensable=objective.condensable,
            folder=folder,
        )

    # The first process clears a folder of other teachers' outputs before the others look into it.
    first = make() if machine.rank == 0 else None
    machine.wait()
    held = first or make()
    stack.callback(held.close, machine.rank == 0)
    return held


def _validation(
    validation: Any, metric: Metric, targets: Targets, objective: Objective, common: Mapping[str, Any]
) -> Validation | None:
    """Returns what scores the student, or ``None``."""
    if validation is None:
        if metric is not None:
            raise InvalidArgumentError("metric needs validation=, the data to measure it on.")
        return None
    if not (metric is None or callable(metric) or metric in ("loss", "accuracy")):
        raise InvalidArgumentError(f"metric must be None, 'loss', 'accuracy' or a function, not {metric!r}.")
    if callable(validation) and not isinstance(validation, (Iterable, nn.Module)) and metric is None:
        judge: Callable[[nn.Module], Any] = validation
        return Validation(judge, None, targets, objective)
    found = source(validation, shuffle=False, once=False, what="validation", **common)
    return Validation(found, metric, targets, objective)


def _pair(value: Any, name: str) -> tuple[Any, Any]:
    if not isinstance(value, (tuple, list)):
        return value, value
    if len(value) != 2:
        raise InvalidArgumentError(f"{name} must be one entry for both models or a pair (student, teacher).")
    return value[0], value[1]


def _checkpoint(path: Any, every: int | None, resume: bool, machine: Engine) -> Checkpoint | None:
    """Returns what is written between steps, or ``None``."""
    if path is None:
        if resume or every is not None:
            raise InvalidArgumentError("resume and checkpoint_every need checkpoint=, the path of the file.")
        return None
    saved = Checkpoint(path, every, resume)
    if saved.found is None and machine.rank == 0:
        saved.clear()
    machine.wait()
    return saved
