"""From scores, a pattern, a scope and an amount to masks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from netopt.errors import InvalidArgumentError, NonFiniteError, percent
from netopt.masking.patterns import Shape, expand_blocks, keep_n_of_m, keep_per_row, mean_of_blocks
from netopt.masking.quantile import Scores, keep_above, keep_best
from netopt.model.parameters import Place

__all__ = ["Request", "decide"]


@dataclass(frozen=True)
class Request:
    """How much to remove, counted where.

    Attributes:
        shape: The pattern.
        scope: What the amount is counted over: ``"global"``, ``"layer"`` or ``"row"``.
        amount: A fraction, or a count, of entries (of blocks, for a block pattern), those zero already among them.
        threshold: Remove what scores below, instead of an amount.
    """

    shape: Shape
    scope: str = "global"
    amount: float | int | None = None
    threshold: float | None = None

    def count(self, size: int, where: str) -> int:
        """Returns how many of ``size`` entries to remove.

        Raises:
            InvalidArgumentError: a count that exceeds them.
        """
        if isinstance(self.amount, int):
            if self.amount > size:
                raise InvalidArgumentError(
                    f"amount={self.amount} is more than the {size} entries of {where}; "
                    f"give a smaller count, or a fraction in [0, 1){percent(self.amount)}."
                )
            return self.amount
        return round((self.amount or 0.0) * size)


def decide(wanted: Mapping[str, Place], score: Callable[[Place], Scores], request: Request) -> dict[str, Tensor]:
    """Decides what is kept of each weight; what is masked already stays so, and counts as removed.

    Args:
        wanted: The weights, in the model's order.
        score: The scores of one weight.
        request: How much, in what pattern.

    Returns:
        A mask for each name, of the weight's shape.
    """
    if request.shape.kind == "block":
        return _blocks(wanted, score, request)
    if request.shape.kind == "n:m" or (request.scope == "row" and request.threshold is None):
        return {name: _by_rows(place, score(place), request) for name, place in wanted.items()}
    scored = [score(place) for place in wanted.values()]
    return dict(zip(wanted, _keep(scored, request), strict=True))


def _keep(scored: Sequence[Scores], request: Request) -> list[Tensor]:
    if request.threshold is not None:
        return keep_above(scored, request.threshold)
    groups = [scored] if request.scope == "global" else [[one] for one in scored]
    masks: list[Tensor] = []
    for group in groups:
        where = "the weights chosen" if len(groups) == 1 else repr(group[0].name)
        dead = sum(one.size - int(torch.count_nonzero(one.alive)) for one in group if one.alive is not None)
        remove = max(request.count(sum(one.size for one in group), where), dead)
        masks += keep_best(group, remove)
    return masks


def _by_rows(place: Place, scores: Scores, request: Request) -> Tensor:
    shape = request.shape
    # Read as they lie where nothing is removed yet; who ranks them refuses NaN.
    ready = scores.alive is None and shape.kind == "n:m"
    rows = place.orientation.rows(scores.tensor.detach() if ready else scores.materialize())
    if shape.kind == "n:m":
        try:
            keep = keep_n_of_m(rows, shape.first, shape.second, magnitude=ready and scores.magnitude)
        except NonFiniteError as error:
            raise NonFiniteError(f"{place.name!r}: {error}") from None
    else:
        keep = keep_per_row(rows, request.count(rows.shape[1], f"a row of {place.name!r}"))
    keep = place.orientation.back(keep, place.parameter)
    return keep if scores.alive is None else keep & scores.alive


def _blocks(wanted: Mapping[str, Place], score: Callable[[Place], Scores], request: Request) -> dict[str, Tensor]:
    shape = request.shape
    reduced: list[Scores] = []
    for name, place in wanted.items():
        scores = score(place)
        full = scores.materialize()
        alive = None
        if scores.alive is not None:
            full = torch.where(scores.alive, full, 0)
            alive = mean_of_blocks(place.orientation.rows(scores.alive.float()), shape.first, shape.second) > 0
        means = mean_of_blocks(place.orientation.rows(full), shape.first, shape.second)
        reduced.append(Scores(means, alive=alive, name=name))
    masks: dict[str, Tensor] = {}
    for (name, place), keep in zip(wanted.items(), _keep(reduced, request), strict=True):
        rows = place.orientation.rows(place.parameter.detach())
        full = expand_blocks(keep, shape.first, shape.second, rows.shape)
        mask = place.orientation.back(full, place.parameter)
        masks[name] = mask if place.mask is None else mask & place.mask.bool()
    return masks
