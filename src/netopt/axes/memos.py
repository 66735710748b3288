"""Functions that remember their results by their arguments, passed by where an argument is a size.

A size equals the plain integer that an earlier forward has asked the same function about, so it would be answered with
what was kept then: plain integers, whose origin is lost. While a model is traced, ``functools.lru_cache`` is passed by
for arguments that remember, so that nothing old is handed out, and no size is left behind for later forwards.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import sys
import threading
import types
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias

from netopt.model.attributes import is_library
from netopt.symbolic import SymbolicFloat, SymbolicInt

_MEMO = type(functools.lru_cache(lambda: None))
_Held: TypeAlias = "tuple[Any, str, Any, Any]"
"""Who holds such a function (the names of a file, a class, a cell), under which name, it, and what is lent instead."""

_APART = frozenset(["netopt", "__main__", "sympy", "mpmath", "networkx", "jinja2", "typing_extensions"])
"""Searched in another way, or brought along by torch for its compiler: no forward calls them."""
_lock = threading.RLock()
_searched: set[str] = set()
_found: dict[tuple[int, str], _Held] = {}


@contextmanager
def memos_passed_by() -> Iterator[None]:
    """Lets functions kept by a cache run anew on every size that remembers, until left."""
    with _lock:
        _search()
        swapped: list[_Held] = []
        try:
            # What is typed into a session or a notebook grows.
            for held in (*_found.values(), *_held_by(sys.modules.get("__main__"))):
                holder, name, memo, lent = held
                if type(holder) is types.CellType:
                    if holder.cell_contents is memo:
                        holder.cell_contents = lent
                        swapped.append(held)
                elif (holder if type(holder) is dict else vars(holder)).get(name) is memo:
                    _put(holder, name, lent)
                    swapped.append(held)
            yield
        finally:
            for holder, name, memo, _ in swapped:
                if type(holder) is types.CellType:
                    holder.cell_contents = memo
                else:
                    _put(holder, name, memo)


def _search() -> None:
    """Notes what files of the user's and of model libraries hold; each is searched once."""
    if next(reversed(sys.modules)) in _searched and len(sys.modules) <= len(_searched):
        return
    new = sys.modules.keys() - _searched
    _searched.update(new)
    for name in new:
        if not is_library(name) and name.partition(".")[0] not in _APART:
            for held in _held_by(sys.modules.get(name)):
                _found.setdefault((id(held[0]), held[1]), held)


def _put(holder: Any, name: str, value: Any) -> None:
    if type(holder) is dict:
        holder[name] = value
    else:
        setattr(holder, name, value)


def _held_by(module: Any) -> Iterator[_Held]:
    if type(module) is not types.ModuleType:  # one that makes its entries when they are asked for
        return
    held = list(vars(module).items())
    for name, value in held:
        yield from _entry(vars(module), name, value, 1)
        if isinstance(value, type) and value.__module__ == module.__name__:
            for key, one in list(vars(value).items()):
                yield from _entry(value, key, one, 2)  # a method is given its object, and something else


def _entry(holder: Any, name: str, value: Any, least: int) -> Iterator[_Held]:
    """What stands under one name: such a function, or one with such a function inside, as decorators make it."""
    inside, least = (value.__func__, 1) if type(value) is staticmethod else (value, least)
    if type(inside) is _MEMO and _takes(inside, least):
        passing = _passing(inside)
        yield holder, name, value, passing if inside is value else staticmethod(passing)
    elif type(inside) is types.FunctionType and inside.__closure__:
        for cell in inside.__closure__:
            with contextlib.suppress(ValueError):  # an empty cell
                if type(cell.cell_contents) is _MEMO and _takes(cell.cell_contents, least):
                    yield cell, "cell_contents", cell.cell_contents, _passing(cell.cell_contents)


def _takes(memo: Any, arguments: int) -> bool:
    """Whether a function takes so many arguments, so that one may be a size; nearly all that are kept take none."""
    code = getattr(memo.__wrapped__, "__code__", None)
    return code is None or bool(code.co_flags & _ANY_NUMBER) or code.co_argcount + code.co_kwonlyargcount >= arguments


_ANY_NUMBER = inspect.CO_VARARGS | inspect.CO_VARKEYWORDS


def _passing(memo: Any) -> Any:
    @functools.wraps(memo)
    def passing(*args: Any, **kwargs: Any) -> Any:
        function: Callable[..., Any] = memo.__wrapped__ if _remember((*args, *kwargs.values())) else memo
        return function(*args, **kwargs)

    for name in ("cache_info", "cache_clear", "cache_parameters"):
        setattr(passing, name, getattr(memo, name))
    return passing


def _remember(values: Iterable[Any]) -> bool:
    return any(
        type(value) in (SymbolicInt, SymbolicFloat) or (isinstance(value, (tuple, list)) and _remember(value))
        for value in values
    )
