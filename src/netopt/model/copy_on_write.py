"""What is written into parameters while a model is looked at, undone afterwards.

A forward may write into a parameter, as a teacher's moving average does, and so may a model's own ``train``, as one
that merges what it has learned. Copies of all parameters would double the memory of every model; what is copied is the
one that is about to be written to.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

__all__ = ["Writes", "storage_of"]


class Writes:
    """Values of parameters, each copied before it is first written to.

    Args:
        parameters: The ones to watch.
    """

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        self._parameters = list(parameters)
        self._stored: dict[int, Tensor] | None = None
        self._saved: dict[int, tuple[Tensor, Tensor]] = {}

    def save(self, tensors: Iterable[Tensor]) -> None:
        """Copies the parameters that an operation may write to by being given these."""
        if self._stored is None:
            self._stored = {storage_of(parameter): parameter for parameter in self._parameters}
        for tensor in tensors:
            key = storage_of(tensor)
            if key in self._stored and key not in self._saved:
                self._saved[key] = (self._stored[key], self._stored[key].detach().clone())

    def undo(self) -> None:
        """Gives the parameters the values they had."""
        with torch.no_grad():
            for parameter, value in self._saved.values():
                parameter.copy_(value)
        self._saved.clear()

    def seen(self) -> TorchDispatchMode:
        """A mode that copies before writes, for code that is not traced."""
        return _Seen(self)


class _Seen(TorchDispatchMode):
    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False

    def __init__(self, writes: Writes) -> None:
        super().__init__()
        self._writes = writes

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if function._schema.is_mutable:
            self._writes.save(one for one in tree_iter((args, kwargs)) if isinstance(one, Tensor))
        return function(*args, **kwargs)


def storage_of(tensor: Tensor) -> int:
    """The identity of a tensor's memory."""
    return tensor.untyped_storage()._cdata if tensor.layout is torch.strided else id(tensor)
