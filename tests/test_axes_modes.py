"""A forward is traced in evaluation and in training mode, and what both say holds together."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from netopt.axes import find_axes


class Chosen(nn.Module):
    """Adds a parameter in training mode."""

    def __init__(self):
        super().__init__()
        self.extra = nn.Parameter(torch.randn(8))

    def forward(self, x):
        return x + self.extra if self.training else x


class ByItsForward(nn.Module):
    """Calls the forward of a part, which is then not called as a module."""

    def __init__(self):
        super().__init__()
        self.part = Chosen()

    def forward(self, x):
        return self.part.forward(x)


@pytest.mark.parametrize(("part", "name"), [(Chosen, "1.extra"), (ByItsForward, "1.part.extra")])
def test_a_tensor_read_in_training_alone_shrinks_too(part, name):
    model = nn.Sequential(nn.Linear(5, 8), part(), nn.Linear(8, 3))
    members = {member.tensor for member in find_axes(model, torch.randn(4, 5))["0"].members}
    assert members == {"0.weight", "0.bias", name, "2.weight"}


class Failing(nn.Module):
    """Cannot be run in training mode, and counts its runs."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        if self.training:
            raise RuntimeError("not in training")
        return x


def test_a_forward_that_fails_in_training_is_left_out():
    model = nn.Sequential(nn.Linear(5, 8), Failing(), nn.Linear(8, 3))
    assert find_axes(model, torch.randn(4, 5))["0"].frozen is None
    assert model[1].calls == 0
    assert model.training


class AddedNoise(nn.Module):
    def forward(self, x):
        return x + torch.randn_like(x) if self.training else x


class NoisyTwice(nn.Module):
    """Noise is added to what is not zero where it is masked, and then to what is."""

    def __init__(self):
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(5, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.one, self.other = AddedNoise(), AddedNoise()

    def forward(self, x):
        x = self.other(self.middle(self.one(self.first(x).sigmoid())))
        return self.last(x) + x.square().sum(-1, keepdim=True)


def test_noise_on_what_is_zero_is_another_thing():
    assert not find_axes(NoisyTwice().eval(), torch.randn(4, 5))["middle"].exact


class WithATrainOfItsOwn(nn.Module):
    """Has another attribute for its mode, and merges a weight for evaluation."""

    def __init__(self, refuses=False):
        super().__init__()
        self.first, self.last = nn.Linear(5, 8), nn.Linear(8, 3)
        self.extra, self.merged, self.refuses = nn.Parameter(torch.randn(8)), False, refuses

    def train(self, mode=True):
        if mode and self.refuses:
            raise RuntimeError("is not to be trained")
        if self.merged is mode:
            self.first.bias.data += -self.extra.data if mode else self.extra.data
            self.merged = not mode
        return super().train(mode)

    def forward(self, x):
        x = self.first(x)
        return self.last(x if self.merged else x + self.extra) + 0 * self.extra.sum()


@pytest.mark.parametrize("training", [True, False])
def test_a_train_of_its_own_is_run_and_undone(training):
    model = WithATrainOfItsOwn().train(training)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    axes = find_axes(model, torch.randn(4, 5))
    assert "extra:0" in map(str, axes["first"].members)
    assert model.merged is not training
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_a_model_that_refuses_to_be_trained_is_evaluated():
    model = WithATrainOfItsOwn(refuses=True).eval()
    assert find_axes(model, torch.randn(4, 5))["first"].frozen is None
    assert model.merged
