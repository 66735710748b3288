"""What is borrowed is given back.

A user's model is run to be looked at: its flags, gradients, buffers, cached tensors and the random state of the process
are noted before, and put back after, whatever happens in between.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor

__all__ = ["preserve_gradients", "preserve_random_state", "preserve_values", "restored", "version_of"]


@contextmanager
def restored(*modules: nn.Module, rng: bool = True) -> Iterator[None]:
    """Restores the modules on leaving, by whatever way: flags, gradients, buffers and, with ``rng``, random states.

    Restored are each sub-module's training flag, each parameter's ``requires_grad``, the ``.grad`` objects (set aside
    inside, so that nothing is added to them), and each buffer, as the same object with the same bits; buffers that
    appeared are gone again. So are tensors kept in plain attributes, lists and dicts, which a forward or a change of
    mode may make anew or drop. Values of parameters are not copied: who changes them restores them.

    Example:
        >>> model = nn.BatchNorm1d(2)
        >>> with restored(model):
        ...     _ = model.train()(torch.randn(8, 2)).sum().backward()
        >>> model.num_batches_tracked.item(), model.weight.grad
        (0, None)
    """
    parts = list(dict.fromkeys(part for module in modules for part in module.modules()))
    parameters = dict.fromkeys(one for part in parts for one in part._parameters.values() if one is not None)
    with (
        preserve_random_state() if rng else nullcontext(),
        preserve_gradients(parameters),
        _buffers_kept(parts),
        _plain_tensors_kept(parts),
    ):
        flags = [(part, part.training) for part in parts]
        try:
            yield
        finally:
            for part, training in flags:
                if part.training is not training:
                    part.training = training


@contextmanager
def preserve_random_state() -> Iterator[None]:
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


@contextmanager
def preserve_gradients(parameters: Iterable[Tensor]) -> Iterator[None]:
    """Restores ``requires_grad`` and the ``.grad`` objects of parameters, set aside inside."""
    noted = [(parameter, parameter.grad, parameter.requires_grad) for parameter in parameters]
    for parameter, grad, _ in noted:
        if grad is not None:
            parameter.grad = None
    try:
        yield
    finally:
        for parameter, grad, requires_grad in noted:
            if parameter.requires_grad is not requires_grad:
                parameter.requires_grad_(requires_grad)
            if parameter.grad is not grad:
                parameter.grad = grad


@contextmanager
def _buffers_kept(parts: Iterable[nn.Module]) -> Iterator[None]:
    tables, empty = [], []
    for part in parts:
        if part._buffers or part._non_persistent_buffers_set:
            tables.append((part, dict(part._buffers), set(part._non_persistent_buffers_set)))
        else:
            empty.append(part)
    with preserve_values(buffer for _, buffers, _ in tables for buffer in buffers.values() if buffer is not None):
        try:
            yield
        finally:
            for part, buffers, transient in tables:
                _refill(part, buffers, transient)
            for part in empty:
                if part._buffers or part._non_persistent_buffers_set:
                    _refill(part, {}, set())


@contextmanager
def preserve_values(tensors: Iterable[Tensor]) -> Iterator[None]:
    """Restores the bits of tensors, and writes to none whose bits are as they were."""
    values = _Values(tensors)
    try:
        yield
    finally:
        values.put_back()


@contextmanager
def _plain_tensors_kept(parts: Iterable[nn.Module]) -> Iterator[None]:
    noted: list[tuple[Any, Any]] = []
    for part in parts:
        if isinstance(part, torch.jit.ScriptModule):
            continue
        own = {name: value for name, value in vars(part).items() if name not in _OWN}
        noted.append((vars(part), own))
        noted += [(value, copy.copy(value)) for value in own.values() if isinstance(value, (dict, list))]
    try:
        yield
    finally:
        for holder, before in noted:
            _put_back(holder, before)


_OWN = frozenset(vars(nn.Module()))


def _holds_tensor(value: Any) -> bool:
    if isinstance(value, dict):
        value = list(value.values())
    return isinstance(value, Tensor) or (isinstance(value, (tuple, list)) and any(map(_holds_tensor, value)))


def _put_back(holder: Any, before: Any) -> None:
    if isinstance(holder, list):
        if _holds_tensor(holder) or _holds_tensor(before):
            holder[:] = before
        return
    for name, value in before.items():
        now = holder.get(name)
        if now is not value and (_holds_tensor(now) or _holds_tensor(value)):
            holder[name] = value
    appeared = [name for name in holder if name not in before and name not in _OWN and _holds_tensor(holder[name])]
    for name in appeared:
        del holder[name]


def _refill(module: nn.Module, buffers: dict[str, Any], transient: set[str]) -> None:
    """Gives a module its buffers again: the same objects, in the same order."""
    now = module._buffers
    if not isinstance(now, dict):  # a scripted module's are fixed, and not in a dict
        return
    if list(now) != list(buffers) or any(now[name] is not buffers[name] for name in buffers):
        now.clear()
        now.update(buffers)
    if module._non_persistent_buffers_set != transient:
        module._non_persistent_buffers_set.clear()
        module._non_persistent_buffers_set.update(transient)


class _Values:
    """The bits of some tensors, copied, to be put back where they have changed."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self._small: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
        self._noted: list[tuple[Tensor, int | None, Tensor]] = []
        for tensor in {id(tensor): tensor for tensor in tensors}.values():  # hashing tensors takes longer
            if type(tensor) is Tensor and tensor.dim() < 2 and tensor.layout is torch.strided and not tensor.is_meta:
                self._small.setdefault((tensor.device, tensor.dtype), []).append(tensor)
            else:
                self._noted.append((tensor, version_of(tensor), tensor.detach().clone()))
        # Models hold many small buffers (statistics, counters): joined, they are copied and compared at once.
        self._joined = {kind: _join(several) for kind, several in self._small.items()}

    def put_back(self) -> None:
        for kind, several in self._small.items():
            if not torch.equal(_join(several), self._joined[kind]):
                values = self._joined[kind].split([tensor.numel() for tensor in several])
                for tensor, value in zip(several, values, strict=True):
                    _copy_back(tensor, value.view(tensor.shape))
        for tensor, version, value in self._noted:
            if version_of(tensor) != version:
                _write(tensor, value)
            else:
                _copy_back(tensor, value)


def _join(tensors: Sequence[Tensor]) -> Tensor:
    with torch.no_grad():
        return torch.cat([tensor if tensor.dim() else tensor.view(1) for tensor in tensors])


def _copy_back(tensor: Tensor, value: Tensor) -> None:
    """Copies ``value`` where it differs: unasked, it would disturb a graph of the user's that has saved the tensor."""
    # Batch norm writes its running statistics without counting a version, so values are compared.
    if not (tensor.is_meta or isinstance(tensor, FakeTensor)) and not torch.equal(tensor, value):
        _write(tensor, value)


def _write(tensor: Tensor, value: Tensor) -> None:
    with torch.inference_mode(tensor.is_inference()), torch.no_grad():
        tensor.copy_(value)


def version_of(tensor: Tensor) -> int | None:
    """How often a tensor was written to, ``None`` where that is not counted."""
    return None if tensor.is_inference() else tensor._version
