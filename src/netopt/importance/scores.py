"""From a criterion and data to a score for every entry of every weight."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from netopt.batches import Data
from netopt.errors import ArgumentTypeError, NonFiniteError, ShapeMismatchError, UnknownNameError
from netopt.importance.evidence import collect
from netopt.importance.registry import Importance, lookup
from netopt.model.parameters import Place, places
from netopt.selectors import Selector, chosen

__all__ = ["scores"]


def scores(
    model: nn.Module,
    data: Data | None = None,
    importance: Importance | Mapping[str, Tensor] = "magnitude",
    *,
    loss_fn: Callable[[Any, Any], Tensor] | None = None,
    include: Selector = None,
    exclude: Selector = None,
    wanted: Mapping[str, Place] | None = None,
    named: Collection[str] | None = None,
    progress: bool = False,
) -> dict[str, Tensor]:
    """Scores every entry of the weights of ``model``; higher means keep.

    Args:
        model: Any module; it is run only if the criterion needs that, in eval mode, and given back as it was.
        data: Batches, for criteria that need gradients or inputs; read once.
        importance: A criterion's name, a criterion, a function of :class:`Evidence`, or the scores themselves, a
            tensor for each name.
        loss_fn: Of the model's result and a batch's targets, for criteria that need the loss; by default the ``loss``
            the model itself returns.
        include: Restricts the weights to these names, patterns, types, modules or predicates.
        exclude: Leaves these out.
        wanted: The weights themselves, instead of those pruned by default.
        named: Those among them that a score is owed of, by default all; of others none is returned if they meet no
            inputs on this data and the criterion needs inputs.
        progress: Whether to show a progress bar.

    Returns:
        For each parameter name, in the model's order, a tensor of its shape.

    Raises:
        UnknownNameError: no such criterion.
        MissingDataError: the criterion needs data or a loss and there is none.
        NonFiniteError: a weight or a score is NaN.
        ShapeMismatchError: a criterion's scores do not have the weight's shape.

    Example:
        >>> model = nn.Linear(2, 1, bias=False)
        >>> _ = model.weight.data.copy_(torch.tensor([[-3.0, 2.0]]))
        >>> scores(model)
        {'weight': tensor([[3., 2.]])}
    """
    if wanted is None:
        selected = chosen(model, include, exclude)
        wanted = {name: place for name, place in places(model).items() if place.prunable and selected(name)}
    for name, place in wanted.items():
        if torch.isnan(place.parameter.detach()).any():
            raise NonFiniteError(f"the weight {name!r} holds NaN; repair it, or exclude it.")
    if isinstance(importance, Mapping):
        return {name: _given(importance, name, place) for name, place in wanted.items()}
    criterion = lookup(importance)
    owed = wanted if named is None else named
    seen = collect(model, wanted, criterion.needs, data=data, loss_fn=loss_fn, named=owed, progress=progress)
    return {name: _checked(criterion(one), name, wanted[name]) for name, one in seen.items()}


def _given(given: Mapping[str, Tensor], name: str, place: Place) -> Tensor:
    if name not in given:
        raise UnknownNameError(f"the scores given have none for {name!r}; add one, or exclude it.")
    return _checked(given[name], name, place)


def _checked(score: Any, name: str, place: Place) -> Tensor:
    if not isinstance(score, Tensor):
        raise ArgumentTypeError(f"the score of {name!r} must be a tensor, not {type(score).__name__}.")
    if score.shape != place.parameter.shape:
        raise ShapeMismatchError(
            f"the score of {name!r} has shape {tuple(score.shape)} and the weight {tuple(place.parameter.shape)}; "
            "a criterion returns a score for every entry."
        )
    if torch.isnan(score).any():
        raise NonFiniteError(f"the score of {name!r} holds NaN; check the criterion and the data.")
    return score.detach()
