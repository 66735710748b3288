"""Whether a forward does something else in training mode.

A model says so by reading the flag ``training`` of a module. While a forward runs, every reading is noticed; those do
not count where the flag only switches dropout, whose rule holds in both modes, nor those by torch's own layers that
hand it on to batch norm or to a recurrent kernel.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from netopt.axes.handing_on import only_switches_dropout
from netopt.axes.training import is_small

_lock = threading.RLock()
_LAYERS = Path(torch.nn.modules.__file__).parent
# Files whose layers hand the flag to dropout, to batch norm or to a recurrent kernel, and do nothing else with it.
_HANDING_ON = frozenset(
    str(_LAYERS / f"{name}.py") for name in ("activation", "batchnorm", "dropout", "instancenorm", "rnn", "transformer")
)


class Modes:
    """What was noticed.

    Attributes:
        differ: Whether the forward may do something else in training mode.
        asking: Small modules being called that asked for their own mode, which are to be asked what they do in both.
    """

    def __init__(self) -> None:
        self.differ = False
        self.asking: list[nn.Module] = []


class _WatchedFlag:
    """Stands in for the flag of all modules; the flags themselves stay where they are."""

    def __init__(self, modes: Modes) -> None:
        self._modes = modes

    def __get__(self, module: nn.Module | None, owner: type | None = None) -> Any:
        if module is None:
            return self
        asking = self._modes.asking
        if not self._modes.differ and not (asking and asking[-1] is module):
            frame = sys._getframe(1)
            if frame.f_code.co_filename not in _HANDING_ON and not only_switches_dropout(frame):
                if frame.f_code is getattr(type(module).forward, "__code__", None) and is_small(module):
                    asking.append(module)
                else:
                    self._modes.differ = True
        try:
            return module.__dict__["training"]
        except KeyError:
            raise AttributeError("training") from None

    def __set__(self, module: nn.Module, value: bool) -> None:
        module.__dict__["training"] = value


@contextmanager
def modes_watched() -> Iterator[Modes]:
    """Notices who reads the flag of a module, until left.

    Example:
        >>> layer = nn.Dropout()
        >>> with modes_watched() as modes:
        ...     _ = layer(torch.ones(2))
        >>> modes.differ
        False
        >>> with modes_watched() as modes:
        ...     _ = layer.training
        >>> modes.differ
        True
    """
    modes = Modes()
    with _lock:
        before = vars(nn.Module).get("training")
        nn.Module.training = _WatchedFlag(modes)  # type: ignore[assignment]
        try:
            yield modes
        finally:
            if before is None:
                del nn.Module.training
            else:
                nn.Module.training = before
