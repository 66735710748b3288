"""What stands in for a block while it is only looked at: a wrapped forward on the module itself.

The module stays in its place, so that what reads its attributes or hooks it goes on working.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_flatten_with_path, tree_map_only, tree_unflatten

__all__ = ["Form", "Forwards", "Kind", "Seen", "form_of", "identity", "zeros"]

Kind = Literal["identity", "zeros"]
Forward = Callable[..., Any]
_PLAIN = (bool, int, float, str)


class Seen(NamedTuple):
    """One call of a block.

    Attributes:
        leaves: Its arguments' leaves by path.
        result: What it returned.
    """

    leaves: dict[Any, Any]
    result: Any


class Form(NamedTuple):
    """How a block's result is made from its arguments.

    Attributes:
        stream: The path of the argument that the block changes.
        passed: For each leaf of the result, the path of the argument that it is, if it is one.
        first: The first tensor of the result, which takes the stream's place.
    """

    stream: Any
    passed: tuple[Any, ...]
    first: int


class Forwards:
    """Other forwards on some modules; a change that is done and undone.

    Args:
        forwards: From a module's own forward to the one in its place, by module.
    """

    def __init__(self, forwards: Iterable[tuple[nn.Module, Callable[[Forward], Forward]]]) -> None:
        self._forwards = list(forwards)
        self._before = [(vars(module), vars(module).get("forward")) for module, _ in self._forwards]

    def do(self) -> None:
        """Puts them in."""
        for module, wrap in self._forwards:
            own = module.forward
            vars(module)["forward"] = functools.wraps(own)(wrap(own))

    def undo(self) -> None:
        """Takes them away."""
        for attributes, before in reversed(self._before):
            if before is None:
                attributes.pop("forward", None)
            else:
                attributes["forward"] = before


def arguments(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[Any, Any]:
    """The leaves of a call's arguments by path, in their order."""
    return dict(tree_flatten_with_path((args, dict(kwargs)))[0])


def form_of(calls: Iterable[Seen]) -> Form | str:
    """The form of a block's result in all its calls, or why it is none."""
    forms = {_form(call) for call in calls}
    why = next((form for form in forms if isinstance(form, str)), None)
    return why or (forms.pop() if len(forms) == 1 else "returns something else from one call to the next")


def _form(call: Seen) -> Form | str:
    results, _ = tree_flatten(call.result)
    first = next((place for place, leaf in enumerate(results) if isinstance(leaf, Tensor)), None)
    if first is None:
        return "returns no tensor"
    made = results[first]
    stream = next((path for path, leaf in call.leaves.items() if _alike(leaf, made)), None)
    if stream is None:
        return "does not return the shape it is given"
    return Form(stream, tuple(_same(call.leaves, leaf) for leaf in results), first)


def _alike(leaf: Any, made: Tensor) -> bool:
    return isinstance(leaf, Tensor) and leaf.shape == made.shape and leaf.dtype == made.dtype


def _same(leaves: Mapping[Any, Any], leaf: Any) -> Any:
    if leaf is None or type(leaf) in _PLAIN:
        return None
    return next((path for path, one in leaves.items() if one is leaf), None)


def identity(form: Form, shown: Any) -> Callable[[Forward], Forward]:
    """A forward that returns its input in the form the block returned.

    Args:
        form: Of the block's result.
        shown: A result of it.
    """
    leaves_shown, spec = tree_flatten(shown)
    constants = [leaf if type(leaf) in _PLAIN else None for leaf in leaves_shown]

    def wrap(_own: Forward) -> Forward:
        def skipped(*args: Any, **kwargs: Any) -> Any:
            leaves = arguments(args, kwargs)
            made = [
                leaves.get(path, None) if path is not None else constant
                for path, constant in zip(form.passed, constants, strict=True)
            ]
            made[form.first] = leaves[form.stream]
            return tree_unflatten(made, spec)

        return skipped

    return wrap


def zeros(own: Forward) -> Forward:
    """A forward that returns zeros where the module returns tensors."""

    def zeroed(*args: Any, **kwargs: Any) -> Any:
        return tree_map_only(Tensor, torch.zeros_like, own(*args, **kwargs))

    return zeroed
