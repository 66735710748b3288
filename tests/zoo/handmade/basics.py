"""Plain networks and the normalisations between their layers."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from tests.zoo.case import axis, case
from torch import nn


@case(
    "mlp_flatten",
    inputs=(2, 1, 8, 8),
    other=(5, 1, 8, 8),
    share=0.99,
    expected=[axis("1:0 3.weight:1", 24), axis("3:0 5.weight:1", 16)],
    frozen={"1.weight:1": "input", "5.weight:0": "output"},
)
def mlp_flatten():
    return nn.Sequential(
        nn.Flatten(), nn.Linear(64, 24), nn.ReLU(), nn.Linear(24, 16), nn.Tanh(), nn.Linear(16, 10), nn.LogSoftmax(-1)
    )


class ConvNet(nn.Module):
    """Two convolutions with any normalisation, and a linear head."""

    def __init__(self, norm1, norm2):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.norm1 = norm1
        self.conv2 = nn.Conv2d(16, 24, 3, padding=1)
        self.norm2 = norm2
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(24, 10)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.norm1(self.conv1(x))), 2)
        x = self.pool(F.silu(self.norm2(self.conv2(x))))
        return self.head(torch.flatten(x, 1))


@case(
    "conv_batchnorm",
    inputs=(2, 3, 8, 8),
    other=(3, 3, 12, 10),
    share=0.99,
    expected=[axis("conv1:0 norm1:0 conv2.weight:1", 16), axis("conv2:0 norm2:0 head.weight:1", 24)],
    frozen={"conv1.weight:1": "input", "head.weight:0": "output"},
)
def conv_batchnorm():
    return ConvNet(nn.BatchNorm2d(16), nn.BatchNorm2d(24))


@case(
    "conv_batchnorm_no_affine",
    inputs=(2, 3, 8, 8),
    other=(3, 3, 12, 10),
    share=0.99,
    expected=[axis("conv1:0 norm1:0 conv2.weight:1", 16), axis("conv2:0 head.weight:1", 24)],
)
def conv_batchnorm_no_affine():
    return ConvNet(nn.BatchNorm2d(16, affine=False), nn.BatchNorm2d(24, affine=False, track_running_stats=False))


@case(
    "conv_groupnorm",
    inputs=(2, 3, 8, 8),
    other=(3, 3, 12, 10),
    share=0.99,
    expected=[
        axis("conv1:0 norm1:0 conv2.weight:1", 4, None, "g"),
        axis("conv1:0 norm1:0 conv2.weight:1", 4, False, "c"),
        axis("conv2:0 norm2:0 head.weight:1", 24, False),
    ],
    sizes={"norm1.num_groups": "g", "norm1.num_channels": "g * c", "conv1.out_channels": "g * c"},
)
def conv_groupnorm():
    return ConvNet(nn.GroupNorm(4, 16), nn.GroupNorm(1, 24))


@case(
    "conv_instancenorm",
    inputs=(2, 3, 8, 8),
    other=(3, 3, 12, 10),
    share=0.99,
    expected=[axis("conv1:0 norm1:0 conv2.weight:1", 16), axis("conv2:0 head.weight:1", 24)],
)
def conv_instancenorm():
    return ConvNet(nn.InstanceNorm2d(16, affine=True, track_running_stats=True), nn.InstanceNorm2d(24))


class LayerNorm2d(nn.LayerNorm):
    """Layer norm over the channels of an image."""

    def forward(self, x):
        x = x.permute(0, 2, 3, 1)
        x = F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)
        return x.permute(0, 3, 1, 2)


@case(
    "conv_layernorm_permuted",
    inputs=(2, 3, 8, 8),
    other=(3, 3, 12, 10),
    share=0.99,
    expected=[axis("conv1:0 norm1:0 conv2.weight:1", 16, False, "a"), axis("conv2:0 norm2:0 head.weight:1", 24, False)],
    sizes={"norm1.normalized_shape.0": "a", "conv1.out_channels": "a", "conv2.in_channels": "a"},
)
def conv_layernorm_permuted():
    return ConvNet(LayerNorm2d(16), LayerNorm2d(24))


class HandNorm(nn.Module):
    """Layer norm over the channels, written out."""

    def __init__(self, channels):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(channels))
        self.shift = nn.Parameter(torch.zeros(channels))

    def forward(self, x):
        mean = x.mean(1, keepdim=True)
        var = (x - mean).pow(2).mean(1, keepdim=True)
        x = (x - mean) / torch.sqrt(var + 1e-6)
        return self.gain[:, None, None] * x + self.shift[:, None, None]


@case(
    "conv_layernorm_by_hand",
    inputs=(2, 3, 8, 8),
    other=(3, 3, 12, 10),
    share=0.99,
    expected=[axis("conv1:0 norm1:0 conv2.weight:1", 16, False), axis("conv2:0 norm2:0 head.weight:1", 24, False)],
)
def conv_layernorm_by_hand():
    return ConvNet(HandNorm(16), HandNorm(24))


class RMSNorm(nn.Module):
    """As Llama writes it, computing in float32 or better."""

    def __init__(self, hidden_size, eps=1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.variance_epsilon = eps

    def forward(self, hidden_states):
        variance = hidden_states.pow(2).mean(-1, keepdim=True)
        return self.weight * (hidden_states * torch.rsqrt(variance + self.variance_epsilon))


@case(
    "mlp_layernorm_rmsnorm",
    inputs=(4, 12),
    other=(2, 7, 12),
    share=0.99,
    expected=[
        axis("fc1:0 norm1:0 fc2.weight:1", 16, False, "a"),
        axis("fc2:0 norm2:0 fc3.weight:1", 20, False, "b"),
        axis("fc3:0 norm3:0 fc4.weight:1", 24, False, "c"),
    ],
    sizes={"norm1.normalized_shape.0": "a", "norm3.normalized_shape.0": "c", "fc2.out_features": "b"},
)
class MLPWithNorms(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.norm1 = nn.Linear(12, 16), nn.LayerNorm(16)
        self.fc2, self.norm2 = nn.Linear(16, 20), RMSNorm(20)
        self.fc3, self.norm3 = nn.Linear(20, 24), nn.RMSNorm(24)
        self.fc4 = nn.Linear(24, 6)

    def forward(self, x):
        x = self.norm1(self.fc1(x)).relu()
        x = self.norm2(self.fc2(x)).relu()
        return self.fc4(self.norm3(self.fc3(x)).relu())


@case(
    "conv_flatten_linear",
    inputs=(2, 3, 8, 8),
    other=(5, 3, 8, 8),
    share=0.99,
    expected=[axis("conv:0 fc.weight:1", 12, label="c"), axis("fc:0 head.weight:1", 20)],
    sizes={"fc.in_features": "16 * c", "conv.out_channels": "c"},
)
class ConvFlatten(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 12, 3, stride=2, padding=1)
        self.fc = nn.Linear(12 * 4 * 4, 20)
        self.head = nn.Linear(20, 5)

    def forward(self, x):
        x = F.elu(self.conv(x))
        x = x.view(x.size(0), -1)
        return self.head(F.gelu(self.fc(x)))


@case(
    "conv_flatten_nhwc",
    inputs=(2, 3, 8, 8),
    other=(5, 3, 8, 8),
    share=0.99,
    expected=[axis("conv:0 fc.weight:1", 12, label="c"), axis("fc:0 head.weight:1", 20)],
    sizes={"fc.in_features": "16 * c"},
)
class ConvFlattenNHWC(ConvFlatten):
    def forward(self, x):
        x = F.elu(self.conv(x)).permute(0, 2, 3, 1).reshape(len(x), -1)
        return self.head(F.gelu(self.fc(x)))


@case(
    "prelu",
    inputs=(2, 3, 8, 8),
    other=(3, 3, 6, 6),
    share=0.99,
    expected=[axis("0:0 1:0 2.weight:1", 8, label="a"), axis("2:0 6.weight:1", 12)],
    sizes={"1.num_parameters": "a"},
)
def prelu():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.PReLU(8),
        nn.Conv2d(8, 12, 3),
        nn.PReLU(),
        nn.AdaptiveMaxPool2d(1),
        nn.Flatten(),
        nn.Linear(12, 4),
    )


@case(
    "channel_buffers",
    inputs=(2, 3, 8, 8),
    other=(3, 3, 6, 6),
    share=0.99,
    expected=[axis("conv1:0 scale:1 conv2.weight:1", 8), axis("conv2:0 mean:0 head.weight:1", 12)],
)
class ChannelBuffers(nn.Module):
    """Statistics measured once and used in the forward."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1)
        self.conv2 = nn.Conv2d(8, 12, 3, padding=1)
        self.head = nn.Linear(12, 4)
        self.register_buffer("scale", torch.rand(1, 8, 1, 1) + 0.5)
        self.register_buffer("mean", torch.randn(12), persistent=False)

    def forward(self, x):
        x = self.conv1(x).mul(self.scale).relu()
        x = self.conv2(x) - self.mean.view(1, -1, 1, 1)
        return self.head(x.clamp(min=0).mean(dim=(2, 3)))


@case(
    "sigmoid_then_sum",
    inputs=(4, 12),
    other=(2, 12),
    share=1.0,
    expected=[axis("inner:0 outer.weight:1", 16), axis("outer:0", 8, False)],
)
class SigmoidThenSum(nn.Module):
    """A removed neuron of ``outer`` takes sigmoid(0) with it: removing is not masking."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(12, 16)
        self.outer = nn.Linear(16, 8)

    def forward(self, x):
        return torch.sigmoid(self.outer(self.inner(x).cos())).sum(-1)


@case(
    "channel_softmax_gate",
    inputs=(2, 3, 8, 8),
    other=(3, 3, 6, 6),
    share=0.99,
    expected=[axis("conv:0 gate:0 head.weight:1", 16, False)],
)
class ChannelSoftmaxGate(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3, padding=1)
        self.gate = nn.Conv2d(3, 16, 1)
        self.head = nn.Linear(16, 4)

    def forward(self, x):
        weights = self.gate(x).flatten(2).mean(-1).softmax(dim=1)
        return self.head((self.conv(x) * weights[:, :, None, None]).amax((-2, -1)))


@case(
    "dropouts",
    inputs=(4, 3, 16),
    other=(2, 3, 10),
    share=0.99,
    expected=[axis("conv1:0 conv2.weight:1", 8), axis("conv2:0 fc.weight:1", 8), axis("fc:0 head.weight:1", 16)],
)
class Dropouts(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv1d(3, 8, 3)
        self.conv2 = nn.Conv1d(8, 8, 3)
        self.fc = nn.Linear(8, 16)
        self.head = nn.Linear(16, 2)
        self.drop1d = nn.Dropout1d(0.2)
        self.alpha = nn.AlphaDropout(0.1)

    def forward(self, x):
        x = self.drop1d(F.leaky_relu(self.conv1(x), 0.1))
        x = F.avg_pool1d(F.dropout(self.conv2(x), 0.3, self.training, inplace=True), 2)
        x = self.alpha(F.selu(self.fc(x.max(-1).values)))
        return self.head(F.dropout(x, training=self.training))


@case(
    "literal_in_view",
    inputs=(2, 3, 8, 8),
    other=(5, 3, 8, 8),
    share=0.33,
    expected=[axis("fc:0 head.weight:1", 10)],
    frozen={"conv.weight:0": r"literal 12.*basics\.py:\d+"},
)
class LiteralInView(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 12, 3, padding=1)
        self.fc = nn.Linear(12, 10)
        self.head = nn.Linear(10, 4)

    def forward(self, x):
        x = self.conv(x).relu().view(x.shape[0], 12, -1).mean(-1)
        return self.head(self.fc(x).relu())


@case(
    "literal_in_flatten",
    inputs=(2, 3, 8, 8),
    other=(5, 3, 8, 8),
    share=0.95,
    expected=[axis("fc:0 head.weight:1", 10)],
    frozen={"conv.weight:0": r"literal 768.*basics\.py:\d+"},
)
class LiteralInFlatten(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 12, 3, padding=1)
        self.fc = nn.Linear(768, 10)
        self.head = nn.Linear(10, 4)

    def forward(self, x):
        x = self.conv(x).relu().reshape(-1, 768)
        return self.head(self.fc(x).relu())


@case(
    "zero_is_not_kept",
    inputs=(4, 10),
    other=(2, 10),
    share=1.0,
    expected=[axis(f"layers.{i}:0", 6, False) for i in range(9)] + [axis(f"fine.{i}:0", 6) for i in range(5)],
)
class ZeroIsNotKept(nn.Module):
    """Functions of a removed neuron that are summed up: those with f(0) != 0 are inexact, the others exact."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(10, 6) for _ in range(9))
        self.fine = nn.ModuleList(nn.Linear(10, 6) for _ in range(5))

    def forward(self, x):
        a, b, c, d, e, f, g, h, i = (layer(x) for layer in self.layers)
        odd = [
            a.clamp(min=0.1), 2**b, c.sinc(), d**0, F.hardtanh(e, 0.5, 1.0), F.logsigmoid(f), 1 - g, h.eq(0).float(),
            torch.where(i > 0, i, -1.0),
        ]  # fmt: skip
        p, q, r, s, t = (layer(x) for layer in self.fine)
        even = [p.clamp(-0.5, 0.5), q.abs() ** 1.5, torch.where(r > 0, r, 0.1 * r), F.hardtanh(s) * 3 - s, t * t.exp()]
        return torch.stack([one.sum(-1) for one in odd + even], dim=1)
