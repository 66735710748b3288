"""Composite operations are traced as what they are made of, inside modes, transforms and autocast too."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from netopt import measure
from netopt.axes import find_axes
from netopt.prune import prune_neurons

LAYERS = {
    "linear": (nn.Linear(6, 4), (2, 6)),
    "linear of a vector": (nn.Linear(6, 4), (6,)),
    "linear of sequences": (nn.Linear(6, 4, bias=False), (2, 5, 3, 6)),
    "conv1d": (nn.Conv1d(4, 6, 3, stride=2, padding=1), (2, 4, 9)),
    "conv2d": (nn.Conv2d(4, 6, 3, groups=2, dilation=2), (2, 4, 9, 9)),
    "conv2d, same": (nn.Conv2d(4, 6, 3, padding="same"), (2, 4, 9, 9)),
    "conv2d, one sample": (nn.Conv2d(4, 6, 1), (4, 9, 9)),
    "conv3d": (nn.Conv3d(4, 6, 2), (1, 4, 5, 5, 5)),
    "conv_transpose1d": (nn.ConvTranspose1d(4, 6, 3, stride=2), (2, 4, 9)),
    "conv_transpose2d": (nn.ConvTranspose2d(4, 6, 3, stride=2, output_padding=1, groups=2), (2, 4, 5, 5)),
    "conv_transpose3d": (nn.ConvTranspose3d(4, 6, 2, padding=1, dilation=2), (1, 4, 5, 5, 5)),
    "batch_norm": (nn.BatchNorm2d(4), (2, 4, 5, 5)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_costs_what_its_operations_cost(name):
    layer, shape = LAYERS[name]
    x = torch.randn(shape)
    assert find_axes(layer, x).macs() == measure.count_macs(layer, x)


class _Counted(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.__name__)
        return function(*args, **(kwargs or {}))


class _Counting(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 4)
        self.seen = 0

    def forward(self, x):
        with _Counted() as counted:
            y = self.layer(x)
        self.names = counted.names
        return y


def test_a_mode_of_the_forward_sees_the_operations():
    model = _Counting()
    seen = []
    model.register_forward_hook(lambda module, *_: seen.append(module.names))
    model(torch.randn(2, 6))
    find_axes(model, torch.randn(2, 6))
    assert seen[0] == seen[1]
    assert "addmm.default" in seen[0]


class _Vectorised(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 4)

    def forward(self, x):
        return torch.func.vmap(lambda row: self.last(self.first(row).relu()))(x)


def test_layers_run_inside_a_transform():
    model, x = _Vectorised(), torch.randn(3, 6)
    assert [axis.name for axis in find_axes(model, x).free] == ["first"]
    expected = model(x)
    removed = prune_neurons(model, x, 0.5, importance="magnitude").plan
    assert removed.exact
    assert model(x).shape == expected.shape


class _Autocast(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 6))
        self.last = nn.Linear(8, 3)

    def forward(self, x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            h = nn.functional.linear(x, self.weight)
            return self.last(h + torch.mm(self.weight, x.t()).t())  # of the same weight, cast once


def test_what_autocast_keeps_is_seen_being_made():
    model, x = _Autocast(), torch.randn(4, 6)
    assert find_axes(model, x)["weight"].frozen is None
    assert prune_neurons(model, x, 0.5, importance="magnitude").plan.shapes_after["weight"] == (4, 6)


class _Latent(nn.Module):
    """Attention from learned queries, of which some may go unless a triangle says which keys each may see."""

    def __init__(self, **how):
        super().__init__()
        self.how, self.queries = how, nn.Parameter(torch.randn(6, 8))
        self.key, self.value, self.out = nn.Linear(5, 8), nn.Linear(5, 8), nn.Linear(6, 3)

    def forward(self, x):
        queries = self.queries.expand(x.shape[0], -1, -1)
        seen = nn.functional.scaled_dot_product_attention(queries, self.key(x), self.value(x), **self.how)
        return self.out(seen.transpose(1, 2)).sum(1)


@pytest.mark.parametrize("how", [{}, {"is_causal": True}, {"is_causal": True, "scale": 0.3}], ids=str)
def test_a_causal_mask_ties_queries_to_keys(how):
    axes = find_axes(_Latent(**how), torch.randn(2, 6, 5))
    queries = next(axis for axis in axes if "queries:0" in map(str, axis.members))
    assert (queries.frozen is None) is ("is_causal" not in how)


class _Channels(nn.Module):
    """Causal attention between channels; the numbers of both may differ."""

    def __init__(self, keys):
        super().__init__()
        self.query, self.key, self.value = nn.Linear(5, 8), nn.Linear(5, keys), nn.Linear(5, keys)
        self.out = nn.Linear(8, 3)

    def forward(self, x):
        q, k, v = (layer(x).transpose(1, 2) for layer in (self.query, self.key, self.value))
        seen = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=1.0)
        return self.out(seen.transpose(1, 2))


@pytest.mark.parametrize("keys", [8, 7])
def test_channels_under_a_causal_mask_go_together_or_stay(keys):
    model, x = _Channels(keys), torch.randn(2, 6, 5)
    assert {axis.name: axis.size for axis in find_axes(model, x).free} == ({"query": 8} if keys == 8 else {})


class _Along(nn.Module):
    """Reads a derivative that is computed along with a layer."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(5, 8), nn.Linear(8, 3)

    def forward(self, x):
        with forward_ad.dual_level():
            made = self.first(forward_ad.make_dual(x, torch.ones_like(x)))
            return self.last(forward_ad.unpack_dual(made).tangent.tanh())


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # torch scripts the formulas of these
def test_forward_mode_derivatives_are_seen():
    axes = find_axes(_Along(), torch.randn(2, 5))
    assert "last.weight:1" in map(str, axes["first"].members)


class _Twice(TorchFunctionMode):
    """Gives what every linear layer makes, and the same once more."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        return torch.cat([made, made], -1) if function is nn.functional.linear else made


def test_a_mode_around_the_search_is_seen():
    model, x = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(8, 3)), torch.randn(2, 5)
    with _Twice():
        axes = find_axes(model, x)
    assert {str(member) for member in axes["0"].members} == {"0.weight:0", "0.bias:0", "2.weight:1"}
    assert axes["0"].frozen is None
