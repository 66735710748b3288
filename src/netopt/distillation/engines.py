"""Where a step runs: one device, or many processes that act as one.

The loop knows no device and no process: it hands an engine the micro-batch's loss and counts, and gets back what they
are in the whole step.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from netopt import batches
from netopt.errors import ArgumentTypeError, InvalidArgumentError

__all__ = ["Engine", "engine_for", "precision"]


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
        scaled = amp is torch.float16
        self.scaler = torch.amp.GradScaler(self.device.type) if scaled else None

    def prepare(self, model: nn.Module, optimizers: list[Optimizer]) -> tuple[nn.Module, list[Optimizer]]:
        """Returns what to call instead of ``model``, and what to step instead of ``optimizers``."""
        return model, optimizers

    def autocast(self) -> AbstractContextManager[Any]:
        """The context the forwards run in."""
        if self.amp is None:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.amp)

    def holding(self, model: nn.Module, last: bool) -> AbstractContextManager[Any]:  # noqa: ARG002
        """The context of one micro-batch; only the ``last`` of a step exchanges gradients."""
        return nullcontext()

    def totals(self, counts: Sequence[int]) -> Sequence[float | Tensor]:
        """Returns how many items each term has over all processes, at least one each."""
        return [max(1, one) for one in counts]

    def backward(self, loss: Tensor) -> None:
        """Adds the gradients of ``loss``."""
        if self.scaler is not None:
            loss = self.scaler.scale(loss)
        loss.backward()

    def step(self, optimizers: Iterable[Optimizer], parameters: Sequence[Tensor], clip: float | None) -> None:
        """Clips the gradients to norm ``clip``, steps and forgets the gradients."""
        optimizers = list(optimizers)
        if clip is not None:
            for optimizer in optimizers if self.scaler is not None else ():
                self.scaler.unscale_(optimizer) if self.scaler is not None else None
            torch.nn.utils.clip_grad_norm_(parameters, clip)
        for optimizer in optimizers:
            if self.scaler is None:
                optimizer.step()
            else:
                self.scaler.step(optimizer)
        if self.scaler is not None:
            self.scaler.update()
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)

    def sum(self, values: Tensor) -> Tensor:
        """Returns ``values`` summed over all processes."""
        return values

    def close(self) -> None:
        """Leaves nothing of this call behind in whatever the caller passed as engine."""


def precision(amp: Any) -> torch.dtype | None:
    """Returns the dtype meant by ``amp=``: ``None``, ``True`` (bfloat16), ``"bf16"``, ``"fp16"`` or a dtype.

    Raises:
        InvalidArgumentError: Anything else.
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
    if amp not in known:
        raise InvalidArgumentError(f"amp must be None, True, 'bf16', 'fp16' or a torch dtype of these, not {amp!r}.")
    return known[amp]


def engine_for(engine: Any, student: nn.Module, amp: torch.dtype | None) -> Engine:
    """Returns the engine meant by ``engine=``.

    Raises:
        ArgumentTypeError: Not an engine.
    """
    if engine is None:
        return Engine(student, amp)
    raise ArgumentTypeError(f"engine must be an Accelerator or a Fabric, not {type(engine).__name__}.")
