"""The Python wrappers of torch's functions, run through while a torch-function mode is active.

Each wrapper, such as those of ``torch.nn.functional``, first tests whether an argument or a mode overrides it, which a
mode makes true of every call. A mode that wants to see what reaches C++ runs a copy of the wrapper instead, whose
globals answer these tests with no; the wrapper itself, which other threads run, is left alone.
"""

from __future__ import annotations

import builtins
import types
from collections.abc import Callable
from typing import Any, cast

import torch
import torch._tensor
import torch.functional
import torch.nn.functional
from torch._guards import TracingContext, tracing
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack, _pop_mode

__all__ = ["TorchCalls"]

_TESTS = frozenset(["has_torch_function", "has_torch_function_unary", "has_torch_function_variadic"])
_ANSWERS = frozenset(["__len__"])
"""Methods of Tensor whose integer C makes a plain one of, so that what runs inside them cannot be followed."""


def _never(*_args: Any, **_kwargs: Any) -> bool:
    return False


class _Globals(dict[str, Any]):
    """The names of a module as they are now, but for the tests for overrides; its functions as copies of this kind."""

    def __init__(self, names: dict[str, Any]) -> None:
        super().__init__(dict.fromkeys(_TESTS & names.keys(), _never))
        self._names = names

    def __missing__(self, name: str) -> Any:
        if name not in self._names:
            return vars(builtins)[name]
        value = self._names[name]
        return _transparent(value) or value


_views = {id(vars(module)): _Globals(vars(module)) for module in (torch.nn.functional, torch.functional, torch._tensor)}
_copies: dict[types.FunctionType, Callable[..., Any]] = {}


def _transparent(function: Any) -> Callable[..., Any] | None:
    """A copy of one of torch's Python wrappers that tests for no override; None for any other function."""
    if type(function) is not types.FunctionType or function.__name__ in _ANSWERS:
        return None
    found = _copies.get(function)
    if found is None and _is_wrapper(function):
        found = _copies[function] = _copy(function)
    return found


def _is_wrapper(function: Any) -> bool:
    """Whether a function is written in one of these modules, or chooses between two that are (boolean_dispatch)."""
    if type(function) is not types.FunctionType:
        return False
    cells = function.__closure__ or () if function.__globals__.get("__name__") == "torch._jit_internal" else ()
    return id(function.__globals__) in _views or any(_is_wrapper(cell.cell_contents) for cell in cells)


def _copy(function: types.FunctionType) -> types.FunctionType:
    names = _views.get(id(function.__globals__), function.__globals__)
    cells = tuple(types.CellType(_inner(cell.cell_contents, function)) for cell in function.__closure__ or ())
    copied = types.FunctionType(function.__code__, names, function.__name__, function.__defaults__, cells or None)
    copied.__kwdefaults__ = function.__kwdefaults__
    return copied


def _inner(value: Any, function: types.FunctionType) -> Any:
    """What a copy closes over: copies of the wrappers that ``function`` calls, though not of itself."""
    return value if value is function else _transparent(value) or value


class _Kernel:
    """In place of a fake mode whose kernel is being invoked; a real one would import all of torch.compile."""

    in_kernel_invocation = True
    shape_env = None


# Of a kernel that is being invoked: torch.compile compiles nothing under it, in this thread.
_EAGER = TracingContext(cast("Any", _Kernel()))


class TorchCalls(TorchFunctionMode):
    """Sees every call of a torch function that reaches C++, in its own thread; subclasses override :meth:`run_call`.

    While such a mode is active the fused attention of ``nn.MultiheadAttention`` and of torch's encoder layers is not
    taken: these test for overrides themselves.
    """

    def __init__(self) -> None:
        super().__init__()
        self._method: Callable[..., Any] | None = None
        """The method of Tensor, written in Python, that is being run through."""
        self._eager: Any = None

    def __enter__(self) -> Any:
        """Starts seeing calls; compiled regions run as they are written."""
        self._eager = tracing(_EAGER)
        self._eager.__enter__()
        return super().__enter__()

    def __exit__(self, *error: object) -> None:
        """Stops seeing calls."""
        self._take_off()
        self._eager.__exit__(None, None, None)

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Runs a call, or the Python wrapper around several."""
        # A method of Tensor in Python has the name of the one in C++ that it calls.
        wrapper = None if function is self._method else _transparent(function)
        if wrapper is None:
            return self.run_call(function, args, {} if kwargs is None else kwargs)
        before, self._method = self._method, function if function.__globals__ is vars(torch._tensor) else None
        TorchFunctionMode.__enter__(self)  # torch has taken the mode off the stack for the time of this call
        try:
            return wrapper(*args, **(kwargs or {}))
        finally:
            self._take_off()
            self._method = before

    def _take_off(self) -> None:
        """Takes the mode off the stack, if an interruption has not left it off."""
        if self in _get_current_function_mode_stack():
            while _pop_mode() is not self:
                pass

    def run_call(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Runs one call that reaches C++; it is not seen by this mode again.

        Args:
            function: The torch function.
            args: Its positional arguments.
            kwargs: Its keyword arguments.
        """
        return function(*args, **kwargs)
