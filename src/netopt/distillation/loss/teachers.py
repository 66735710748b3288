"""Models as functions from a batch to an output and the layers wanted; teachers among them are only ever read.

A teacher runs in eval mode, without gradients, unwrapped, where it is. It may share tensors with the student, as its
base model with adapters switched off does, as long as it reads none that is trained.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from types import MappingProxyType
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves

from netopt import batches
from netopt.distillation.loss.objective import Record
from netopt.distillation.loss.outputs import Picker, pick
from netopt.errors import ArgumentTypeError, InvalidArgumentError
from netopt.model.checks import check_values
from netopt.model.dispatch import ThreadDispatchMode

__all__ = ["Forward", "Reads", "Runner", "Shared", "as_teachers", "local", "set_eval", "shared_tensors"]

Forward: TypeAlias = Callable[[nn.Module, Any], Any] | None
"""How a model is run on a batch, ``(model, batch) -> result``; ``None`` feeds it the batch's inputs."""

NOTHING_SEEN: Mapping[str, Tensor] = MappingProxyType({})


class Runner:
    """Runs a model on batches.

    Args:
        model: Run in whatever mode it is in.
        forward: How it is run on a batch; ``None`` feeds it the batch's inputs.
        picker: Finds its output in the result.
        shared: Sub-modules that are in eval mode only while it runs, since the student has them too.
    """

    def __init__(self, model: nn.Module, forward: Forward, picker: Picker, shared: Collection[nn.Module] = ()) -> None:
        self.model, self.forward, self.picker, self.shared = model, forward, picker, shared
        # Left in, labels make a Hugging Face model compute its loss as well. Only one that makes its decoder's inputs
        # from them keeps them.
        config: Any = getattr(model, "config", None)
        keeps = bool(getattr(config, "is_encoder_decoder", False))
        self.feeder = batches.Feeder(model, frozenset() if keeps else frozenset({"labels"}))

    def __call__(self, batch: Any, seen: Mapping[str, Tensor]) -> Record:
        """Runs the model on ``batch``; ``seen`` is what hooks fill with the layers' activations meanwhile."""
        with _in_eval(self.shared) if self.shared else nullcontext():
            result = self.feeder(batch) if self.forward is None else self.forward(self.model, batch)
        return Record(pick(result, self.picker), dict(seen) if seen else NOTHING_SEEN)


@contextmanager
def _in_eval(parts: Collection[nn.Module]) -> Iterator[None]:
    flags = [(part, part.training) for part in parts]
    try:
        for part in parts:
            part.training = False
        yield
    finally:
        for part, flag in flags:
            part.training = flag


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
        check_values(one)
    if not teachers:
        raise InvalidArgumentError("teacher is an empty list; pass at least one model.")
    shares = [1.0] * len(teachers) if weights is None else [float(one) for one in weights]
    if len(shares) != len(teachers) or min(shares) < 0 or not 0 < sum(shares) < float("inf"):
        raise InvalidArgumentError(
            f"teacher_weights needs {len(teachers)} weights, none negative and not all zero, and got {shares}."
        )
    return teachers, [one / sum(shares) for one in shares]


class Shared(NamedTuple):
    """A tensor that training the student writes to, and a teacher has too.

    Args:
        ours: Its name in the student.
        theirs: Its name in the teacher.
        memory: Where it is.
    """

    ours: str
    theirs: str
    memory: tuple[str, int]


def shared_tensors(student: nn.Module, teacher: nn.Module, optimizer: Any) -> list[Shared]:
    """Lists what training writes to and ``teacher`` holds: parameters that need a gradient and are in ``optimizer``.

    Raises:
        InvalidArgumentError: they are one model.
    """
    if teacher is student:
        raise InvalidArgumentError(
            "teacher and student are the same model; copy.deepcopy(model) before pruning keeps a teacher."
        )
    stepped = None
    if isinstance(optimizer, Optimizer):
        stepped = {id(one) for group in optimizer.param_groups for one in group["params"]}
    written = {
        _memory(one): name
        for name, one in student.named_parameters()
        if one.requires_grad and (stepped is None or id(one) in stepped)
    }
    modes = {part.training for part in student.modules()}
    for path, part in student.named_modules():
        if isinstance(part, nn.modules.batchnorm._NormBase) and (part.training or not any(modes)):
            written |= {_memory(one): f"{path}.{name}" for name, one in part.named_buffers()}
    held = ((name, one) for name, one in (*teacher.named_parameters(), *teacher.named_buffers()) if one.numel())
    return [
        Shared(written[_memory(one)], name, _memory(one))
        for name, one in held
        if one.device.type != "meta" and _memory(one) in written
    ]


class Reads(ThreadDispatchMode):
    """Notes which tensors of ``shared`` any operation reads: a switched-off adapter is held and not read."""

    def __init__(self, shared: Iterable[Shared]) -> None:
        super().__init__()
        self.left = {one.memory: one for one in shared}
        self.read: list[Shared] = []

    def __torch_dispatch__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for one in tree_leaves((args, kwargs)):
            if isinstance(one, Tensor):
                self.read += filter(None, [self.left.pop(_memory(one), None)])
        return func(*args, **(kwargs or {}))

    def check(self) -> None:
        """Raises an `InvalidArgumentError` that names what was read."""
        if not self.read:
            return
        names = ", ".join(f"the student's {one.ours!r} and the teacher's {one.theirs!r}" for one in self.read[:3])
        more = f" and {len(self.read) - 3} more pairs" if len(self.read) > 3 else ""
        raise InvalidArgumentError(
            f"{names}{more} are one tensor, which the teacher's forward reads, so training would change the teacher; "
            "give the student a copy, or freeze it with requires_grad_(False)."
        )


def local(tensor: Tensor) -> Tensor:
    """Returns this process's part of a tensor, all of it unless it is sharded."""
    to_local: Any = getattr(tensor, "to_local", None)
    return tensor if to_local is None else to_local()


def _memory(tensor: Tensor) -> tuple[str, int]:
    held = local(tensor)
    return str(tensor.device), held.untyped_storage().data_ptr() if held.layout is torch.strided else id(tensor)


def set_eval(module: nn.Module, without: Collection[nn.Module] = ()) -> None:
    """Puts every sub-module into eval mode, without calling a ``train`` that someone has overridden."""
    for part in module.modules():
        if part not in without:
            part.training = False
