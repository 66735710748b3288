"""A forward is traced in evaluation and in training mode, and what both say holds together."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from tests.zoo.handmade import HANDMADE
from torch import nn

from netopt.axes import find, find_axes


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


def told(model, inputs):
    """All that is told of the axes of a model."""
    return [
        (one.name, one.size, one.frozen is None, one.exact or one.frozen is not None, *map(str, one.members))
        for one in find_axes(model, inputs)
    ]


class Reader(nn.Module):
    """Reads the flag of a part in some way, between two layers."""

    def __init__(self, read, part=None):
        super().__init__()
        self.first, self.part, self.last = nn.Linear(5, 8), part or Chosen(), nn.Linear(8, 3)
        self.read = read

    def forward(self, x):
        return self.last(self.read(self, self.first(x)))


class Delegating(Chosen):
    """Looks attributes up in its own way."""

    def __getattr__(self, name):
        return super().__getattr__(name)


class Widening(Chosen):
    """Returns something of another shape in training."""

    def forward(self, x):
        return x.mean(-1, keepdim=True).expand(-1, 8) if self.training else x[:, :8]


class Growing(Chosen):
    """Returns one more tensor in training."""

    def forward(self, x):
        return (x, self.extra) if self.training else (x,)


def sets_the_mode(module, x):
    module.part.eval()
    return module.part(x)


def scripted(module):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch means to do away with it
        return torch.jit.script(module)


def hooked(read):
    part = nn.Linear(8, 8)
    part.extra = nn.Parameter(torch.randn(8))
    part.register_forward_hook(lambda module, args, result: result + module.extra if module.training else result)
    return Reader(read, part)


READERS = {
    "in a part": lambda: Reader(lambda module, x: module.part(x)),
    "by a parent": lambda: Reader(lambda module, x: x + module.part.extra if module.part.training else x),
    "of a library's layer": lambda: Reader(
        lambda module, x: x + module.last.weight[0] if module.part.training else x, nn.Dropout()
    ),
    "by the forward alone": lambda: Reader(lambda module, x: module.part.forward(x)),
    "by a copy": lambda: Reader(lambda module, x: copy.copy(module.part)(x)),
    "by a deep copy": lambda: Reader(lambda module, x: x + 0 * copy.deepcopy(module.part)(x)),
    "as an entry": lambda: Reader(lambda module, x: x + module.part.extra if vars(module.part)["training"] else x),
    "and sets it": lambda: Reader(sets_the_mode),
    "by its own look-up": lambda: Reader(lambda module, x: module.part(x), Delegating()),
    "by a hook": lambda: hooked(lambda module, x: module.part(x)),
    "for other numbers": lambda: Reader(lambda module, x: module.part(x), nn.AlphaDropout()),
    "for another shape": lambda: Reader(lambda module, x: module.part(x), Widening()),
    "for more results": lambda: Reader(lambda module, x: module.part(x)[0], Growing()),
    "by what is scripted": lambda: Reader(lambda module, x: module.part(x), scripted(nn.Dropout())),
    "and keeps a count": lambda: Reader(
        lambda module, x: (setattr(module, "seen", module.training), module.part(x))[1]
    ),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", READERS)
def test_however_the_flag_is_read_both_modes_are_told(name, training, monkeypatch):
    torch.manual_seed(0)
    model, inputs = READERS[name]().train(training), torch.randn(4, 5)
    attributes = [(vars(module), list(vars(module).items())) for module in model.modules()]
    once = told(model, inputs)
    assert all(
        vars(module) is held and list(held.items()) == entries
        for module, (held, entries) in zip(model.modules(), attributes, strict=True)
    )
    monkeypatch.setattr(find, "_sets_flags_alone", lambda *_: False)
    assert told(model, inputs) == once


@pytest.mark.parametrize("case", HANDMADE, ids=str)
def test_one_trace_tells_what_two_tell(case, monkeypatch):
    with warnings.catch_warnings():
        if case.warns:
            warnings.filterwarnings("ignore", message=f".*{case.warns}")
        once = told(case.build(), case.inputs())
        monkeypatch.setattr(find, "_sets_flags_alone", lambda *_: False)
        assert told(case.build(), case.inputs()) == once


def test_a_model_that_reads_no_flag_runs_once():
    layers = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Dropout(), nn.Linear(8, 3))
    ran = []
    layers[0].register_forward_pre_hook(lambda module, _: ran.append(type(module)))
    find_axes(layers, torch.randn(4, 5))
    assert ran == [nn.Linear]
