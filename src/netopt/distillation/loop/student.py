"""The student is lent: its weights are meant to change, and nothing else of it is.

Flags, gradients, hooks and random states are as they were on leaving; after an error its weights are, too.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from netopt.distillation.loss.hints import HintTerm, captured
from netopt.distillation.loss.objective import Record
from netopt.distillation.loss.outputs import Picker
from netopt.distillation.loss.teachers import Forward, Runner
from netopt.errors import NetoptError
from netopt.model.restore import Gradients, Snapshot
from netopt.model.signals import UndoLog

__all__ = ["Trainee", "copy_values", "evaluating", "lend", "modes", "put_values", "undo_on_error"]

UNDONE = (NetoptError, KeyboardInterrupt, SystemExit)
"""What leaves the student as it was."""


class Trainee(nn.Module):
    """Student and projections as one module, so that whatever wraps a module for training wraps both, and neither.

    Args:
        student: The model to train.
        hints: Terms whose projections are trained along.
        forward: How the student is run on a batch.
        picker: Finds its output.
    """

    def __init__(self, student: nn.Module, hints: Sequence[HintTerm], forward: Forward, picker: Picker) -> None:
        super().__init__()
        self.student = student
        self.projections = nn.ModuleDict(
            {str(place): hint.projection for place, hint in enumerate(hints) if hint.projection is not None}
        )
        self._hints, self._run = tuple(hints), Runner(student, forward, picker)
        self._projected = {self._hints[int(place)].student: place for place in self.projections}
        self._seen: dict[str, Tensor] = {}

    @contextmanager
    def hooked(self) -> Iterator[None]:
        """Lets the layers the hints name be heard."""
        with captured(self.student, [hint.student for hint in self._hints]) as self._seen:
            yield

    def forward(self, batch: Any) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Returns the student's output and its hints' activations, projected."""
        output, seen = self._run(batch, self._seen)
        if not self._projected:
            return output, seen
        features = dict(seen)
        for name, place in self._projected.items():
            features[name] = self.projections[place](seen[name])
        return output, features

    def record(self, batch: Any) -> Record:
        """Returns what the student says to ``batch``, unprojected."""
        return self._run(batch, self._seen)


def modes(student: nn.Module) -> dict[nn.Module, bool]:
    """Returns the training flag each sub-module has while it learns.

    What the caller put into eval mode, a frozen batch norm say, stays so; a student that is in eval mode altogether
    has merely been evaluated before, and trains altogether.
    """
    flags = {part: part.training for part in student.modules()}
    return flags if any(flags.values()) else dict.fromkeys(flags, True)


def evaluating(student: nn.Module) -> UndoLog:
    """Puts every sub-module into eval mode, without gradients, and back into the mode it was in."""

    def start(log: UndoLog) -> None:
        log.callback(_flags_restored(student))
        for part in student.modules():
            part.training = False
        log.enter_context(torch.no_grad())

    return UndoLog(start)


def lend(log: UndoLog, student: nn.Module, optimizer: Optimizer | None) -> None:
    """Has training flags, ``requires_grad`` and the ``.grad`` objects restored, of the optimizer's parameters too."""
    groups = optimizer.param_groups if optimizer is not None else ()
    gradients = Gradients(dict.fromkeys(chain(student.parameters(), *(group["params"] for group in groups))))
    log.callback(gradients.put_back)
    log.callback(_flags_restored(student))
    gradients.set_aside()


def _flags_restored(student: nn.Module) -> Callable[[], None]:
    flags = [(part, part.training) for part in student.modules()]

    def put_back() -> None:
        for part, flag in flags:
            part.training = flag

    return put_back


def undo_on_error(log: UndoLog, student: nn.Module, *stateful: Any) -> None:
    """Has student, optimizer and scheduler put back if this library raises one of its errors, or is interrupted.

    Other exceptions, the caller's own, leave the student as far trained as it is.
    """
    for one in stateful:
        if hasattr(one, "state_dict") and not isinstance(one, type):
            log.callback(one.load_state_dict, copy.deepcopy(one.state_dict()), on=UNDONE)
    log.callback(Snapshot(student, parameters=True).put_back, on=UNDONE)


def copy_values(student: nn.Module) -> dict[str, Tensor]:
    """Copies of parameters and buffers, by name."""
    return {name: one.detach().clone() for name, one in (*student.named_parameters(), *student.named_buffers())}


def put_values(student: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Writes values into the parameters and buffers of these names; one that has grown since keeps its own."""
    with torch.no_grad():
        for name, one in (*student.named_parameters(), *student.named_buffers()):
            if name in values and one.shape == values[name].shape:
                one.copy_(values[name])
