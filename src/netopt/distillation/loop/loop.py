"""The training loop: micro-batches to steps, steps to epochs, epochs to a report."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from netopt.distillation.data.sources import Drawn
from netopt.distillation.loop.checkpoint import Checkpoint
from netopt.distillation.loop.dry_run import Lesson
from netopt.distillation.loop.engines import Engine
from netopt.distillation.loop.interrupts import Interruption
from netopt.distillation.loop.optimizing import Stepper
from netopt.distillation.loop.student import Trainee, copy_values, put_values
from netopt.distillation.loss.objective import Objective, Target
from netopt.distillation.report import DistillationReport, Epoch
from netopt.distillation.settings import Run, Schedule
from netopt.errors import EmptyDataError, NonFiniteError, ShapeMismatchError
from netopt.progress import bar

__all__ = ["Loop"]


@dataclass
class State:
    """Where training is; with weights, optimizer and random states all that a checkpoint has to hold."""

    epoch: int = 0
    drawn: int = 0
    step: int = 0
    samples: int = 0
    best: float | None = None
    best_epoch: int | None = None
    stale: int = 0
    seconds: float = 0.0
    teacher_seconds: float = 0.0
    history: list[Epoch] = field(default_factory=list)


class Loop:
    """Everything one call trains with, wired together.

    Args:
        trainee: Student and projections.
        lesson: What is learnt.
        stepper: What steps the weights.
        schedule: How long, and how.
        run: Callbacks, and whether to show a bar.
        checkpoint: What is written between steps, or ``None``.
    """

    def __init__(
        self,
        trainee: Trainee,
        lesson: Lesson,
        stepper: Stepper,
        schedule: Schedule,
        run: Run,
        checkpoint: Checkpoint | None,
    ) -> None:
        self.trainee, self.schedule, self.checkpoint = trainee, schedule, checkpoint
        self.source, self.targets, self.objective, self.validation = lesson
        self.engine, optimizers, self.schedulers = stepper
        self.callbacks, self.progress = run.callbacks, run.progress
        self.keep_best = self.validation is not None if schedule.keep_best is None else schedule.keep_best
        self.model, self.optimizers = self.engine.prepare(trainee, optimizers)
        # The trainee itself is ours and has no hooks, so where it is not wrapped its forward is called directly.
        self.run_model: Callable[..., Any] = trainee.forward if self.model is trainee else self.model
        self.spare: Drawn | None = None
        self.generators: list[Tensor] = []
        self.state = State()
        self.best: dict[str, Tensor] | None = None
        self.began = time.perf_counter()
        self.meter = _Meter(self.engine.device, self.objective)
        self.interruption = Interruption()
        self.stopped = "finished"

    def run(self, first: Iterator[Drawn], generators: list[Tensor], interruption: Interruption) -> DistillationReport:
        """Trains until there is a reason to stop.

        Args:
            first: The first epoch, begun already.
            generators: States of the caller's generators where it began.
            interruption: Whether a stop was requested.
        """
        self.generators, self.interruption = generators, interruption
        if self.checkpoint is not None:
            self.checkpoint.restore(self)
        self._train(first)
        return self._report()

    def _train(self, drawn: Iterator[Drawn]) -> None:
        self.began = time.perf_counter()
        state = self.state
        try:
            with self._bar() as bar:
                while self.stopped == "finished" and not self._done():
                    self._epoch(drawn, bar)
                    if self.stopped == "interrupted" or self._done():
                        break
                    drawn = self.source.begin(state.epoch)
        except KeyboardInterrupt:
            self.stopped = "interrupted"
        self.meter.settle()
        if state.drawn:
            self._close_epoch(time.perf_counter())

    def _report(self) -> DistillationReport:
        state = self.state
        kept = self.keep_best and self.best is not None and state.best_epoch is not None
        if kept and self.best is not None:
            put_values(self.trainee.student, self.best)
        return DistillationReport(
            history=state.history,
            stopped=self.stopped,
            steps=state.step,
            samples=state.samples,
            seconds=self._seconds(),
            teacher_seconds=state.teacher_seconds + self.targets.seconds(),
            metric=self.validation.name if self.validation is not None else None,
            best=state.best,
            best_epoch=state.best_epoch,
            kept_best=kept,
            cache=self.targets.facts(),
            notes=self.targets.notes(),
        )

    def _done(self) -> bool:
        steps = self.schedule.steps
        return self.state.epoch >= self.schedule.epochs if steps is None else self.state.step >= steps

    def _epoch(self, drawn: Iterator[Drawn], bar: Any) -> None:
        """One pass over the data, or what is left of it; then validation, and a line in the history."""
        state, began = self.state, time.perf_counter()
        while group := self._group(drawn):
            state.drawn += len(group)
            self._step(group)
            bar.tick(self.meter)
            if self._interrupted():
                self.stopped = "interrupted"
                self._save()
                return
            if self.checkpoint is not None and self.checkpoint.due(state.step):
                self._save()
            if self.schedule.steps is not None and state.step >= self.schedule.steps:
                break
        self._close_epoch(began)
        entry = state.history[-1]
        if self.schedule.patience is not None and state.stale >= self.schedule.patience:
            self.stopped = "patience"
        for callback in self.callbacks:
            if self.engine.most(bool(callback(self.trainee.student, entry))):
                self.stopped = "callback"
        self.generators = [one.get_state() for one in self.source.generators()]
        if self.checkpoint is not None:
            self._save()

    def _group(self, drawn: Iterator[Drawn]) -> list[Drawn]:
        """Draws the micro-batches of a step; a process that has fewer left than another stands in with idle ones."""
        group = list(islice(drawn, self.schedule.accumulate))
        if self.source.divided:
            self.spare = group[-1] if group else self.spare
            missing = self.engine.most(len(group)) - len(group)
            if missing and self.spare is None:
                raise EmptyDataError("this process was handed no batch at all; use fewer processes or smaller batches.")
            group += [Drawn(self.spare.identities, self.spare.batch, True)] * missing if self.spare else []
        return group

    def _interrupted(self) -> bool:
        """Whether to stop; several processes agree on it now and then, so that all stop after the same step."""
        if self.engine.world == 1:
            return self.interruption.requested
        return self.state.step % 16 == 0 and bool(self.engine.most(self.interruption.requested))

    def _step(self, group: Sequence[Drawn]) -> None:
        """One optimizer step on all micro-batches of ``group``."""
        if len(group) == 1:
            batch, target = self.targets.prepare(group[0])
            counts = self.objective.counts(target.items, target.labels)
            self._learn(batch, target, self._shares(self.engine.totals(counts)), counts)
        else:
            self._learn_all(group)
        self.engine.step(self.model, self.optimizers, self.schedule.clip)
        for scheduler in self.schedulers:
            scheduler.step()
        if self.targets.cache is not None and self.targets.cache.shared:
            # All processes have opened what they share by now, and no other step has begun.
            self.engine.wait()
            self.targets.cache.detach()
            self.engine.wait()
        self.state.step += 1

    def _learn_all(self, group: Sequence[Drawn]) -> None:
        """Adds up the gradients of all micro-batches of a step."""
        # They are counted before any teacher runs, if the batches alone are enough for that, so that one output of a
        # teacher is held at a time.
        counted = [one for one in map(self.targets.count_ahead, group) if one is not None]
        prepared: Iterable[tuple[Any, Target]] = (self.targets.prepare(one) for one in group)
        if len(counted) < len(group):
            prepared = list(prepared)
            counted = [(target.items, target.labels) for _, target in prepared]
        counts = [self.objective.counts(items, labels) for items, labels in counted]
        shares = self._shares(self.engine.totals([sum(column) for column in zip(*counts, strict=True)]))
        for place, (batch, target) in enumerate(prepared):
            if target.items.positions != counted[place][0].positions:
                raise ShapeMismatchError(
                    f"an output has positions {target.items.positions} where its batch suggests "
                    f"{counted[place][0].positions}, unlike the first one's; set accumulate=1."
                )
            with self.engine.holding(self.model, place == len(group) - 1):
                self._learn(batch, target, shares, counts[place])

    def _shares(self, totals: Sequence[float | Tensor]) -> list[float | Tensor]:
        """Returns by what each term's sum is multiplied, so that processes that average their gradients add up."""
        world = self.engine.world
        return [weight * world / total for weight, total in zip(self.objective.weights, totals, strict=True)]

    def _learn(self, batch: Any, target: Target, shares: Sequence[float | Tensor], counts: Sequence[int]) -> None:
        """Adds the gradients of one micro-batch."""
        with self.engine.autocast():
            output, features = self.run_model(batch)
        sums = self.objective.sums(output, features, target, shares)
        self.meter.add([one.value for one in sums], shares, counts, self.state.step)
        self.state.samples += target.items.positions[0]
        if len(sums) > 1:
            # A term of weight zero has no graph.
            pairs = [(one, share) for one, share in zip(sums, shares, strict=True) if one.root.requires_grad]
            sums, shares = [one for one, _ in pairs], [share for _, share in pairs]
        self.engine.backward(sums, shares)

    def _close_epoch(self, began: float) -> None:
        """Ends an epoch, be it a partial one: its means, its validation, its line in the history."""
        state = self.state
        self.meter.settle()
        state.epoch += 1
        if self.targets.cache is not None:
            self.targets.cache.close_epoch(state.epoch)
        state.drawn = 0
        means = self.meter.means(self.engine)
        loss = math.fsum(w * means[n] for w, n in zip(self.objective.weights, self.objective.names, strict=True) if w)
        score = self._validate()
        state.history.append(Epoch(state.epoch, state.step, loss, means, score, time.perf_counter() - began))

    def _validate(self) -> float | None:
        if self.validation is None:
            return None
        score = self.validation.score(self.trainee)
        if self.validation.better(score, self.state.best):
            self.state.best, self.state.best_epoch, self.state.stale = score, self.state.epoch, 0
            if self.keep_best:
                self.best = copy_values(self.trainee.student)
        else:
            self.state.stale += 1
        return score

    def keep(self, values: Mapping[str, Tensor]) -> None:
        """Takes ``values`` for the best weights so far."""
        self.best = dict(values)

    def _save(self) -> None:
        if self.checkpoint is None:
            return
        kept = self.state.seconds, self.state.teacher_seconds
        self.state.seconds, self.state.teacher_seconds = self._seconds(), kept[1] + self.targets.seconds()
        self.checkpoint.save(self, self.generators)
        self.state.seconds, self.state.teacher_seconds = kept

    def _seconds(self) -> float:
        return self.state.seconds + time.perf_counter() - self.began

    def _bar(self) -> _Bar:
        return _Bar(self.schedule.total(len(self.source)) or None, self.progress and self.engine.rank == 0)


class _Meter:
    """Adds terms up where they are, and looks for a loss that is not finite without waiting for a device."""

    def __init__(self, device: torch.device, objective: Objective) -> None:
        self.objective = objective
        self.host = device.type == "cpu"
        self.dtype = torch.float32 if device.type == "mps" else torch.float64
        self.sums = torch.zeros(len(objective.names), dtype=self.dtype, device=device)
        self.held = [0.0] * len(objective.names)
        self.counts = [0] * len(objective.names)
        self.landed = torch.zeros(len(objective.names), dtype=torch.float64)
        self.read = self.landed.numpy()
        self.pending: deque[tuple[int, Any, Tensor]] = deque()
        self.last: tuple[Tensor, Sequence[float | Tensor]] | None = None

    def add(self, sums: Sequence[Tensor], shares: Sequence[float | Tensor], counts: Sequence[int], step: int) -> None:
        terms = sums[0] if len(sums) == 1 else torch.stack(list(sums))
        self.last = terms, shares
        for place, more in enumerate(counts):
            self.counts[place] += more
        if self.host:
            # Nothing is waited for here: the numbers are in host memory, and read where they are.
            self.landed.copy_(terms)
            values = self.read.tolist()
            if not all(map(math.isfinite, values)):
                self._raise_not_finite(step, values)
            for place, more in enumerate(values):
                self.held[place] += more
            return
        self.sums += terms
        # Copied to the host in passing and read once it has arrived, so no step waits for the device.
        arrived = torch.empty(len(sums), dtype=terms.dtype, pin_memory=terms.device.type == "cuda")
        arrived.copy_(terms, non_blocking=True)
        event = torch.Event(terms.device.type)
        event.record()
        self.pending.append((step, event, arrived))
        while self.pending and (self.pending[0][1].query() or len(self.pending) > 32):
            self._read()

    def loss(self) -> float:
        """Returns the objective of the last micro-batch; this waits for it."""
        if self.last is None:
            return math.nan
        terms, shares = self.last
        return math.fsum(one * float(share) for one, share in zip(terms.reshape(-1).tolist(), shares, strict=True))

    def restore(self, sums: Tensor, counts: list[int]) -> None:
        """Goes on from the sums of an epoch begun earlier."""
        self.sums.copy_(sums)
        self.held = [0.0] * len(counts)
        self.counts = list(counts)

    def settle(self) -> None:
        """Reads what has not been read yet, and puts all sums into one place."""
        while self.pending:
            self._read()
        self.sums += torch.tensor(self.held, dtype=self.dtype, device=self.sums.device)
        self.held = [0.0] * len(self.held)

    def means(self, engine: Engine) -> dict[str, float]:
        """Returns each term's mean since the last call, over all processes, and starts anew."""
        self.settle()
        counts = torch.tensor(self.counts, dtype=self.dtype, device=self.sums.device)
        sums, totals = engine.sum(torch.stack([self.sums, counts])).tolist()
        self.sums.zero_()
        self.counts = [0] * len(self.counts)
        return {
            name: one / total if total else 0.0
            for name, one, total in zip(self.objective.names, sums, totals, strict=True)
        }

    def _read(self) -> None:
        step, event, arrived = self.pending.popleft()
        event.synchronize()
        values = arrived.tolist()
        if not all(map(math.isfinite, values)):
            self._raise_not_finite(step, values)

    def _raise_not_finite(self, step: int, terms: Sequence[float]) -> None:
        values = ", ".join(f"{name} {one:.4g}" for name, one in zip(self.objective.names, terms, strict=True))
        raise NonFiniteError(
            f"the loss is not finite at step {step + 1} (sums over the batch: {values}); look for NaN in the data, "
            "or lower lr, set clip=1.0, or choose amp='bf16'. Student and optimizer are as they were before the call."
        )


class _Bar:
    """tqdm, kept off the hot path: the loss is fetched a few times a second at most."""

    def __init__(self, total: int | None, shown: bool) -> None:
        self.bar: Any = bar(None, "distill", total=total, unit="step") if shown else None
        self.next = time.perf_counter() + 0.5
        self.ticks = 0

    def __enter__(self) -> _Bar:  # noqa: PYI034
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.close()

    def tick(self, meter: _Meter) -> None:
        if self.bar is None:
            return
        self.ticks += 1
        now = time.perf_counter()
        if now >= self.next:
            self.bar.set_postfix(loss=f"{meter.loss():.4g}", refresh=False)
            self.bar.update(self.ticks)
            self.ticks, self.next = 0, now + 0.5
