"""Convolutions of every kind."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from tests.zoo.case import axis, case
from torch import nn


@case(
    "conv1d",
    inputs=(2, 4, 20),
    other=(3, 4, 33),
    share=0.99,
    expected=[axis("0:0 1:0 3.weight:1", 12), axis("3:0 7.weight:1", 8)],
)
def conv1d():
    return nn.Sequential(
        nn.Conv1d(4, 12, 5, dilation=2), nn.BatchNorm1d(12), nn.ReLU(inplace=True),
        nn.Conv1d(12, 8, 3, padding="same", padding_mode="circular"), nn.Hardswish(),
        nn.AdaptiveAvgPool1d(1), nn.Flatten(),
        nn.Linear(8, 3),
    )  # fmt: skip


@case(
    "conv3d",
    inputs=(2, 1, 6, 8, 8),
    other=(1, 1, 8, 6, 8),
    share=0.99,
    expected=[axis("conv1:0 bn:0 conv2.weight:1", 8), axis("conv2:0 head.weight:1", 6)],
)
class Conv3d(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv3d(1, 8, (1, 3, 3), padding=(0, 1, 1), bias=False)
        self.bn = nn.BatchNorm3d(8)
        self.conv2 = nn.Conv3d(8, 6, 3, stride=2)
        self.head = nn.Linear(6, 5)

    def forward(self, x):
        x = F.max_pool3d(torch.relu_(self.bn(self.conv1(x))), (1, 2, 2), ceil_mode=True)
        x = F.pad(x, (1, 1, 1, 1, 1, 1))
        return self.head(self.conv2(x).mean([-3, -2, -1]))


@case(
    "conv_transpose",
    inputs=(2, 6, 5, 5),
    other=(3, 6, 4, 7),
    share=0.99,
    expected=[axis("0.weight:1 0.bias:0 1:0 3.weight:0", 12), axis("3.weight:1 3.bias:0 5.weight:1", 8)],
    frozen={"0.weight:0": "input", "5.weight:0": "output"},
)
def conv_transpose():
    return nn.Sequential(
        nn.ConvTranspose2d(6, 12, 4, stride=2, padding=1), nn.BatchNorm2d(12), nn.ReLU(),
        nn.ConvTranspose2d(12, 8, 3, stride=2, output_padding=1), nn.ReLU(), nn.Conv2d(8, 3, 1),
    )  # fmt: skip


@case(
    "conv_transpose_grouped",
    inputs=(2, 6, 5, 5),
    other=(3, 6, 4, 7),
    share=0.99,
    expected=[
        axis("first:0 up.weight:0 up.bias:0 last.weight:1", 4, label="g"),
        axis("first:0 up.weight:0", 3, label="i"),
        axis("up.weight:1 up.bias:0 last.weight:1", 2, label="o"),
    ],
    sizes={"up.groups": "g", "up.in_channels": "g * i", "up.out_channels": "g * o", "last.in_channels": "g * o"},
)
class ConvTransposeGrouped(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(6, 12, 1)
        self.up = nn.ConvTranspose2d(12, 8, 2, stride=2, groups=4)
        self.last = nn.Conv2d(8, 3, 3, padding=1)

    def forward(self, x):
        return self.last(self.up(self.first(x).relu()).relu())


@case(
    "conv_grouped",
    inputs=(2, 3, 8, 8),
    other=(3, 3, 10, 6),
    share=0.99,
    expected=[
        axis("reduce:0 bn1:0 grouped:0 bn2:0 expand.weight:1", 4, label="g"),
        axis("reduce:0 bn1:0 grouped.weight:1", 6, label="i"),
        axis("grouped:0 bn2:0 expand.weight:1", 4, label="o"),
        axis("expand:0 head.weight:1", 20),
    ],
    sizes={
        "grouped.groups": "g",
        "grouped.in_channels": "g * i",
        "grouped.out_channels": "g * o",
        "bn2.num_features": "g * o",
    },
)
class ConvGrouped(nn.Module):
    def __init__(self):
        super().__init__()
        self.reduce = nn.Conv2d(3, 24, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(24)
        self.grouped = nn.Conv2d(24, 16, 3, padding=1, groups=4)
        self.bn2 = nn.BatchNorm2d(16)
        self.expand = nn.Conv2d(16, 20, 1)
        self.head = nn.Linear(20, 4)

    def forward(self, x):
        x = self.bn1(self.reduce(x)).relu()
        x = self.bn2(self.grouped(x)).relu()
        return self.head(self.expand(x).relu().sum((2, 3)))


@case(
    "depthwise_separable",
    inputs=(2, 3, 8, 8),
    other=(3, 3, 9, 6),
    share=0.99,
    expected=[
        axis("stem:0 dw1:0 bn1:0 pw1.weight:1", 12, label="a"),
        axis("pw1:0 dw2:0 bn2:0 pw2.weight:1", 16, label="b"),
        axis("pw2:0 head.weight:1", 10),
    ],
    sizes={"dw1.groups": "a", "dw1.in_channels": "a", "dw2.groups": "b", "dw2.out_channels": "b"},
)
class DepthwiseSeparable(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 3, padding=1)
        self.dw1 = nn.Conv2d(12, 12, 3, padding=1, groups=12, bias=False)
        self.bn1 = nn.BatchNorm2d(12)
        self.pw1 = nn.Conv2d(12, 16, 1)
        self.dw2 = nn.Conv2d(16, 16, 5, padding=4, dilation=2, groups=16)
        self.bn2 = nn.BatchNorm2d(16)
        self.pw2 = nn.Conv2d(16, 10, 1)
        self.head = nn.Linear(10, 4)

    def forward(self, x):
        x = F.relu6(self.bn1(self.dw1(F.relu6(self.stem(x)))))
        x = F.relu6(self.bn2(self.dw2(F.relu6(self.pw1(x)))))
        return self.head(F.adaptive_avg_pool2d(self.pw2(x), 1).flatten(1))


@case(
    "depthwise_multiplier",
    inputs=(2, 3, 8, 8),
    other=(3, 3, 9, 6),
    share=0.99,
    expected=[
        axis("stem:0 dw:0 head.weight:1", 6, label="g"),
        axis("dw:0 head.weight:1", 4, label="m"),
    ],
    sizes={"dw.groups": "g", "dw.in_channels": "g", "dw.out_channels": "g * m"},
)
class DepthwiseMultiplier(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3)
        self.dw = nn.Conv2d(6, 24, 3, groups=self.stem.out_channels)
        self.head = nn.Conv2d(24, 5, 1)

    def forward(self, x):
        return self.head(self.dw(self.stem(x).relu()).relu()).amax(dim=(2, 3))


@case(
    "unfold_as_convolution",
    inputs=(2, 3, 8, 8),
    other=(3, 3, 10, 8),
    share=0.99,
    expected=[axis("stem:0 weight:1", 8), axis("weight:0 bias:0 head.weight:1", 12)],
)
class UnfoldConvolution(nn.Module):
    """A convolution as a product with unfolded patches."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 1)
        self.weight = nn.Parameter(0.1 * torch.randn(12, 8, 3, 3))
        self.bias = nn.Parameter(torch.zeros(12))
        self.head = nn.Conv2d(12, 4, 1)

    def forward(self, x):
        x = self.stem(x).relu()
        n, _, h, w = x.shape
        patches = F.unfold(x, 3, padding=1)
        x = self.weight.view(self.weight.size(0), -1) @ patches + self.bias[:, None]
        return self.head(x.view(n, -1, h, w))


@case(
    "unfold_then_linear_then_fold",
    inputs=(2, 3, 8, 8),
    other=(3, 3, 12, 8),
    share=0.99,
    expected=[
        axis("stem:0 mix.weight:1", 8),
        axis("mix:0 project.weight:1", 20),
        axis("project:0 head.weight:1", 6),
    ],
)
class UnfoldFold(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 1)
        self.unfold = nn.Unfold(2, stride=2)
        self.mix = nn.Linear(8 * 4, 20)
        self.project = nn.Linear(20, 6 * 4)
        self.head = nn.Conv2d(6, 4, 1)

    def forward(self, x):
        size = x.shape[-2:]
        x = self.unfold(self.stem(x)).transpose(1, 2)
        x = self.project(self.mix(x).relu()).transpose(1, 2)
        return self.head(F.fold(x, size, kernel_size=2, stride=2))


class WSConv2d(nn.Conv2d):
    """Weight standardisation (Qiao et al., 2019)."""

    def forward(self, x):
        weight = self.weight
        mean = weight.mean(dim=(1, 2, 3), keepdim=True)
        std = weight.std(dim=(1, 2, 3), keepdim=True) + 1e-5
        return self._conv_forward(x, (weight - mean) / std, self.bias)


@case(
    "weight_standardisation",
    inputs=(2, 3, 8, 8),
    other=(3, 3, 10, 8),
    share=0.99,
    expected=[axis("conv1:0 bn:0 conv2.weight:1", 12, False), axis("conv2:0 head.weight:1", 8, None)],
)
class WeightStandardised(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = WSConv2d(3, 12, 3, padding=1)
        self.bn = nn.BatchNorm2d(12)
        self.conv2 = WSConv2d(12, 8, 3, padding=1)
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        x = self.conv2(self.bn(self.conv1(x)).relu())
        return self.head(x.relu().mean((2, 3)))


@case(
    "padded_shortcut",
    inputs=(2, 3, 8, 8),
    other=(3, 3, 6, 6),
    share=0.98,
    expected=[axis("stem:0 conv1.weight:1 conv2:0 head.weight:1", 8), axis("conv1:0 conv2.weight:1", 16)],
    frozen={"conv2.bias:0": "is padding"},
)
class PaddedShortcut(nn.Module):
    """Option A of the CIFAR ResNets: the shortcut is padded with channels of zeros."""

    def __init__(self):
        super().__init__()
        planes = 16
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.conv1 = nn.Conv2d(8, planes, 3, stride=2, padding=1)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1)
        self.shortcut = lambda x: F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, planes // 4, planes // 4), "constant", 0)
        self.head = nn.Linear(planes, 4)

    def forward(self, x):
        x = self.stem(x).relu()
        out = self.conv2(self.conv1(x).relu())
        out += self.shortcut(x)
        return self.head(out.relu().mean((2, 3)))


@case(
    "dilated_pyramid",
    inputs=(2, 3, 12, 12),
    other=(1, 3, 16, 10),
    share=0.99,
    expected=[
        axis("stem:0 branches.0.weight:1 branches.1.weight:1 branches.2.weight:1 pooled.1.weight:1", 8),
        axis("branches.0:0 project.weight:1", 6),
        axis("branches.1:0 project.weight:1", 6),
        axis("branches.2:0 project.weight:1", 6),
        axis("pooled.1:0 project.weight:1", 6),
        axis("project:0 head.weight:1", 10),
    ],
)
class DilatedPyramid(nn.Module):
    """Atrous spatial pyramid pooling."""

    def __init__(self, rates=(1, 2, 4)):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.branches = nn.ModuleList([nn.Conv2d(8, 6, 3, padding=r, dilation=r) for r in rates])
        self.pooled = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(8, 6, 1), nn.ReLU())
        self.project = nn.Conv2d(24, 10, 1)
        self.head = nn.Conv2d(10, 3, 1)

    def forward(self, x):
        size = x.shape[-2:]
        x = self.stem(x)
        out = [branch(x).relu() for branch in self.branches]
        out.append(F.interpolate(self.pooled(x), size=size, mode="bilinear", align_corners=False))
        return self.head(self.project(torch.cat(out, dim=1)))


@case(
    "functional_convolution",
    inputs=(2, 3, 9, 9),
    other=(1, 3, 11, 7),
    share=0.99,
    expected=[axis("first:0 blur:0 second.weight:1", 10), axis("second:0 head.weight:1", 6)],
)
class BlurPool(nn.Module):
    """A fixed filter per channel, its groups read off the input."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 10, 3)
        kernel = torch.tensor([1.0, 2.0, 1.0])
        kernel = kernel[:, None] * kernel[None, :]
        self.register_buffer("blur", (kernel / kernel.sum()).expand(10, 1, 3, 3).clone())
        self.second = nn.Conv2d(10, 6, 3)
        self.head = nn.Conv2d(6, 2, 1)

    def forward(self, x):
        x = self.first(x).relu()
        x = F.conv2d(F.pad(x, (1, 1, 1, 1), mode="reflect"), self.blur, stride=2, groups=x.shape[1])
        return self.head(self.second(x)).mean((2, 3))
