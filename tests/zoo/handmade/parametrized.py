"""Weights that are computed from others: weight norm, spectral norm, masks, parametrizations of one's own."""

from __future__ import annotations

import warnings

import torch
import torch.nn.functional as F
from tests.zoo.case import axis, case
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune


def three_layers():
    """An MLP whose layers the cases below dress up."""
    return nn.Sequential(nn.Linear(10, 12), nn.ReLU(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 3))


@case(
    "weight_norm_parametrization",
    inputs=(4, 10),
    other=(2, 10),
    share=0.98,
    expected=[
        axis("0.parametrizations.weight:0 0.bias:0 2.parametrizations.weight.original1:1", 12, False),
        axis("2.parametrizations.weight:0 2.bias:0 4.weight:1", 8, None),
    ],
)
def weight_norm_parametrization():
    net = three_layers()
    parametrizations.weight_norm(net[0])
    parametrizations.weight_norm(net[2])
    return net


@case(
    "weight_norm_hook",
    inputs=(2, 3, 12),
    other=(3, 3, 9),
    share=0.99,
    expected=[
        axis("0.weight_g:0 0.weight_v:0 0.bias:0 2.weight_v:1", 8, False),
        axis("2.weight_g:0 2.weight_v:0 2.bias:0 4.weight:1", 6, None),
    ],
)
def weight_norm_hook():
    net = nn.Sequential(nn.Conv1d(3, 8, 3), nn.ReLU(), nn.Conv1d(8, 6, 3), nn.ReLU(), nn.Conv1d(6, 2, 1))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        nn.utils.weight_norm(net[0])
        nn.utils.weight_norm(net[2])
    return net


@case(
    "spectral_norm_parametrization",
    inputs=(4, 10),
    other=(2, 10),
    share=0.98,
    expected=[
        axis("0:0 2.parametrizations.weight.original:1 2.parametrizations.weight.0._v:0", 12, False),
        axis("2.parametrizations.weight.original:0 2.parametrizations.weight.0._u:0 2.bias:0 4.weight:1", 8, False),
    ],
)
def spectral_norm_parametrization():
    net = three_layers()
    parametrizations.spectral_norm(net[2])
    return net


@case(
    "spectral_norm_hook",
    inputs=(2, 3, 8, 8),
    other=(3, 3, 6, 6),
    share=0.99,
    expected=[
        axis("0:0 2.weight_orig:1 2.weight_v:0", 6, False),
        axis("2.weight_orig:0 2.weight_u:0 2.bias:0 4.weight:1", 8, False),
    ],
)
def spectral_norm_hook():
    net = nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.LeakyReLU(0.2), nn.Conv2d(6, 8, 3), nn.LeakyReLU(0.2), nn.Conv2d(8, 1, 1)
    )
    nn.utils.spectral_norm(net[2])
    return net


@case(
    "masked_by_torch_prune",
    inputs=(4, 10),
    other=(2, 10),
    share=0.98,
    expected=[
        axis("0.weight_orig:0 0.weight_mask:0 0.bias:0 2.weight_orig:1 2.weight_mask:1", 12),
        axis("2.weight_orig:0 2.weight_mask:0 2.bias_orig:0 2.bias_mask:0 4.weight:1", 8),
    ],
)
def masked_by_torch_prune():
    net = three_layers()
    prune.random_unstructured(net[0], "weight", 0.3)
    prune.l1_unstructured(net[2], "weight", 0.5)
    prune.random_unstructured(net[2], "bias", 2)
    return net


class Symmetric(nn.Module):
    """A symmetric matrix from its upper triangle: rows and columns are one axis."""

    def forward(self, w):
        return w.triu() + w.triu(1).transpose(-1, -2)


@case(
    "symmetric_parametrization",
    inputs=(4, 10),
    other=(2, 10),
    ordered="the weight is one triangle of a matrix: what is left is one too, what is exchanged is not",
    share=0.98,
    expected=[
        axis("0:0 2.parametrizations.weight.original:0 2.parametrizations.weight.original:1 2.bias:0 4.weight:1", 9)
    ],
)
def symmetric_parametrization():
    net = nn.Sequential(nn.Linear(10, 9), nn.ReLU(), nn.Linear(9, 9), nn.ReLU(), nn.Linear(9, 3))
    parametrize.register_parametrization(net[2], "weight", Symmetric())
    return net


class Positive(nn.Module):
    """Weights kept positive."""

    def forward(self, w):
        return F.softplus(w)


@case(
    "positive_parametrization",
    inputs=(4, 10),
    other=(2, 10),
    share=0.98,
    expected=[
        axis("0.parametrizations.weight.original:0 0.bias:0 2.parametrizations.weight.original:1", 12, False),
        axis("2.parametrizations.weight.original:0 2.bias:0 4.weight:1", 8, None),
    ],
)
def positive_parametrization():
    net = three_layers()
    parametrize.register_parametrization(net[0], "weight", Positive())
    parametrize.register_parametrization(net[2], "weight", Positive())
    return net


class Standardised(nn.Linear):
    """Rows of mean zero and length one, computed at every forward."""

    def forward(self, x):
        w = self.weight - self.weight.mean(1, keepdim=True)
        return F.linear(x, w / (w.norm(dim=1, keepdim=True) + 1e-6), self.bias)


@case(
    "standardised_linear",
    inputs=(4, 10),
    other=(2, 10),
    share=0.98,
    expected=[axis("0:0 2.weight:1", 12, False), axis("2:0 4.weight:1", 8, None)],
)
def standardised_linear():
    return nn.Sequential(Standardised(10, 12), nn.ReLU(), Standardised(12, 8), nn.ReLU(), nn.Linear(8, 3))


class FakeQuantised(nn.Module):
    """Weights rounded to a grid of their row's range, gradients straight through."""

    def forward(self, w):
        step = w.abs().amax(dim=1, keepdim=True) / 127
        return w + (torch.round(w / step) * step - w).detach()


@case(
    "fake_quantised",
    inputs=(4, 10),
    other=(2, 10),
    share=0.98,
    expected=[
        axis("0:0 2.parametrizations.weight.original:1", 12, False),
        axis("2.parametrizations.weight.original:0 2.bias:0 4.weight:1", 8, None),
    ],
)
def fake_quantised():
    net = three_layers()
    parametrize.register_parametrization(net[2], "weight", FakeQuantised())
    return net


@case(
    "orthogonal_parametrization",
    inputs=(4, 10),
    other=(2, 10),
    share=0.47,
    fake="the parametrization compares values",
    expected=[
        axis("2.parametrizations.weight.0.base:0 2.bias:0 4.weight:1", 9),
        axis("4:0 6.weight:1", 12),
    ],
    frozen={"2.parametrizations.weight.original:0": "householder|compared with another dimension"},
)
def orthogonal_parametrization():
    net = nn.Sequential(
        nn.Linear(10, 9), nn.ReLU(), nn.Linear(9, 9), nn.ReLU(), nn.Linear(9, 12), nn.ReLU(), nn.Linear(12, 3)
    )
    parametrizations.orthogonal(net[2], orthogonal_map="householder")
    return net
