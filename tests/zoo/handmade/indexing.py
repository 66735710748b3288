"""Channels flipped, rolled, repeated, stacked, indexed, multiplied out."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from tests.zoo.case import axis, case
from torch import nn


class Between(nn.Module):
    """A linear layer, something done to its outputs, and a linear layer."""

    def __init__(self, width=12, after=None):
        super().__init__()
        self.fc1 = nn.Linear(10, width)
        self.fc2 = nn.Linear(width if after is None else after, 5)

    def forward(self, x):
        return self.fc2(self.between(self.fc1(x).tanh()))


PLAIN = [axis("fc1:0 fc2.weight:1", 12)]


@case("flip", inputs=(4, 10), other=(2, 10), share=0.97, expected=PLAIN)
class Flip(Between):
    def between(self, x):
        return torch.flip(x, dims=[-1])


@case(
    "roll",
    inputs=(4, 10),
    other=(2, 10),
    share=0.55,
    expected=[axis("fc1:0 fc2.weight:1", 7)],
    frozen={"fc1.weight:0": "roll", "fc2.weight:1": "roll"},
)
class Roll(Between):
    """Those that come first are counted by a literal, and stay; the others may go."""

    def between(self, x):
        return torch.roll(x, shifts=5, dims=1)


@case(
    "permutation_buffer",
    inputs=(4, 10),
    other=(2, 10),
    share=0.97,
    fake="the permutation has no values",
    expected=[axis("fc1:0 fc2.weight:1 ?permutation:0", 12)],
)
class PermutationBuffer(Between):
    """A fixed permutation, as normalising flows have."""

    def __init__(self):
        super().__init__()
        self.register_buffer("permutation", torch.randperm(12))

    def between(self, x):
        return x[:, self.permutation]


@case("repeat", inputs=(4, 10), other=(2, 10), share=0.98, expected=PLAIN)
class Repeat(Between):
    def __init__(self):
        super().__init__(after=24)

    def between(self, x):
        return x.repeat(1, 2)


@case("repeat_interleave", inputs=(4, 10), other=(2, 10), share=0.98, expected=PLAIN)
class RepeatInterleave(Between):
    def __init__(self):
        super().__init__(after=24)

    def between(self, x):
        return torch.repeat_interleave(x, 2, dim=-1)


@case(
    "expand_and_reshape",
    inputs=(4, 10),
    other=(2, 10),
    share=0.98,
    expected=PLAIN,
)
class ExpandReshape(Between):
    def __init__(self):
        super().__init__(after=36)

    def between(self, x):
        b, n = x.shape
        return x[:, :, None].expand(b, n, 3).reshape(b, n * 3)


@case(
    "stack_of_branches",
    inputs=(4, 10),
    other=(2, 10),
    share=0.98,
    expected=[axis("left:0 right:0 fc.weight:1", 12)],
)
class StackOfBranches(nn.Module):
    """A stack needs equal sizes: its branches share an axis."""

    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Linear(10, 12), nn.Linear(10, 12)
        self.fc = nn.Linear(24, 5)

    def forward(self, x):
        return self.fc(torch.stack((self.left(x), self.right(x)), dim=1).flatten(1).relu())


@case(
    "stack_then_sum",
    inputs=(4, 10),
    other=(2, 10),
    share=0.92,
    expected=[axis("branches:0 fc.weight:1", 12)],
    frozen={"gate.weight:0!": "number of tensors stacked"},
)
class StackThenSum(nn.Module):
    def __init__(self):
        super().__init__()
        self.branches = nn.ModuleList(nn.Linear(10, 12) for _ in range(3))
        self.gate = nn.Linear(10, 3)
        self.fc = nn.Linear(12, 5)

    def forward(self, x):
        out = torch.stack([branch(x) for branch in self.branches], dim=-1)
        return self.fc((out * self.gate(x).softmax(-1).unsqueeze(1)).sum(-1))


@case(
    "outer_product",
    inputs=(4, 10),
    other=(2, 10),
    share=0.98,
    expected=[axis("left:0 fc.weight:1", 6, label="l"), axis("right:0 fc.weight:1", 8, label="r")],
    sizes={"fc.in_features": "l * r"},
)
class OuterProduct(nn.Module):
    """Bilinear pooling: every pair of channels."""

    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Linear(10, 6), nn.Linear(10, 8)
        self.fc = nn.Linear(48, 5)

    def forward(self, x):
        pairs = self.left(x).unsqueeze(2) * self.right(x).unsqueeze(1)
        return self.fc(pairs.view(x.shape[0], -1))


@case(
    "einsum_several",
    inputs=(2, 7, 10),
    other=(3, 5, 10),
    share=1.0,
    expected=[
        axis("left:1 right:1 mix:0", 6),
        axis("left:2 core:0", 5),
        axis("right:2 core:1", 8),
        axis("core:2 out:0", 9),
        axis("mix:1 out:1", 4),
    ],
)
class EinsumSeveral(nn.Module):
    def __init__(self):
        super().__init__()
        self.left = nn.Parameter(0.3 * torch.randn(10, 6, 5))
        self.right = nn.Parameter(0.3 * torch.randn(10, 6, 8))
        self.core = nn.Parameter(0.3 * torch.randn(5, 8, 9))
        self.mix = nn.Parameter(0.3 * torch.randn(6, 4))
        self.out = nn.Parameter(0.3 * torch.randn(9, 4, 3))

    def forward(self, x):
        left = torch.einsum("bti,ihk->bthk", x, self.left)
        right = torch.einsum("bti,ihl->bhtl", x, self.right)
        joint = torch.einsum("bthk,bhtl,klm->bthm", left, right, self.core).tanh()
        mixed = torch.einsum("... h m, h n -> ... m n", joint, self.mix)
        return torch.einsum("btmn,mno->bo", mixed, self.out)


@case(
    "maxout",
    inputs=(4, 10),
    other=(2, 10),
    share=0.98,
    expected=[axis("lin:0 head.weight:1", 8, label="d"), axis("lin:0", 3, False, "k")],
    sizes={"pieces": "k", "width": "d", "lin.out_features": "d * k"},
)
class Maxout(nn.Module):
    def __init__(self, width=8, pieces=3):
        super().__init__()
        self.width, self.pieces = width, pieces
        self.lin = nn.Linear(10, width * pieces)
        self.head = nn.Linear(width, 4)

    def forward(self, x):
        x = self.lin(x).view(*x.shape[:-1], self.width, self.pieces)
        return self.head(x.max(dim=-1)[0])


@case(
    "bilinear_layer",
    inputs=(4, 10),
    other=(2, 10),
    share=0.99,
    expected=[axis("left:0 pair.weight:1", 6), axis("right:0 pair.weight:2", 8), axis("pair:0 head.weight:1", 7)],
    sizes={},
)
class BilinearLayer(nn.Module):
    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Linear(10, 6), nn.Linear(10, 8)
        self.pair = nn.Bilinear(6, 8, 7)
        self.head = nn.Linear(7, 4)

    def forward(self, x):
        return self.head(self.pair(self.left(x).relu(), self.right(x).relu()))


@case(
    "channel_sort",
    inputs=(4, 10),
    other=(2, 10),
    share=0.59,
    expected=[axis("head.0:0 head.2.weight:1", 8)],
    frozen={"fc.weight:0": "sort"},
)
class ChannelSort(nn.Module):
    """After a sort a position is a rank, no longer a neuron."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(10, 6)
        self.head = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 6))

    def forward(self, x):
        return self.head(self.fc(x).sort(dim=-1).values)


@case(
    "constant_selection",
    inputs=(4, 10),
    other=(2, 10),
    share=0.41,
    expected=[axis("head:0 last.weight:1", 8)],
    frozen={"fc.weight:0": "index|constant|literal"},
)
class ConstantSelection(nn.Module):
    """Three channels chosen by number."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(10, 6)
        self.head = nn.Linear(3, 8)
        self.last = nn.Linear(8, 2)

    def forward(self, x):
        return self.last(self.head(self.fc(x)[:, [0, 2, 5]]).relu())


@case(
    "two_channels_by_number",
    inputs=(2, 3, 6, 6),
    other=(1, 3, 8, 4),
    share=0.99,
    expected=[axis("conv:0 offset.weight:1", 8)],
    frozen={"offset.bias:0!": "position taken by number"},
)
class TwoChannels(nn.Module):
    """Channel 0 is x, channel 1 is y: meaning is in the number."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.offset = nn.Conv2d(8, 2, 3, padding=1)

    def forward(self, x):
        offset = self.offset(self.conv(x).relu()).tanh()
        grid = torch.stack([offset[:, 0], offset[:, 1]], dim=-1)
        return F.grid_sample(x, grid, align_corners=False)


@case(
    "where_and_masked_fill",
    inputs=(4, 10),
    other=(2, 10),
    share=0.98,
    expected=[axis("left:0 right:0 floor:0 fc.weight:1", 12)],
)
class WhereAndMask(nn.Module):
    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Linear(10, 12), nn.Linear(10, 12)
        self.floor = nn.Parameter(torch.randn(12))
        self.fc = nn.Linear(12, 5)

    def forward(self, x):
        a, b = self.left(x), self.right(x)
        x = torch.where(a > b, a, b.detach())
        x = torch.maximum(x, self.floor).masked_fill(a.abs() < 0.01, 0.0)
        return self.fc(x)


@case(
    "movedim_unflatten",
    inputs=(2, 3, 6, 6),
    other=(3, 3, 4, 8),
    share=0.99,
    expected=[
        axis("conv:0 squash.weight:1", 4, label="c"),
        axis("conv:0 scale:0 fc.weight:1", 5, label="d"),
        axis("squash:0 fc.weight:1", 6, label="s"),
    ],
    sizes={"capsules": "c", "conv.out_channels": "c * d", "fc.in_features": "d * s"},
)
class Capsules(nn.Module):
    """Channels as capsules: (capsule, entry), the capsules mixed, the entries kept apart."""

    def __init__(self, capsules=4, entries=5):
        super().__init__()
        self.capsules = capsules
        self.conv = nn.Conv2d(3, capsules * entries, 3, padding=1)
        self.squash = nn.Linear(capsules, 6)
        self.scale = nn.Parameter(torch.ones(entries))
        self.fc = nn.Linear(entries * 6, 4)

    def forward(self, x):
        x = self.conv(x).unflatten(1, (self.capsules, -1)).mean((-2, -1))
        x = self.squash(x.movedim(1, -1)).relu() * self.scale.view(1, -1, 1)
        return self.fc(torch.flatten(x, start_dim=1))
