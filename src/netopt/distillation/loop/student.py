"""The student is lent: its weights are meant to change, and nothing else of it is.

Flags, gradients, hooks and random states are as they were on leaving; after an error its weights are, too.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from netopt.distillation.loss.hints import HintTerm, captured
from netopt.distillation.loss.objective import Record
from netopt.distillation.loss.outputs import Picker
from netopt.distillation.loss.teachers import Forward, Runner
from netopt.errors import NetoptError

__all__ = ["Snapshot", "Trainee", "evaluating", "lent", "modes", "undone_on_error"]


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


@contextmanager
def evaluating(student: nn.Module) -> Iterator[None]:
    """Puts every sub-module into eval mode, and back into the one it was in."""
    flags = [(part, part.training) for part in student.modules()]
    for part, _ in flags:
        part.training = False
    try:
        yield
    finally:
        for part, flag in flags:
            part.training = flag


@contextmanager
def lent(student: nn.Module, optimizer: Optimizer | None) -> Iterator[None]:
    """Restores training flags, ``requires_grad`` and the ``.grad`` objects, of the optimizer's parameters too."""
    flags = [(part, part.training) for part in student.modules()]
    parameters = {id(one): one for one in student.parameters()}
    for group in optimizer.param_groups if optimizer is not None else ():
        parameters |= {id(one): one for one in group["params"]}
    grads = [(one, one.grad, one.requires_grad) for one in parameters.values()]
    for parameter in parameters.values():
        parameter.grad = None
    try:
        yield
    finally:
        for part, flag in flags:
            part.training = flag
        for parameter, grad, requires_grad in grads:
            if parameter.requires_grad is not requires_grad:
                parameter.requires_grad_(requires_grad)
            parameter.grad = grad


class Snapshot:
    """The values of a model's parameters and buffers at one moment; the tensors themselves stay the same objects.

    Args:
        model: The model to note.
        values: What to note instead of the values it has, by name.
    """

    def __init__(self, model: nn.Module, values: Mapping[str, Tensor] | None = None) -> None:
        named = (*model.named_parameters(), *model.named_buffers())
        self._values = [(name, one, (one if values is None else values[name]).detach().clone()) for name, one in named]

    def values(self) -> dict[str, Tensor]:
        """Returns the values noted, by name."""
        return {name: value for name, _, value in self._values}

    def put_back(self) -> None:
        """Writes the values noted into the model."""
        with torch.no_grad():
            for _, tensor, value in self._values:
                tensor.copy_(value)


@contextmanager
def undone_on_error(student: nn.Module, *stateful: Any) -> Iterator[None]:
    """Puts student, optimizer and scheduler back to where they were if this library raises one of its errors.

    Other exceptions, the caller's own, leave the student as far trained as it is.
    """
    before = Snapshot(student)
    states = [
        (one, copy.deepcopy(one.state_dict()))
        for one in stateful
        if hasattr(one, "state_dict") and not isinstance(one, type)
    ]
    try:
        yield
    except NetoptError:
        before.put_back()
        for one, state in states:
            one.load_state_dict(state)
        raise
