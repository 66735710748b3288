"""Where a step runs: one device, or many processes that act as one.

The loop knows no device and no process. It hands an engine each micro-batch's loss and counts, and the engine sees to
it that the gradients are those of the whole step's sum over the whole step's count.
"""

from __future__ import annotations

import socket
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from netopt import batches
from netopt.distillation.files import SharedFolder
from netopt.distillation.loss.objective import Sum
from netopt.errors import ArgumentTypeError, ForwardError, InvalidArgumentError

__all__ = ["Engine", "engine_for", "precision"]

NOTHING = nullcontext()


class Engine:
    """One process on the student's device.

    Args:
        student: The model to train; where it is, is where the work is done.
        amp: Autocast's dtype, or ``None``.
    """

    world = 1
    rank = 0

    def __init__(self, student: nn.Module, amp: torch.dtype | None) -> None:
        self.device = batches.device_of(student) or torch.device("cpu")
        self.amp = amp
        self.scaler = torch.amp.GradScaler(self.device.type) if amp is torch.float16 else None

    def prepare(self, model: nn.Module, optimizers: list[Optimizer]) -> tuple[nn.Module, list[Any]]:
        """Returns what to call instead of ``model``, and what to step instead of ``optimizers``."""
        return model, list(optimizers)

    def autocast(self) -> AbstractContextManager[Any]:
        """The context the forwards run in."""
        if self.amp is None:
            return NOTHING
        return torch.autocast(self.device.type, dtype=self.amp)

    def holding(self, model: nn.Module, last: bool) -> AbstractContextManager[Any]:  # noqa: ARG002
        """The context of one micro-batch; only the ``last`` of a step exchanges gradients."""
        return NOTHING

    def backward(self, parts: Sequence[Sum], shares: Sequence[float | Tensor]) -> None:
        """Adds the gradients of the sum of ``parts`` times their ``shares``, this process's part of the step's."""
        # The shares are where backpropagation starts from, and no multiplication of their own.
        seeds = [_seed(one, share) for one, share in zip(parts, shares, strict=True)]
        seeds = seeds if self.scaler is None else [self.scaler.scale(one) for one in seeds]
        _backward([one.root for one in parts], seeds)

    def step(self, model: nn.Module, optimizers: Sequence[Any], clip: float | None) -> None:
        """Clips the gradients to norm ``clip``, steps and forgets the gradients."""
        if clip is not None:
            self.clip(model, optimizers, clip)
        for optimizer in optimizers:
            if self.scaler is None:
                optimizer.step()
            else:
                self.scaler.step(optimizer)
        if self.scaler is not None:
            self.scaler.update()
        for optimizer in optimizers:
            if type(optimizer).zero_grad is Optimizer.zero_grad:
                # What it would do, without the profiler's range around it.
                for group in optimizer.param_groups:
                    for parameter in group["params"]:
                        parameter.grad = None
            else:
                optimizer.zero_grad()

    def clip(self, model: nn.Module, optimizers: Sequence[Any], clip: float) -> None:
        """Clips the gradients of everything that is trained to norm ``clip``."""
        if self.scaler is not None:
            for optimizer in optimizers:
                self.scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), clip)

    def totals(self, counts: Sequence[int]) -> Sequence[float | Tensor]:
        """Returns how many items each term has over all processes, at least one each."""
        return [max(1, one) for one in counts]

    def sum(self, values: Tensor) -> Tensor:
        """Returns ``values`` summed over all processes."""
        return values

    def most(self, value: int) -> int:
        """Returns the largest ``value`` of any process."""
        return value

    def agreed(self, value: float) -> float:
        """Returns the first process's ``value``."""
        return value

    def gather(self, value: Any) -> list[Any]:
        """Returns every process's ``value``."""
        return [value]

    def wait(self) -> None:
        """Waits until all processes are here."""

    def shared_folder(self) -> SharedFolder | None:
        """Returns a new folder that all processes can use, or ``None`` if there is but one, or several machines."""
        return None

    def close(self) -> None:
        """Leaves nothing of this call behind in whatever the caller passed as engine."""


class Processes(Engine):
    """The processes of an initialised process group, each with a replica, or with a shard that is wrapped already.

    Args:
        student: The model to train, or this process's replica of it.
        amp: Autocast's dtype, or ``None``.
    """

    def __init__(self, student: nn.Module, amp: torch.dtype | None) -> None:
        super().__init__(student, amp)
        self.student = student
        self.joined = dist.is_available() and dist.is_initialized()
        self.rank, self.world = (dist.get_rank(), dist.get_world_size()) if self.joined else (0, 1)
        self.wrapped = isinstance(student, DistributedDataParallel) or _is_sharded(student)

    def prepare(self, model: nn.Module, optimizers: list[Optimizer]) -> tuple[nn.Module, list[Any]]:
        """Wraps ``model`` for data parallelism, unless the student is wrapped or sharded already."""
        if self.wrapped or self.world == 1:
            return model, list(optimizers)
        # A student may have parameters its forward leaves out.
        return DistributedDataParallel(model, find_unused_parameters=True), list(optimizers)

    def holding(self, model: nn.Module, last: bool) -> AbstractContextManager[Any]:
        """Exchanges gradients only in the last micro-batch of a step."""
        if _is_sharded(self.student):
            for part in self.student.modules():
                setter: Any = getattr(part, "set_requires_gradient_sync", None)
                if setter is not None:
                    setter(last)
            return NOTHING
        parallel = self.student if self.wrapped else model
        return parallel.no_sync() if isinstance(parallel, DistributedDataParallel) and not last else NOTHING

    def step(self, model: nn.Module, optimizers: Sequence[Any], clip: float | None) -> None:
        """Steps; projections beside a student that is wrapped already are synchronised here."""
        projections: Any = getattr(model, "projections", None)
        if self.wrapped and self.world > 1 and projections is not None:
            for parameter in projections.parameters():
                if parameter.grad is not None:
                    dist.all_reduce(parameter.grad)
                    parameter.grad /= self.world
        super().step(model, optimizers, clip)

    def clip(self, model: nn.Module, optimizers: Sequence[Any], clip: float) -> None:
        """Clips to the norm of the whole, of which a sharded student has a part in every process."""
        if not _is_sharded(self.student):
            super().clip(model, optimizers, clip)
            return
        grads = [one.grad for one in model.parameters() if one.grad is not None]
        parts = [grads for grads in ([g for g in grads if _shards(g)], [g for g in grads if not _shards(g)]) if grads]
        norms = [torch.nn.utils.get_total_norm(part) for part in parts]
        whole = [_whole(one) for one in norms]
        scale = (clip / (torch.stack(whole).norm() + 1e-6)).clamp_max(1).item()
        for grad in grads:
            grad.mul_(scale)

    def totals(self, counts: Sequence[int]) -> Sequence[float | Tensor]:
        """Adds the counts up over all processes."""
        if self.world == 1:
            return super().totals(counts)
        total = self.sum(torch.tensor(counts, dtype=torch.float64, device=self.device)).clamp_min(1)
        return total.tolist() if self.device.type == "cpu" else list(total.unbind())

    def sum(self, values: Tensor) -> Tensor:
        """Returns ``values`` summed over all processes."""
        values = values.to(self.device, copy=True)
        if self.world > 1:
            dist.all_reduce(values)
        return values

    def most(self, value: int) -> int:
        """Returns the largest ``value`` of any process."""
        largest = torch.tensor(value, device=self.device)
        if self.world > 1:
            dist.all_reduce(largest, dist.ReduceOp.MAX)
        return int(largest)

    def agreed(self, value: float) -> float:
        """Returns the first process's ``value``."""
        first = torch.tensor(value, dtype=torch.float64, device=self.device)
        if self.world > 1:
            dist.broadcast(first, 0)
        return first.item()

    def gather(self, value: Any) -> list[Any]:
        """Returns every process's ``value``."""
        gathered: list[Any] = [value] * self.world
        if self.world > 1:
            dist.all_gather_object(gathered, value)
        return gathered

    def wait(self) -> None:
        """Waits until all processes are here."""
        if self.world > 1:
            dist.barrier()

    def shared_folder(self) -> SharedFolder | None:
        """Lets the first process make a folder, if all are on one machine; who made it removes it."""
        if self.world == 1:
            return None
        hosts: list[Any] = [None] * self.world
        dist.all_gather_object(hosts, socket.gethostname())
        if len(set(hosts)) > 1:
            return None
        own = SharedFolder() if self.rank == 0 else None
        made = [None if own is None else str(own.path)]
        dist.broadcast_object_list(made, src=0)
        return own or SharedFolder(Path(str(made[0])))


class Accelerated(Processes):
    """A Hugging Face ``Accelerator``, which has wrapping, precision and scaling its own way.

    Args:
        accelerator: The caller's.
        student: The model to train.
    """

    def __init__(self, accelerator: Any, student: nn.Module) -> None:
        super().__init__(student, None)
        self.accelerator, self.device = accelerator, accelerator.device
        self._held = {name: list(getattr(accelerator, name)) for name in ("_models", "_optimizers")}

    def prepare(self, model: nn.Module, optimizers: list[Optimizer]) -> tuple[nn.Module, list[Any]]:
        """Lets the accelerator wrap the model and the optimizers; those it has wrapped already stay as they are."""
        if self.wrapped:
            return model, [self.accelerator.prepare_optimizer(one) for one in optimizers]
        wrapped, *rest = self.accelerator.prepare(model, *optimizers)
        return wrapped, rest

    def autocast(self) -> AbstractContextManager[Any]:
        """The accelerator's autocast."""
        return self.accelerator.autocast()

    def backward(self, parts: Sequence[Sum], shares: Sequence[float | Tensor]) -> None:
        """Adds the gradients, undivided: the accelerator would divide by its own number of micro-batches."""
        self.accelerator.backward(_weighed(parts, shares) * self.accelerator.gradient_accumulation_steps)

    def clip(self, model: nn.Module, optimizers: Sequence[Any], clip: float) -> None:  # noqa: ARG002
        """Clips with the accelerator, which undoes its scaling first."""
        self.accelerator.clip_grad_norm_(model.parameters(), clip)

    def close(self) -> None:
        """Takes model and optimizers off the accelerator's lists."""
        for name, held in self._held.items():
            getattr(self.accelerator, name)[:] = held


class Fabricated(Processes):
    """A Lightning ``Fabric``, launched by the caller.

    Args:
        fabric: The caller's.
        student: The model to train.
    """

    def __init__(self, fabric: Any, student: nn.Module) -> None:
        super().__init__(student, None)
        self.fabric, self.device = fabric, fabric.device
        self._models = fabric._models_setup

    def prepare(self, model: nn.Module, optimizers: list[Optimizer]) -> tuple[nn.Module, list[Any]]:
        """Lets the fabric wrap the model and the optimizers."""
        wrapped, *rest = self.fabric.setup(model, *optimizers)
        return wrapped, rest

    def autocast(self) -> AbstractContextManager[Any]:
        """The fabric's autocast."""
        return self.fabric.autocast()

    def holding(self, model: nn.Module, last: bool) -> AbstractContextManager[Any]:
        """Exchanges gradients only in the last micro-batch of a step."""
        return self.fabric.no_backward_sync(model, enabled=not last) if self.world > 1 else NOTHING

    def backward(self, parts: Sequence[Sum], shares: Sequence[float | Tensor]) -> None:
        """Adds the gradients."""
        self.fabric.backward(_weighed(parts, shares))

    def clip(self, model: nn.Module, optimizers: Sequence[Any], clip: float) -> None:
        """Clips with the fabric, which undoes its scaling first."""
        self.fabric.clip_gradients(model, optimizers[0], max_norm=clip)

    def close(self) -> None:
        """Gives the fabric back as it was."""
        self.fabric._models_setup = self._models


def precision(amp: Any) -> torch.dtype | None:
    """Returns the dtype meant by ``amp=``: ``None``, ``True`` (bfloat16), ``"bf16"``, ``"fp16"`` or a dtype.

    Raises:
        InvalidArgumentError: anything else.
    """
    known: dict[Any, torch.dtype | None] = {
        None: None,
        False: None,
        True: torch.bfloat16,
        "bf16": torch.bfloat16,
        "fp16": torch.float16,
        torch.bfloat16: torch.bfloat16,
        torch.float16: torch.float16,
    }
    if not isinstance(amp, (bool, str, torch.dtype, type(None))) or amp not in known:
        raise InvalidArgumentError(f"amp must be None, True, 'bf16', 'fp16' or a torch dtype of these, not {amp!r}.")
    return known[amp]


def engine_for(engine: Any, student: nn.Module, amp: torch.dtype | None) -> Engine:
    """Returns the engine meant by ``engine=``; without one an initialised process group is used as it is.

    Raises:
        ArgumentTypeError: neither an ``Accelerator`` nor a ``Fabric``.
        InvalidArgumentError: ``amp`` beside an engine that has its own precision.
    """
    if engine is None:
        many = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        return Processes(student, amp) if many else Engine(student, amp)
    kinds: dict[str, Any] = {"Accelerator": Accelerated, "Fabric": Fabricated}
    kind = next((kinds[one.__name__] for one in type(engine).__mro__ if one.__name__ in kinds), None)
    if kind is None:
        raise ArgumentTypeError(
            f"engine must be a Hugging Face Accelerator or a Lightning Fabric, not {type(engine).__name__}."
        )
    if amp is not None:
        raise InvalidArgumentError("both amp and engine are given; set the engine's own precision.")
    return kind(engine, student)


def _backward(roots: Sequence[Tensor], seeds: Sequence[Tensor]) -> None:
    try:
        torch.autograd.backward(roots, seeds)
    except RuntimeError as error:
        if "modified by an inplace operation" not in str(error):
            raise
        first = str(error).partition("\n")[0]
        raise ForwardError(
            f"the student cannot be trained: {first}\n"
            "Its forward writes in place over what a gradient needs; copy that first (.clone())."
        ) from error


def _seed(part: Sum, share: float | Tensor) -> Tensor:
    if part.seed is not None:
        return part.seed
    return share.to(part.root.dtype) if isinstance(share, Tensor) else part.root.new_full((), share)


def _weighed(parts: Sequence[Sum], shares: Sequence[float | Tensor]) -> Tensor:
    """Returns a number with the gradient of the parts times their shares, for engines that start from one."""
    weighed = [
        one.root * share if one.seed is None else (one.root * one.seed).sum()
        for one, share in zip(parts, shares, strict=True)
    ]
    return torch.stack(weighed).sum()


def _is_sharded(model: nn.Module) -> bool:
    return any(_shards(one) for one in model.parameters())


def _whole(tensor: Any) -> Tensor:
    return tensor.full_tensor() if _shards(tensor) else tensor


def _shards(tensor: Tensor) -> bool:
    return hasattr(tensor, "device_mesh")
