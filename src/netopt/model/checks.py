"""What no call can work with, refused before anything is done."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from netopt.errors import ArgumentTypeError, InvalidArgumentError
from netopt.model.view import ModelView

__all__ = ["check_model", "check_values", "problem"]

FLOAT8 = frozenset(getattr(torch, name) for name in dir(torch) if name.startswith("float8_"))


def check_model(model: object, what: str = "model") -> ModelView:
    """What a model holds, if all of it has values and new tensors would have some too.

    Args:
        model: Anything.
        what: How messages call it.

    Raises:
        ArgumentTypeError: It is no module.
        InvalidArgumentError: A tensor has no values yet, or the default device is "meta".
    """
    if not isinstance(model, nn.Module):
        shown = model.__name__ if isinstance(model, type) else type(model).__name__
        raise ArgumentTypeError(f"{what} must be a torch.nn.Module, not {shown}.")
    if torch.get_default_device().type == "meta":
        raise InvalidArgumentError(
            'the default device is "meta", on which no index has a value; call this outside torch.device("meta"), '
            "or after torch.set_default_device(None). The model itself may be on it."
        )
    view = ModelView(model)
    check_values(view)
    return view


def check_values(model: nn.Module | ModelView) -> None:
    """Raises an `InvalidArgumentError` if a parameter or buffer has no values yet."""
    for name, tensor in ModelView.of(model).tensors.items():
        if nn.parameter.is_lazy(tensor):
            raise InvalidArgumentError(f"{name!r} is not initialised yet; run the model once first.")


def problem(tensor: Tensor) -> str | None:
    """Why neurons of a tensor cannot be compared and removed, if they cannot."""
    if tensor.is_nested:
        return "is a nested tensor, whose rows have no common size; pad it before pruning"
    if tensor.layout is not torch.strided:
        return "is a sparse tensor; make it dense before pruning, with .to_dense()"
    if tensor.dtype in FLOAT8:
        return "is stored in float8, in which nothing is computed; convert it before pruning, with .to(torch.bfloat16)"
    return None
