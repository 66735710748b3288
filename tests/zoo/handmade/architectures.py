"""Blocks with a name of their own: what makes each of them hard is how it moves channels about."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from tests.zoo.case import axis, case
from torch import nn

IMAGE = {"inputs": (2, 3, 8, 8), "other": (3, 3, 6, 10)}


@case(
    "temporal_shift",
    inputs=(2, 4, 3, 6, 6),
    other=(1, 5, 3, 4, 4),
    share=0.99,
    expected=[
        axis("first:0 second.weight:1", 2, label="past"),
        axis("first:0 second.weight:1", 2, label="future"),
        axis("first:0 second.weight:1", 12, label="rest"),
        axis("second:0 head.weight:1", 6),
    ],
    sizes={"first.out_channels": "past + future + rest"},
)
class TemporalShift(nn.Module):
    """TSM: an eighth of the channels comes from the past, an eighth from the future; which ones is their place."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 6, 3, padding=1)
        self.head = nn.Linear(6, 4)

    def forward(self, video):
        b, t = video.shape[:2]
        x = self.first(video.flatten(0, 1))
        _, c, h, w = x.size()
        x = x.view(b, t, c, h, w)
        fold = c // 8
        out = torch.zeros_like(x)
        out[:, :-1, :fold] = x[:, 1:, :fold]
        out[:, 1:, fold : 2 * fold] = x[:, :-1, fold : 2 * fold]
        out[:, :, 2 * fold :] = x[:, :, 2 * fold :]
        x = self.second(out.view(b * t, c, h, w)).relu().mean((2, 3))
        return self.head(x).view(b, t, -1).mean(1)


@case(
    "ghost_module",
    **IMAGE,
    share=0.97,
    expected=[axis("primary:0 cheap:0 cheap_norm:0 head.weight:1", 8)],
    sizes={},
)
class Ghost(nn.Module):
    """GhostNet: cheap copies beside the channels they are made of, and a slice that takes them all."""

    def __init__(self, channels=16):
        super().__init__()
        self.channels = channels
        self.primary = nn.Conv2d(3, channels // 2, 1)
        self.cheap = nn.Conv2d(channels // 2, channels // 2, 3, padding=1, groups=channels // 2, bias=False)
        self.cheap_norm = nn.BatchNorm2d(channels // 2)
        self.head = nn.Conv2d(channels, 4, 1)

    def forward(self, x):
        x1 = self.primary(x).relu()
        x2 = self.cheap_norm(self.cheap(x1)).relu()
        out = torch.cat([x1, x2], dim=1)
        return self.head(out[:, : self.channels, :, :]).mean((2, 3))


@case(
    "involution",
    **IMAGE,
    share=0.98,
    expected=[
        axis("stem:0 reduce.weight:1 span:0 head.weight:1", 2, None, "g"),
        axis("stem:0 reduce.weight:1 head.weight:1", 4, label="c"),
        axis("reduce:0 span.weight:1", 5),
    ],
    sizes={"groups": "g", "span.out_channels": "9 * g", "head.in_channels": "g * c"},
)
class Involution(nn.Module):
    """A kernel for every place, made from the place, shared by the channels of a group."""

    def __init__(self, channels=8, groups=2, kernel=3):
        super().__init__()
        self.groups, self.kernel = groups, kernel
        self.stem = nn.Conv2d(3, channels, 1)
        self.reduce, self.span = nn.Conv2d(channels, 5, 1), nn.Conv2d(5, kernel**2 * groups, 1)
        self.head = nn.Conv2d(channels, 4, 1)

    def forward(self, x):
        x = self.stem(x)
        b, c, h, w = x.shape
        weight = self.span(self.reduce(x).relu()).view(b, self.groups, self.kernel**2, h, w).unsqueeze(2)
        patches = F.unfold(x, self.kernel, padding=1).view(b, self.groups, c // self.groups, self.kernel**2, h, w)
        return self.head((weight * patches).sum(dim=3).view(b, c, h, w))


@case(
    "selective_kernel",
    **IMAGE,
    share=0.99,
    expected=[
        axis("branches:0 squeeze.weight:1 excite:0 head.weight:1", 8, label="c"),
        axis("squeeze:0 excite.weight:1", 5),
    ],
    sizes={"excite.out_features": "2 * c", "channels": "c"},
)
class SelectiveKernel(nn.Module):
    """Two branches weighed against each other, channel by channel."""

    def __init__(self, channels=8):
        super().__init__()
        self.channels = channels
        self.branches = nn.ModuleList(nn.Conv2d(3, channels, 3, padding=d, dilation=d) for d in (1, 2))
        self.squeeze, self.excite = nn.Linear(channels, 5), nn.Linear(5, 2 * channels)
        self.head = nn.Linear(channels, 4)

    def forward(self, x):
        features = torch.stack([branch(x) for branch in self.branches], dim=1)
        pooled = features.sum(dim=1).mean(-1).mean(-1)
        weights = self.excite(self.squeeze(pooled).relu()).view(-1, 2, self.channels).softmax(dim=1)
        out = (features * weights[..., None, None]).sum(1)
        return self.head(out.amax((2, 3)))


@case(
    "split_attention",
    **IMAGE,
    share=0.99,
    expected=[
        axis("conv:0 fc1.weight:1 fc2:0 head.weight:1", 2, None, "k"),
        axis("conv:0 fc1.weight:1 fc2:0 head.weight:1", 4, None, "c"),
    ],
    sizes={"cardinality": "k", "conv.groups": "1", "fc1.in_features": "k * c"},
)
class SplitAttention(nn.Module):
    """ResNeSt: splits of every cardinal group, weighed by a softmax over the splits."""

    def __init__(self, channels=8, radix=2, cardinality=2):
        super().__init__()
        self.radix, self.cardinality = radix, cardinality
        self.conv = nn.Conv2d(3, channels * radix, 3, padding=1)
        self.fc1, self.fc2 = nn.Linear(channels, 6), nn.Linear(6, channels * radix)
        self.head = nn.Conv2d(channels, 4, 1)

    def forward(self, x):
        x = self.conv(x).relu()
        b, rc = x.shape[:2]
        splits = torch.split(x, rc // self.radix, dim=1)
        gap = sum(splits).mean((2, 3))
        weights = self.fc2(self.fc1(gap).relu()).view(b, self.cardinality, self.radix, -1)
        weights = weights.transpose(1, 2).softmax(dim=1).reshape(b, -1, 1, 1)
        weights = torch.split(weights, rc // self.radix, dim=1)
        return self.head(sum(w * s for w, s in zip(weights, splits, strict=True)))


@case(
    "efficient_channel_attention",
    **IMAGE,
    share=0.22,
    expected=[axis("body:0 head.weight:1", 6)],
    frozen={"stem.weight:0!": "spatial"},
)
class EfficientChannelAttention(nn.Module):
    """ECA: a convolution along the channels; neighbours are neighbours by number."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.along = nn.Conv1d(1, 1, 3, padding=1, bias=False)
        self.body, self.head = nn.Conv2d(8, 6, 1), nn.Conv2d(6, 2, 1)

    def forward(self, x):
        x = self.stem(x)
        y = self.along(x.mean((2, 3)).unsqueeze(1)).squeeze(1)
        return self.head(self.body(x * y.sigmoid()[:, :, None, None]).relu())


@case(
    "res2net",
    **IMAGE,
    share=0.99,
    expected=[
        axis("reduce:0 convs.0.weight:1", 6, label="w"),
        axis("reduce:0 convs.0:0 convs.1.weight:1 expand.weight:1", 6),
        axis("reduce:0 convs.1:0 convs.2.weight:1 expand.weight:1", 6),
        axis("convs.2:0 expand.weight:1", 6),
        axis("reduce:0 expand.weight:1", 6),
    ],
    sizes={"width": "w"},
)
class Res2Net(nn.Module):
    """Parts that each see the result of the part before: an int of the module cuts them."""

    def __init__(self, width=6, scale=4):
        super().__init__()
        self.width = width
        self.reduce = nn.Conv2d(3, width * scale, 1)
        self.convs = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(scale - 1))
        self.expand = nn.Conv2d(width * scale, 5, 1)

    def forward(self, x):
        parts = torch.split(self.reduce(x).relu(), self.width, 1)
        done, last = [], None
        for conv, part in zip(self.convs, parts, strict=False):
            last = conv(part if last is None else last + part).relu()
            done.append(last)
        return self.expand(torch.cat([*done, parts[-1]], 1))


@case(
    "cross_covariance_attention",
    inputs=(2, 6, 16),
    other=(3, 9, 16),
    share=0.99,
    expected=[axis("qkv:0 temperature:0 proj.weight:1", 4, None, "h"), axis("qkv:0 proj.weight:1", 5, False, "d")],
    sizes={"num_heads": "h", "qkv.out_features": "3 * h * d"},
)
class CrossCovariance(nn.Module):
    """XCiT: attention between the entries of a head, normalised over one of the two."""

    def __init__(self, num_heads=4):
        super().__init__()
        self.num_heads = num_heads
        self.temperature = nn.Parameter(torch.ones(num_heads, 1, 1))
        self.qkv, self.proj = nn.Linear(16, 60), nn.Linear(20, 7)

    def forward(self, x):
        b, n, _ = x.shape
        qkv = self.qkv(x).reshape(b, n, 3, self.num_heads, -1).permute(2, 0, 3, 4, 1)
        q, k, v = qkv.unbind(0)
        q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        attn = ((q @ k.transpose(-2, -1)) * self.temperature).softmax(dim=-1)
        return self.proj((attn @ v).permute(0, 3, 1, 2).reshape(b, n, -1))


@case(
    "gated_mlp",
    inputs=(2, 6, 10),
    other=(3, 6, 10),
    share=0.83,
    expected=[
        axis("up:0 norm:0 down.weight:1", 8, False),
    ],
    frozen={"spatial.weight:0": "input"},
)
class SpatialGatingUnit(nn.Module):
    """gMLP: one half, mixed over tokens, gates the other."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(10, 16), nn.Linear(8, 5)
        self.norm = nn.LayerNorm(8)
        self.spatial = nn.Conv1d(6, 6, 1)

    def forward(self, x):
        u, v = F.gelu(self.up(x)).chunk(2, dim=-1)
        return self.down(u * self.spatial(self.norm(v)))


@case(
    "conformer_convolution",
    inputs=(2, 9, 8),
    other=(3, 7, 8),
    share=0.99,
    expected=[axis("point1:0 depth:0 norm:0 point2.weight:1", 10, label="c"), axis("point2:0 head.weight:1", 6)],
    sizes={"depth.groups": "c", "point1.out_channels": "2 * c"},
)
class ConformerConvolution(nn.Module):
    def __init__(self):
        super().__init__()
        self.point1 = nn.Conv1d(8, 20, 1)
        self.depth = nn.Conv1d(10, 10, 3, padding=1, groups=10)
        self.norm = nn.BatchNorm1d(10)
        self.point2 = nn.Conv1d(10, 6, 1)
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        x = F.glu(self.point1(x.transpose(1, 2)), dim=1)
        x = F.silu(self.norm(self.depth(x)))
        return self.head(self.point2(x).transpose(1, 2))


@case(
    "convolutions_into_lstm",
    inputs=(2, 1, 8, 12),
    other=(3, 1, 8, 20),
    share=0.99,
    expected=[
        axis("conv:0 norm:0 rnn.weight_ih_l0:1 rnn.weight_ih_l0_reverse:1", 6, label="c"),
        axis("rnn.weight_ih_l0:0 rnn.weight_hh_l0:0 rnn.weight_hh_l0:1 rnn.bias_ih_l0:0 rnn.bias_hh_l0:0 "
             "rnn.weight_ih_l0_reverse:0 rnn.weight_hh_l0_reverse:0 rnn.weight_hh_l0_reverse:1 "
             "rnn.bias_ih_l0_reverse:0 rnn.bias_hh_l0_reverse:0 head.weight:1", 7, label="h"),
    ],
    sizes={"rnn.input_size": "4 * c", "rnn.hidden_size": "h"},
)  # fmt: skip
class ConvRecurrent(nn.Module):
    """Reads text off an image: columns of (channels · height) go into an LSTM."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.rnn = nn.LSTM(24, 7, bidirectional=True, batch_first=True)
        self.head = nn.Linear(14, 5)

    def forward(self, x):
        x = F.max_pool2d(self.norm(self.conv(x)).relu(), 2)
        b, c, h, w = x.size()
        x = x.permute(0, 3, 1, 2).reshape(b, w, c * h)
        return self.head(self.rnn(x)[0]).log_softmax(-1)
