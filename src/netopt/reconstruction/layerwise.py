"""Prunes a model layer by layer and updates what is kept, within one call that succeeds or leaves everything."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from netopt import batches
from netopt.errors import MissingDataError, NonFiniteError, ShapeMismatchError
from netopt.importance import Criterion, lookup
from netopt.importance.inputs import Matrix, filled_like
from netopt.importance.scoring import Scoring
from netopt.masking.decide import Request
from netopt.model.kernels import Unfused
from netopt.model.parameters import Place
from netopt.model.restore import restored
from netopt.model.signals import UndoLog
from netopt.model.writes import CopyOnWrite
from netopt.progress import bar
from netopt.reconstruction.replay import Runner, container_of
from netopt.reconstruction.shares import Share, in_proportion, shared_out
from netopt.reconstruction.solvers import Problem
from netopt.reconstruction.stages import by_block, moments, stages
from netopt.reconstruction.target import Moments, regression_target

__all__ = ["reconstruct"]


def reconstruct(
    model: nn.Module,
    wanted: Mapping[str, Place],
    requests: Sequence[tuple[Sequence[str], Request]],
    scoring: Scoring,
    log: UndoLog,
) -> dict[str, Tensor]:
    """Decides masks and updates the weights below them, layer by layer.

    Args:
        model: Run in eval mode, and given back as it was, except for the values of ``wanted``.
        wanted: The weights.
        requests: For groups of names, how much and in what pattern.
        scoring: A criterion of layers, and calibration batches, whose inputs are kept and whose activations are not; a
            global amount is shared out by ``loss_fn``, or else by the change of all outputs.
        log: Puts the weights back if its block fails.

    Returns:
        A mask for each name; the weights hold the updated values where it is ``True``.

    Raises:
        MissingDataError: there is no ``data``.
        InvalidArgumentError: a block pattern, a threshold, or a weight whose layer's outputs do not say what its
            entries should be: it is looked up, or used in several ways that share entries.
        ShapeMismatchError: the criterion returns something of another shape than the weight.
    """
    importance, progress = scoring.importance, scoring.progress
    assert not isinstance(importance, Mapping), "scores that are given update nothing"
    solver = lookup(importance, of="layers")
    if scoring.data is None:
        raise MissingDataError(f"importance {solver.name!r} needs the layers' inputs; pass data=, a list of batches.")
    held = list(batches.iterate(scoring.data))
    shares = shared_out(model, wanted, requests, held, loss_fn=scoring.loss_fn, progress=progress)
    own = {name: place.parameter.detach() for name, place in wanted.items()}
    before = {name: filled_like(one, 0).copy_(one) for name, one in own.items()}
    masks: dict[str, Tensor] = {}
    log.callback(_write, wanted, before, on=BaseException)
    with restored(model, writes=False) as looking:
        solved = {id(place.parameter) for place in wanted.values()}
        others = CopyOnWrite(one for one in model.parameters() if id(one) not in solved)
        looking.enter_context(others.watching(), Unfused(attention=False))
        batches.set_eval(model)
        container = container_of(model, wanted)
        order, chain = stages(model, held, wanted, container)
        # Who aims at no outputs needs no unpruned model, and makes up for nothing done before in the same block.
        aims = solver.needs != {"moment"}
        runner = Runner(model, held, container, chain, unpruned=(lambda: _exchanged(wanted, before)) if aims else None)
        for stage in bar(order if aims else by_block(order), solver.name, shown=progress, unit="stage"):
            for name, found in moments(runner, stage, wanted).items():
                parts = list(zip(stage.matrices[name], found, strict=True))
                masks[name] = _solve(wanted[name], parts, shares[name], solver)
    return {name: masks[name] for name in wanted}


def _write(wanted: Mapping[str, Place], values: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for name, place in wanted.items():
            place.parameter.copy_(values[name])


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


def _solve(place: Place, parts: Sequence[tuple[Matrix, Moments]], share: Share, solver: Criterion) -> Tensor:
    """Updates one parameter, matrix by matrix, and returns its mask."""
    parameter = place.parameter.detach()
    if not torch.isfinite(parameter).all():
        raise NonFiniteError(f"the weight {place.name!r} holds NaN or infinity; repair it, or exclude it.")
    # In memory as the parameter is, so that a matrix is the same entries of each.
    weight = filled_like(parameter, 0).copy_(place.value)
    alive = None if place.mask is None else filled_like(parameter, 0, torch.bool).copy_(place.mask)
    mask = filled_like(parameter, 1, torch.bool)
    counts = in_proportion(share.count, [matrix.count for matrix, _ in parts])
    for (matrix, moment), count in zip(parts, counts, strict=True):
        if not (torch.isfinite(moment.own).all() and torch.isfinite(moment.cross).all()):
            raise NonFiniteError(f"the inputs of {place.name!r} are not finite on this data; check data and weights.")
        rows = matrix.rows(weight).to(moment.own.dtype)
        demand = share.demand(matrix, count, place.name, None if alive is None else matrix.rows(alive))
        target = regression_target(rows, moment)
        solved, kept = solver(Problem(rows, moment.own.sum(0), target, demand, share.outputs_of(rows)))
        if solved.shape != rows.shape or kept.shape != rows.shape:
            raise ShapeMismatchError(
                f"importance {solver.name!r} was given {tuple(rows.shape)} entries of {place.name!r} and returned "
                f"weights of shape {tuple(solved.shape)} and a mask of shape {tuple(kept.shape)}; both must be alike."
            )
        matrix.write(weight, solved.to(weight.dtype))
        matrix.write(mask, kept)
    if not torch.isfinite(weight).all():
        raise NonFiniteError(f"the weights of {place.name!r} could not be reconstructed; give more or other data.")
    # What a mask hides keeps its value.
    parameter.copy_(torch.where(mask, weight, parameter))
    if place.mask is None:
        # Until the masks are put, zeros stand for them, so that later layers see pruned inputs.
        parameter.masked_fill_(~mask, 0)
    return mask.contiguous()
