"""Models that hold sizes, observers and gradients of their own: followed, or refused with what to do."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from tests.zoo.laws import choose, halves, mask, plan_for
from torch import nn

import netopt
from netopt.axes import find_axes
from netopt.errors import ForwardError, InvalidArgumentError

USES = {
    "embedding_dim": ("embed", lambda m, h: h * math.sqrt(m.embed.embedding_dim)),
    "a power": ("embed", lambda m, h: h * m.embed.embedding_dim**-0.5),
    "in_features": ("embed", lambda m, h: h / math.sqrt(m.fc.in_features)),
    "a tensor of it": ("embed", lambda m, h: h * torch.tensor(m.embed.embedding_dim).sqrt()),
    "out_features": ("fc", lambda m, h: h / math.sqrt(m.fc.out_features)),
    "a remainder": ("fc", lambda m, h: h * (m.fc.out_features % 7)),
    "num_features": ("fc", lambda m, h: h / m.norm.num_features),
    "in_channels": ("fc", lambda m, h: h / m.conv.in_channels),
    "out_channels": ("conv", lambda m, h: h / m.conv.out_channels),
    "groups of a convolution": ("up", lambda m, h: h / m.up.out_channels),
    "input_size": ("up", lambda m, h: h / math.sqrt(m.rnn.input_size)),
    "hidden_size": ("rnn", lambda m, h: h / math.sqrt(m.rnn.hidden_size)),
}


class Sized(nn.Module):
    """One layer of each kind; after one of them its own size is computed with."""

    def __init__(self, after, use):
        super().__init__()
        self.after, self.use = after, use
        self.embed, self.fc, self.norm = nn.Embedding(10, 8), nn.Linear(8, 12), nn.BatchNorm1d(12)
        self.conv, self.up = nn.Conv1d(12, 6, 1), nn.ConvTranspose1d(6, 4, 1, groups=2)
        self.rnn, self.head = nn.GRU(4, 5, batch_first=True), nn.Linear(5, 2)

    def used(self, name, h):
        return self.use(self, h) if name == self.after else h

    def forward(self, ids):
        h = self.used("fc", self.fc(self.used("embed", self.embed(ids))))
        h = self.used("up", self.up(self.used("conv", self.conv(self.norm(h.transpose(1, 2))))))
        return self.head(self.used("rnn", self.rnn(h.transpose(1, 2))[0]))


@pytest.mark.parametrize(("layer", "use"), USES.values(), ids=USES)
def test_a_layers_own_size_is_a_size(layer, use):
    torch.manual_seed(0)
    model, ids = Sized(layer, use).eval(), torch.randint(10, (2, 4))
    axes = find_axes(model, ids)
    made = axes.made_by(layer)
    assert made
    assert not any(axis.exact for axis in made if axis.frozen is None), axes
    assert any("test_axes_layers.py:" in (axis.inexact or "") for axis in made), axes
    assert all(axis.exact for axis in find_axes(Sized("nowhere", use).eval(), ids).free)
    counts = halves(axes)
    plan_for(axes, counts, choose(axes, counts, 0)).apply(model)
    assert model(ids).shape == (2, 4, 2)


@pytest.mark.filterwarnings("ignore")
def test_a_model_prepared_for_quantisation_can_be_cut():
    from torch.ao import quantization

    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 8, 3), nn.ReLU(), nn.Flatten(), nn.LazyLinear(4)]
    model, x = nn.Sequential(quantization.QuantStub(), *layers, quantization.DeQuantStub()), torch.randn(4, 3, 8, 8)
    model(x)
    model = quantization.fuse_modules_qat(model.train(), [["1", "2"], ["3", "4"]])
    model.qconfig = quantization.get_default_qat_qconfig("x86")
    model = quantization.prepare_qat(model)
    for _ in range(3):
        model(x)
    model.eval().apply(quantization.disable_observer)
    axes = find_axes(model, x)
    counts = halves(axes)
    kept = choose(axes, counts, 0)
    assert all(axes[name].exact for name in kept)
    assert {"1", "3"} <= {axis.name.partition("/")[0] for axis in axes.free}
    wanted = copy.deepcopy(model)
    mask(wanted, axes, kept, 1e-12)  # a scale of zero would be divided by itself
    plan_for(axes, counts, kept).apply(model)
    near = (model(x) - wanted(x)).abs().max() / wanted(x).abs().max()
    assert near < 0.05
    model.train()(x).square().sum().backward()
    assert model[1].weight.grad.shape == (8, 3, 3, 3)


class Forces(nn.Module):
    def __init__(self, create_graph):
        super().__init__()
        self.fc, self.out, self.create_graph = nn.Linear(3, 16), nn.Linear(16, 1), create_graph

    def forward(self, places):
        with torch.enable_grad():
            places = places.detach().requires_grad_()
            energy = self.out(self.fc(places).tanh()).sum()
            (slope,) = torch.autograd.grad(energy, places, create_graph=self.create_graph)
        return energy + slope


class InPlace(nn.Module):
    """A partial convolution written over what it read, which nothing can be differentiated through."""

    def __init__(self):
        super().__init__()
        self.first, self.part, self.last = nn.Conv2d(3, 16, 1), nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(16, 5, 1)
        self.dim = 4

    def forward(self, x):
        x = self.first(x)
        x[:, : self.dim] = self.part(x[:, : self.dim])
        return self.last(x)


def test_forces_that_can_be_differentiated_are_pruned():
    model, x = Forces(create_graph=True), torch.randn(7, 3)
    assert netopt.prune_neurons(model, x, 0.5, progress=False).plan.exact
    assert model.fc.weight.shape == (8, 3)


@pytest.mark.parametrize(
    ("model", "x"),
    [(Forces(create_graph=False), torch.randn(7, 3)), (InPlace(), torch.randn(2, 3, 6, 6))],
    ids=["a graph that is freed", "written in place"],
)
def test_what_cannot_be_differentiated_says_so(model, x):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ForwardError, match=r"create_graph=True there[\s\S]*clone[\s\S]*magnitude"):
        netopt.prune_neurons(model, x, 0.5, progress=False)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    netopt.prune_neurons(model, x, 0.5, importance="magnitude", progress=False)
    assert model(x).shape[0] == len(x)


def test_a_forward_that_takes_gradients_without_asking_is_told_to():
    class Bare(Forces):
        def forward(self, places):
            places.requires_grad_()
            return torch.autograd.grad(self.out(self.fc(places)).sum(), places)[0]

    with pytest.raises(ForwardError, match=r"torch\.enable_grad"):
        find_axes(Bare(create_graph=True), torch.randn(2, 3))


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(6, 6) for _ in range(4))

    def forward(self, x):
        return self.experts[0](x)


UNMET = [f"experts.{index}.weight" for index in (1, 2, 3)]


@pytest.mark.parametrize("importance", ["wanda", "sparsegpt"])
def test_layers_without_inputs_are_named_together(importance):
    data, include = [torch.randn(4, 6)], [f"experts.{index}.weight" for index in range(4)]
    with pytest.raises(InvalidArgumentError, match=r"exclude=\['experts.1.weight', 'experts.2.weight', 'experts.3.w"):
        netopt.prune_weights(Experts(), 0.5, importance=importance, data=data, include=include, progress=False)
    model = Experts()
    netopt.prune_weights(model, 0.5, importance=importance, data=data, exclude=UNMET, progress=False)
    assert (model.experts[0].weight == 0).float().mean() == 0.5


def test_layers_without_inputs_are_left_out_where_nobody_named_them():
    report = netopt.prune_weights(Experts(), 0.5, importance="wanda", data=[torch.randn(4, 6)], progress=False)
    assert all("met no inputs" in report.frozen[name] for name in UNMET)
