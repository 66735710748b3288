"""Which tensor of a result is distilled, and which of its positions count.

An output is a float tensor whose first dimension is the sample. Classes are its last dimension, as in token logits
``(samples, tokens, classes)``, or the second one of images, ``(samples, classes, height, width)``; what is left are
positions, and labels and masks have their shape.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from netopt import batches
from netopt.errors import ArgumentTypeError, InvalidArgumentError, ShapeMismatchError, nearest

__all__ = [
    "UNLABELLED",
    "Picker",
    "check_shapes",
    "classes_last",
    "is_causal",
    "pick",
    "positions_of",
    "shifted",
    "valid_positions",
]

Picker: TypeAlias = str | Callable[[Any], Tensor] | None
"""Finds the output in a result: a dotted path into it, a function of it, or ``None`` for the main output."""

UNLABELLED = -1


def pick(result: Any, picker: Picker) -> Tensor:
    """Returns the tensor of ``result`` that is distilled.

    Raises:
        InvalidArgumentError: there is nothing at the path given; the message lists the paths there are.
        ArgumentTypeError: what was found is not a floating-point tensor.
    """
    if picker is None:
        found = batches.primary(result)
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


def is_causal(model: nn.Module) -> bool:
    """Whether labels belong to the position before, as Hugging Face's language models have it."""
    kind = getattr(model, "loss_type", None) or type(model).__name__
    return re.search(r"ForCausalLM|LMHeadModel", str(kind)) is not None


def shifted(labels: Tensor, ignore_index: int) -> Tensor:
    """Returns ``labels`` moved to the positions that predict them; the last position predicts nothing."""
    return torch.cat([labels[:, 1:], labels.new_full((len(labels), 1), ignore_index)], dim=1)


def valid_positions(batch: Any, labels: Any, positions: tuple[int, ...], ignore_index: int) -> Tensor | None:
    """Returns which positions count, bool in the shape of ``positions`` or of their samples; ``None`` for all.

    Integer labels rule out where they equal ``ignore_index``; without labels a Hugging Face batch's attention mask
    rules out padding.
    """
    if isinstance(labels, Tensor) and not labels.is_floating_point() and labels.dtype != torch.bool:
        if labels.shape == positions or labels.shape == positions[:1]:
            # In host memory a look is cheap, and most batches have nothing to rule out.
            if labels.device.type == "cpu" and ignore_index < 0 <= (labels.numpy().min() if labels.numel() else 0):
                return None
            return labels != ignore_index
        return None
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    if isinstance(mask, Tensor) and tuple(mask.shape) == positions:
        return mask.bool()
    return None
