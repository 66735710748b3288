"""Lottery tickets: what survived pruning gets back the values it had earlier; what was pruned stays pruned."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from netopt import masking
from netopt.errors import ArgumentTypeError
from netopt.plan import Plan

__all__ = ["rewind"]


def rewind(model: nn.Module, state: Mapping[str, Any], *, plan: Plan | None = None) -> None:
    """Puts the weights that survived pruning back to the values of an earlier ``state``, in place.

    Masks stay where they are; buffers go back as well. If the state does not fit, the model is left as it was.

    Args:
        model: Masked, or physically smaller.
        state: A ``state_dict`` of the model before it was pruned, for example a copy of the one at initialisation.
        plan: What was removed physically since, such as ``report.plan``; the state is narrowed by it.

    Raises:
        ArgumentTypeError: ``model`` is no module or ``plan`` no plan.
        MaskError: A name is missing, or unexpected.
        ShapeMismatchError: A tensor has another shape than the model's.

    References:
        The Lottery Ticket Hypothesis (Frankle and Carbin, 2019), https://arxiv.org/abs/1803.03635

    Example:
        >>> import copy, netopt
        >>> model = nn.Linear(4, 2)
        >>> start = copy.deepcopy(model.state_dict())
        >>> _ = nn.init.ones_(model.weight)
        >>> _ = netopt.prune_weights(model, 0.5)
        >>> rewind(model, start)
        >>> bool(((model.weight == start["weight"]) | (model.weight == 0)).all())
        True
    """
    if not isinstance(model, nn.Module):
        raise ArgumentTypeError(f"model must be a torch.nn.Module, not {type(model).__name__}.")
    if plan is not None and not isinstance(plan, Plan):
        raise ArgumentTypeError(f"plan must be a netopt.Plan, such as report.plan, not {type(plan).__name__}.")
    narrowed = state if plan is None else {name: _narrowed(value, name, plan) for name, value in state.items()}
    masking.load_state_dict(model, narrowed)


def _narrowed(value: Any, name: str, plan: Plan) -> Any:
    if not isinstance(value, Tensor):
        return value
    replaced = plan.values.get(name)
    if replaced is not None:
        return replaced.to(value.device, value.dtype)
    for dim, kept in plan.tensors.get(name, {}).items():
        value = torch.index_select(value, dim, kept.to(value.device))
    return value
