"""What the student should say: asks the teachers about a micro-batch, and finds its labels and what counts of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from netopt import batches
from netopt.distillation.data.sources import Drawn, batch_length
from netopt.distillation.loop.engines import Engine
from netopt.distillation.loss.cache import TeacherCache
from netopt.distillation.loss.hints import captured
from netopt.distillation.loss.objective import Items, Record, Target
from netopt.distillation.loss.outputs import UNLABELLED, Picker, positions_of, shifted, valid_positions
from netopt.distillation.loss.teachers import Asked, Forward, all_eval
from netopt.errors import ArgumentTypeError, InvalidArgumentError

__all__ = ["Labels", "Targets"]

Labels: TypeAlias = str | Callable[[Any], Tensor] | None
"""Where labels are: a key of the batch, a function of it, or ``None`` for the batch's targets."""


class Targets:
    """The teachers, and what else is known of a batch.

    Args:
        teachers: Asked in eval mode and without gradients, where they are.
        forward: How a teacher is run on a batch.
        picker: Finds a teacher's output.
        layers: The first teacher's layers that hints need.
        labels: Where labels are.
        ignore_index: The label of what does not count.
        causal: Whether a position's label is the next one's.
        engine: Where the student is.
        cache: Keeps what the teachers said, or ``None``.
    """

    def __init__(
        self,
        teachers: Sequence[nn.Module],
        *,
        forward: Forward,
        picker: Picker,
        layers: Sequence[str],
        labels: Labels,
        ignore_index: int,
        causal: bool,
        engine: Engine,
        cache: TeacherCache | None = None,
    ) -> None:
        self.teachers, self.layers = tuple(teachers), tuple(layers)
        self._asked = [Asked(one, forward, picker) for one in teachers]
        self.labels, self.ignore_index, self.causal, self.engine = labels, ignore_index, causal, engine
        self.cache = cache
        self._seen: dict[str, Tensor] = {}
        self._clock, self._ungraded = _Clock(engine.device), torch.no_grad()
        self._shape: Callable[[Targets, Any], tuple[int, ...] | None] | None = None
        self._all_count = self._all_labelled = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Puts the teachers into eval mode and lets the layers that hints need be heard."""
        with ExitStack() as stack:
            all_eval(self.teachers)
            self._seen = stack.enter_context(captured(self.teachers[0], list(self.layers)))
            yield

    def prepare(self, drawn: Drawn, *, train: bool = True) -> tuple[Any, Target]:
        """Returns the batch on the student's device, and its target; the cache is for data to ``train`` on."""
        batch = drawn.batch
        with self._clock:
            if train and self.cache is not None and self.cache.active:
                records = self.cache.records(drawn.identities, batch, lambda: self._ask_all(batch))
            else:
                records = self._ask_all(batch)
        items, labels = self._items(drawn, positions_of(records[0].output.shape), train and self._all_count)
        return batches.move(batch, self.engine.device), Target(items, records, labels)

    def learn(self, drawn: Drawn, target: Target, whole: Any) -> None:
        """Finds out on the first batch what, in a batch, has the shape of the output's positions.

        Where the ``whole`` of the samples is at hand, it is looked at once whether all of them count.
        """
        positions = target.items.positions
        if whole is not None and not callable(self.labels):
            everywhere = (batch_length(whole), *positions[1:])
            labels = self.labels_of(whole, everywhere)
            mask = valid_positions(whole, labels, everywhere, self.ignore_index)
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

    def foresee(self, drawn: Drawn) -> tuple[Items, Tensor | None] | None:
        """Returns what counts of a batch and its labels before a teacher is asked; ``None`` if it cannot be told."""
        positions = None if self._shape is None else self._shape(self, drawn.batch)
        return None if positions is None else self._items(drawn, positions, self._all_count)

    def _items(self, drawn: Drawn, positions: tuple[int, ...], all_count: bool) -> tuple[Items, Tensor | None]:
        labels = self.labels_of(drawn.batch, positions)
        if drawn.idle:
            return Items(positions, torch.zeros(positions[0], dtype=torch.bool)), labels
        if all_count:
            return Items(positions, labelled=self._all_labelled), labels
        return Items(positions, valid_positions(drawn.batch, labels, positions, self.ignore_index)), labels

    def seconds(self) -> float:
        """How long the teachers have been asked altogether."""
        return self._clock.seconds()

    def facts(self) -> dict[str, Any]:
        """What the report says of the cache."""
        return self.cache.facts() if self.cache is not None else {}

    def notes(self) -> list[str]:
        """Returns what the caller might want to know, one sentence each."""
        if self.cache is None or self.cache.active:
            return []
        return [f"the cache of the teacher's outputs was switched off: {self.cache.reason}."]

    def _ask_all(self, batch: Any) -> list[Record]:
        return [self._ask(one, batch) for one in self._asked]

    def _ask(self, asked: Asked, batch: Any) -> Record:
        with self._ungraded, self.engine.autocast():
            record = asked(batch, self._seen)
        home = self.engine.device
        if record.output.device == home and not record.features:
            return record
        return Record(record.output.to(home), {name: one.to(home) for name, one in record.features.items()})

    def labels_of(self, batch: Any, positions: tuple[int, ...]) -> Tensor | None:
        """Returns the labels of a batch, each at the position that should say it; ``None`` if it has none."""
        if callable(self.labels):
            found = self.labels(batch)
        elif isinstance(self.labels, str):
            if not isinstance(batch, Mapping) or self.labels not in batch:
                keys = list(batch) if isinstance(batch, Mapping) else f"a {type(batch).__name__}"
                raise InvalidArgumentError(f"labels={self.labels!r} is no key of the batch, {keys}.")
            found = batch[self.labels]
        else:
            found = batches.split(batch)[1]
        if found is None or not isinstance(found, Tensor):
            if self.labels is not None:
                raise ArgumentTypeError(f"labels= gave a {type(found).__name__}; let it give a tensor.")
            return None
        if self.causal and self.labels is None and isinstance(batch, Mapping) and tuple(found.shape) == positions:
            found = shifted(found, self.ignore_index)
        if found.dim() == len(positions) + 1 and found.shape[-1] == 1 and not found.is_floating_point():
            found = found.squeeze(-1)
        return found


def _samples(_targets: Targets, batch: Any) -> tuple[int, ...] | None:
    return (batch_length(batch),)


def _labels(targets: Targets, batch: Any) -> tuple[int, ...] | None:
    labels = targets.labels_of(batch, ())
    return None if labels is None or labels.is_floating_point() else tuple(labels.shape)


def _attention(_targets: Targets, batch: Any) -> tuple[int, ...] | None:
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    return tuple(mask.shape) if isinstance(mask, Tensor) else None


class _Clock:
    """Adds up time spent inside; on an accelerator by events, so that nobody waits for it."""

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
