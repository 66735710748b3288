"""Which module of a model is being run, and how many times it was entered before.

Every module carries two hooks for the time being, which do nothing in other threads. Its tables of hooks are replaced,
not written to, since a module shared with another model may be running in another thread.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import nn

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["Visit", "Visits"]

_lock = threading.RLock()
TABLES = ("_forward_pre_hooks", "_forward_hooks", "_forward_hooks_always_called")


class Visit(NamedTuple):
    """One run of a module.

    Attributes:
        module: Its dotted name; a module without one goes by that of the module that runs it.
        number: How many times that name had been entered before.
        seen: How many calls of each torch function were named in this visit.
        owner: The module's identity.
    """

    module: str
    number: int
    seen: dict[str, int]
    owner: int


class Visits:
    """Follows which module of a model is being run, in the thread that enters it.

    Args:
        parts: The modules by name, each once.
        on_return: Called with a module and its result while the visit is still in progress.

    Attributes:
        counts: How many times each name was entered.
    """

    def __init__(
        self, parts: Iterable[tuple[str, nn.Module]], on_return: Callable[[nn.Module, Any], None] | None = None
    ) -> None:
        self._on_return = on_return
        self._parts = list(parts)
        self._names = {id(module): name for name, module in self._parts}
        self._stack = [Visit("", 0, {}, 0)]
        self._thread: int | None = None
        self.counts: dict[str, int] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> Visits:
        return self  # a forward may copy a module, whose hooks find no name for the copy

    @property
    def current(self) -> Visit:
        """The visit in progress."""
        return self._stack[-1]

    def __enter__(self) -> Self:
        """Hooks every module."""
        self._thread = threading.get_ident()
        with _lock:
            for _, module in self._parts:
                held = vars(module)
                if all(isinstance(held.get(name), dict) for name in TABLES):
                    before, after, always = (held[name] for name in TABLES)
                    held[TABLES[0]] = _Table(before, [(self, self._begin), *before.items()])
                    held[TABLES[1]] = _Table(after, [*after.items(), (self, self._end)])
                    held[TABLES[2]] = _Table(always, [*always.items(), (self, True)])
        return self

    def __exit__(self, *error: object) -> None:
        """Takes the hooks away; those that the forward itself registered stay."""
        self._thread = None
        with _lock:
            for _, module in self._parts:
                for name in TABLES:
                    table = vars(module).get(name)
                    if isinstance(table, _Table):
                        vars(module)[name] = table.without(self)

    def _begin(self, module: nn.Module, _args: Any) -> None:
        if threading.get_ident() == self._thread:
            name = self._names.get(id(module), self._stack[-1].module)
            number = self.counts.get(name, 0)
            self.counts[name] = number + 1
            self._stack.append(Visit(name, number, {}, id(module)))

    def _end(self, module: nn.Module, _args: Any, result: Any) -> None:
        if threading.get_ident() == self._thread:
            depth = next((at for at in range(len(self._stack) - 1, 0, -1) if self._stack[at].owner == id(module)), 0)
            if depth:
                if self._on_return is not None:
                    self._on_return(module, result)
                del self._stack[depth:]


class _Table(OrderedDict[Any, Any]):
    """A module's hooks with those of visits among them, in place of its own table."""

    def __init__(self, own: Any = (), entries: Any = ()) -> None:
        super().__init__(entries)
        self.own = own.own if isinstance(own, _Table) else own

    def __reduce__(self) -> Any:
        return OrderedDict, (), None, None, iter(self.items())

    def without(self, visits: Visits) -> Any:
        """The module's own table, if no other visits are among the hooks."""
        left = [(key, value) for key, value in self.items() if key is not visits]
        if any(isinstance(key, Visits) for key, _ in left):
            return _Table(self, left)
        if list(self.own.items()) != left:
            self.own.clear()
            self.own.update(left)
        return self.own
