"""A model is asked about a batch, and answers with its output and the layers wanted.

The teacher is only ever read: in eval mode, without gradients, unwrapped, where it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Any, TypeAlias

from torch import Tensor, nn

from netopt import batches
from netopt.distillation.loss.objective import Record
from netopt.distillation.loss.outputs import Picker, pick
from netopt.errors import ArgumentTypeError, InvalidArgumentError

__all__ = ["Asked", "Forward", "all_eval", "as_teachers", "check_apart", "local"]

Forward: TypeAlias = Callable[[nn.Module, Any], Any] | None
"""How a model is run on a batch, ``(model, batch) -> result``; ``None`` feeds it the batch's inputs."""

NOTHING_SEEN: Mapping[str, Tensor] = MappingProxyType({})


class Asked:
    """A model that is asked about batches.

    Args:
        model: Run in whatever mode it is in.
        forward: How it is run on a batch; ``None`` feeds it the batch's inputs.
        picker: Finds its output in the result.
    """

    def __init__(self, model: nn.Module, forward: Forward, picker: Picker) -> None:
        self.model, self.forward, self.picker = model, forward, picker
        # Left in, labels make a Hugging Face model compute a loss nobody asked for. Only one that makes its decoder's
        # inputs from them keeps them.
        config: Any = getattr(model, "config", None)
        keeps = bool(getattr(config, "is_encoder_decoder", False))
        self.feeder = batches.Feeder(model, frozenset() if keeps else frozenset({"labels"}))

    def __call__(self, batch: Any, seen: Mapping[str, Tensor]) -> Record:
        """Runs the model on ``batch``; ``seen`` is what hooks fill with the layers' activations meanwhile."""
        result = self.feeder(batch) if self.forward is None else self.forward(self.model, batch)
        return Record(pick(result, self.picker), dict(seen) if seen else NOTHING_SEEN)


def as_teachers(teacher: Any, weights: Iterable[float] | None) -> tuple[list[nn.Module], list[float]]:
    """Returns the teachers as a list, and their weights, which sum to 1.

    Raises:
        ArgumentTypeError: not a module, nor a list of modules.
        InvalidArgumentError: no teacher, or weights that do not fit.
    """
    teachers = [teacher] if isinstance(teacher, nn.Module) and not isinstance(teacher, nn.ModuleList) else teacher
    if isinstance(teachers, (str, bytes)) or not isinstance(teachers, Iterable):
        raise ArgumentTypeError(f"teacher must be a module or a list of modules, not {type(teacher).__name__}.")
    teachers = list(teachers)
    for one in teachers:
        if not isinstance(one, nn.Module):
            raise ArgumentTypeError(f"teacher must be a module or a list of modules; one is a {type(one).__name__}.")
    if not teachers:
        raise InvalidArgumentError("teacher is an empty list; pass at least one model.")
    shares = [1.0] * len(teachers) if weights is None else [float(one) for one in weights]
    if len(shares) != len(teachers) or min(shares) < 0 or not 0 < sum(shares) < float("inf"):
        raise InvalidArgumentError(
            f"teacher_weights needs {len(teachers)} weights, none negative and not all zero, and got {shares}."
        )
    return teachers, [one / sum(shares) for one in shares]


def check_apart(student: nn.Module, teachers: Iterable[nn.Module]) -> None:
    """Makes sure that training the student cannot change a teacher.

    Raises:
        InvalidArgumentError: they are one model, or share memory that training writes to; frozen parameters may be
            shared.
    """
    written = {_memory(one): name for name, one in student.named_parameters() if one.requires_grad}
    for path, part in student.named_modules():
        if isinstance(part, nn.modules.batchnorm._NormBase):
            written |= {_memory(one): f"{path}.{name}" for name, one in part.named_buffers()}
    for teacher in teachers:
        if teacher is student:
            raise InvalidArgumentError(
                "teacher and student are the same model; copy.deepcopy(model) before pruning keeps a teacher."
            )
        for name, tensor in (*teacher.named_parameters(), *teacher.named_buffers()):
            ours = written.get(_memory(tensor))
            if ours is not None and tensor.numel() and tensor.device.type != "meta":
                raise InvalidArgumentError(
                    f"the student's {ours!r} and the teacher's {name!r} are one tensor, so training would change the "
                    "teacher; give the student a copy, or freeze it with requires_grad_(False)."
                )


def local(tensor: Tensor) -> Tensor:
    """Returns this process's part of a tensor, all of it unless it is sharded."""
    to_local: Any = getattr(tensor, "to_local", None)
    return tensor if to_local is None else to_local()


def _memory(tensor: Tensor) -> tuple[str, int]:
    return str(tensor.device), local(tensor).untyped_storage().data_ptr()


def all_eval(modules: Iterable[nn.Module]) -> None:
    """Puts every sub-module into eval mode, without calling a ``train`` that someone has overridden."""
    for module in modules:
        for part in module.modules():
            part.training = False
