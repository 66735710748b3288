"""Prunes a model layer by layer and updates what is kept, within one call that succeeds or leaves everything."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from tqdm import tqdm

from netopt import batches
from netopt.batches import Batch
from netopt.errors import InvalidArgumentError, MissingDataError, NonFiniteError
from netopt.importance.inputs import every_contraction
from netopt.masking.decide import Request
from netopt.parameters import Place
from netopt.reconstruction.replay import Runner, container_of
from netopt.reconstruction.solvers import SOLVERS, Demand, Solver
from netopt.reconstruction.stages import Moments, moments, stages
from netopt.restore import given_back

__all__ = ["reconstruct"]


def reconstruct(
    model: nn.Module,
    wanted: Mapping[str, Place],
    data: Iterable[Batch] | None,
    solver: str,
    requests: Sequence[tuple[Sequence[str], Request]],
    *,
    progress: bool = False,
) -> dict[str, Tensor]:
    """Decides masks and updates the weights below them, layer by layer.

    Args:
        model: Run in eval mode, and given back as it was, except for the values of ``wanted``.
        wanted: The weights.
        data: Calibration batches; inputs are kept, activations are not.
        solver: A name in :data:`netopt.reconstruction.SOLVERS`.
        requests: For groups of names, how much and in what pattern. A global amount is shared out in proportion.
        progress: Whether to show a progress bar.

    Returns:
        A mask for each name; the weights hold the updated values where it is ``True``.

    Raises:
        MissingDataError: there is no ``data``.
        InvalidArgumentError: a block pattern, a threshold, or a weight that is no matrix of a layer.
    """
    if data is None:
        raise MissingDataError(f"importance {solver!r} needs the layers' inputs; pass data=, a list of batches.")
    demands = _demands(wanted, requests)
    held = list(batches.iterate(data))
    before = {name: place.parameter.detach().clone() for name, place in wanted.items()}
    masks: dict[str, Tensor] = {}
    try:
        with given_back(model), every_contraction(model):
            model.eval()
            container = container_of(model, wanted)
            order, chain = stages(model, held[0], wanted, container)
            runner = Runner(model, held, container, chain, unpruned=lambda: _exchanged(wanted, before))
            for stage in tqdm(order, desc=solver, disable=not progress, leave=False):
                for name, moment in moments(runner, stage, wanted).items():
                    masks[name] = _solve(wanted[name], moment, demands[name], SOLVERS[solver])
    except BaseException:
        with torch.no_grad():
            for name, place in wanted.items():
                place.parameter.copy_(before[name])
        raise
    return {name: masks[name] for name in wanted}


@contextmanager
def _exchanged(wanted: Mapping[str, Place], values: Mapping[str, Tensor]) -> Iterator[None]:
    """Lets the parameters hold other values for a while."""
    own = {name: place.parameter.data for name, place in wanted.items()}
    try:
        for name, place in wanted.items():
            place.parameter.data = values[name]
        yield
    finally:
        for name, place in wanted.items():
            place.parameter.data = own[name]


def _solve(place: Place, moments: Moments, demands: Sequence[Demand], solver: Solver) -> Tensor:
    """Updates one parameter, group by group, and returns its mask."""
    orientation, parameter = place.orientation, place.parameter
    moment = moments.own
    rows = orientation.rows(place.value).to(moment.dtype)
    if not torch.isfinite(rows).all():
        raise NonFiniteError(f"the weight {place.name!r} holds NaN or infinity; repair it, or exclude it.")
    if not torch.isfinite(moment).all():
        raise NonFiniteError(f"the inputs of {place.name!r} are not finite on this data; check data and weights.")
    parts = rows.chunk(len(moment))
    cross = moments.cross
    solved = [
        solver(part, own, part @ other, demand)
        for part, own, other, demand in zip(parts, moment, cross, demands, strict=True)
    ]
    weight = orientation.back(torch.cat([one for one, _ in solved]), parameter)
    mask = orientation.back(torch.cat([kept for _, kept in solved]), parameter).contiguous()
    if not torch.isfinite(weight).all():
        raise NonFiniteError(f"the weights of {place.name!r} could not be reconstructed; give more or other data.")
    with torch.no_grad():
        # What a mask hides keeps its value.
        parameter.copy_(torch.where(mask, weight.to(parameter.dtype), parameter))
        if place.mask is None:
            # Until the masks are put, zeros stand for them, so that later layers see pruned inputs.
            parameter.masked_fill_(~mask, 0)
    return mask


def _demands(wanted: Mapping[str, Place], requests: Sequence[tuple[Sequence[str], Request]]) -> dict[str, list[Demand]]:
    found: dict[str, list[Demand]] = {}
    for names, request in requests:
        if request.shape.kind == "block" or request.threshold is not None:
            what = "a block pattern" if request.shape.kind == "block" else "a threshold"
            raise InvalidArgumentError(f"layer-wise reconstruction takes no {what}; use 'unstructured' or 'n:m'.")
        sizes = [wanted[name].parameter.numel() for name in names]
        counts = _shares(request, names, sizes)
        for name, count in zip(names, counts, strict=True):
            found[name] = _by_group(wanted[name], request, count)
    return found


def _shares(request: Request, names: Sequence[str], sizes: Sequence[int]) -> list[int]:
    if request.shape.kind == "n:m" or request.scope == "row":
        return [0] * len(names)
    if request.scope == "layer":
        return [request.count(size, repr(name)) for name, size in zip(names, sizes, strict=True)]
    return _in_proportion(request.count(sum(sizes), "the weights chosen"), sizes)


def _in_proportion(count: int, sizes: Sequence[int]) -> list[int]:
    """Shares ``count`` out so that the shares add up to it."""
    total, passed, shares = max(sum(sizes), 1), 0, []
    for size in sizes:
        shares.append(round(count * (passed + size) / total) - round(count * passed / total))
        passed += size
    return shares


def _by_group(place: Place, request: Request, count: int) -> list[Demand]:
    module, _ = place.owners[0]
    groups = int(getattr(module, "groups", 1)) if place.orientation.inputs == 1 else 1
    rows = place.orientation.rows(place.parameter.detach())
    columns = rows.shape[1]
    alive = [None] * groups if place.mask is None else place.orientation.rows(place.mask.bool()).chunk(groups)
    if request.shape.kind == "n:m":
        group = (request.shape.first, request.shape.second)
        return [Demand(columns, group=group, alive=one) for one in alive]
    if request.scope == "row":
        remove = request.count(columns, f"a row of {place.name!r}")
        return [Demand(columns, remove, per_row=True, alive=one) for one in alive]
    shares = _in_proportion(count, [rows.numel() // groups] * groups)
    return [Demand(columns, share, alive=one) for share, one in zip(shares, alive, strict=True)]
