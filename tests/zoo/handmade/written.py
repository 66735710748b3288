"""Sizes a layer holds used as numbers, tensors written by number or by a mask, numbers rounded, signals, forces."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from tests.zoo.case import axis, case, tokens
from torch import nn

ROWS = {"inputs": (4, 10), "other": (2, 10)}


class Between(nn.Module):
    """A linear layer, something done to its outputs, and a linear layer."""

    def __init__(self, width=12, after=None):
        super().__init__()
        self.fc1 = nn.Linear(10, width)
        self.fc2 = nn.Linear(width if after is None else after, 5)

    def forward(self, x):
        return self.fc2(self.between(self.fc1(x).tanh()))


@case(
    "embedding_scaled_by_its_width",
    inputs=tokens(2, 6, 30),
    other=tokens(3, 4, 30),
    share=0.9,
    expected=[axis("embed:1 fc.weight:1", 16, False, "d"), axis("fc:0 head.weight:1", 12, False, "h")],
    sizes={"embed.embedding_dim": "d", "fc.in_features": "d", "fc.out_features": "h"},
)
class ScaledEmbedding(nn.Module):
    """The original transformer's scale, and a layer divided by the root of its own width."""

    def __init__(self):
        super().__init__()
        self.embed, self.fc, self.head = nn.Embedding(30, 16), nn.Linear(16, 12), nn.Linear(12, 4)

    def forward(self, ids):
        x = self.embed(ids) * math.sqrt(self.embed.embedding_dim)
        return self.head(self.fc(x).tanh() / self.fc.out_features**0.5)


@case(
    "pillars_on_a_canvas",
    inputs=lambda: (torch.randn(9, 5), torch.randperm(16)[:9]),
    other=lambda: (torch.randn(4, 5), torch.randperm(16)[:4]),
    share=0.9,
    expected=[axis("fc:0 conv.weight:1", 12, label="c"), axis("conv:0 head.weight:1", 6)],
    sizes={"channels": "c", "conv.in_channels": "c"},
)
class Canvas(nn.Module):
    """PointPillars: features of points written to the columns of a bird's-eye view, channels first."""

    def __init__(self):
        super().__init__()
        self.channels = 12
        self.fc, self.conv, self.head = nn.Linear(5, 12), nn.Conv2d(12, 6, 3, padding=1), nn.Linear(6, 4)

    def forward(self, points, at):
        features = self.fc(points).relu()
        canvas = torch.zeros(self.channels, 16, dtype=features.dtype)
        canvas[:, at] = features.t()
        x = self.conv(canvas.view(1, self.channels, 4, 4)).relu()
        return self.head(x.mean((2, 3)))


@case("rows_filled_with_a_number", **ROWS, share=0.9, expected=[axis("fc1:0 fc2.weight:1", 12, False)])
class FilledRows(Between):
    """A masked neuron is one where it was filled, and then summed over."""

    def between(self, h):
        h = h.clone()
        h[torch.tensor([0, 1])] = 1.0
        return h * h.sum(-1, keepdim=True)


@case("rows_filled_with_zero", **ROWS, share=0.9, expected=[axis("fc1:0 fc2.weight:1", 12)])
class ZeroedRows(Between):
    def between(self, h):
        h = h.clone()
        h[torch.tensor([0, 1])] = 0.0
        return h * h.sum(-1, keepdim=True)


@case(
    "channels_chosen_by_a_mask",
    **ROWS,
    share=0.9,
    expected=[axis("fc1:0 fc2.weight:1 chosen:0", 12)],
    fake="a mask selects by value",
)
class ChosenByMask(Between):
    """A boolean buffer splits the channels in two kinds."""

    def __init__(self):
        super().__init__()
        self.register_buffer("chosen", torch.arange(12) % 3 > 0)

    def between(self, h):
        return torch.cat([h[:, self.chosen].relu(), h[:, ~self.chosen]], 1)


@case(
    "channels_pooled_by_a_list",
    **ROWS,
    share=0.6,
    expected=[axis("fc1:0 group:0", 12)],
    frozen={"fc2.weight:1": "written to by number|literal"},
)
class PooledByList(Between):
    """Each channel is added to the group that an integer buffer names."""

    def __init__(self):
        super().__init__(after=3)
        self.register_buffer("group", torch.arange(12) % 3)

    def between(self, h):
        return h.new_zeros(len(h), 3).scatter_add(1, self.group[None].expand(len(h), -1), h)


@case("squeezed_of_all_ones", inputs=(4, 10), share=0.9, expected=[axis("fc1:0 fc2.weight:1", 12)])
class Squeezed(Between):
    """The number of channels must stay above one."""

    def between(self, h):
        return h[:, None, :, None].squeeze()


@case("stepped_through_memory", **ROWS, share=0.9, expected=[axis("fc1:0 fc2.weight:1", 12, False)])
class Stepped(Between):
    def between(self, h):
        return h / (h.stride(0) + h.nbytes // len(h))


@case("smallest_by_a_negative_order", **ROWS, share=0.9, expected=[axis("fc1:0 fc2.weight:1", 12, False)])
class SmallestNorm(Between):
    def between(self, h):
        return h * torch.linalg.vector_norm(h, -math.inf, dim=-1, keepdim=True)


@case(
    "signals_in_frames",
    inputs=(2, 3, 32),
    other=(1, 3, 48),
    share=0.9,
    expected=[axis("mix:0 head.weight:1", 6)],
    fake="it looks at whether windows overlap",
)
class Frames(nn.Module):
    """Channels are signals: a short-time transform, its lengths, and back."""

    def __init__(self):
        super().__init__()
        self.mix, self.head = nn.Conv1d(3, 6, 1), nn.Conv1d(6, 4, 1)
        self.register_buffer("window", torch.hann_window(8))

    def forward(self, x):
        x = self.mix(x)
        flat = x.flatten(0, 1)
        window = self.window.to(x.dtype)
        spectrum = torch.stft(flat, 8, hop_length=4, window=window, return_complex=True)
        back = torch.istft(spectrum * spectrum.abs(), 8, hop_length=4, window=window)
        return self.head(back.unflatten(0, x.shape[:2]))


@case(
    "energy_and_forces",
    inputs=(7, 3),
    other=(4, 3),
    share=0.9,
    expected=[axis("fc1:0 fc2.weight:1", 16), axis("fc2:0 out.weight:1", 12)],
)
class Forces(nn.Module):
    """A potential and its negative gradient."""

    def __init__(self):
        super().__init__()
        self.fc1, self.fc2, self.out = nn.Linear(3, 16), nn.Linear(16, 12), nn.Linear(12, 1)

    def forward(self, places):
        with torch.enable_grad():
            places = places.detach().requires_grad_()
            energy = self.out(F.silu(self.fc2(torch.tanh(self.fc1(places))))).sum()
            (slope,) = torch.autograd.grad(energy, places, create_graph=True)
        return energy, -slope


@case(
    "rounded_to_a_grid",
    inputs=(4, 10),
    other=(2, 10),
    share=0.9,
    expected=[axis("fc1:0 scale:0 zero:0 fc2.weight:1", 12)],
    double=False,
    tolerance=5e-2,
)
class Rounded(Between):
    """Quantisation-aware: a scale for each channel of the weight, and one for all activations."""

    def __init__(self):
        super().__init__()
        self.register_buffer("scale", torch.full((12,), 1 / 128))
        self.register_buffer("zero", torch.zeros(12, dtype=torch.int32))

    def forward(self, x):
        weight = torch.fake_quantize_per_channel_affine(self.fc1.weight, self.scale, self.zero, 0, -128, 127)
        h = F.linear(x, weight, self.fc1.bias).tanh()
        return self.fc2(torch.fake_quantize_per_tensor_affine(h, 1 / 128, 0, -128, 127))
