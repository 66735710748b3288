"""Values of parameters that a forward writes into: each is copied before it is first written to.

A forward may write into a parameter, as a moving average of a teacher does, an embedding with ``max_norm`` or a clipped
weight, and so may a model's own ``train``, as one that merges what it has learned. To copy all would double the memory
of every model; so the first run of a model is watched, and those that it writes to are known from then on.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch._ops import HigherOrderOperator
from torch._subclasses import FakeTensor
from torch.utils._pytree import tree_iter

from netopt.model.dispatch import ThreadDispatchMode
from netopt.model.signals import UndoLog

__all__ = ["CopyOnWrite", "WriteWatch", "storage_of", "write"]


class CopyOnWrite:
    """Values of parameters, each copied before it is first written to.

    Args:
        parameters: The ones to watch.

    Attributes:
        written: Those that were written to, by identity.
    """

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        self.written: dict[int, Tensor] = {}
        self._parameters = list(parameters)
        self._runs = 0
        self._stored: dict[int, list[Tensor]] | None = None
        self._saved: dict[int, list[tuple[Tensor, Tensor]]] = {}

    def save(self, tensors: Iterable[Tensor]) -> None:
        """Copies the parameters that an operation may write to by being given these."""
        if self._stored is None:
            self._stored = {}
            for parameter in self._parameters:
                self._stored.setdefault(storage_of(parameter), []).append(parameter)
        for tensor in tensors:
            key = storage_of(tensor)
            if key in self._stored and key not in self._saved:
                several = self._stored[key]
                self.written |= {id(one): one for one in several}
                self._saved[key] = [(one, one.detach().clone()) for one in several]

    def undo(self) -> None:
        """Gives the parameters the values they had."""
        for several in self._saved.values():
            for parameter, value in several:
                write(parameter, value)
        self._saved.clear()

    def first_run(self) -> AbstractContextManager[Any]:
        """For each forward of several: the first is watched, and what it writes to is known from then on."""
        runs, self._runs = self._runs, self._runs + 1
        return nullcontext() if runs else self.saving()

    def watching(self) -> UndoLog:
        """Undoes on leaving what is written meanwhile, by code that is not traced."""

        def start(log: UndoLog) -> None:
            log.callback(self.undo)
            log.enter_context(self.saving())

        return UndoLog(start)

    def saving(self) -> WriteWatch:
        """A mode that copies before writes, for code that is not traced."""
        return WriteWatch(self)


class WriteWatch(ThreadDispatchMode):
    """Copies parameters before operations of this thread that write to them; tensors are what they are without it."""

    supports_higher_order_operators = True

    def __init__(self, writes: CopyOnWrite) -> None:
        super().__init__()
        self._writes = writes

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if not isinstance(function, HigherOrderOperator) and function._schema.is_mutable:
            self._writes.save(one for one in tree_iter((args, kwargs)) if isinstance(one, Tensor))
        return function(*args, **kwargs)


def write(tensor: Tensor, value: Tensor) -> None:
    """Writes values into a tensor, one made in inference mode too; into one without values nothing."""
    if not (tensor.is_meta or isinstance(tensor, FakeTensor)):
        with torch.inference_mode(tensor.is_inference()), torch.no_grad():
            tensor.copy_(value)


def storage_of(tensor: Tensor) -> int:
    """The identity of a tensor's memory."""
    return tensor.untyped_storage()._cdata if tensor.layout is torch.strided else id(tensor)
