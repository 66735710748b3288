"""Schedules, gradual pruning, rewinding and regularisers: what is pruned when, what stays, and what goes on."""

from __future__ import annotations

import copy
import random

import pytest
import torch
from torch import nn

import netopt
from conftest import state_of, state_of_optimizer, unchanged
from netopt import masking
from netopt.errors import InvalidArgumentError, NetoptError, NothingToPruneError, UnknownNameError
from netopt.training.schedules import SCHEDULES, fraction, resolve


def mlp(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 4))


def convnet(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4)
    )


def train(model, optimizer, pruner, steps, start=0):
    for index in range(start, start + steps):
        x = torch.randn(16, 8, generator=torch.Generator().manual_seed(index))
        optimizer.zero_grad()
        (model(x) - x[:, :4]).square().mean().backward()
        optimizer.step()
        pruner.step()


@pytest.mark.parametrize("name", sorted(SCHEDULES))
def test_a_schedule_rises_from_little_to_all(name):
    values = [fraction(resolve(name), index / 50) for index in range(51)]
    assert values == sorted(values)
    assert values[-1] == 1.0
    assert name == "constant" or values[0] < 0.01


def test_a_schedule_out_of_range_is_refused():
    with pytest.raises(InvalidArgumentError, match=r"is 2 at progress 0\.5"):
        fraction(lambda progress: 2.0, 0.5)
    with pytest.raises(UnknownNameError, match="cubic"):
        resolve("cubik")


@pytest.mark.parametrize("schedule", [*sorted(SCHEDULES), lambda progress: progress**2])
def test_weights_end_at_exactly_the_final_amount(schedule):
    model = mlp()
    total = sum(one.weight.numel() for one in model if isinstance(one, nn.Linear))
    pruner = netopt.GradualPruner(model, final=0.9, begin=3, end=21, every=4, schedule=schedule)
    train(model, torch.optim.SGD(model.parameters(), lr=0.1), pruner, 25)
    assert sum(masking.sparsity(model).zeros.values()) == round(0.9 * total)
    assert [step for step, _ in pruner.history] == [3, 7, 11, 15, 19, 21]
    assert pruner.sparsity == 0.9


def test_with_regrowth_masked_weights_come_back():
    model = mlp()
    pruner = netopt.GradualPruner(model, final=0.5, end=2, schedule="constant", regrow=True)
    pruner.step()
    first = masking.masks(model)["0.weight"]
    with torch.no_grad():
        model[0].weight_orig[~first] = 10.0
    pruner.step()
    assert masking.masks(model)["0.weight"][~first].all()


@pytest.mark.parametrize("physical", [False, True])
def test_neurons_end_removed_and_the_optimizer_goes_on(physical):
    model = mlp()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    pruner = netopt.GradualPruner(
        model, kind="neurons", final=0.5, end=8, every=3, example_inputs=torch.randn(4, 8), optimizer=optimizer,
        importance="l2", physical=physical,
    )  # fmt: skip
    train(model, optimizer, pruner, 10)
    assert model[0].out_features + model[2].out_features == 24
    assert not masking.masks(model)
    assert all(optimizer.state[one]["exp_avg"].shape == one.shape for one in model.parameters())
    assert sum(len(cut.kept) for cut in pruner.plan.axes) == 24


@pytest.mark.parametrize(
    "options", [{}, {"kind": "neurons", "physical": True, "importance": "l2"}, {"kind": "neurons", "importance": "l2"}]
)
def test_a_run_taken_up_again_ends_bit_for_bit_the_same(options):
    def made():
        model = mlp()
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        inputs = {"example_inputs": torch.ones(1, 8), "optimizer": optimizer} if "kind" in options else {}
        return model, optimizer, netopt.GradualPruner(model, final=0.5, end=12, every=2, **options, **inputs)

    whole = made()
    train(whole[0], whole[1], whole[2], 15)
    before = made()
    train(*before, 7)
    after = made()
    after[2].load_state_dict(copy.deepcopy(before[2].state_dict()))
    after[0].load_state_dict(before[0].state_dict())
    after[1].load_state_dict(copy.deepcopy(before[1].state_dict()))
    train(*after, 8, start=7)
    assert after[2].history == whole[2].history
    for name, value in whole[0].state_dict().items():
        assert torch.equal(value, after[0].state_dict()[name]), name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"final": 1.0}, "fraction in"),
        ({"begin": 5, "end": 4}, "begin <= end"),
        ({"every": 0}, "every >= 1"),
        ({"kind": "neurons"}, "needs example_inputs"),
        ({"physical": True}, "is for kind='neurons'"),
        ({"kind": "blocks"}, "unknown kind"),
        ({"schedule": "cubik"}, "unknown schedule"),
    ],
)
def test_wrong_arguments_are_told_at_once(options, message):
    with pytest.raises(InvalidArgumentError, match=message):
        netopt.GradualPruner(mlp(), **{"end": 10, **options})


def test_a_state_that_lacks_something_is_refused():
    with pytest.raises(InvalidArgumentError, match="lacks 'masks', 'plan'"):
        netopt.GradualPruner(mlp(), end=3).load_state_dict({"steps": 1, "history": [], "total": None})


def test_the_plot_shows_schedule_and_history():
    pytest.importorskip("matplotlib")
    pruner = netopt.GradualPruner(mlp(), final=0.5, end=4)
    pruner.step()
    axes = pruner.plot().axes[0]
    assert len(axes.lines) == 2
    assert axes.get_legend() is not None


def test_rewinding_a_masked_model_keeps_the_masks():
    model = mlp()
    start = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(torch.randn_like(parameter))
    netopt.prune_weights(model, 0.5)
    masks = masking.masks(model)
    netopt.rewind(model, start)
    for name, mask in masks.items():
        assert torch.equal(masking.state_dict(model)[name], start[name] * mask)
    assert torch.equal(model[0].bias, start["0.bias"])


@pytest.mark.parametrize("build", [mlp, convnet])
def test_rewinding_a_smaller_model_narrows_the_state(build):
    model, inputs = build(), torch.randn(2, *((8,) if build is mlp else (3, 8, 8)))
    start = copy.deepcopy(model.state_dict())
    expected = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))
    plan = netopt.prune_neurons(model, inputs, 0.5, importance="l2").plan
    netopt.rewind(model, start, plan=plan)
    plan.apply(expected)
    for name, value in expected.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name


def test_a_state_that_does_not_fit_leaves_the_model_alone():
    model = mlp()
    netopt.prune_weights(model, 0.5)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(netopt.errors.MaskError):
        netopt.rewind(model, {"0.weight": torch.zeros(32, 8)})
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(("build", "kind"), [(mlp, "group_lasso"), (convnet, "group_lasso"), (convnet, "bn_l1")])
def test_the_term_has_the_gradient_of_its_formula(build, kind):
    model = build().double()
    inputs = torch.randn(2, *((8,) if build is mlp else (3, 8, 8)), dtype=torch.float64)
    penalty = netopt.Regularizer(model, inputs, kind=kind, strength=0.5)
    penalty().backward()
    if kind == "bn_l1":
        torch.testing.assert_close(model[1].weight.grad, 0.5 * model[1].weight.sign())
        return
    if build is mlp:
        rows = torch.cat([model[0].weight, model[0].bias[:, None]], 1)
        expected = 0.5 * 3.0 * model[0].weight / rows.norm(dim=1, keepdim=True)
        torch.testing.assert_close(model[0].weight.grad, expected)
    assert model[-1].weight.grad is None or not model[-1].weight.grad.any()


def test_proximal_steps_empty_whole_neurons_and_shrink_removes_them():
    model, inputs = mlp(), torch.randn(16, 8)
    penalty = netopt.Regularizer(model, inputs, strength=0.3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    zero = 0
    for _ in range(30):
        optimizer.zero_grad()
        (model(inputs) - inputs[:, :4]).square().mean().backward()
        optimizer.step()
        zero = penalty.proximal_step(0.01)
    assert 0 < zero < 48
    expected = model(inputs)
    netopt.shrink(model, inputs)
    assert model[0].out_features + model[2].out_features <= 48 - zero + 2  # one neuron stays on every axis
    torch.testing.assert_close(model(inputs), expected)


def test_a_model_without_free_axes_or_scales_is_refused():
    with pytest.raises(NothingToPruneError):
        netopt.Regularizer(nn.Linear(3, 2), torch.randn(1, 3))
    with pytest.raises(NothingToPruneError, match="scale"):
        netopt.Regularizer(mlp(), torch.randn(1, 8), kind="bn_l1")


JUNK = (None, True, -1, 1 << 70, float("nan"), "", "x", "0-2", [], {}, [[]], [1, 2, 3], ["", "training"], {"a": {}})


def entries(tree, path=()):
    yield path
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ():
        yield from entries(value, (*path, key))


@pytest.mark.parametrize("physical", [False, True])
def test_a_broken_state_is_refused_and_changes_nothing(physical):
    def made():
        model = mlp()
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        options = {"kind": "neurons", "importance": "l2", "example_inputs": torch.ones(1, 8), "optimizer": optimizer}
        return model, optimizer, netopt.GradualPruner(model, final=0.5, end=6, every=2, physical=physical, **options)

    before, chance, refused = made(), random.Random(0), 0
    train(*before, 4)
    whole = before[2].state_dict() | {"masks": dict(masking.masks(before[0]))}
    for _ in range(150):
        state = copy.deepcopy(whole)
        *way, last = chance.choice([path for path in entries(state) if path])
        holder = state
        for step in way:
            holder = holder[step]
        holder[last] = copy.deepcopy(chance.choice(JUNK))
        model, optimizer, pruner = made()
        unpruned, counts = (state_of(model), state_of_optimizer(optimizer)), (pruner.steps, pruner.history, pruner.plan)
        try:
            pruner.load_state_dict(state)
        except NetoptError:
            refused += 1
            assert (state_of(model), state_of_optimizer(optimizer)) == unpruned
            assert (pruner.steps, pruner.history, pruner.plan) == counts
    assert refused > 75


def test_a_step_that_fails_at_its_end_has_not_happened(monkeypatch):
    model = mlp()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    pruner = netopt.GradualPruner(
        model, kind="neurons", final=0.5, end=2, importance="l2", example_inputs=torch.ones(1, 8), optimizer=optimizer
    )
    train(model, optimizer, pruner, 1)

    def refuse(model):
        raise RuntimeError("no")

    monkeypatch.setattr(masking, "bake", refuse)  # the last of three calls, when neurons are removed already
    with unchanged(model, optimizer), pytest.raises(RuntimeError, match="no"):
        pruner.step()
    assert (pruner.steps, len(pruner.history), pruner.plan) == (1, 1, None)
    monkeypatch.undo()
    pruner.step()
    assert model[0].out_features + model[2].out_features == 24
