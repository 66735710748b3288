"""What the student should return: the teachers' outputs on a micro-batch, its labels, and which of its items count."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from netopt import batches
from netopt.distillation.data.sources import Drawn, batch_length
from netopt.distillation.loss.cache import TeacherCache
from netopt.distillation.loss.hints import captured
from netopt.distillation.loss.labels import UNLABELLED, Labelling
from netopt.distillation.loss.objective import Items, Record, Target
from netopt.distillation.loss.outputs import positions_of
from netopt.distillation.loss.teachers import Reads, Runner, Shared, set_eval

if TYPE_CHECKING:
    from netopt.distillation.loop.engines import Engine

__all__ = ["Targets"]


class Targets:
    """The teachers, and what else is known of a batch.

    Args:
        teachers: Run in eval mode and without gradients, where they are.
        layers: The first teacher's layers that hints need.
        labelling: Where labels are.
        engine: Where the student is.
        cache: Keeps the teachers' outputs, or ``None``.
    """

    def __init__(
        self,
        teachers: Sequence[Runner],
        layers: Sequence[str],
        labelling: Labelling,
        engine: Engine,
        cache: TeacherCache | None = None,
    ) -> None:
        self.teachers, self.layers, self.labelling = tuple(teachers), tuple(layers), labelling
        self.engine, self.cache = engine, cache
        self._seen: dict[str, Tensor] = {}
        self._clock, self._ungraded = _Clock(engine.device), torch.no_grad()
        self._shape: Callable[[Targets, Any], tuple[int, ...] | None] | None = None
        self._all_count = self._all_labelled = False

    @contextmanager
    def hooked(self) -> Iterator[None]:
        """Puts the teachers into eval mode and hooks the layers that hints need."""
        with ExitStack() as stack:
            for one in self.teachers:
                set_eval(one.model, without=one.shared)
            self._seen = stack.enter_context(captured(self.teachers[0].model, list(self.layers)))
            yield

    def check_apart(self, batch: Any, shared: Sequence[Sequence[Shared]]) -> None:
        """Raises an `InvalidArgumentError` if a teacher reads a tensor that is trained, of those it holds."""
        for teacher, held in zip(self.teachers, shared, strict=True):
            if held:
                with Reads(held) as reads:
                    self._run(teacher, batch)
                reads.check()

    def prepare(self, drawn: Drawn, *, train: bool = True) -> tuple[Any, Target]:
        """Returns the batch on the student's device, and its target; the cache is for data to ``train`` on."""
        batch = drawn.batch
        with self._clock:
            if train and self.cache is not None and self.cache.active:
                records = self.cache.records(drawn.identities, batch, lambda: self._run_all(batch))
            else:
                records = self._run_all(batch)
        items, labels = self._items(drawn, positions_of(records[0].output.shape), train and self._all_count)
        return batches.move(batch, self.engine.device), Target(items, records, labels)

    def learn(self, drawn: Drawn, target: Target, whole: Any) -> None:
        """Finds out on the first batch what, in a batch, has the shape of the output's positions.

        Where the ``whole`` of the samples is at hand, it is looked at once whether all of them count.
        """
        positions = target.items.positions
        if whole is not None and not callable(self.labelling.where):
            everywhere = (batch_length(whole), *positions[1:])
            labels = self.labelling.of(whole, everywhere)
            mask = self.labelling.valid(whole, labels, everywhere)
            self._all_count = mask is None or bool(mask.all())
            self._all_labelled = (
                self._all_count
                and isinstance(labels, Tensor)
                and not labels.is_floating_point()
                and tuple(labels.shape) == everywhere
                and bool((labels > UNLABELLED).all())
            )
        for shape in (_samples, _labels, _attention):
            if shape(self, drawn.batch) == positions:
                self._shape = shape
                return

    def count_ahead(self, drawn: Drawn) -> tuple[Items, Tensor | None] | None:
        """Returns what counts of a batch and its labels before a teacher runs; ``None`` if that is not known."""
        positions = None if self._shape is None else self._shape(self, drawn.batch)
        return None if positions is None else self._items(drawn, positions, self._all_count)

    def _items(self, drawn: Drawn, positions: tuple[int, ...], all_count: bool) -> tuple[Items, Tensor | None]:
        labels = self.labelling.of(drawn.batch, positions)
        if drawn.idle:
            return Items(positions, torch.zeros(positions[0], dtype=torch.bool)), labels
        if all_count:
            return Items(positions, labelled=self._all_labelled), labels
        return Items(positions, self.labelling.valid(drawn.batch, labels, positions)), labels

    def seconds(self) -> float:
        """How long the teachers have run altogether."""
        return self._clock.seconds()

    def facts(self) -> dict[str, Any]:
        """The facts on the cache that the report shows."""
        return self.cache.facts() if self.cache is not None else {}

    def notes(self) -> list[str]:
        """Returns what the caller might want to know, one sentence each."""
        if self.cache is None or self.cache.active:
            return []
        return [f"the cache of the teacher's outputs was switched off: {self.cache.reason}."]

    def _run_all(self, batch: Any) -> list[Record]:
        return [self._run(one, batch) for one in self.teachers]

    def _run(self, teacher: Runner, batch: Any) -> Record:
        with self._ungraded, self.engine.autocast():
            record = teacher(batch, self._seen)
        home = self.engine.device
        if record.output.device == home and not record.features:
            return record
        return Record(record.output.to(home), {name: one.to(home) for name, one in record.features.items()})


def _samples(_targets: Targets, batch: Any) -> tuple[int, ...] | None:
    return (batch_length(batch),)


def _labels(targets: Targets, batch: Any) -> tuple[int, ...] | None:
    labels = targets.labelling.of(batch, ())
    return None if labels is None or labels.is_floating_point() else tuple(labels.shape)


def _attention(_targets: Targets, batch: Any) -> tuple[int, ...] | None:
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    return tuple(mask.shape) if isinstance(mask, Tensor) else None


class _Clock:
    """Adds up time spent inside; on an accelerator by events, without synchronising."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self.total, self.began = 0.0, 0.0
        self.events: list[tuple[Any, Any]] = []

    def __enter__(self) -> None:
        if self.cuda:
            self.events.append((torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)))
            self.events[-1][0].record()
        else:
            self.began = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        if self.cuda:
            self.events[-1][1].record()
            if len(self.events) > 256:
                self._drain()
        else:
            self.total += time.perf_counter() - self.began

    def _drain(self, keep: int = 64) -> None:
        while len(self.events) > keep:
            start, end = self.events.pop(0)
            end.synchronize()
            self.total += start.elapsed_time(end) / 1000

    def seconds(self) -> float:
        self._drain(keep=0)
        return self.total
