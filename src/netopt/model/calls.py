"""Names every torch call of a forward, so that a place found in one run is found again in another.

A call is named by the module it happens in, how many times that module has been entered, the torch function, and how
many calls of that function came before it in the same visit. The Python wrappers of ``torch.nn.functional`` are run
through, so that only calls that reach C++ have names.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
import torch._tensor
import torch.functional
import torch.nn.functional
from torch import nn
from torch.overrides import TorchFunctionMode

_WRAPPERS = (torch.nn.functional, torch.functional, torch._tensor)
_TESTS = ("has_torch_function", "has_torch_function_unary", "has_torch_function_variadic")
_lock = threading.RLock()


class Call(NamedTuple):
    """One call of a torch function during a forward.

    Attributes:
        module: Dotted name of the innermost module being run; ``""`` is the model itself.
        visit: How many times that module had been entered before.
        function: Name of the torch function, such as ``"linear"``.
        number: How many calls of that function came before it in this visit.
    """

    module: str
    visit: int
    function: str
    number: int


def _never(*_args: Any, **_kwargs: Any) -> bool:
    return False


@contextmanager
def transparent_wrappers() -> Iterator[None]:
    """Lets ``torch.nn.functional`` run its Python bodies although a torch-function mode is active.

    Each wrapper first asks whether an argument or a mode overrides it, which a mode makes true of every call; answered
    with no, only the calls that reach C++ are seen by the mode.
    """
    with _lock:
        plain = [
            (module, name, getattr(module, name)) for module in _WRAPPERS for name in _TESTS if hasattr(module, name)
        ]
        for module, name, _ in plain:
            setattr(module, name, _never)
        try:
            yield
        finally:
            for module, name, test in plain:
                setattr(module, name, test)


class CallNames(TorchFunctionMode):
    """Runs a model with a name for every torch call; subclasses override :meth:`on_call`.

    Example:
        >>> class Seen(CallNames):
        ...     def on_call(self, call, function, args, kwargs, result):
        ...         if call.function == "linear":
        ...             print(call)
        ...         return result
        >>> net = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
        >>> with Seen(net):
        ...     _ = net(torch.zeros(1, 2))
        Call(module='0', visit=0, function='linear', number=0)
        Call(module='1', visit=0, function='linear', number=0)
    """

    def __init__(self, model: nn.Module, parts: Iterable[tuple[str, nn.Module]] | None = None) -> None:
        super().__init__()
        self._names = {id(module): name for name, module in (model.named_modules() if parts is None else parts)}
        self._visits: dict[str, int] = {}
        self._stack: list[tuple[str, int, dict[str, int]]] = [("", 0, {})]
        self._open: ExitStack | None = None

    def __enter__(self) -> Any:
        """Starts naming; the model is left without hooks of its own."""
        self._open = ExitStack()
        self._open.enter_context(transparent_wrappers())
        self._open.enter_context(self._visits_counted())
        return super().__enter__()

    def __exit__(self, *error: object) -> None:
        """Stops naming and lets modules be called as before."""
        super().__exit__(*error)
        assert self._open is not None
        self._open.close()

    @contextmanager
    def _visits_counted(self) -> Iterator[None]:
        """Notes which module is being run. A global hook would tell as well, and send every call a longer way."""
        plain = nn.Module._call_impl
        stack, visits, names = self._stack, self._visits, self._names

        def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            name = names.get(id(module))
            if name is None:
                name = stack[-1][0]
            depth = len(stack)
            visit = visits.get(name, 0)
            stack.append((name, visit, {}))
            visits[name] = visit + 1
            try:
                result = plain(module, *args, **kwargs)
                self.on_return(module, args, kwargs, result)
                return result
            finally:
                del stack[depth:]

        with _lock:
            nn.Module._call_impl = call  # type: ignore[assignment, method-assign]  # pyright: ignore[reportAttributeAccessIssue]
            try:
                yield
            finally:
                nn.Module._call_impl = plain

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Runs one torch function, then hands it to :meth:`on_call` under its name."""
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        return self.on_call(self.name_of(getattr(function, "__name__", "")), function, args, kwargs, result)

    def on_return(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        """Sees what a module returned; does nothing unless a subclass does.

        Args:
            module: That was called.
            args: Its positional arguments.
            kwargs: Its keyword arguments.
            result: What it returned.
        """

    def name_of(self, function: str) -> Call:
        """The name of the call of ``function`` that has just been made; each call is to be named once, or none."""
        module, visit, seen = self._stack[-1]
        number = seen.get(function, 0)
        seen[function] = number + 1
        return Call(module, visit, function, number)

    def on_call(
        self,
        call: Call,  # noqa: ARG002 - for subclasses
        function: Callable[..., Any],  # noqa: ARG002
        args: tuple[Any, ...],  # noqa: ARG002
        kwargs: dict[str, Any],  # noqa: ARG002
        result: Any,
    ) -> Any:
        """Sees one call and returns its result, or another in its place.

        Args:
            call: Its name.
            function: The torch function.
            args: Its positional arguments.
            kwargs: Its keyword arguments.
            result: What it returned.
        """
        return result
