"""Ctrl-C requests a stop; the step under way is finished first."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

__all__ = ["Interruption", "graceful"]


class Interruption:
    """Whether a stop was requested."""

    def __init__(self) -> None:
        self.requested = False


@contextmanager
def graceful() -> Iterator[Interruption]:
    """Turns the first Ctrl-C into a request and the second into a KeyboardInterrupt.

    Only where Python's own handler is installed, and in the main thread; elsewhere nothing changes.
    """
    interruption = Interruption()
    ours = threading.current_thread() is threading.main_thread()
    if not ours or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield interruption
        return

    def request(_signal: int, _frame: FrameType | None) -> None:
        if interruption.requested:
            raise KeyboardInterrupt
        interruption.requested = True

    signal.signal(signal.SIGINT, request)
    try:
        yield interruption
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
