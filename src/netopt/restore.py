"""What is borrowed is given back.

A user's model is run to be looked at: its flags, gradients, buffers and the random state of the process are noted
before, and put back after, whatever happens in between.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor

__all__ = ["given_back", "random_state_kept"]


@contextmanager
def given_back(*modules: nn.Module, rng: bool = True) -> Iterator[None]:
    """Restores the modules on leaving, by whatever way: flags, gradients, buffers and, with ``rng``, random states.

    Restored are each sub-module's training flag, each parameter's ``requires_grad``, the ``.grad`` objects (set aside
    inside, so that nothing is added to them), and each buffer, as the same object with the same bits; buffers that
    appeared are gone again. Values of parameters are not copied: who changes them restores them.

    Example:
        >>> model = nn.BatchNorm1d(2)
        >>> with given_back(model):
        ...     _ = model.train()(torch.randn(8, 2)).sum().backward()
        >>> model.num_batches_tracked.item(), model.weight.grad
        (0, None)
    """
    with ExitStack() as stack:
        if rng:
            stack.enter_context(random_state_kept())
        seen: set[int] = set()
        for module in modules:
            for part in module.modules():
                if id(part) not in seen:
                    seen.add(id(part))
                    stack.callback(_note_flags(part))
                    stack.callback(_note_buffers(part))
            for parameter in module.parameters():
                if id(parameter) not in seen:
                    seen.add(id(parameter))
                    stack.callback(_note_parameter(parameter))
        yield


@contextmanager
def random_state_kept() -> Iterator[None]:
    """Restores on leaving the random state of torch (on every device in use), of Python and of numpy."""
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
    mps = torch.mps.get_rng_state() if torch.backends.mps.is_available() else None
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)
        if cuda is not None:
            torch.cuda.set_rng_state_all(cuda)
        if mps is not None:
            torch.mps.set_rng_state(mps)


def _note_flags(module: nn.Module) -> Callable[[], None]:
    training = module.training

    def restore() -> None:
        if module.training is not training:
            module.training = training

    return restore


def _note_parameter(parameter: nn.Parameter) -> Callable[[], None]:
    grad, requires_grad = parameter.grad, parameter.requires_grad
    parameter.grad = None

    def restore() -> None:
        if parameter.requires_grad is not requires_grad:
            parameter.requires_grad_(requires_grad)
        parameter.grad = grad

    return restore


def _note_buffers(module: nn.Module) -> Callable[[], None]:
    buffers: dict[str, Any] = dict(module._buffers)
    transient = set(module._non_persistent_buffers_set)
    values = {
        name: (tensor, _version(tensor), tensor.detach().clone())
        for name, tensor in buffers.items()
        if tensor is not None
    }

    def restore() -> None:
        if isinstance(module._buffers, dict):  # a scripted module's are fixed, and not in a dict
            module._buffers.clear()
            module._buffers.update(buffers)
            module._non_persistent_buffers_set.clear()
            module._non_persistent_buffers_set.update(transient)
        for tensor, version, value in values.values():
            # Copying unasked would disturb a graph of the user's that has saved the buffer.
            if _changed(tensor, version, value):
                with torch.inference_mode(tensor.is_inference()), torch.no_grad():
                    tensor.copy_(value)

    return restore


def _version(tensor: Tensor) -> int | None:
    return None if tensor.is_inference() else tensor._version


def _changed(tensor: Tensor, version: int | None, value: Tensor) -> bool:
    if _version(tensor) != version:
        return True
    # Batch norm writes its running statistics without counting a version, so values are compared as well.
    return not (tensor.is_meta or isinstance(tensor, FakeTensor)) and not torch.equal(tensor, value)
