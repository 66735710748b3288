"""Ctrl-C requests a stop; the step under way is finished first."""

from __future__ import annotations

import signal
from types import FrameType
from typing import TYPE_CHECKING

from netopt.model.signals import Handlers, users_handler

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["Interruption"]


class Interruption(Handlers):
    """Turns the first Ctrl-C into a request and the second into a KeyboardInterrupt, while it is entered.

    Only where Python's own handler is installed, and in the main thread; elsewhere nothing changes.

    Attributes:
        requested: Whether a stop was requested.
    """

    def __init__(self) -> None:
        super().__init__((signal.SIGINT,))
        self.requested = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """Notes the first, and lets the others through."""
        if self.requested:
            self.before[number](number, frame)
        self.requested = True

    def __enter__(self) -> Self:
        if users_handler(signal.SIGINT) is signal.default_int_handler:
            self.install()
        return self

    def __exit__(self, *error: object) -> None:
        self.remove()
