"""Weights that no layer owns: bare parameters, stacks, lists, dicts, and weights that are computed."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from tests.zoo.case import axis, case
from torch import nn


@case(
    "bare_weights",
    inputs=(4, 10),
    other=(2, 10),
    share=1.0,
    expected=[axis("w1:0 b1:0 w2:0", 12), axis("w2:1 b2:0 w3:1", 9), axis("w3:0 w4:0", 7)],
)
class BareWeights(nn.Module):
    """F.linear, @, addmm and matmul with a transpose."""

    def __init__(self):
        super().__init__()
        self.w1 = nn.Parameter(0.3 * torch.randn(12, 10))
        self.b1 = nn.Parameter(torch.zeros(12))
        self.w2 = nn.Parameter(0.3 * torch.randn(12, 9))
        self.b2 = nn.Parameter(torch.zeros(9))
        self.w3 = nn.Parameter(0.3 * torch.randn(7, 9))
        self.w4 = nn.Parameter(0.3 * torch.randn(7, 4))

    def forward(self, x):
        x = F.linear(x, self.w1, self.b1).relu()
        x = torch.addmm(self.b2, x, self.w2).tanh()
        x = torch.matmul(x, self.w3.t())
        return x @ self.w4


@case(
    "stacked_layers",
    inputs=(4, 10),
    other=(2, 10),
    share=1.0,
    expected=[axis("inside:0 weights:1 weights:2 biases:1 outside:0", 12)],
)
class StackedLayers(nn.Module):
    """One tensor holds the weights of all layers, indexed by a loop."""

    def __init__(self, depth=3):
        super().__init__()
        self.inside = nn.Linear(10, 12)
        self.weights = nn.Parameter(0.3 * torch.randn(depth, 12, 12))
        self.biases = nn.Parameter(torch.zeros(depth, 12))
        self.outside = nn.Parameter(0.3 * torch.randn(12, 4))

    def forward(self, x):
        x = self.inside(x)
        for i in range(self.weights.shape[0]):
            x = x + torch.tanh(x @ self.weights[i] + self.biases[i])
        return x @ self.outside


@case(
    "lists_and_dicts",
    inputs=(4, 10),
    other=(2, 10),
    share=0.98,
    expected=[
        axis("layers.0:0 layers.1:1", 8),
        axis("layers.1:0 gains.relu:0 named.in:0 extra:0", 9),
        axis("named.in:1 named.out:0", 7),
    ],
    frozen={"gains.unused:0!": "is not used"},
)
class ListsAndDicts(nn.Module):
    """ParameterList, ParameterDict, and a plain list of registered parameters."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ParameterList([nn.Parameter(0.3 * torch.randn(8, 10)), nn.Parameter(0.3 * torch.randn(9, 8))])
        self.gains = nn.ParameterDict({"relu": nn.Parameter(torch.ones(9)), "unused": nn.Parameter(torch.ones(3))})
        self.named = nn.ParameterDict({"in": nn.Parameter(torch.randn(9, 7)), "out": nn.Parameter(torch.randn(7, 4))})
        self.extra = nn.Parameter(torch.randn(9))
        self.plain = [self.extra]

    def forward(self, x):
        for w in self.layers:
            x = F.linear(x, w).relu()
        x = x * self.gains["relu"] + self.plain[0]
        return x @ self.named["in"] @ self.named["out"]


@case(
    "low_rank",
    inputs=(4, 10),
    other=(2, 10),
    share=1.0,
    expected=[
        axis("base:0 up:0 head.weight:1", 12),
        axis("up:1 down:0", 5),
        axis("u:1 v:0", 4),
        axis("head:0 u:0", 6),
    ],
)
class LowRank(nn.Module):
    """LoRA merged into its weight at every forward; the rank is an axis."""

    def __init__(self):
        super().__init__()
        self.base = nn.Linear(10, 12)
        self.up, self.down = nn.Parameter(torch.randn(12, 5)), nn.Parameter(torch.randn(5, 10))
        self.head = nn.Linear(12, 6)
        self.u, self.v = nn.Parameter(torch.randn(6, 4)), nn.Parameter(torch.randn(4, 6))

    def forward(self, x):
        weight = self.base.weight + self.up @ self.down * 0.5
        x = F.linear(x, weight, self.base.bias).relu()
        return self.head(x) @ (self.u @ self.v)


@case(
    "hypernetwork",
    inputs=lambda: (torch.randn(4, 10), torch.randn(5)),
    other=lambda: (torch.randn(2, 10), torch.randn(5)),
    share=0.99,
    expected=[
        axis("hidden:0 make_weight.weight:1 make_bias.weight:1", 8),
        axis("make_weight:0 make_bias:0 head.weight:1", 6, label="w"),
    ],
    sizes={"width": "w", "make_bias.out_features": "w", "make_weight.out_features": "10 * w"},
)
class HyperNetwork(nn.Module):
    """A layer whose weights another layer computes."""

    def __init__(self, width=6):
        super().__init__()
        self.width = width
        self.hidden = nn.Linear(5, 8)
        self.make_weight = nn.Linear(8, width * 10)
        self.make_bias = nn.Linear(8, width)
        self.head = nn.Linear(width, 4)

    def forward(self, x, z):
        z = self.hidden(z).relu()
        weight = self.make_weight(z).view(self.width, x.shape[-1])
        return self.head(F.linear(x, weight, self.make_bias(z)).relu())


@case(
    "tied_autoencoder",
    inputs=(4, 10),
    other=(2, 10),
    share=1.0,
    expected=[axis("first:0 second.weight:1 back:0", 12), axis("second:0", 6)],
    frozen={"first.weight:1": "input|output"},
)
class TiedAutoencoder(nn.Module):
    """The decoder is the encoder's transposes."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(10, 12), nn.Linear(12, 6)
        self.back = nn.Parameter(torch.zeros(12))

    def forward(self, x):
        z = self.second(self.first(x).relu()).relu()
        x = F.linear(z, self.second.weight.t(), self.back).relu()
        return x @ self.first.weight


@case(
    "tensor_factors",
    inputs=(4, 6, 5),
    other=(2, 6, 5),
    share=1.0,
    expected=[
        axis("rows:1 head:0", 4),
        axis("columns:1 head:1", 3),
        axis("factors:0 spread:1", 5),
        axis("factors:1 mix:0", 6),
    ],
)
class TensorFactors(nn.Module):
    """tensordot, baddbmm over a stack, and mv."""

    def __init__(self):
        super().__init__()
        self.rows, self.columns = nn.Parameter(torch.randn(6, 4)), nn.Parameter(torch.randn(5, 3))
        self.head = nn.Parameter(torch.randn(4, 3, 8))
        self.spread = nn.Parameter(torch.randn(8, 5))
        self.factors = nn.Parameter(torch.randn(5, 6))
        self.mix = nn.Parameter(torch.randn(6))

    def forward(self, x):
        x = torch.tensordot(torch.tensordot(x, self.rows, dims=([1], [0])), self.columns, dims=([1], [0]))
        x = torch.tensordot(x, self.head, dims=2).tanh()
        return torch.inner(x @ self.spread, torch.mv(self.factors, self.mix))


@case(
    "dynamic_convolution",
    inputs=(2, 3, 8, 8),
    other=(3, 3, 6, 7),
    share=0.99,
    expected=[
        axis("stem:0 kernels:2", 6, label="i"),
        axis("kernels:1 head.weight:1", 8, label="o"),
    ],
)
class DynamicConvolution(nn.Module):
    """Kernels mixed per sample; the batch is folded into groups."""

    def __init__(self, experts=3):
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.route = nn.Linear(3, experts)
        self.kernels = nn.Parameter(0.2 * torch.randn(experts, 8, 6, 3, 3))
        self.head = nn.Conv2d(8, 2, 1)

    def forward(self, x):
        mix = self.route(x.mean((2, 3))).softmax(-1)
        x = self.stem(x).relu()
        b, c, h, w = x.shape
        _, o, _, k, _ = self.kernels.shape
        weight = torch.einsum("be,eoikl->boikl", mix, self.kernels).reshape(b * o, c, k, k)
        y = F.conv2d(x.reshape(1, b * c, h, w), weight, padding=1, groups=b)
        return self.head(y.view(b, o, h, w))


@case(
    "film",
    inputs=lambda: {"x": torch.randn(2, 3, 8, 8), "condition": torch.randn(2, 5)},
    other=lambda: {"x": torch.randn(3, 3, 6, 6), "condition": torch.randn(3, 5)},
    share=0.99,
    expected=[
        axis("conv:0 norm:0 modulate.1:0 head.weight:1", 9, label="c"),
        axis("modulate.0:0 modulate.1.weight:1", 8),
    ],
    sizes={"modulate.1.out_features": "2 * c", "norm.num_features": "c"},
)
class FiLM(nn.Module):
    """Scale and shift per channel from a condition (StyleGAN, DiT)."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 9, 3, padding=1)
        self.norm = nn.BatchNorm2d(9, affine=False)
        self.modulate = nn.Sequential(nn.Linear(5, 8), nn.Linear(8, 18))
        self.head = nn.Conv2d(9, 2, 1)

    def forward(self, x, condition):
        scale, shift = self.modulate(condition)[:, :, None, None].chunk(2, dim=1)
        return self.head(F.mish(self.norm(self.conv(x)) * (1 + scale) + shift))


@case(
    "modulated_convolution",
    inputs=lambda: (torch.randn(2, 3, 8, 8), torch.randn(2, 5)),
    other=lambda: (torch.randn(1, 3, 6, 6), torch.randn(1, 5)),
    share=0.99,
    expected=[axis("stem:0 style:0 weight:2", 6, None), axis("weight:1 head.weight:1", 8)],
)
class ModulatedConvolution(nn.Module):
    """StyleGAN2: weights scaled by a style and normalised per output channel."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.style = nn.Linear(5, 6)
        self.weight = nn.Parameter(torch.randn(1, 8, 6, 3, 3))
        self.head = nn.Conv2d(8, 2, 1)

    def forward(self, x, style):
        x = self.stem(x).relu()
        weight = self.weight * (self.style(style)[:, None, :, None, None] + 1)
        weight = weight * torch.rsqrt(weight.pow(2).sum([2, 3, 4], keepdim=True) + 1e-8)
        out = [F.conv2d(x[i : i + 1], weight[i], padding=1) for i in range(x.shape[0])]
        return self.head(torch.cat(out))
