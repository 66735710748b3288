"""Sensitivity: each trial is what pruning that part alone gives, and nothing stays changed."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import nn

import netopt
from netopt import masking
from netopt.errors import ArgumentTypeError, InvalidArgumentError, UnknownNameError


@pytest.fixture
def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 4))


@pytest.fixture
def x():
    return torch.randn(32, 8, generator=torch.Generator().manual_seed(1))


def metric_of(net, x):
    y = net(x).detach()
    return lambda model: 1 - ((model(x) - y).square().mean() / y.square().mean()).item()


def test_an_axis_alone_is_what_prune_neurons_makes_of_it(net, x):
    metric = metric_of(net, x)
    report = netopt.sensitivity(net, x, metric, amounts=(0.5, 0.25), importance="l2", progress=False)
    assert report.dense == 1.0
    assert list(report.curves["0"]) == [0.25, 0.5]
    for name in ("0", "2"):
        for amount in (0.25, 0.5):
            pruned = copy.deepcopy(net)
            netopt.prune_neurons(pruned, x, {name: amount}, include=name, importance="l2", progress=False)
            assert report.curves[name][amount] == pytest.approx(metric(pruned))


def test_a_tensor_alone_is_what_prune_weights_makes_of_it(net, x):
    metric = metric_of(net, x)
    report = netopt.sensitivity(net, x, metric, amounts=(0.5,), over="tensors", progress=False)
    for name in ("0.weight", "2.weight", "4.weight"):
        pruned = copy.deepcopy(net)
        netopt.prune_weights(pruned, 0.5, include=name, progress=False)
        assert report.curves[name][0.5] == pytest.approx(metric(pruned))


@pytest.mark.parametrize("over", ["axes", "kinds", "blocks", "tensors"])
def test_the_model_is_left_as_it_was(net, x, over):
    netopt.prune_weights(net, 0.25, include="2", progress=False)
    before, masks = copy.deepcopy(net.state_dict()), masking.masks(net)
    netopt.sensitivity(net, x, metric_of(net, x), over=over, importance="magnitude" if over == "tensors" else "l2")
    assert net.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert all(torch.equal(mask, masks[name]) for name, mask in masking.masks(net).items())


def test_below_the_floor_no_more_is_tried(net, x):
    calls = []
    report = netopt.sensitivity(
        net, x, lambda model: calls.append(1) or -len(calls), amounts=(0.2, 0.4, 0.6), floor=-2.5, progress=False
    )
    assert [len(curve) for curve in report.curves.values()] == [2, 1]


def test_amounts_can_be_handed_on(net, x):
    report = netopt.sensitivity(net, x, metric_of(net, x), importance="l2", progress=False)
    chosen = report.amounts(at=0.9)
    assert set(chosen) == {"0", "2"}
    netopt.prune_neurons(net, x, {name: amount for name, amount in chosen.items() if amount}, importance="l2")
    assert net[0].out_features == 16 - round(chosen["0"] * 16)
    json.dumps(report.to_dict())


def test_the_plot_has_curves_and_a_map(net, x):
    pytest.importorskip("matplotlib")
    drawn = netopt.sensitivity(net, x, metric_of(net, x), importance="l2", progress=False).plot()
    assert len(drawn.axes[0].lines) == 2
    assert len(drawn.axes[1].images) == 1


def test_wrong_arguments(net, x):
    with pytest.raises(InvalidArgumentError, match="fractions in"):
        netopt.sensitivity(net, x, float, amounts=(0.5, 1.0))
    with pytest.raises(UnknownNameError, match="axes, blocks, kinds, tensors"):
        netopt.sensitivity(net, x, lambda _: 1.0, over="layers")
    with pytest.raises(ArgumentTypeError, match="return a number"):
        netopt.sensitivity(net, x, lambda _: None)
    with pytest.raises(InvalidArgumentError, match="in \\[0, 1\\]"):
        netopt.sensitivity(net, x, metric_of(net, x), importance="l2", progress=False).amounts(at=98)


def test_kinds_and_blocks_are_what_prune_neurons_makes_of_them():
    from transformers import BertConfig, BertModel

    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 32}
    torch.manual_seed(0)
    net = BertModel(BertConfig(vocab_size=20, max_position_embeddings=8, **sizes)).eval()
    ids = torch.arange(1, 7)[None]
    y = net(ids).last_hidden_state.detach()

    @torch.no_grad()
    def metric(model):
        return 1 - float((model(ids).last_hidden_state - y).square().mean() / y.square().mean())

    options = {"importance": "l2", "include": ["ffn", "heads"], "progress": False}
    for over in ("kinds", "blocks"):
        report = netopt.sensitivity(net, ids, metric, amounts=(0.5,), over=over, **options)
        assert len(report.curves) >= 2
        for part, curve in report.curves.items():
            pruned = copy.deepcopy(net)
            netopt.prune_neurons(pruned, ids, {part: 0.5}, scope="layer", **options)
            assert metric(pruned) == pytest.approx(curve[0.5], abs=1e-5), part
        amounts = report.amounts(at=0.0)
        pruned = copy.deepcopy(net)
        netopt.prune_neurons(pruned, ids, amounts, scope="layer", **options)
        assert sum(one.numel() for one in pruned.parameters()) < sum(one.numel() for one in net.parameters())


def test_a_repaired_part_loses_less_and_the_model_is_left_alone(net):
    data = torch.randn(512, 8, generator=torch.Generator().manual_seed(2))
    metric, before = metric_of(net, data), copy.deepcopy(net.state_dict())
    plain, refitted = (
        netopt.sensitivity(net, data, metric, amounts=(0.5,), data=[data], repair=repair, progress=False)
        for repair in (False, True)
    )
    assert all(refitted.curves[name][0.5] > plain.curves[name][0.5] for name in plain.curves)
    assert all(torch.equal(one, before[name]) for name, one in net.state_dict().items())
    with pytest.raises(InvalidArgumentError, match="tensors"):
        netopt.sensitivity(net, data, metric, over="tensors", repair=True)
    with pytest.raises(InvalidArgumentError, match="needs data"):
        netopt.sensitivity(net, data, metric, repair=True)
