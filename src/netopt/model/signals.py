"""An undo log: every change is written down before it is made, and no signal interrupts the undoing.

Python runs the handlers of signals in the main thread, between any two steps of what runs there; the handler of Ctrl-C
raises. An undo log stands in front of the handlers while it is entered: it lets signals through to them while the work
is done, and holds them back, to be delivered when all is settled, while a change is put back or a context is entered.

The trade: handlers belong to the process, so :func:`signal.getsignal` shows another one meanwhile. No other thread runs
it, in other threads a log installs none, what a handler of the user's does is done by that handler, and the ones that
were there are back afterwards. The ways without it (a mask of the thread's signals, which other threads of the process
then catch; asking for pending signals now and then) leave gaps.
"""

from __future__ import annotations

import signal
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from operator import methodcaller
from types import FrameType, GeneratorType, TracebackType
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

import torch
from torch._C._functorch import (  # pyright: ignore[reportMissingModuleSource]
    _vmap_decrement_nesting,
    maybe_current_level,
)
from torch.overrides import _get_current_function_mode_stack

if TYPE_CHECKING:
    from typing_extensions import Self

Result = TypeVar("Result")
_Kinds: TypeAlias = "type[BaseException] | tuple[type[BaseException], ...]"
_Step: TypeAlias = "tuple[Callable[..., object], _Kinds | None, bool]"

__all__ = ["Handlers", "UndoLog", "entered", "users_handler"]

# Ctrl-C first: installed first and removed last, it cannot come between the others.
_SIGNALS = tuple(
    signal.Signals[name]
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGALRM", "SIGVTALRM", "SIGPROF", "SIGUSR1", "SIGUSR2")
    if name in signal.Signals.__members__
)


class Handlers(ABC):
    """Something that stands in front of the Python handlers of signals, in the main thread alone.

    Args:
        signals: Which; those without a handler in Python (ignored, or ending the process) are left alone.

    Attributes:
        before: The handlers that were there.
    """

    def __init__(self, signals: tuple[signal.Signals, ...] = _SIGNALS) -> None:
        self.before: dict[int, Callable[[int, FrameType | None], Any]] = {}
        self._signals = signals

    @abstractmethod
    def __call__(self, number: int, frame: FrameType | None) -> None:
        """Handles a signal.

        Args:
            number: Which.
            frame: Where it came.
        """

    def install(self) -> None:
        """Goes in front; once more does nothing."""
        if threading.current_thread() is not threading.main_thread():
            return
        for number in self._signals:
            handler = signal.getsignal(number)
            if callable(handler) and handler is not self:
                self.before[number] = handler
                signal.signal(number, self)

    def remove(self) -> None:
        """Puts the handlers back that were there, unless somebody has set others since."""
        for number, handler in reversed(self.before.items()):
            if signal.getsignal(number) is self:
                signal.signal(number, handler)


def users_handler(number: signal.Signals) -> Any:
    """The handler of a signal behind all that stand in front of it here."""
    handler = signal.getsignal(number)
    while isinstance(handler, Handlers):
        handler = handler.before[number]
    return handler


class _Nested(threading.local):
    """The logs of this thread that are entered, from the first that is for all inside it."""

    def __init__(self) -> None:
        self.logs: list[UndoLog] = []


_nested = _Nested()


class UndoLog(Handlers):
    """An :class:`~contextlib.ExitStack` whose steps are all taken, last first, by whatever way it is left.

    Nothing stops it halfway. A step is recorded **before** its change, does nothing if that was not made, and may be
    taken again. The thread's modes are put back too, some of which an interruption on the way into ``torch.no_grad()``
    or out of ``torch.vmap`` would leave switched off or on.

    Args:
        start: Called with the log when it is entered, with signals held back: what is to be recorded and changed first.
        whole: Whether what logs inside have left done is undone too, if this one's block fails after them.

    Example:
        >>> values = [1, 2]
        >>> with UndoLog() as log:
        ...     log.callback(values.reverse)
        ...     values.reverse()
        >>> values
        [1, 2]
        >>> with UndoLog() as log:
        ...     log.callback(values.reverse, on=Exception)
        ...     values.reverse()
        >>> values
        [2, 1]
    """

    def __init__(self, start: Callable[[UndoLog], object] | None = None, *, whole: bool = False) -> None:
        super().__init__()
        self._start, self._whole = start, whole
        self._steps: list[_Step] = []
        self._pending: list[int] = []
        self._holds = True

    def callback(self, undo: Callable[..., object], /, *args: Any, on: _Kinds | None = None) -> None:
        """Writes down how a change is undone that is about to be made.

        Args:
            undo: Takes it back.
            args: What it is called with.
            on: Only if the block ends in an exception of these kinds, or a signal that raises one comes before the
                block has ended: a call that raises has then changed nothing, and one that returns has. By default
                always.
        """
        self._steps.append((partial(undo, *args), on, False))

    def enter_context(self, *contexts: AbstractContextManager[Any]) -> Any:
        """Enters contexts until the log is left; no signal comes in the middle of their entering or leaving.

        Returns:
            What the last one gives.
        """
        given = None
        held, self._holds = self._holds, True
        try:
            for context in contexts:
                given = context.__enter__()
                self._steps.append((context.__exit__, None, True))
        finally:
            self._holds = held
        if not held:
            self._deliver()
        return given

    def close(self, error: BaseException | None = None) -> None:
        """Undoes what the end of the block calls for, which is what leaving it does; once more does what is left.

        Args:
            error: In which the block has ended.
        """
        self._holds = True
        failures = self._undo(error)
        self._hand_over(error)
        try:
            self.remove()
            self._holds = False  # a handler set in front meanwhile still calls this one
            self._deliver()  # for what is kept this is the last place where a signal can come
        except BaseException as signalled:
            self._holds = True
            self.install()
            self._undo(signalled)
            self.remove()
            self._holds = False
            raise
        if failures:
            raise failures[0]

    def run(self, work: Callable[[UndoLog], Result]) -> Result:
        """Does ``work`` inside, which has then either happened and returns, or has not.

        Behind a ``with`` statement Python looks for signals once more, where what it leaves done stays.

        Args:
            work: Called with the log.

        Returns:
            What ``work`` returned.
        """
        try:
            self.__enter__()
            result = work(self)
        except BaseException as error:
            self._closed(error)
            raise
        self._closed(None)
        return result

    def __enter__(self) -> Self:
        try:
            while True:
                self._holds = True
                self.install()
                if self._whole or _nested.logs:
                    _nested.logs.append(self)
                self.callback(_thread_state())
                if self._start is not None:
                    self._start(self)
                if not self._pending:
                    self._holds = False
                    return self
                self.close()  # which raises, unless the user's handler does not
        except BaseException as error:
            self.close(error)
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closed(error)

    def _closed(self, error: BaseException | None) -> None:
        self._holds = True
        try:
            self.close(error)
        except BaseException as failure:
            self.close(failure)  # once more, which costs nothing: debuggers interrupt where signals do not
            raise

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """Holds a signal back, or lets it through."""
        if self._holds or self._is_leaving(frame):
            self._pending.append(number)
        else:
            self.before[number](number, frame)

    def _undo(self, error: BaseException | None) -> list[BaseException]:
        """Takes every step that this end of the block calls for, and keeps the others; what steps raised."""
        failures: list[BaseException] = []
        try:
            _end_generators(error)
        except BaseException as failure:  # a debugger's, or what the end of one raises
            failures.append(failure)
        place = len(self._steps) - 1
        while place >= 0:
            undo, kinds, is_context = self._steps[place]
            try:
                if kinds is None or isinstance(error, kinds):
                    undo(*_ends(error)) if is_context else undo()
                    del self._steps[place]
            except KeyboardInterrupt as interrupt:  # from elsewhere than a signal: the step is taken again
                failures += [interrupt] if error is None else []
                continue
            except BaseException as failure:  # whatever it is, the steps before it are still to be taken
                failures.append(failure)
                del self._steps[place]
            place -= 1
        return failures

    def _hand_over(self, error: BaseException | None) -> None:
        """Hands the steps of what stays done to the log around this one, which may fail yet."""
        logs = _nested.logs
        if self in logs:
            place = logs.index(self)
            del logs[place:]
            if error is None and place:
                logs[place - 1]._steps += self._steps

    def _is_leaving(self, frame: FrameType | None) -> bool:
        """Whether a signal came on the very way into ``close``."""
        while frame is not None:
            if frame.f_code.co_name in ("__exit__", "_closed", "close") and frame.f_locals.get("self") is self:
                return True
            frame = frame.f_back
        return False

    def _deliver(self) -> None:
        pending, self._pending = self._pending, []
        for number in pending:
            signal.raise_signal(number)


def entered(*contexts: AbstractContextManager[Any]) -> UndoLog:
    """Contexts that no signal leaves half entered or half left, as it may ``with torch.no_grad():``.

    Example:
        >>> with entered(torch.no_grad()):
        ...     torch.is_grad_enabled()
        False
    """
    return UndoLog(lambda log: log.enter_context(*contexts))


def _thread_state() -> Callable[[], None]:
    """Notes the modes of this thread; what is returned puts back those that an interruption left entered, or lost."""
    grad, level, batched = torch.is_grad_enabled(), maybe_current_level(), _batched_level()
    dispatch, functions = torch._C._len_torch_dispatch_stack(), _get_current_function_mode_stack()

    def put_back() -> None:
        while torch._C._len_torch_dispatch_stack() > dispatch:
            torch._C._pop_torch_dispatch_stack(None)
        if _get_current_function_mode_stack() != functions:  # torch takes modes off while they handle a call
            while torch._C._len_torch_function_stack():
                torch._C._pop_torch_function_stack()
            for mode in functions:
                torch._C._push_on_torch_function_stack(mode)
        while (maybe_current_level() or 0) > (level or 0):
            _vmap_decrement_nesting()
        while _batched_level() > batched:
            torch._C._vmapmode_decrement_nesting()
        torch.set_grad_enabled(grad)

    return put_back


def _batched_level() -> int:
    """How deep batched gradients are nested; the only way to ask is one step up and down, here without one between."""
    steps = torch._C._vmapmode_increment_nesting, torch._C._vmapmode_decrement_nesting
    return list(map(methodcaller("__call__"), steps))[1]


def _end_generators(error: BaseException | None) -> None:
    """Ends contexts that an interruption on the way in or out left halfway, not only when the error is forgotten.

    Torch puts a mode back that was off the stack for a call at the end of such a context, and whether there are
    gradients at that of inference mode.
    """
    trace = None if error is None else error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_globals.get("__name__") == "contextlib":
            generator = getattr(trace.tb_frame.f_locals.get("self"), "gen", None)
            if isinstance(generator, GeneratorType) and not generator.gi_running:
                generator.close()
        context = trace.tb_frame.f_locals.get("self")
        if isinstance(context, torch.inference_mode):
            vars(context).pop("_inference_mode_context", None)  # which is left when it is forgotten
        trace = trace.tb_next


def _ends(error: BaseException | None) -> tuple[Any, Any, Any]:
    """The arguments of ``__exit__`` for the exception a block ends in."""
    return (None, None, None) if error is None else (type(error), error, error.__traceback__)
