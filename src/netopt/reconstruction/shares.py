"""How much each weight is to lose, and how much an error of each of its outputs counts.

Where all weights compete, an entry goes if zeroing it costs the model's outputs less than others would: its square,
times the mean square of its input, times that of the gradient at its output. That says how many entries go from where;
which, and what makes up for them, is then for a solver to find.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from netopt.batches import Data
from netopt.errors import ForwardError, InvalidArgumentError, MissingDataError
from netopt.importance.activations import float_outputs
from netopt.importance.inputs import Matrix
from netopt.importance.output_costs import OutputCosts, output_costs
from netopt.masking.decide import Request, decide
from netopt.masking.quantile import Scores
from netopt.model.parameters import Place
from netopt.reconstruction.solvers import Demand

__all__ = ["LossOf", "Share", "in_proportion", "shared_out"]

LossOf: TypeAlias = "Callable[[Any, Any], Tensor]"
LEAST = 0.01
"""An output counts at least this share of the mean one."""


@dataclass(frozen=True)
class Share:
    """What one weight is to lose.

    Attributes:
        request: The pattern, and what the amount is counted over.
        count: How many entries in all, where that is not counted by rows.
        costs: What errors in it cost, where weights compete.
    """

    request: Request
    count: int = 0
    costs: OutputCosts | None = None

    def outputs_of(self, rows: Tensor) -> Tensor:
        """How much an error of each output of a matrix counts beside others, ``(groups, outputs, 1)``."""
        if self.costs is None or self.costs.outputs.shape != rows.shape[:2]:
            return torch.ones_like(rows[..., :1])
        found = self.costs.outputs.to(rows)
        return (found / found.mean().clamp(min=torch.finfo(found.dtype).tiny)).clamp(min=LEAST)[..., None]

    def demand(self, matrix: Matrix, count: int, name: str, alive: Tensor | None) -> Demand:
        """Returns which zeros are wanted in one matrix of the weight, which is to lose ``count`` entries."""
        shape = self.request.shape
        if shape.kind == "n:m":
            return Demand(matrix.columns, group=(shape.first, shape.second), alive=alive)
        if self.request.scope == "row":
            remove = self.request.count(matrix.columns, f"a row of {name!r}")
            return Demand(matrix.columns, remove, per_row=True, alive=alive)
        return Demand(matrix.columns, count, alive=alive)


def shared_out(
    model: nn.Module,
    wanted: Mapping[str, Place],
    requests: Sequence[tuple[Sequence[str], Request]],
    data: Data,
    *,
    loss_fn: LossOf | None,
    progress: bool,
) -> dict[str, Share]:
    """How much each weight is to lose; of a global amount, most where it costs the outputs least."""
    found: dict[str, Share] = {}
    competing = [(names, request) for names, request in requests if _compete(request)]
    chosen = {name: wanted[name] for names, _ in competing for name in names}
    costs: dict[str, OutputCosts] = {}
    if competing:
        try:
            costs = output_costs(model, chosen, data, loss_fn=loss_fn, outputs=float_outputs, progress=progress)
        except (MissingDataError, ForwardError) as error:
            raise type(error)(f"{error} Or write scope='layer', which asks for no gradients.") from error
    for names, request in requests:
        if _compete(request):
            found |= _by_cost({name: wanted[name] for name in names}, request, costs)
            continue
        by_rows = request.shape.kind == "n:m" or request.scope == "row"
        for name in names:
            count = 0 if by_rows else request.count(wanted[name].parameter.numel(), repr(name))
            found[name] = Share(request, count)
    return found


def _compete(request: Request) -> bool:
    if request.shape.kind == "block" or request.threshold is not None:
        what = "a block pattern" if request.shape.kind == "block" else "a threshold"
        raise InvalidArgumentError(f"layer-wise reconstruction takes no {what}; use 'unstructured' or 'n:m'.")
    return request.shape.kind == "unstructured" and request.scope == "global"


def _by_cost(wanted: Mapping[str, Place], request: Request, costs: Mapping[str, OutputCosts]) -> dict[str, Share]:
    """Of each what one threshold on the costs removes, by a quarter its proportion; that alone where none are known."""
    sizes = [place.parameter.numel() for place in wanted.values()]
    total = request.count(sum(sizes), "the weights chosen")
    counts = dict(zip(wanted, in_proportion(total, sizes), strict=True))
    known = {name: place for name, place in wanted.items() if name in costs}
    remove = sum(counts[name] for name in known)

    def score(place: Place) -> Scores:
        alive = None if place.mask is None else place.mask.bool()
        return Scores(costs[place.name].scores(place.value), alive=alive, name=place.name)

    kept = decide(known, score, Request(request.shape, "global", remove)) if known else {}
    told = [mask.numel() - int(torch.count_nonzero(mask)) for mask in kept.values()]
    # Costs are told by small changes: a quarter of equal shares in them generalises better than none, or a half.
    mixed = [3 * one + counts[name] for name, one in zip(known, told, strict=True)]
    counts |= zip(known, in_proportion(remove, mixed), strict=True)
    return {name: Share(request, count, costs.get(name)) for name, count in counts.items()}


def in_proportion(count: int, sizes: Sequence[int]) -> list[int]:
    """Shares ``count`` out so that the shares add up to it."""
    total, passed, shares = max(sum(sizes), 1), 0, []
    for size in sizes:
        shares.append(round(count * (passed + size) / total) - round(count * passed / total))
        passed += size
    return shares
