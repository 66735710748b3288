"""Channels that change places: shuffles, pixel shuffles, splits, slices."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from tests.zoo.case import axis, case
from torch import nn


@case(
    "channel_shuffle",
    inputs=(2, 3, 8, 8),
    other=(3, 3, 6, 10),
    share=0.99,
    expected=[
        axis("stem:0 group1:0 bn1:0 depth:0 group2.weight:1", 4, label="g"),
        axis("stem:0 group1.weight:1", 6, label="i"),
        axis("group1:0 bn1:0 depth:0 group2:0 head.weight:1", 3, label="c"),
        axis("group2:0 head.weight:1", 5, label="o"),
    ],
    sizes={
        "groups": "g", "group1.groups": "g", "group2.groups": "c", "depth.groups": "g * c",
        "group2.in_channels": "g * c",
        "group2.out_channels": "c * o", "head.in_features": "c * o", "bn1.num_features": "g * c",
    },
)  # fmt: skip
class ChannelShuffle(nn.Module):
    """ShuffleNet v1: what one grouped convolution calls its group is a place within the next one's groups."""

    def __init__(self, groups=4):
        super().__init__()
        self.groups = groups
        self.stem = nn.Conv2d(3, 24, 3, padding=1)
        self.group1 = nn.Conv2d(24, 12, 1, groups=groups, bias=False)
        self.bn1 = nn.BatchNorm2d(12)
        self.depth = nn.Conv2d(12, 12, 3, padding=1, groups=12)
        self.group2 = nn.Conv2d(12, 15, 1, groups=3)
        self.head = nn.Linear(15, 4)

    def shuffle(self, x):
        n, c, h, w = x.size()
        x = x.view(n, self.groups, c // self.groups, h, w)
        return torch.transpose(x, 1, 2).contiguous().view(n, c, h, w)

    def forward(self, x):
        x = F.relu(self.bn1(self.group1(self.stem(x).relu())))
        x = self.group2(self.depth(self.shuffle(x)))
        return self.head(x.relu().mean((2, 3)))


@case(
    "channel_shuffle_module",
    inputs=(2, 3, 8, 8),
    other=(3, 3, 6, 10),
    share=0.98,
    expected=[
        axis("0:0 2:0 5.weight:1", 4, label="g"),
        axis("0:0 2.weight:1", 3),
        axis("2:0 5.weight:1", 4, label="c"),
    ],
    sizes={"2.groups": "g", "3.groups": "g", "5.in_channels": "g * c"},
)
def channel_shuffle_module():
    return nn.Sequential(
        nn.Conv2d(3, 12, 3),
        nn.ReLU(),
        nn.Conv2d(12, 16, 1, groups=4),
        nn.ChannelShuffle(4),
        nn.ReLU(),
        nn.Conv2d(16, 5, 1),
    )


@case(
    "pixel_shuffle",
    inputs=(2, 3, 6, 6),
    other=(1, 3, 5, 8),
    share=0.99,
    expected=[axis("body:0 expand.weight:1", 10), axis("expand:0 last.weight:1", 8, label="c")],
    sizes={"expand.out_channels": "4 * c", "last.in_channels": "c", "shuffle.upscale_factor": "2"},
)
class SuperResolution(nn.Module):
    def __init__(self, scale=2):
        super().__init__()
        self.body = nn.Conv2d(3, 10, 3, padding=1)
        self.expand = nn.Conv2d(10, 8 * scale**2, 3, padding=1)
        self.shuffle = nn.PixelShuffle(scale)
        self.last = nn.Conv2d(8, 3, 3, padding=1)

    def forward(self, x):
        skip = F.interpolate(x, scale_factor=2, mode="nearest")
        return self.last(self.shuffle(self.expand(self.body(x).tanh())).relu()) + skip


@case(
    "pixel_unshuffle",
    inputs=(2, 3, 8, 8),
    other=(1, 3, 4, 12),
    share=0.99,
    expected=[axis("0:0 2.weight:1", 6), axis("2:0 4.weight:1", 10)],
)
def pixel_unshuffle():
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1),
        nn.PixelUnshuffle(2),
        nn.Conv2d(24, 10, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(10, 2, 1),
    )


@case(
    "space_to_depth_by_view",
    inputs=(2, 3, 8, 8),
    other=(1, 3, 4, 12),
    share=0.99,
    expected=[axis("stem:0 merge.weight:1", 6), axis("merge:0 head.weight:1", 10)],
)
class SpaceToDepth(nn.Module):
    """Patch merging: four neighbours become channels, the channel running fastest."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 1)
        self.merge = nn.Linear(4 * 6, 10)
        self.head = nn.Linear(10, 3)

    def forward(self, x):
        x = self.stem(x).relu()
        b, c, h, w = x.shape
        x = x.reshape(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 3, 5, 1)
        x = x.reshape(b, (h // 2) * (w // 2), 4 * c)
        return self.head(F.gelu(self.merge(x))).mean(1)


@case(
    "focus_slices",
    inputs=(2, 3, 8, 8),
    other=(1, 3, 4, 12),
    share=0.99,
    expected=[axis("stem:0 conv.weight:1", 6), axis("conv:0 head.weight:1", 10)],
)
class Focus(nn.Module):
    """Patch merging by strided slices, concatenated (YOLO's focus layer, Swin's patch merging)."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 1)
        self.conv = nn.Conv2d(24, 10, 1)
        self.head = nn.Linear(10, 3)

    def forward(self, x):
        x = self.stem(x).relu()
        x = torch.cat([x[..., ::2, ::2], x[..., 1::2, ::2], x[..., ::2, 1::2], x[..., 1::2, 1::2]], 1)
        return self.head(self.conv(x).relu().mean((2, 3)))


@case(
    "glu",
    inputs=(2, 3, 20),
    other=(3, 3, 14),
    share=0.99,
    expected=[axis("conv1:0 conv2.weight:1", 8), axis("conv2:0 head.weight:1", 8)],
    sizes={},
)
class GatedConv(nn.Module):
    """Halves that are multiplied belong together: F.glu, then chunk by hand."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv1d(3, 16, 3)
        self.conv2 = nn.Conv1d(8, 16, 3)
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        x = F.glu(self.conv1(x), dim=1)
        value, gate = self.conv2(x).chunk(2, dim=1)
        return self.head((value.tanh() * torch.sigmoid(gate)).mean(-1))


@case(
    "swiglu_split_sizes",
    inputs=(2, 5, 12),
    other=(3, 7, 12),
    share=0.99,
    expected=[axis("up:0 down.weight:1", 20, label="h"), axis("down:0 head.weight:1", 16)],
    sizes={"up.out_features": "2 * h", "split_sizes.0": "h", "split_sizes.1": "h"},
)
class SwiGLU(nn.Module):
    def __init__(self, inner=20):
        super().__init__()
        self.split_sizes = [inner, inner]
        self.up = nn.Linear(12, 2 * inner, bias=False)
        self.down = nn.Linear(inner, 16)
        self.head = nn.Linear(16, 5)

    def forward(self, x):
        gate, value = self.up(x).split(self.split_sizes, dim=-1)
        return self.head(self.down(F.silu(gate) * value))


@case(
    "split_uneven",
    inputs=(2, 12),
    other=(3, 12),
    share=0.96,
    expected=[
        axis("mix:0 first.weight:1", 6, label="a"),
        axis("mix:0 second.weight:1", 10, label="b"),
        axis("mix:0 third.weight:1", 4, label="c"),
    ],
    sizes={"parts.0": "a", "parts.1": "b", "parts.2": "c", "mix.out_features": "a + b + c"},
)
class SplitUneven(nn.Module):
    def __init__(self):
        super().__init__()
        self.parts = (6, 10, 4)
        self.mix = nn.Linear(12, sum(self.parts))
        self.first = nn.Linear(6, 5)
        self.second = nn.Linear(10, 5)
        self.third = nn.Linear(4, 5)

    def forward(self, x):
        a, b, c = torch.split(self.mix(x).relu(), self.parts, dim=1)
        return self.first(a) + self.second(b) * self.third(c)


@case(
    "narrow_and_slice",
    inputs=(2, 12),
    other=(3, 12),
    share=0.96,
    expected=[axis("mix:0 first.weight:1", 6, label="a"), axis("mix:0 second.weight:1", 10, label="b")],
    sizes={"cut": "a", "mix.out_features": "a + b"},
)
class NarrowAndSlice(nn.Module):
    """The front by narrow, the rest by a slice, both cut at an integer the module keeps."""

    def __init__(self):
        super().__init__()
        self.cut = 6
        self.mix = nn.Linear(12, 16)
        self.first = nn.Linear(6, 5)
        self.second = nn.Linear(10, 5)

    def forward(self, x):
        x = self.mix(x).sigmoid()
        front = x.narrow(1, 0, self.cut)
        return self.first(front) + self.second(x[:, self.cut :])


@case(
    "slices_with_steps",
    inputs=(2, 12),
    other=(3, 12),
    share=0.98,
    expected=[axis("mix:0 head.weight:1", 8, label="n")],
    sizes={"mix.out_features": "2 * n"},
)
class EvenOdd(nn.Module):
    """Even channels gate odd ones: pairs, (8, 2)."""

    def __init__(self):
        super().__init__()
        self.mix = nn.Linear(12, 16)
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        x = self.mix(x)
        return self.head(x[..., ::2] * x[..., 1::2].sigmoid())


@case(
    "additive_coupling",
    inputs=(2, 3, 6, 6),
    other=(3, 3, 8, 4),
    share=0.99,
    expected=[
        axis("stem:0 f.2:0 g.0.weight:1 head.weight:1", 8, label="a"),
        axis("stem:0 f.0.weight:1 g.2:0 head.weight:1", 8, label="b"),
        axis("f.0:0 f.2.weight:1", 10),
        axis("g.0:0 g.2.weight:1", 10),
    ],
    sizes={"stem.out_channels": "a + b", "head.in_channels": "a + b", "f.2.out_channels": "a", "f.0.in_channels": "b"},
)
class AdditiveCoupling(nn.Module):
    """A reversible block: its halves are two axes, of equal counts since chunk(2) makes them."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.f = nn.Sequential(nn.Conv2d(8, 10, 3, padding=1), nn.ReLU(), nn.Conv2d(10, 8, 1))
        self.g = nn.Sequential(nn.Conv2d(8, 10, 3, padding=1), nn.ReLU(), nn.Conv2d(10, 8, 1))
        self.head = nn.Conv2d(16, 4, 1)

    def forward(self, x):
        x1, x2 = torch.chunk(self.stem(x), 2, dim=1)
        y1 = x1 + self.f(x2)
        y2 = x2 + self.g(y1)
        return self.head(torch.cat([y1, y2], dim=1))


@case(
    "shuffle_unit_v2",
    inputs=(2, 3, 8, 8),
    other=(3, 3, 6, 10),
    share=0.99,
    expected=[
        axis("stem:0 branch.3:0 head.weight:1", 6, label="k"),
        axis("stem:0 branch.0.weight:1", 6, label="w"),
        axis("branch.0:0 branch.2:0 branch.3.weight:1", 6, label="d"),
    ],
    sizes={"stem.out_channels": "k + w", "branch.2.groups": "d", "head.in_channels": "2 * k"},
)
class ShuffleUnitV2(nn.Module):
    """ShuffleNet v2: one half passes, the other is worked on, then both are interleaved."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 3, padding=1)
        self.branch = nn.Sequential(
            nn.Conv2d(6, 6, 1), nn.ReLU(), nn.Conv2d(6, 6, 3, padding=1, groups=6), nn.Conv2d(6, 6, 1), nn.ReLU()
        )
        self.head = nn.Conv2d(12, 4, 1)

    def forward(self, x):
        keep, work = self.stem(x).chunk(2, dim=1)
        x = torch.cat((keep, self.branch(work)), dim=1)
        b, c, h, w = x.shape
        x = x.view(b, 2, c // 2, h, w).transpose(1, 2).flatten(1, 2)
        return self.head(x)
