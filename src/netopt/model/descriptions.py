"""Integers by which a module describes its own tensors: ``out_features``, ``embedding_dim``, ``num_features``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

__all__ = ["DESCRIPTIONS", "QUOTIENTS", "ROWS_OF", "Description", "dimension", "stored_under"]


@dataclass(frozen=True)
class Description:
    """An integer by which a module describes one of its tensors."""

    attribute: str
    tensor: str
    dim: int
    transposed: int | None = None
    """The dimension instead, in a module whose own ``transposed`` is true."""
    grouped: bool = False
    """The integer counts all groups, the dimension one."""


# Integers that modules hold and never compute with, so that no equation holds them. A row holds for a module
# only if it is true of it before the surgery; the module's class plays no part.
DESCRIPTIONS = (
    Description("out_features", "weight", 0),
    Description("in_features", "weight", 1),
    Description("in1_features", "weight", 1),
    Description("in2_features", "weight", 2),
    Description("out_channels", "weight", 0, transposed=1),
    Description("in_channels", "weight", 1, transposed=0),
    Description("out_channels", "weight", 1, transposed=1, grouped=True),
    Description("in_channels", "weight", 1, transposed=0, grouped=True),
    Description("num_features", "weight", 0),
    Description("num_features", "running_mean", 0),
    Description("num_channels", "weight", 0),
    Description("num_embeddings", "weight", 0),
    Description("embedding_dim", "weight", 1),
    Description("num_parameters", "weight", 0),
    Description("nf", "weight", 1),
    Description("nx", "weight", 0),
    Description("input_size", "weight_ih", 1),
    Description("hidden_size", "weight_hh", 1),
    Description("input_size", "weight_ih_l0", 1),
    Description("hidden_size", "weight_hr_l0", 1),
    Description("proj_size", "weight_hr_l0", 0),
    Description("embed_dim", "out_proj_weight", 0),
    Description("kdim", "k_proj_weight", 1),
    Description("vdim", "v_proj_weight", 1),
)


ROWS_OF = {
    name: tuple(row for row in DESCRIPTIONS if row.attribute == name)
    for name in dict.fromkeys(row.attribute for row in DESCRIPTIONS)
}
"""The rows of each attribute."""

# An integer that is another divided by a third: attribute, dividend, divisor. It follows where the dividend is set;
# where only the divisor is, as by code that keeps its own width, the quotient is what the equations made it.
QUOTIENTS = (("head_dim", "embed_dim", "num_heads"),)


def stored_under(module: nn.Module, tensor: str) -> str | None:
    """The name below ``module`` of the parameter or buffer behind its attribute ``tensor``."""
    parameters, buffers = module._parameters, module._buffers
    if parameters.get(tensor) is not None:
        return tensor
    for name in (tensor, f"{tensor}_orig", f"{tensor}_v"):
        if parameters.get(name) is not None or buffers.get(name) is not None:
            return name
    if "parametrizations" not in module._modules:
        return None
    inner = f"parametrizations.{tensor}.original"
    return next((name for name, _ in module.named_parameters() if name in (inner, f"{inner}1")), None)


def dimension(row: Description, module: nn.Module, value: int, shape: Sequence[int]) -> int | None:
    """The dimension of the tensor that ``value`` counts, or ``None`` where the row is not true of the module."""
    dim = row.transposed if row.transposed is not None and getattr(module, "transposed", False) else row.dim
    groups = getattr(module, "groups", 1) if row.grouped else 1
    return dim if dim < len(shape) and value == shape[dim] * groups else None
