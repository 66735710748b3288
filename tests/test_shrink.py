"""shrink: what does nothing goes, and what the model computes stays."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from conftest import unchanged
from netopt import measure
from netopt.errors import ArgumentTypeError, VerificationError
from netopt.prune import prune_neurons, shrink
from netopt.prune import verify as verify_module
from test_prune_neurons import built, train


@pytest.mark.parametrize("name", ["mlp", "cnn"])
def test_masks_become_absence(name):
    model, x = built(name, torch.float64)
    optimizer = torch.optim.Adam(model.parameters())
    train(model, optimizer, x)
    removed = copy.deepcopy(model)
    masked = prune_neurons(model, x, 0.5, mode="mask", progress=False)
    twin = prune_neurons(removed, x, 0.5, progress=False)
    before = model.eval()(x)
    report = shrink(model, x, optimizer)
    assert report.params_after == twin.params_after < masked.params_after
    torch.testing.assert_close(model(x), before)
    train(model, optimizer, x)
    assert all(optimizer.state[one]["exp_avg"].shape == one.shape for one in model.parameters())


def test_a_bias_through_an_activation_is_folded():
    model, x = built("mlp", torch.float64)
    with torch.no_grad():
        model[0].weight[[1, 4]] = 0
        model[0].bias[[1, 4]] = torch.tensor([2.0, -1.0], dtype=torch.float64)
        model[3].weight[5] = 0
        model[3].bias[5] = 0.7
    other = torch.randn(9, 6, dtype=torch.float64)
    before = model.eval()(other)
    report = shrink(model, x)
    assert (model[0].out_features, model[3].out_features) == (8, 7)
    torch.testing.assert_close(model(other), before)
    assert {row.name: row.note for row in report.rows} == dict.fromkeys(
        ("0", "3"), "constants folded into what reads them"
    )


def test_what_died_of_the_removal_goes_as_well():
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 5, bias=False), nn.ReLU(), nn.Linear(5, 2))
    with torch.no_grad():
        model[0].weight[1:] = 0
        model[0].bias[1:] = 0
        model[2].weight[2:, 0] = 0
    x = torch.randn(4, 3)
    before = model(x)
    report = shrink(model, x)
    assert (model[0].out_features, model[2].out_features) == (1, 2)
    torch.testing.assert_close(model(x), before)
    fresh = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 5, bias=False), nn.ReLU(), nn.Linear(5, 2))
    report.plan.apply(fresh)
    fresh.load_state_dict(model.state_dict())


@pytest.mark.parametrize("padding", [0, 1])
def test_constants_are_folded_into_convolutions_that_read_them_everywhere(padding):
    model = nn.Sequential(nn.Conv2d(1, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 3, padding=padding)).double()
    with torch.no_grad():
        model[0].weight[2] = 0
        model[0].bias[2] = 1.5
    x = torch.randn(2, 1, 5, 5, dtype=torch.float64)
    before = model(x)
    shrink(model, x)
    # At a border padded with zeros a constant is not read everywhere, so the neuron stays.
    assert model[0].out_channels == 4 - (padding == 0)
    torch.testing.assert_close(model(x), before)


def test_a_dead_axis_keeps_one_neuron():
    model, x = built("mlp")
    with torch.no_grad():
        model[0].weight.zero_()
        model[0].bias.zero_()
    before = model.eval()(x)
    shrink(model, x)
    assert model[0].out_features == 1
    torch.testing.assert_close(model(x), before)


def test_nothing_dead_is_nothing_done():
    model, x = built("cnn")
    with unchanged(model):
        report = shrink(model, x)
    assert report.params_after == report.params_before
    assert not report.plan.tensors


def test_unstructured_masks_stay_on_what_stays():
    model, x = built("mlp")
    prune.l1_unstructured(model[0], "weight", 0.4)
    with torch.no_grad():
        model[0].weight_mask[:3] = 0
    before = model.eval()(x)
    zeros = measure.nonzero_parameters(model)
    shrink(model, x)
    assert model[0].weight_mask.shape == (7, 6)
    torch.testing.assert_close(model(x), before)
    assert measure.nonzero_parameters(model) < zeros


def test_a_failing_check_undoes_all_rounds_and_folds(monkeypatch):
    model, x = built("mlp")
    with torch.no_grad():
        model[0].weight[1] = 0

    def fail(*_, **__):
        raise VerificationError("no")

    monkeypatch.setattr(verify_module.Reference, "check", fail)
    with unchanged(model), pytest.raises(VerificationError):
        shrink(model, x)


def test_complex_neurons_go_where_they_are_zero():
    class Complex(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Parameter(torch.randn(3, 6, dtype=torch.complex64))
            self.last = nn.Parameter(torch.randn(6, 2, dtype=torch.complex64))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return ((x.to(torch.complex64) @ self.first) @ self.last).abs()

    model, x = Complex(), torch.randn(4, 3)
    with torch.no_grad():
        model.first[:, [0, 3]] = 0
    before = model(x)
    report = shrink(model, x)
    assert (report.params_before, report.params_after) == (30, 20)
    assert "33.3 % of 6 neurons removed" in str(report)
    torch.testing.assert_close(model(x), before)


def test_only_modules_shrink():
    with pytest.raises(ArgumentTypeError, match="not str"):
        shrink("model", torch.ones(1))
