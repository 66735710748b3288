"""Threads whose models share modules, tensors or a configuration look at them in turn.

What a look changes for a while (modes, hooks, gradients, integers) is noted before and put back after. A second look
that began in between would note what is there for a while, and leave it behind.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from functools import cached_property
from typing import TYPE_CHECKING, Any

from netopt.errors import NetoptError
from netopt.model.attributes import is_configuration
from netopt.model.signals import UndoLog
from netopt.model.view import ModelView

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["InTurn"]

_changed = threading.Condition(threading.RLock())
_looking: list[InTurn] = []


class InTurn(UndoLog):
    """An undo log that is entered when no other thread is in one of a model that shares something with this one.

    Args:
        views: The models.
        start: As of any undo log.
    """

    def __init__(self, views: Iterable[ModelView], start: Callable[[UndoLog], object] | None = None) -> None:
        super().__init__(start)
        self._views = list(views)
        self._thread = 0

    def __enter__(self) -> Self:
        """Waits, while signals go through, and enters.

        Raises:
            NetoptError: This thread is looking at something already that the other may be waiting for.
        """
        try:
            self._wait()
            return super().__enter__()
        except BaseException as error:  # an interruption comes between entering and the block too
            self.close(error)
            raise

    def close(self, error: BaseException | None = None) -> None:
        """As of any undo log, and lets others go on."""
        try:
            super().close(error)
        finally:
            self._leave()

    def _wait(self) -> None:
        self._thread = threading.get_ident()
        with _changed:
            while any(map(self._waits_for, _looking)):
                if any(other._thread == self._thread for other in _looking):
                    raise NetoptError(
                        "two threads each wait for models that the other is looking at; call netopt in one thread at "
                        "a time on models that share modules, parameters or a configuration."
                    )
                _changed.wait()
            _looking.append(self)

    def _waits_for(self, other: InTurn) -> bool:
        return other._thread != self._thread and not self._objects.isdisjoint(other._objects)

    @cached_property
    def _objects(self) -> frozenset[int]:
        """By identity, what models may share; looked up only where two threads are at work."""
        found: list[Any] = []
        for view in self._views:
            found += view.tensors.values()
            for module in view.modules.values():
                found += [module, *filter(is_configuration, list(vars(module).values()))]
        return frozenset(map(id, found))

    def _leave(self) -> None:
        with _changed:
            if self in _looking:
                _looking.remove(self)
                _changed.notify_all()
