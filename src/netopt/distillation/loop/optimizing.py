"""What steps the weights: the caller's optimizer, or one made for them, and a schedule."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.optim import Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR

from netopt.distillation.loop.engines import Engine
from netopt.distillation.loop.student import Trainee
from netopt.errors import ArgumentTypeError, InvalidArgumentError

__all__ = [
    "OptimizerLike",
    "SchedulerLike",
    "Stepper",
    "fused",
    "is_dense",
    "optimizers_for",
    "overlaps",
    "scheduler_for",
]

OptimizerLike: TypeAlias = Optimizer | Callable[[list[nn.Parameter]], Optimizer] | None
SchedulerLike: TypeAlias = Any

DEFAULT_LR = 1e-3


class Stepper(NamedTuple):
    """What steps the weights, and where.

    Args:
        engine: Where a step runs.
        optimizers: What is stepped.
        schedulers: Stepped after every optimizer step.
    """

    engine: Engine
    optimizers: list[Optimizer]
    schedulers: list[Any]


def optimizers_for(
    optimizer: OptimizerLike, lr: float | None, trainee: Trainee, teachers: Sequence[nn.Module]
) -> list[Optimizer]:
    """Returns the optimizers to step: the caller's or a new AdamW, and one for projections a given one does not know.

    Raises:
        InvalidArgumentError: ``lr`` beside an optimizer, an optimizer without the student's parameters, or with a
            teacher's.
        ArgumentTypeError: neither an optimizer nor a function that makes one.
    """
    student = [one for one in trainee.student.parameters() if one.requires_grad]
    projections = list(trainee.projections.parameters())
    # Sharded parameters and whole ones do not mix in one optimizer.
    mixed = projections and any(hasattr(one, "device_mesh") for one in student)
    groups = [student, projections] if mixed else [student + projections]
    if optimizer is None:
        return [_adamw(group, DEFAULT_LR if lr is None else lr) for group in groups]
    if lr is not None:
        raise InvalidArgumentError("both optimizer and lr are given; set the optimizer's own learning rate.")
    if not isinstance(optimizer, Optimizer):
        if isinstance(optimizer, (str, nn.Module)) or not callable(optimizer):
            raise ArgumentTypeError(
                f"optimizer must be a torch optimizer or a function of the parameters, not {type(optimizer).__name__}; "
                "write lambda parameters: torch.optim.SGD(parameters, lr=0.1)."
            )
        made = [optimizer(group) for group in groups]
        for one in made:
            if not isinstance(one, Optimizer):
                raise ArgumentTypeError(f"the function given as optimizer returned a {type(one).__name__}.")
        return made
    # What both have is the student's: that no teacher reads it has been made sure of.
    theirs = {id(one) for teacher in teachers for one in teacher.parameters()} - {id(one) for one in student}
    held = {id(one) for group in optimizer.param_groups for one in group["params"]}
    if held & theirs:
        raise InvalidArgumentError("the optimizer holds parameters of the teacher; make it from the student's alone.")
    if not held & {id(one) for one in student}:
        raise InvalidArgumentError(
            "the optimizer holds no trainable parameter of the student; make it from student.parameters()."
        )
    return [optimizer, _adamw(projections, optimizer.param_groups[0]["lr"])] if projections else [optimizer]


def _adamw(parameters: list[nn.Parameter], lr: float) -> AdamW:
    fusable = all(one.device.type == "cuda" and one.is_floating_point() and is_dense(one) for one in parameters)
    return AdamW(parameters, lr=lr, fused=fusable or None)


@contextmanager
def fused(optimizers: Sequence[Optimizer]) -> Iterator[None]:
    """Lets Adam and AdamW step all parameters at once, where they are on the CPU and the choice is left to torch.

    Torch chooses one parameter at a time there, several times as slow on a small net. What was chosen by the caller
    stays, and afterwards everything is as it was. Parameters that are views with gaps keep a group from it.
    """
    chosen: list[tuple[Optimizer, int]] = []
    for one in optimizers:
        for place, group in enumerate(one.param_groups):
            if type(one) in (Adam, AdamW) and _left_open(group) and all(map(_plain, group["params"])):
                group["fused"] = True
                chosen.append((one, place))
    try:
        yield
    finally:
        for one, place in chosen:
            one.param_groups[place]["fused"] = None


def _left_open(group: dict[str, Any]) -> bool:
    decided = (group["fused"], group["foreach"])
    return decided == (None, None) and not (group["capturable"] or group["differentiable"])


def _plain(parameter: nn.Parameter) -> bool:
    """Whether a parameter is dense, whole, real and in host memory."""
    whole = not hasattr(parameter, "device_mesh") and is_dense(parameter)
    return whole and parameter.device.type == "cpu" and parameter.is_floating_point()


def is_dense(tensor: Tensor) -> bool:
    """Whether a tensor's entries fill one stretch of memory, each with a place of its own.

    The fused step runs over as many numbers in memory as the tensor has entries, whatever lies there.
    """
    if hasattr(tensor, "device_mesh"):
        return True
    expected = 1
    for size, stride in _dims(tensor):
        if stride != expected:
            return False
        expected *= size
    return tensor.layout is torch.strided


def overlaps(tensor: Tensor) -> bool:
    """Whether some of a tensor's entries surely lie at one place in memory: there are more than places."""
    if tensor.layout is not torch.strided or hasattr(tensor, "device_mesh"):
        return False
    return tensor.numel() > 1 + sum((size - 1) * stride for size, stride in _dims(tensor))


def _dims(tensor: Tensor) -> list[tuple[int, int]]:
    """Returns size and stride of the dimensions longer than 1, the shortest stride first."""
    if tensor.layout is not torch.strided or not tensor.numel():
        return []
    pairs = [(size, stride) for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if size > 1]
    return sorted(pairs, key=lambda pair: pair[1])


def scheduler_for(scheduler: SchedulerLike, optimizers: list[Optimizer], steps: int) -> list[Any]:
    """Returns what is stepped after every optimizer step.

    Args:
        scheduler: A scheduler, a function of the optimizer that returns one, ``"cosine"``, or ``None``.
        optimizers: The first is the one scheduled.
        steps: How many steps there will be, 0 if that is not known.

    Raises:
        InvalidArgumentError: a name that is not known, or a cosine over an unknown number of steps.
        ArgumentTypeError: something without ``step``.
    """
    if scheduler is None:
        return []
    if isinstance(scheduler, str):
        if scheduler != "cosine":
            raise InvalidArgumentError(f"scheduler={scheduler!r} is not known; write 'cosine', or pass a scheduler.")
        if not steps:
            raise InvalidArgumentError("a cosine needs the number of steps, and the data has no length; set steps=.")
        return [CosineAnnealingLR(one, T_max=steps) for one in optimizers]
    if isinstance(scheduler, type) or (callable(scheduler) and not hasattr(scheduler, "step")):
        scheduler = scheduler(optimizers[0])
    if not hasattr(scheduler, "step"):
        raise ArgumentTypeError(
            f"scheduler must be a scheduler, a function of the optimizer or 'cosine', not {type(scheduler).__name__}."
        )
    return [scheduler]
