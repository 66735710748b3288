"""Branches that meet again: sums, concatenations, gates."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from tests.zoo.case import axis, case
from torch import nn


class BasicBlock(nn.Module):
    """The block of ResNet-18."""

    def __init__(self, inplanes, planes, stride=1):
        super().__init__()
        self.conv1 = nn.Conv2d(inplanes, planes, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(planes, planes, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.downsample = None
        if stride != 1 or inplanes != planes:
            self.downsample = nn.Sequential(nn.Conv2d(inplanes, planes, 1, stride, bias=False), nn.BatchNorm2d(planes))

    def forward(self, x):
        identity = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += identity
        return self.relu(out)


@case(
    "residual_chain",
    inputs=(2, 3, 8, 8),
    other=(3, 3, 12, 6),
    share=0.99,
    expected=[
        axis("0:0 1:0 3.conv1.weight:1 3.conv2:0 3.bn2:0 4.conv1.weight:1 4.downsample.0.weight:1", 8),
        axis("3.conv1:0 3.bn1:0 3.conv2.weight:1", 8),
        axis("4.conv1:0 4.bn1:0 4.conv2.weight:1", 12),
        axis("4.conv2:0 4.bn2:0 4.downsample:0 5.conv1.weight:1 5.conv2:0 5.bn2:0 8.weight:1", 12),
        axis("5.conv1:0 5.bn1:0 5.conv2.weight:1", 12),
    ],
)
def residual_chain():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True),
        BasicBlock(8, 8), BasicBlock(8, 12, 2), BasicBlock(12, 12), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(12, 4),
    )  # fmt: skip


@case(
    "preactivation_chain",
    inputs=(4, 10),
    other=(2, 10),
    share=0.99,
    expected=[
        axis("stem:0 norms:0 up.0.weight:1 up.1.weight:1 up.2.weight:1 down:0 scale:1 last:0 head.weight:1", 16),
        axis("up.0:0 down.0.weight:1", 24),
        axis("up.1:0 down.1.weight:1", 24),
        axis("up.2:0 down.2.weight:1", 24),
    ],
)
class PreActivation(nn.Module):
    """Pre-activation blocks with a learned scale per block (layer scale)."""

    def __init__(self, width=16, depth=3):
        super().__init__()
        self.stem = nn.Linear(10, width)
        self.norms = nn.ModuleList(nn.BatchNorm1d(width) for _ in range(depth))
        self.up = nn.ModuleList(nn.Linear(width, 24) for _ in range(depth))
        self.down = nn.ModuleList(nn.Linear(24, width) for _ in range(depth))
        self.scale = nn.Parameter(0.1 * torch.ones(depth, width))
        self.last = nn.BatchNorm1d(width)
        self.head = nn.Linear(width, 3)

    def forward(self, x):
        x = self.stem(x)
        for i, (norm, up, down) in enumerate(zip(self.norms, self.up, self.down, strict=True)):
            x = x + self.scale[i] * down(F.relu(up(norm(x))))
        return self.head(self.last(x))


@case(
    "dense_concatenation",
    inputs=(2, 3, 8, 8),
    other=(3, 3, 6, 10),
    share=0.99,
    expected=[
        axis("stem:0 norms:0 layers.0.weight:1 layers.1.weight:1 layers.2.weight:1 transition.weight:1", 8),
        axis("layers.0:0 norms.1:0 norms.2:0 layers.1.weight:1 layers.2.weight:1 transition.weight:1", 6),
        axis("layers.1:0 norms.2:0 layers.2.weight:1 transition.weight:1", 6),
        axis("layers.2:0 transition.weight:1", 6),
        axis("transition:0 head.weight:1", 10),
    ],
)
class DenseBlock(nn.Module):
    def __init__(self, growth=6):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norms = nn.ModuleList()
        self.layers = nn.ModuleList()
        channels = 8
        for _ in range(3):
            self.norms.append(nn.BatchNorm2d(channels))
            self.layers.append(nn.Conv2d(channels, growth, 3, padding=1))
            channels += growth
        self.transition = nn.Conv2d(channels, 10, 1)
        self.head = nn.Linear(10, 4)

    def forward(self, x):
        features = [self.stem(x)]
        for norm, layer in zip(self.norms, self.layers, strict=True):
            features.append(layer(norm(torch.cat(features, 1)).relu()))
        x = F.avg_pool2d(self.transition(torch.cat(features, 1)), 2)
        return self.head(x.flatten(2).mean(2))


def double_conv(inside, outside):
    """Two convolutions, as U-Nets stack them."""
    return nn.Sequential(
        nn.Conv2d(inside, outside, 3, padding=1, bias=False), nn.BatchNorm2d(outside), nn.ReLU(inplace=True),
        nn.Conv2d(outside, outside, 3, padding=1), nn.ReLU(inplace=True),
    )  # fmt: skip


@case(
    "unet",
    inputs=(2, 2, 8, 8),
    other=(1, 2, 14, 10),
    share=0.99,
    expected=[
        axis("down1.0:0 down1.1:0 down1.3.weight:1", 6),
        axis("down1.3:0 down2.0.weight:1 merge1.0.weight:1", 6, label="s1"),
        axis("down2.0:0 down2.1:0 down2.3.weight:1", 8),
        axis("down2.3:0 bottom.0.weight:1 merge2.0.weight:1", 8, label="s2"),
        axis("bottom.0:0 bottom.1:0 bottom.3.weight:1", 12),
        axis("bottom.3:0 up2.weight:0", 12),
        axis("up2.weight:1 up2.bias:0 merge2.0.weight:1", 8, label="u2"),
        axis("merge2.0:0 merge2.1:0 merge2.3.weight:1", 8),
        axis("merge2.3:0 merge1.0.weight:1", 8, label="u1"),
        axis("merge1.0:0 merge1.1:0 merge1.3.weight:1", 6),
        axis("merge1.3:0 last.weight:1", 6),
    ],
    sizes={"merge2.0.in_channels": "s2 + u2", "merge1.0.in_channels": "s1 + u1", "up2.out_channels": "u2"},
)
class UNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.down1, self.down2, self.bottom = double_conv(2, 6), double_conv(6, 8), double_conv(8, 12)
        self.up2 = nn.ConvTranspose2d(12, 8, 2, stride=2)
        self.merge2, self.merge1 = double_conv(16, 8), double_conv(14, 6)
        self.last = nn.Conv2d(6, 2, 1)

    def forward(self, x):
        skip1 = self.down1(x)
        skip2 = self.down2(F.max_pool2d(skip1, 2))
        y = self.up2(self.bottom(F.max_pool2d(skip2, 2)))
        dh, dw = skip2.size(2) - y.size(2), skip2.size(3) - y.size(3)
        y = F.pad(y, [dw // 2, dw - dw // 2, dh // 2, dh - dh // 2])
        y = self.merge2(torch.cat([skip2, y], dim=1))
        y = F.interpolate(y, size=skip1.shape[2:], mode="bilinear", align_corners=True)
        return self.last(self.merge1(torch.cat([skip1, y], dim=1)))


@case(
    "inception",
    inputs=(2, 3, 8, 8),
    other=(1, 3, 9, 9),
    share=0.99,
    expected=[
        axis("stem:0 one.weight:1 three.0.weight:1 five.0.weight:1 pool.1.weight:1", 8),
        axis("one:0 head.weight:1", 6, label="a"),
        axis("three.0:0 three.1.weight:1 three.2.weight:1", 4),
        axis("three.1:0 head.weight:1", 5, label="b"),
        axis("three.2:0 head.weight:1", 5, label="c"),
        axis("five.0:0 five.1.weight:1", 4),
        axis("five.1:0 head.weight:1", 6, label="d"),
        axis("pool.1:0 head.weight:1", 6, label="e"),
    ],
    sizes={"head.in_features": "a + b + c + d + e"},
)
class Inception(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.one = nn.Conv2d(8, 6, 1)
        self.three = nn.ModuleList(
            [nn.Conv2d(8, 4, 1), nn.Conv2d(4, 5, (1, 3), padding=(0, 1)), nn.Conv2d(4, 5, (3, 1), padding=(1, 0))]
        )
        self.five = nn.Sequential(nn.Conv2d(8, 4, 1), nn.Conv2d(4, 6, 5, padding=2))
        self.pool = nn.Sequential(nn.AvgPool2d(3, 1, 1), nn.Conv2d(8, 6, 1))
        self.head = nn.Linear(28, 4)

    def forward(self, x):
        x = self.stem(x).relu()
        reduced = self.three[0](x)
        three = torch.cat([self.three[1](reduced), self.three[2](reduced)], 1)
        out = torch.cat([self.one(x), three, self.five(x), self.pool(x)], 1)
        return self.head(F.relu(out).mean((2, 3)))


@case(
    "squeeze_excite",
    inputs=(2, 3, 8, 8),
    other=(3, 3, 6, 10),
    share=0.99,
    expected=[
        axis("stem:0 bn:0 squeeze.weight:1 excite:0 spatial.weight:1 head.weight:1", 16),
        axis("squeeze:0 excite.weight:1", 4),
    ],
)
class SqueezeExcite(nn.Module):
    """Channel and spatial attention (SE, CBAM)."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.bn = nn.BatchNorm2d(16)
        self.squeeze = nn.Linear(16, 4)
        self.excite = nn.Linear(4, 16)
        self.spatial = nn.Conv2d(16, 1, 1)
        self.head = nn.Linear(16, 4)

    def forward(self, x):
        x = self.bn(self.stem(x)).relu()
        b, c = x.shape[:2]
        gate = self.excite(F.relu(self.squeeze(F.adaptive_avg_pool2d(x, 1).view(b, c))))
        x = x * torch.sigmoid(gate).view(b, c, 1, 1)
        x = x * self.spatial(x).sigmoid()
        return self.head(x.mean(dim=[2, 3]))


@case(
    "feature_pyramid",
    inputs=(2, 3, 16, 16),
    other=(1, 3, 24, 16),
    share=0.99,
    expected=[
        axis("c1:0 c2.weight:1 lateral.0.weight:1", 6),
        axis("c2:0 c3.weight:1 lateral.1.weight:1", 8),
        axis("c3:0 lateral.2.weight:1", 10),
        axis("lateral:0 heads.0.weight:1 heads.1.weight:1 heads.2.weight:1", 8),
    ],
)
class FeaturePyramid(nn.Module):
    def __init__(self):
        super().__init__()
        self.c1 = nn.Conv2d(3, 6, 3, 2, 1)
        self.c2 = nn.Conv2d(6, 8, 3, 2, 1)
        self.c3 = nn.Conv2d(8, 10, 3, 2, 1)
        self.lateral = nn.ModuleList(nn.Conv2d(c, 8, 1) for c in (6, 8, 10))
        self.heads = nn.ModuleList(nn.Conv2d(8, 2, 1) for _ in range(3))

    def forward(self, x):
        c1 = self.c1(x).relu()
        c2 = self.c2(c1).relu()
        c3 = self.c3(c2).relu()
        p = [lateral(c) for lateral, c in zip(self.lateral, (c1, c2, c3), strict=True)]
        for level in (1, 0):
            p[level] = p[level] + F.interpolate(p[level + 1], size=p[level].shape[-2:], mode="nearest")
        return {f"p{i}": head(x) for i, (head, x) in enumerate(zip(self.heads, p, strict=True))}


@case(
    "highway",
    inputs=(4, 10),
    other=(2, 10),
    share=0.99,
    expected=[
        axis(
            "embed:0 carry.weight:0 carry.weight:1 carry.bias:0 work.weight:0 work.weight:1 work.bias:0 head.weight:1",
            16,
        )
    ],
)
class Highway(nn.Module):
    """Square layers applied twice: both of their dimensions are one axis."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(10, 16)
        self.carry = nn.Linear(16, 16)
        self.work = nn.Linear(16, 16)
        self.head = nn.Linear(16, 3)

    def forward(self, x):
        x = self.embed(x)
        for _ in range(2):
            t = torch.sigmoid(self.carry(x))
            x = t * self.work(x).relu() + (1 - t) * x
        return self.head(x)


@case(
    "mlp_mixer",
    inputs=(2, 3, 8, 8),
    other=(3, 3, 8, 8),
    share=0.98,
    expected=[
        axis("patch:0 norm1:0 norm2:0 channel.0.weight:1 channel.2:0 head.weight:1", 16, False),
        axis("token.0:0 token.2.weight:1", 10),
        axis("channel.0:0 channel.2.weight:1", 24),
    ],
)
class Mixer(nn.Module):
    """Tokens and channels mixed in turn; the number of tokens is the image's."""

    def __init__(self):
        super().__init__()
        self.patch = nn.Conv2d(3, 16, 2, stride=2)
        self.norm1, self.norm2 = nn.LayerNorm(16), nn.LayerNorm(16)
        self.token = nn.Sequential(nn.Linear(16, 10), nn.GELU(), nn.Linear(10, 16))
        self.channel = nn.Sequential(nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 16))
        self.head = nn.Linear(16, 4)

    def forward(self, x):
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = x + self.token(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        x = x + self.channel(self.norm2(x))
        return self.head(x.mean(dim=1))
