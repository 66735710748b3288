"""What a layer aims at, against data that the calibration has not seen, and against regressions on the samples."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch import nn

from netopt.model.parameters import places
from netopt.reconstruction import replay, target
from netopt.reconstruction.stages import moments, stages
from netopt.reconstruction.target import Moments, regression_target

COLUMNS = 12


def inputs(count, seed, drift=0.5):
    """Inputs in the unpruned model, and in one pruned so far, that has lost some and turned others."""
    generator = torch.Generator().manual_seed(7)
    mixing = torch.randn(COLUMNS, COLUMNS, generator=generator, dtype=torch.float64)
    turned = torch.eye(COLUMNS).double() + drift * torch.randn(COLUMNS, COLUMNS, generator=generator).double() / 4
    generator.manual_seed(seed)
    x = torch.randn(count, COLUMNS, generator=generator, dtype=torch.float64) @ mixing
    noise = torch.randn(count, COLUMNS, generator=generator, dtype=torch.float64)
    return x, x @ turned + drift * noise


def weight(rows=5):
    return torch.randn(rows, COLUMNS, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def halves(x, changed):
    cut = len(x) // 2
    parts = [(x[:cut], changed[:cut]), (x[cut:], changed[cut:])]
    own = torch.stack([other.T @ other for _, other in parts])
    cross = torch.stack([one.T @ other for one, other in parts])
    return Moments(own[:, None], cross[:, None])


def matrix(w, x, changed):
    """The matrix aimed at, from what it makes of the second moment."""
    found = regression_target(w[None], halves(x, changed))[0]
    return torch.linalg.lstsq(changed.T @ changed, found.T).solution.T


def error(found, w, x, changed):
    return float((w @ x.T - found @ changed.T).square().sum())


def regression(w, x, changed, pull, norm=None):
    """By least squares in the samples themselves, and in rows that pull each entry towards the weight's."""
    norm = changed.norm(dim=0) if norm is None else norm
    rows = torch.cat([changed / norm, pull**0.5 * torch.eye(COLUMNS).double()])
    wanted = torch.cat([x @ w.T - changed @ w.T, torch.zeros(COLUMNS, len(w)).double()])
    return w + torch.linalg.lstsq(rows, wanted).solution.T / norm


@pytest.mark.parametrize("count", [16, 40, 100, 2000])
@pytest.mark.parametrize("drift", [0.02, 0.1, 0.5])
def test_on_other_data_the_aim_is_no_worse_than_the_weight_itself(count, drift):
    w, fresh = weight(), inputs(4000, 1000, drift)
    plain, least, found = error(w, w, *fresh), [], []
    for seed in range(6):
        x, changed = inputs(count, seed, drift)
        found.append(error(matrix(w, x, changed), w, *fresh) / plain)
        least.append(error(regression(w, x, changed, 1e-9), w, *fresh) / plain)
    assert max(found) <= 1.02
    assert sum(found) <= 1.05 * sum(least)


def test_with_much_data_the_aim_is_what_comes_nearest_to_the_unpruned_outputs():
    w, (x, changed) = weight(), inputs(4000, seed=0)
    best = error(regression(w, x, changed, 1e-9), w, x, changed)
    assert error(matrix(w, x, changed), w, x, changed) <= 1.001 * best
    assert best < 0.9 * error(w, w, x, changed)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("count", [20, 60, 300])
def test_the_pull_is_the_one_that_serves_the_other_half_best(count, seed):
    w, (x, changed) = weight(), inputs(count, seed)
    norm, cut = changed.norm(dim=0), count // 2
    parts = [(x[:cut], changed[:cut]), (x[cut:], changed[cut:])]
    losses = {torch.inf: error(w, w, x, changed)}
    for pull in target.PULLS:
        fits = [regression(w, *part, pull, norm) for part in parts]
        losses[pull] = error(fits[0], w, *parts[1]) + error(fits[1], w, *parts[0])
        if losses[pull] >= min(list(losses.values())[:-1]):
            break
    best = min(losses, key=losses.__getitem__)
    expected = w if best == torch.inf else regression(w, x, changed, best)
    torch.testing.assert_close(regression_target(w[None], halves(x, changed))[0], expected @ changed.T @ changed)


def test_the_pull_is_told_from_some_of_many_rows(monkeypatch):
    w, found = weight(rows=40)[None], halves(*inputs(200, 0))
    monkeypatch.setattr(target, "ROWS", 8)
    torch.testing.assert_close(regression_target(w[:, ::5], found), regression_target(w, found)[:, ::5])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_inputs_that_have_not_changed_leave_the_weight_as_it_is(dtype):
    w, (x, _) = weight().to(dtype), inputs(50, 0)
    found = halves(x.to(dtype), x.to(dtype))
    assert torch.equal(regression_target(w[None], found), w @ found.own.sum(0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_inputs_that_are_always_zero_do_no_harm(dtype):
    w, (x, changed) = weight().to(dtype), inputs(50, 0)
    changed[:, 3] = 0
    assert torch.isfinite(regression_target(w[None], halves(x.to(dtype), changed.to(dtype)))).all()
    assert not regression_target(w[None], halves(x.to(dtype), 0 * changed.to(dtype))).any()


@pytest.mark.parametrize("sizes", [(6,), (1,), (4, 7), (5, 2, 4)])
def test_every_other_batch_is_of_the_same_half_and_a_single_one_is_cut(sizes):
    torch.manual_seed(0)
    model, data = nn.Linear(4, 3), [torch.randn(size, 4) for size in sizes]
    order, chain = stages(model, data, {"weight": places(model)["weight"]})
    runner = replay.Runner(model, data, None, chain)
    (whole,) = moments(runner, order[0], {"weight": places(model)["weight"]})["weight"]
    runner = replay.Runner(model, data, None, chain, unpruned=contextlib.nullcontext)
    (found,) = moments(runner, order[0], {"weight": places(model)["weight"]})["weight"]
    assert len(whole.own) == 1
    torch.testing.assert_close(whole.own[0], found.own.sum(0))
    assert torch.equal(whole.cross, whole.own)
    parts = [torch.cat(data[0::2]), torch.cat([*data[1::2], torch.empty(0, 4)])]
    if len(sizes) == 1:
        parts = [data[0][: sizes[0] // 2], data[0][sizes[0] // 2 :]]
    for half, x in enumerate(parts):
        torch.testing.assert_close(found.own[half, 0], x.T @ x)
        torch.testing.assert_close(found.cross[half, 0], x.T @ x)
