"""Which parts of a model a user means.

A selector is a dotted name, a glob pattern, a module type, a module, a predicate, or a sequence of these. It is
resolved once into a set of roots; a root selects everything below it, and every other name of the same tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from fnmatch import fnmatchcase
from typing import TypeAlias

from torch import Tensor, nn

from netopt.errors import ArgumentTypeError, SelectorError, nearest

__all__ = ["Selector", "chosen", "matches"]

Entry: TypeAlias = str | type[nn.Module] | nn.Module | Callable[[str, nn.Module], bool]
Selector: TypeAlias = Entry | Sequence[Entry] | None
"""A dotted name, a pattern (``"encoder.*.mlp"``), a module type, a module, a predicate, or several of these."""


def chosen(model: nn.Module, include: Selector = None, exclude: Selector = None) -> Callable[[str], bool]:
    """Returns whether a dotted name is included and not excluded; without ``include`` everything is.

    Raises:
        SelectorError: an entry selects nothing, or ``include`` is empty.
        ArgumentTypeError: an entry is no selector.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 4))
        >>> wanted = chosen(model, exclude="1")
        >>> wanted("0.weight"), wanted("1.weight")
        (True, False)
    """
    if include is not None and not _entries(include, "include"):
        raise SelectorError("include is empty, so nothing would be touched; leave it out to include everything.")
    included = (lambda _: True) if include is None else matches(include, model, what="include")
    excluded = matches(exclude, model, what="exclude")
    return lambda name: included(name) and not excluded(name)


def matches(selector: Selector, model: nn.Module, *, what: str = "selector") -> Callable[[str], bool]:
    """Resolves ``selector`` in ``model`` and returns whether it selects a module or tensor of a given dotted name.

    A name or pattern is compared with the names of modules, parameters and buffers; ``*`` crosses dots. What lies
    below a selected module is selected, and so is a tensor shared with it. A masked or parametrized tensor also goes
    by the name it had before. ``None`` and an empty sequence select nothing.

    Args:
        selector: See :data:`Selector`. A predicate is called with each module's dotted name and the module.
        model: Where the names live.
        what: The argument's name, for messages.

    Raises:
        SelectorError: an entry selects nothing; the message lists near names.
        ArgumentTypeError: an entry is no selector.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 4))
        >>> selected = matches([nn.ReLU, "2"], model)
        >>> [name for name, _ in model.named_parameters() if selected(name)]
        ['2.weight', '2.bias']
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    named = list(_named_tensors(model))
    roots: set[str] = set()
    for entry in _entries(selector, what):
        found = _resolve(entry, modules, [name for name, _ in named], what)
        if not found:
            raise SelectorError(_nothing(entry, model, [*modules, *(name for name, _ in named)], what))
        roots.update(found)
    shared = {id(tensor) for name, tensor in named if _below(name, roots)}
    roots.update(name for name, tensor in named if id(tensor) in shared)
    return lambda name: _below(name, roots)


def _entries(selector: Selector, what: str) -> list[Entry]:
    if selector is None:
        return []
    if isinstance(selector, (str, type, nn.Module)) or callable(selector):
        return [selector]
    if not isinstance(selector, (Sequence, set, frozenset)):
        raise ArgumentTypeError(
            f"{what} must be a name, a pattern, a module type, a module, a predicate, or a list of these, "
            f"not {type(selector).__name__}."
        )
    return list(selector)


def _resolve(entry: Entry, modules: dict[str, nn.Module], tensors: list[str], what: str) -> set[str]:
    if isinstance(entry, str):
        return {name for name in (*modules, *tensors) if name == entry or fnmatchcase(name, entry)}
    if isinstance(entry, nn.Module):
        return {name for name, module in modules.items() if module is entry}
    if isinstance(entry, type):
        return {name for name, module in modules.items() if isinstance(module, entry)}
    if callable(entry):
        return {name for name, module in modules.items() if _ask(entry, name, module, what)}
    raise ArgumentTypeError(
        f"{what} holds {entry!r}, a {type(entry).__name__}; "
        "use dotted names, patterns, module types, modules, or a predicate of name and module."
    )


def _ask(predicate: Callable[[str, nn.Module], bool], name: str, module: nn.Module, what: str) -> bool:
    try:
        return bool(predicate(name, module))
    except TypeError as error:
        raise ArgumentTypeError(
            f"the predicate given as {what} failed at {name or 'the model itself'!r} ({error}); "
            "it is called with a dotted name and a module and returns True or False."
        ) from error


def _nothing(entry: Entry, model: nn.Module, names: list[str], what: str) -> str:
    if isinstance(entry, str):
        close = (
            nearest(entry, names) or f"Its modules are: {', '.join(n for n, _ in model.named_children()) or 'none'}."
        )
        return f"{what} holds {entry!r}, which names nothing in {type(model).__name__}. {close}"
    shown = entry.__name__ if isinstance(entry, type) else type(entry).__name__
    if isinstance(entry, type):
        present = sorted({type(module).__name__ for module in model.modules()})
        return f"{what} holds the type {shown}, and {type(model).__name__} only has {', '.join(present)}."
    if isinstance(entry, nn.Module):
        return f"{what} holds a {shown} that is not part of {type(model).__name__}; pass one of its own modules."
    return (
        f"the predicate given as {what} is true for no module of {type(model).__name__}; "
        "it is called with a dotted name and a module."
    )


def _named_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yields every name of every tensor, those a masked or parametrized tensor had before among them."""
    for source in (model.named_parameters, model.named_buffers):
        for name, tensor in source(remove_duplicate=False):
            yield name, tensor
            owner, _, last = name.rpartition(".")
            prefix = f"{owner}." if owner else ""
            if last.endswith("_orig"):
                yield prefix + last.removesuffix("_orig"), tensor
            head, inside, rest = name.rpartition("parametrizations.")
            if inside:
                yield head + rest.split(".")[0], tensor


def _below(name: str, roots: set[str]) -> bool:
    if "" in roots or name in roots:
        return True
    position = name.rfind(".")
    while position >= 0:
        if name[:position] in roots:
            return True
        position = name.rfind(".", 0, position)
    return False
