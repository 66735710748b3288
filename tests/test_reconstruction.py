"""Solvers against brute force, and blocks run by themselves against the whole model."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import nn

from netopt import masking
from netopt.parameters import places
from netopt.prune import prune_weights
from netopt.reconstruction import SOLVERS, Demand, replay
from netopt.reconstruction.solvers import DAMPENING, _polished
from netopt.reconstruction.stages import stages


def problem(rows=3, columns=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, generator=generator, dtype=torch.float64)
    inputs = torch.randn(200, columns, generator=generator, dtype=torch.float64) @ mixing
    weight = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    return weight, inputs.T @ inputs


def loss(found, weight, moment):
    return float(((weight - found) @ moment * (weight - found)).sum())


def best_for(weight, moment, kept):
    """The least-squares fit of each row, with what the mask leaves."""
    found = torch.zeros_like(weight)
    for row, mask in enumerate(kept):
        found[row, mask] = torch.linalg.solve(moment[mask][:, mask], (weight[row] @ moment)[mask])
    return found


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("seed", range(5))
def test_solvers_come_near_the_best_of_all_masks(solver, seed):
    weight, moment = problem(1, 8, seed)
    found, kept = SOLVERS[solver](weight, moment, weight @ moment, Demand(8, 4))
    assert int(kept.sum()) == 4
    assert not found[~kept].any()
    masks = [
        torch.zeros(1, 8).bool().index_fill(1, torch.tensor(chosen), True)
        for chosen in itertools.combinations(range(8), 4)
    ]
    losses = sorted(loss(best_for(weight, moment, mask), weight, moment) for mask in masks)
    zeroed = loss(weight * masking.keep_per_row(weight.abs(), 4), weight, moment)
    assert loss(found, weight, moment) <= max(losses[len(losses) // 5], 0.1 * zeroed)


def test_fitting_to_a_mask_is_least_squares():
    weight, moment = problem(5, 12)
    kept = torch.rand(5, 12) > 0.5
    found = _polished(weight * kept, weight @ moment, moment, kept, steps=100)
    torch.testing.assert_close(found, best_for(weight, moment, kept), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize(
    "demand",
    [Demand(10, 0), Demand(10, 17), Demand(10, 4, per_row=True), Demand(10, group=(2, 4))],
    ids=["none", "some", "row", "2:4"],
)
def test_demands_are_met_exactly(solver, demand):
    weight, moment = problem(4, 10)
    found, kept = SOLVERS[solver](weight, moment, weight @ moment, demand)
    if demand.group:
        assert (kept[:, :8].unflatten(1, (2, 4)).sum(-1) == 2).all()
    elif demand.per_row:
        assert ((~kept).sum(1) == demand.remove).all()
    else:
        assert int((~kept).sum()) == demand.remove
    if demand.remove == 0 and not demand.group:
        torch.testing.assert_close(found, weight, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("solver", SOLVERS)
def test_inputs_that_are_always_zero_do_no_harm(solver):
    weight, moment = problem(4, 10)
    moment[3] = moment[:, 3] = 0
    found, _ = SOLVERS[solver](weight, moment, weight @ moment, Demand(10, 20))
    assert torch.isfinite(found).all()
    nothing = torch.zeros_like(moment)
    found, kept = SOLVERS[solver](weight, nothing, weight @ nothing, Demand(10, 20))
    assert torch.isfinite(found).all()
    assert int((~kept).sum()) == 20


@pytest.mark.parametrize("solver", SOLVERS)
def test_changed_inputs_are_made_up_for(solver):
    """With inputs twice as large half the weights give the old outputs; the pull towards the old ones adds a little."""
    weight, moment = problem(4, 6)[0], 200 * torch.eye(6, dtype=torch.float64)
    found, _ = SOLVERS[solver](weight, 4 * moment, 2 * weight @ moment, Demand(6, 0))
    torch.testing.assert_close(found, weight * (0.5 + DAMPENING) / (1 + DAMPENING))


class Block(nn.Module):
    def __init__(self, width, spoil):
        super().__init__()
        self.up, self.down, self.spoil = nn.Linear(width, 2 * width), nn.Linear(2 * width, width), spoil

    def forward(self, x, scale, length=None, memory=None):
        x = x.mul_(1.0) if self.spoil else x
        return (x + self.down(self.up(x[:, :length]).relu()) * scale, None)


class Deep(nn.Module):
    """Blocks in a row, with a mask-like tensor for all, an integer of the batch, and layers before and after."""

    def __init__(self, spoil=False):
        super().__init__()
        self.before, self.after = nn.Linear(5, 8), nn.Linear(8, 3)
        self.blocks = nn.ModuleList(Block(8, spoil) for _ in range(4))

    def forward(self, x):
        scale = x.mean((1, 2), keepdim=True)
        x = self.before(x)
        for block in self.blocks:
            x = block(x, scale, length=x.shape[1])[0]
        return self.after(x)


class Remembering(Deep):
    """A chain it is not: each block also sees something made anew."""

    def forward(self, x):
        scale = x.mean((1, 2), keepdim=True)
        x = self.before(x)
        for block in self.blocks:
            x = block(x, scale * 1.0)[0]
        return self.after(x)


class Opaque(Deep):
    """One block is given something that might remember, so that no chain leads through it."""

    def forward(self, x):
        scale = x.mean((1, 2), keepdim=True)
        x = self.before(x)
        for index, block in enumerate(self.blocks):
            x = block(x, scale, memory=object() if index == 1 else None)[0]
        return self.after(x)


def sequential():
    return nn.Sequential(nn.Linear(5, 8), nn.ReLU(inplace=True), nn.Linear(8, 8), nn.Dropout(), nn.Linear(8, 3))


@pytest.mark.parametrize("make", [Deep, lambda: Deep(spoil=True), Remembering, Opaque, sequential])
@pytest.mark.parametrize("solver", SOLVERS)
def test_blocks_by_themselves_give_what_the_whole_model_gives(make, solver, monkeypatch):
    data = [torch.randn(4, length, 5) for length in (3, 7, 5)]
    results = []
    model = make()
    for whole in (True, False):
        copied = copy.deepcopy(model)
        with monkeypatch.context() as patch:
            if whole:
                patch.setattr(replay.Runner, "_reach", lambda self, block: None)
            prune_weights(copied, 0.5, importance=solver, data=data, progress=False)
        assert not any(part._forward_hooks for part in copied.modules())
        results.append({name: place.value for name, place in places(copied).items()})
    for name, value in results[0].items():
        torch.testing.assert_close(results[1][name], value, rtol=1e-4, atol=1e-5)


def test_the_model_is_not_run_for_every_layer(monkeypatch):
    counts = {}
    for make in (Deep, Remembering):
        model, seen = make(), []
        model.before.register_forward_hook(lambda *_, seen=seen: seen.append(1))
        prune_weights(model, 0.5, importance="admm", data=[torch.randn(4, 3, 5)], include="blocks", progress=False)
        counts[make] = len(seen)
    # Once to find the order, three times to reach the first block; where no other follows from it, twice a layer.
    assert counts == {Deep: 4, Remembering: 4 + 2 * 6}


def test_stages_follow_the_forward():
    model = Deep()
    wanted = {name: place for name, place in places(model).items() if place.prunable}
    order, chain = stages(model, torch.randn(2, 3, 5), wanted, model.blocks)
    assert chain.blocks == list(model.blocks)
    assert [list(stage.readings) for stage in order] == [[name] for name in wanted if name != "after.weight"] + [
        ["after.weight"]
    ]
    assert [stage.block for stage in order] == [None, *[block for block in model.blocks for _ in range(2)], None]
