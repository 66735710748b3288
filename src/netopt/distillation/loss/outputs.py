"""Which tensor of a result is distilled, and what its dimensions are.

An output is a float tensor whose first dimension is the sample. Classes are its last dimension, as in token logits
``(samples, tokens, classes)``, or the second one of images, ``(samples, classes, height, width)``; what is left are
positions, and labels and masks have their shape.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor

from netopt import batches
from netopt.errors import ArgumentTypeError, InvalidArgumentError, ShapeMismatchError, nearest

__all__ = [
    "Picker",
    "check_shapes",
    "classes_last",
    "pick",
    "positions_of",
]

Picker: TypeAlias = str | Callable[[Any], Tensor] | None
"""Finds the output in a result: a dotted path into it, a function of it, or ``None`` for the main output."""


INTERNAL = frozenset({"loss", "hidden_states", "attentions", "cross_attentions", "past_key_values"})
"""What a Hugging Face result holds beside its outputs."""


def pick(result: Any, picker: Picker) -> Tensor:
    """Returns the tensor of ``result`` that is distilled.

    Raises:
        InvalidArgumentError: there is nothing at the path given, or several outputs and no path; the message lists
            the paths there are.
        ArgumentTypeError: what was found is not a floating-point tensor.
    """
    if picker is None:
        found = result if isinstance(result, Tensor) else _only_output(result)
    elif callable(picker):
        found = picker(result)
    else:
        known = dict(batches.tensors(result))
        if picker not in known:
            raise InvalidArgumentError(
                f"output={picker!r} is not in the result, a {type(result).__name__} with the tensors "
                f"{', '.join(filter(None, known)) or 'none'}. {nearest(picker, known)}".rstrip()
            )
        found = known[picker]
    if not isinstance(found, Tensor) or not found.is_floating_point():
        what = f"a {found.dtype} tensor" if isinstance(found, Tensor) else f"a {type(found).__name__}"
        raise ArgumentTypeError(f"the output to distill is {what}; choose a floating-point tensor with output=.")
    if found.dim() == 0:
        raise ShapeMismatchError(
            "the output to distill is a single number, as a loss is; let the model return one output a sample, "
            "or choose it with output=."
        )
    return found


def _only_output(result: Any) -> Tensor:
    """Returns the main output where a result names it or holds no other.

    Raises:
        InvalidArgumentError: it holds several.
    """
    read = result.get if isinstance(result, Mapping) else functools.partial(getattr, result)
    if any(isinstance(read(name, None), Tensor) for name in batches.PRIMARY_NAMES):
        return batches.primary(result)
    found = {
        path: one
        for path, one in batches.tensors(result)
        if one.is_floating_point() and one.dim() and path.split(".")[0] not in INTERNAL
    }
    if len(found) < 2:
        return next(iter(found.values())) if found else batches.primary(result)
    listed = ", ".join(f"{path!r} {tuple(one.shape)}" for path, one in found.items())
    raise InvalidArgumentError(
        f"the model returned a {type(result).__name__} with several outputs, {listed}, and no "
        f"output= chooses one; write output={next(iter(found))!r} for one of them, or output=, a function that makes "
        "one tensor of the result, such as lambda result: torch.cat([...], -1), with a loss that takes it apart."
    )


def check_shapes(student: Tensor, teacher: Tensor, who: str = "the teacher") -> None:
    """Raises a `ShapeMismatchError` in one sentence, naming both shapes, unless they agree."""
    if student.shape == teacher.shape:
        return
    hint = "choose comparable outputs with output="
    if student.dim() == teacher.dim() and student.shape[:-1] == teacher.shape[:-1]:
        hint = "two vocabularies or class lists cannot be compared entry by entry: map one onto the other with output="
    raise ShapeMismatchError(
        f"the student's output has shape {tuple(student.shape)} and {who}'s has {tuple(teacher.shape)} "
        f"on the same batch; {hint}."
    )


def classes_last(output: Tensor) -> Tensor:
    """Returns ``output`` with its class dimension last; a view.

    Example:
        >>> classes_last(torch.zeros(2, 10, 4, 4)).shape
        torch.Size([2, 4, 4, 10])
    """
    return output.movedim(1, -1) if output.dim() > 3 else output


def positions_of(shape: torch.Size) -> tuple[int, ...]:
    """Returns the shape of the positions of an output: what labels and masks look like.

    Example:
        >>> positions_of(torch.Size((2, 10, 4, 4))), positions_of(torch.Size((2, 7, 50)))
        ((2, 4, 4), (2, 7))
    """
    if len(shape) > 3:
        return (shape[0], *shape[2:])
    return tuple(shape[:-1]) if len(shape) > 1 else tuple(shape)
