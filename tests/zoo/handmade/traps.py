"""Models that run after a wrong removal, and compute something else: what must not be guessed."""

from __future__ import annotations

import functools
import warnings

import torch
import torch.nn.functional as F
from tests.zoo.case import axis, case
from torch import nn


@case(
    "sines_of_the_width",
    inputs=lambda: (torch.randn(3, 10), torch.rand(3)),
    other=lambda: (torch.randn(2, 10), torch.rand(2)),
    share=0.99,
    expected=[axis("fc:0 time.2:0 head.weight:1", 9), axis("time.0:0 time.2.weight:1", 7)],
    frozen={"time.0.weight:1!": "arange|position|number"},
)
class SinesOfTheWidth(nn.Module):
    """Frequencies made from an arange of the width: another width has other frequencies, not a choice of these."""

    def __init__(self, dim=16):
        super().__init__()
        self.dim = dim
        self.time = nn.Sequential(nn.Linear(dim, 7), nn.SiLU(), nn.Linear(7, 9))
        self.fc, self.head = nn.Linear(10, 9), nn.Linear(9, 3)

    def forward(self, x, t):
        half = self.dim // 2
        frequencies = torch.exp(torch.arange(half).to(x) * (-5.0 / 8))
        angles = t[:, None] * frequencies
        return self.head(self.fc(x).relu() + self.time(torch.cat([angles.sin(), angles.cos()], -1)))


@case(
    "ramp_over_channels",
    inputs=(2, 3, 6, 6),
    other=(3, 3, 4, 4),
    share=0.0,
    frozen={"conv.weight:0!": "arange|linspace|position|number"},
)
class RampOverChannels(nn.Module):
    """Channels weighted by their place."""

    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 2, 1)

    def forward(self, x):
        x = self.conv(x)
        ramp = torch.linspace(0.5, 1.5, x.shape[1]).to(x)
        return self.head(x * ramp.view(1, -1, 1, 1) + torch.arange(x.size(1)).to(x)[:, None, None])


@case(
    "gram_matrix",
    inputs=(2, 3, 6, 6),
    other=(3, 3, 4, 4),
    share=0.99,
    expected=[axis("conv:0 fc.weight:1", 6, label="c"), axis("fc:0 head.weight:1", 8)],
    sizes={"fc.in_features": "c * c"},
)
class GramMatrix(nn.Module):
    """Style features: the same channels along rows and columns, flattened into one dimension."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, padding=1)
        self.fc, self.head = nn.Linear(36, 8), nn.Linear(8, 2)

    def forward(self, x):
        x = self.conv(x).flatten(2)
        gram = torch.bmm(x, x.transpose(1, 2)) / x.shape[-1]
        return self.head(self.fc(gram.flatten(1)).relu())


@case(
    "channels_folded_into_batch",
    inputs=(2, 3, 8, 8),
    other=(3, 3, 6, 6),
    share=0.93,
    expected=[axis("conv:0 head.weight:1", 6)],
)
class FoldedIntoBatch(nn.Module):
    """One filter for every channel, by folding channels into the batch."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, padding=1)
        self.filter = nn.Conv2d(1, 1, 3, padding=1)
        self.head = nn.Conv2d(6, 2, 1)

    def forward(self, x):
        x = self.conv(x)
        b, c, h, w = x.shape
        x = self.filter(x.reshape(b * c, 1, h, w)).reshape(b, c, h, w)
        return self.head(x)


@case(
    "differences_of_neighbours",
    inputs=(4, 10),
    other=(2, 10),
    share=0.0,
    frozen={"fc.weight:0!": "singled out"},
)
class Differences(nn.Module):
    """Each channel minus the one before: a removed neuron would make strangers neighbours."""

    def __init__(self):
        super().__init__()
        self.fc, self.head = nn.Linear(10, 8), nn.Linear(7, 3)

    def forward(self, x):
        x = self.fc(x)
        return self.head(x[:, 1:] - x[:, :-1])


@case(
    "channel_loop",
    inputs=(4, 10),
    other=(2, 10),
    share=0.0,
    frozen={"fc.weight:0!": "position|literal", "gain:0!": "position taken by number|literal"},
)
class ChannelLoop(nn.Module):
    """Channels taken one by one, by number, and put together again."""

    def __init__(self):
        super().__init__()
        self.fc, self.head = nn.Linear(10, 5), nn.Linear(5, 3)
        self.gain = nn.Parameter(torch.randn(5))

    def forward(self, x):
        x = self.fc(x)
        parts = [x[:, i : i + 1] * self.gain[i] for i in range(x.shape[1])]
        return self.head(torch.cat(parts[::-1], dim=1))


@case(
    "unregistered_layers",
    inputs=(4, 10),
    other=(2, 10),
    share=0.83,
    expected=[axis("first.0:0 first.2.weight:1", 9)],
    frozen={"first.2.weight:0": "constant"},
)
class Unregistered(nn.Module):
    """Layers in a plain list are no part of the model: what meets them stays."""

    def __init__(self):
        super().__init__()
        self.first = nn.Sequential(nn.Linear(10, 9), nn.ReLU(), nn.Linear(9, 8))
        self.layers = [nn.Linear(8, 8) for _ in range(2)]
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        x = self.first(x)
        for layer in self.layers:
            x = layer(x.to(layer.weight.dtype)).to(x.dtype).relu()
        return self.head(x)


@functools.lru_cache(maxsize=4)
def binomial(channels):
    """A smoothing kernel per channel, kept between calls."""
    kernel = torch.tensor([1.0, 2.0, 1.0]) / 4
    return kernel.expand(channels, 1, 3).clone()


@case(
    "cached_by_a_function",
    inputs=(2, 3, 12),
    other=(3, 3, 9),
    share=0.0,
    warm=True,
    fake="a function keeps what the first model made",
    frozen={"conv.weight:0!": "meets the literal 6|meets a constant tensor"},
)
class CachedByFunction(nn.Module):
    """A kernel that a function remembers by the number of channels."""

    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv1d(3, 6, 3), nn.Conv1d(6, 2, 1)

    def forward(self, x):
        x = self.conv(x)
        return self.head(F.conv1d(x, binomial(int(x.shape[1])).to(x), groups=x.shape[1]))


@functools.lru_cache(maxsize=64)
def split_shape(shape, heads):
    """The shape of heads side by side, kept between calls, as einops keeps what a pattern makes of a shape."""
    batch, length, width = shape
    return (batch, length, heads, width // heads), shape


def kept(function):
    """A decorator of one's own around the cache of Python."""
    remembered = functools.lru_cache(maxsize=4)(function)

    @functools.wraps(function)
    def wrapper(*args):
        return remembered(*args)

    return wrapper


@case(
    "tensors_kept_by_a_method",
    inputs=(2, 5, 6),
    other=(3, 7, 6),
    share=0.96,
    warm=True,
    fake="a method keeps what the first run made",
    expected=[axis("fc:0 head.weight:1", 8, exact=False)],
)
class TensorsKeptByMethod(nn.Module):
    """A ramp over time, scaled by the width and kept for each shape, as MaskFormer keeps its positions."""

    def __init__(self):
        super().__init__()
        self.fc, self.head = nn.Linear(6, 8), nn.Linear(8, 3)

    @staticmethod
    @kept
    def ramp(shape):
        return (torch.arange(shape[1]) / shape[2])[None, :, None].expand(shape[0], -1, shape[2])

    def forward(self, x):
        x = self.fc(x)
        return self.head(x + self.ramp(x.shape).to(x))


@case(
    "shapes_kept_by_a_function",
    inputs=(2, 5, 6),
    other=(3, 7, 6),
    share=0.99,
    warm=True,
    expected=[
        axis("stem:0 qkv.weight:1 out.weight:0 out.bias:0 head.weight:1", 12),
        axis("qkv.weight:0 qkv.bias:0 out.weight:1", 3, label="heads"),
        axis("qkv.weight:0 qkv.bias:0", 4, label="keys"),
        axis("qkv.weight:0 qkv.bias:0 out.weight:1", 4, label="values"),
    ],
    sizes={"heads": "heads"},
)
class ShapesKeptByFunction(nn.Module):
    """Attention whose shapes a function has computed before, for the same integers."""

    def __init__(self, width=12, heads=3):
        super().__init__()
        self.heads = heads
        self.stem, self.qkv = nn.Linear(6, width), nn.Linear(width, 3 * width)
        self.out, self.head = nn.Linear(width, width), nn.Linear(width, 2)

    def forward(self, x):
        x = self.stem(x)
        q, k, v = self.qkv(x).chunk(3, -1)
        apart, together = split_shape(q.shape, self.heads)
        q, k, v = (one.reshape(apart).transpose(1, 2) for one in (q, k, v))
        y = (q @ k.transpose(-1, -2)).softmax(-1) @ v
        return self.head(x + self.out(y.transpose(1, 2).reshape(together)))


def bias_gelu(x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """A fused activation, as Megatron scripts it."""
    x = x + bias
    return x * 0.5 * (1.0 + torch.tanh(0.79788456 * x * (1 + 0.044715 * x * x)))


@case(
    "scripted_function",
    inputs=(4, 10),
    other=(2, 10),
    share=0.98,
    expected=[axis("fc:0 bias:0 head.weight:1", 12)],
)
class ScriptedFunction(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.head = nn.Linear(10, 12, bias=False), nn.Linear(12, 3)
        self.bias = nn.Parameter(torch.zeros(12))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            self.activation = torch.jit.script(bias_gelu)

    def forward(self, x):
        return self.head(self.activation(self.fc(x), self.bias))


@case(
    "ensemble_by_vmap",
    inputs=(4, 10),
    other=(2, 10),
    share=1.0,
    expected=[axis("w1:2 w2:1", 8), axis("w1:0 w2:0", 3, False)],
)
class Ensemble(nn.Module):
    """Members of an ensemble, mapped over stacked weights."""

    def __init__(self):
        super().__init__()
        self.w1, self.w2 = nn.Parameter(0.3 * torch.randn(3, 10, 8)), nn.Parameter(0.3 * torch.randn(3, 8, 4))

    def forward(self, x):
        one = torch.vmap(lambda w1, w2, x: (x @ w1).relu() @ w2, in_dims=(0, 0, None))
        return one(self.w1, self.w2, x).mean(0)


@case(
    "graph_messages",
    inputs=lambda: (torch.randn(6, 10), torch.randint(6, (2, 9))),
    other=lambda: (torch.randn(4, 10), torch.randint(4, (2, 5))),
    share=0.99,
    expected=[axis("message:0 update.weight:1", 8), axis("embed:0 message.weight:1 update.weight:1", 7),
              axis("update:0 head.weight:1 attend:0", 6)],
)  # fmt: skip
class GraphMessages(nn.Module):
    """Messages along edges, gathered at their targets, with attention over the edges of a node."""

    def __init__(self):
        super().__init__()
        self.embed, self.message = nn.Linear(10, 7), nn.Linear(14, 8)
        self.update, self.head = nn.Linear(15, 6), nn.Linear(6, 3)
        self.attend = nn.Parameter(torch.randn(6))

    def forward(self, x, edges):
        source, target = edges
        x = self.embed(x).relu()
        messages = self.message(torch.cat([x[source], x[target]], dim=-1)).relu()
        gathered = torch.zeros(x.size(0), messages.size(1)).to(x).index_add_(0, target, messages)
        x = self.update(torch.cat((x, gathered), 1)).tanh()
        scores = (x[source] * self.attend).sum(-1).exp()
        total = torch.zeros(len(x)).to(x).scatter_add_(0, target, scores)
        weighted = x[source] * (scores / total[target])[:, None]
        out = torch.zeros_like(x).scatter_add_(0, target[:, None].expand_as(weighted), weighted)
        return self.head(out)


@case(
    "codebook",
    inputs=(4, 10),
    other=(2, 10),
    share=0.96,
    expected=[axis("encode.0:0 encode.2.weight:1", 9), axis("encode.2:0 codebook.weight:1 decode.weight:1", 6, None)],
    frozen={"codebook.weight:0!": "."},
)
class Codebook(nn.Module):
    """Vector quantisation: the nearest code by distance, looked up by number, gradients straight through."""

    def __init__(self):
        super().__init__()
        self.encode = nn.Sequential(nn.Linear(10, 9), nn.ReLU(), nn.Linear(9, 6))
        self.codebook = nn.Embedding(7, 6)
        self.decode = nn.Linear(6, 10)

    def forward(self, x):
        z = self.encode(x)
        codes = self.codebook.weight
        distance = z.pow(2).sum(1, keepdim=True) + codes.pow(2).sum(1) - 2 * z @ codes.t()
        index = distance.argmin(dim=1)
        found = self.codebook(index)
        found = z + (found - z).detach()
        return self.decode(found), index


@case(
    "width_as_a_number",
    inputs=(4, 10),
    other=(2, 10),
    share=0.99,
    expected=[axis("a:0 c.weight:1", 8, False), axis("b:0 c.weight:1", 8, False), axis("c:0 d.weight:1", 7, False)],
)
class WidthAsNumber(nn.Module):
    """The number of channels enters as a value: by division, through a tensor, through a mean by hand."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(10, 8), nn.Linear(10, 8)
        self.c, self.d = nn.Linear(16, 7), nn.Linear(7, 3)

    def forward(self, x):
        a, b = self.a(x), self.b(x)
        a = a / a.shape[1] ** 0.5
        b = b * torch.tensor(float(b.size(-1))).log().to(b)
        c = self.c(torch.cat([a, b], dim=-1))
        c = c + c.new_full((len(c), 1), float(c.shape[1])).rsqrt()
        return self.d(c)


@case(
    "masked_convolution",
    inputs=(2, 3, 6, 6),
    other=(3, 3, 4, 4),
    share=0.99,
    expected=[axis("first:0 mask:1 weight:1", 6), axis("weight:0 mask:0 bias:0 head.weight:1", 8)],
)
class MaskedConvolution(nn.Module):
    """PixelCNN: a mask in a buffer of the weight's shape, multiplied in at every forward."""

    def __init__(self):
        super().__init__()
        self.first, self.head = nn.Conv2d(3, 6, 1), nn.Conv2d(8, 2, 1)
        self.weight, self.bias = nn.Parameter(0.2 * torch.randn(8, 6, 3, 3)), nn.Parameter(torch.zeros(8))
        mask = torch.ones(8, 6, 3, 3)
        mask[:, :, 1, 1:] = 0
        mask[:, :, 2] = 0
        self.register_buffer("mask", mask)

    def forward(self, x):
        return self.head(F.conv2d(self.first(x).relu(), self.weight * self.mask, self.bias, padding=1).relu())


@case(
    "autoregressive_masks",
    inputs=(4, 6),
    other=(2, 6),
    share=0.96,
    expected=[axis("w1:0 m1:0 b1:0 w2:1 m2:1", 12)],
)
class Made(nn.Module):
    """Masked autoencoder for density estimation: masks in buffers tie each unit to its degree."""

    def __init__(self):
        super().__init__()
        degrees = torch.arange(12) % 5
        self.w1, self.b1 = nn.Parameter(torch.randn(12, 6)), nn.Parameter(torch.zeros(12))
        self.w2, self.b2 = nn.Parameter(torch.randn(6, 12)), nn.Parameter(torch.zeros(6))
        self.register_buffer("m1", degrees[:, None] >= torch.arange(6))
        self.register_buffer("m2", torch.arange(6)[:, None] > degrees)

    def forward(self, x):
        h = F.linear(x, self.w1 * self.m1, self.b1).relu()
        return F.linear(h, self.w2.masked_fill(~self.m2, 0.0), self.b2)


@case(
    "repeated_and_flipped",
    inputs=(4, 10),
    other=(2, 10),
    share=0.96,
    expected=[axis("fc:0 head.weight:1", 4)],
)
class RepeatedAndFlipped(nn.Module):
    """Every position is followed through two repeats and a reversal."""

    def __init__(self):
        super().__init__()
        self.fc, self.head = nn.Linear(10, 4), nn.Linear(16, 3)

    def forward(self, x):
        x = self.fc(x).tanh().repeat(1, 2).repeat_interleave(2, dim=1)
        return self.head(x.flip(1))


@case(
    "mirrored_pairs",
    inputs=(2, 3, 6, 6),
    other=(3, 3, 4, 4),
    share=0.0,
    frozen={"stem.weight:0!": "depends on which positions remain"},
)
class MirroredPairs(nn.Module):
    """An odd number of channels added to their mirror image: pairs go together, the middle alone, so no count fits."""

    def __init__(self):
        super().__init__()
        self.stem, self.depth = nn.Conv2d(3, 9, 1), nn.Conv2d(9, 9, 3, padding=1, groups=9)
        self.head = nn.Conv2d(9, 2, 1)

    def forward(self, x):
        x = self.depth(self.stem(x))
        return self.head(x + x.flip(1))


@case(
    "shuffled_and_permuted",
    inputs=(4, 10),
    other=(2, 10),
    share=0.0,
    fake="the permutation has no values",
    frozen={"fc.weight:0!": "depends on which positions remain"},
)
class ShuffledAndPermuted(nn.Module):
    """Single positions against products of single positions."""

    def __init__(self):
        super().__init__()
        self.fc, self.head = nn.Linear(10, 4), nn.Linear(8, 3)
        self.groups = 4
        self.register_buffer("permutation", torch.tensor([3, 0, 7, 1, 6, 2, 5, 4]))

    def forward(self, x):
        x = self.fc(x)
        x = torch.cat([x, x.relu()], dim=1)
        x = x.view(x.size(0), self.groups, -1).transpose(1, 2).flatten(1)
        return self.head(x[:, self.permutation])


class Binarised(torch.autograd.Function):
    """Signs, scaled by how many there are; the gradient passes."""

    @staticmethod
    def forward(ctx, weight):
        return (2.0 / weight.shape[1]) ** 0.5 * weight.sign()

    @staticmethod
    def backward(ctx, grad):
        return grad


@case(
    "size_in_a_custom_function",
    inputs=(3, 6),
    other=(5, 6),
    share=0.97,
    expected=[axis("first:0 weight:1", 8), axis("weight:0 head.weight:1", 10)],
    compared="a float on the left of a size keeps no origin",
)
class SizeInCustomFunction(nn.Module):
    """A literal divided by a size, in a class of the file that is no module: the number of inputs counts."""

    def __init__(self):
        super().__init__()
        self.first, self.head = nn.Linear(6, 8), nn.Linear(10, 2)
        self.weight = nn.Parameter(torch.randn(10, 8))

    def forward(self, x):
        return self.head(F.linear(self.first(x), Binarised.apply(self.weight)).relu())
