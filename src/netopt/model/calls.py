"""Names every torch call of a forward, so that a place found in one run is found again in another.

A call is named by the module it happens in, how many times that module has been entered, the torch function, and how
many calls of that function came before it in the same visit. The Python wrappers of ``torch.nn.functional`` are run
through, so that only calls that reach C++ have names.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import nn

from netopt.model.view import ModelView
from netopt.model.visits import Visits
from netopt.model.wrappers import TorchCalls

__all__ = ["Call", "CallNames"]


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


class CallNames(TorchCalls):
    """Runs a model with a name for every torch call; subclasses override :meth:`on_call`.

    Example:
        >>> import torch
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

    def __init__(self, model: nn.Module | ModelView) -> None:
        super().__init__()
        self.visits = Visits(ModelView.of(model).parts, self.on_return)

    def __enter__(self) -> Any:
        """Starts naming; modules carry hooks until left."""
        self.visits.__enter__()
        return super().__enter__()

    def __exit__(self, *error: object) -> None:
        """Stops naming and takes the hooks away."""
        super().__exit__(*error)
        self.visits.__exit__(*error)

    def run_call(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Runs one torch function, then gives it to :meth:`on_call` under its name."""
        result = function(*args, **kwargs)
        return self.on_call(self.name_of(getattr(function, "__name__", "")), function, args, kwargs, result)

    def on_return(self, module: nn.Module, result: Any) -> None:
        """Sees what a module returned; does nothing unless a subclass does.

        Args:
            module: That was called.
            result: What it returned.
        """

    def name_of(self, function: str) -> Call:
        """The name of the call of ``function`` that has just been made; each call is to be named once, or none."""
        visit = self.visits.current
        number = visit.seen.get(function, 0)
        visit.seen[function] = number + 1
        return Call(visit.module, visit.number, function, number)

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
