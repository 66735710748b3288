"""Kinds of attention beyond the plain one."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from tests.zoo.case import axis, case
from torch import nn

SEQUENCE = {"inputs": (2, 6, 16), "other": (3, 9, 16)}


def split_heads(x, heads):
    """(batch, tokens, heads · entries) to (batch, heads, tokens, entries)."""
    b, n, c = x.shape
    return x.reshape(b, n, heads, c // heads).permute(0, 2, 1, 3)


def merge_heads(x):
    """The inverse of :func:`split_heads`."""
    b, h, n, d = x.shape
    return x.permute(0, 2, 1, 3).reshape(b, n, h * d)


@case(
    "talking_heads",
    **SEQUENCE,
    share=0.99,
    expected=[
        axis("q:0 k:0 before.weight:1", 4, label="h"),
        axis("before.weight:0 after.weight:1", 6, label="m"),
        axis("after.weight:0 v:0 out.weight:1", 5, label="w"),
        axis("q:0 k:0", 3, label="d"),
        axis("v:0 out.weight:1", 4, label="v"),
    ],
    sizes={
        "heads": "h",
        "value_heads": "w",
        "before.in_features": "h",
        "before.out_features": "m",
        "after.out_features": "w",
    },
)
class TalkingHeads(nn.Module):
    """Heads are mixed before and after the softmax: three axes of heads."""

    def __init__(self):
        super().__init__()
        self.heads, self.value_heads = 4, 5
        self.q, self.k, self.v = nn.Linear(16, 12), nn.Linear(16, 12), nn.Linear(16, 20)
        self.before = nn.Linear(4, 6, bias=False)
        self.after = nn.Linear(6, 5, bias=False)
        self.out = nn.Linear(20, 7)

    def forward(self, x):
        q, k = split_heads(self.q(x), self.heads), split_heads(self.k(x), self.heads)
        v = split_heads(self.v(x), self.value_heads)
        scores = torch.einsum("bhid,bhjd->bijh", q, k) * 0.5
        weights = self.before(scores).softmax(dim=2)
        weights = self.after(weights).permute(0, 3, 1, 2)
        return self.out(merge_heads(weights @ v))


@case(
    "linear_attention",
    **SEQUENCE,
    share=0.99,
    expected=[
        axis("to_qkv:0 out.weight:1", 4, None, "h"),
        axis("to_qkv:0", 5, False, "d"),
        axis("to_qkv:0 out.weight:1", 5, None, "v"),
    ],
    sizes={"heads": "h"},
)
class LinearAttention(nn.Module):
    """Kernel attention: a zeroed entry still adds elu(0) + 1 = 1, so removing is not masking."""

    def __init__(self, heads=4):
        super().__init__()
        self.heads = heads
        self.to_qkv = nn.Linear(16, 60, bias=False)
        self.out = nn.Linear(20, 7)

    def forward(self, x):
        q, k, v = (split_heads(t, self.heads) for t in self.to_qkv(x).chunk(3, dim=-1))
        q, k = F.elu(q) + 1, F.elu(k) + 1
        context = torch.einsum("bhnd,bhne->bhde", k, v)
        norm = 1 / torch.einsum("bhnd,bhd->bhn", q, k.sum(dim=2))
        out = torch.einsum("bhnd,bhde,bhn->bhne", q, context, norm)
        return self.out(merge_heads(out))


@case(
    "cosine_attention",
    **SEQUENCE,
    share=0.99,
    expected=[
        axis("q:0 k:0 v:0 logit_scale:0 out.weight:1", 4, label="h"),
        axis("q:0 k:0", 5, None, "d"),
        axis("v:0 out.weight:1", 5, label="v"),
    ],
    sizes={"heads": "h"},
)
class CosineAttention(nn.Module):
    """Normalised queries and keys with a learned temperature per head (Swin v2)."""

    def __init__(self, heads=4):
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v = (nn.Linear(16, 20, bias=bias) for bias in (True, False, True))
        self.logit_scale = nn.Parameter(torch.ones(heads, 1, 1))
        self.out = nn.Linear(20, 7)

    def forward(self, x):
        q, k, v = (
            split_heads(self.q(x), self.heads),
            split_heads(self.k(x), self.heads),
            split_heads(self.v(x), self.heads),
        )
        attn = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1)
        attn = attn * torch.clamp(self.logit_scale, max=4.6).exp()
        return self.out(merge_heads(attn.softmax(-1) @ v))


@case(
    "alibi_slopes",
    **SEQUENCE,
    share=0.99,
    expected=[
        axis("q:0 k:0 v:0 slopes:0 out.weight:1", 4, label="h"),
        axis("q:0 k:0", 5, False, "d"),
        axis("v:0 out.weight:1", 5, label="v"),
    ],
    sizes={"heads": "h"},
)
class ALiBi(nn.Module):
    """A slope per head in a buffer, and the scale read off the tensor."""

    def __init__(self, heads=4):
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v = nn.Linear(16, 20), nn.Linear(16, 20), nn.Linear(16, 20)
        self.register_buffer("slopes", 2.0 ** -torch.arange(1, heads + 1).float())
        self.out = nn.Linear(20, 7)

    def forward(self, x):
        q, k, v = (
            split_heads(self.q(x), self.heads),
            split_heads(self.k(x), self.heads),
            split_heads(self.v(x), self.heads),
        )
        position = torch.arange(x.size(1))
        bias = -(position[:, None] - position).abs()[None] * self.slopes[:, None, None]
        attn = torch.baddbmm(
            bias.repeat(len(x), 1, 1), q.flatten(0, 1), k.flatten(0, 1).transpose(1, 2), alpha=q.size(-1) ** -0.5
        )
        attn = attn.view(len(x), self.heads, *attn.shape[1:])
        return self.out(merge_heads(attn.softmax(-1) @ v))


@case(
    "rotary_complex",
    **SEQUENCE,
    share=1.0,
    expected=[
        axis("wq:0 wk:0 wv:0 wo.weight:1", 4, label="h"),
        axis("wv:0 wo.weight:1", 6, label="v"),
        axis("wq:0 wk:0 freqs_cis:1", 3, label="d"),
    ],
    sizes={"n_heads": "h"},
)
class ComplexRotary(nn.Module):
    """Rotary positions as a complex buffer: pairs of neighbours are one neuron."""

    def __init__(self, n_heads=4, head_dim=6):
        super().__init__()
        self.n_heads = n_heads
        self.wq, self.wk, self.wv = (nn.Linear(16, n_heads * head_dim, bias=False) for _ in range(3))
        self.wo = nn.Linear(n_heads * head_dim, 7, bias=False)
        freqs = 1.0 / (10000.0 ** (torch.arange(0, head_dim, 2).float() / head_dim))
        freqs = torch.outer(torch.arange(32).float(), freqs)
        self.register_buffer("freqs_cis", torch.polar(torch.ones_like(freqs), freqs))

    def rotate(self, x):
        x = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2))
        return torch.view_as_real(x * self.freqs_cis[: x.shape[1], None, :]).flatten(3)

    def forward(self, x):
        b, n, _ = x.shape
        q, k, v = (w(x).view(b, n, self.n_heads, -1) for w in (self.wq, self.wk, self.wv))
        q, k = self.rotate(q), self.rotate(k)
        scores = torch.einsum("bihd,bjhd->bhij", q, k) / 2.5
        return self.wo(torch.einsum("bhij,bjhd->bihd", scores.softmax(dim=-1), v).flatten(2))


@case(
    "attention_weights_as_parameters",
    **SEQUENCE,
    share=1.0,
    expected=[
        axis("w_q:1 w_k:1 w_v:1 w_o:0", 4, label="h"),
        axis("w_q:2 w_k:2", 5),
        axis("w_v:2 w_o:1", 6),
    ],
)
class ParameterAttention(nn.Module):
    """Weights of shape (model, heads, entries), everything by einsum."""

    def __init__(self):
        super().__init__()
        self.w_q, self.w_k = (nn.Parameter(0.2 * torch.randn(16, 4, 5)) for _ in range(2))
        self.w_v = nn.Parameter(0.2 * torch.randn(16, 4, 6))
        self.w_o = nn.Parameter(0.2 * torch.randn(4, 6, 7))

    def forward(self, x):
        q = torch.einsum("btd,dhk->bthk", x, self.w_q)
        k = torch.einsum("bsd,dhk->bshk", x, self.w_k)
        v = torch.einsum("bsd,dhk->bshk", x, self.w_v)
        logits = torch.einsum("bthk,bshk->bhts", q, k)
        return torch.einsum("bhts,bshk,hko->bto", logits.softmax(-1), v, self.w_o)


@case(
    "learned_queries",
    **SEQUENCE,
    share=0.99,
    expected=[
        axis("key:0 q:0", 9),
        axis("value:0 out.weight:1", 8),
        axis("queries:2 q.weight:1 out:0 head.weight:1", 10),
    ],
)
class LearnedQueries(nn.Module):
    """Latents that read a sequence (Perceiver, DETR)."""

    def __init__(self, latents=5):
        super().__init__()
        self.queries = nn.Parameter(torch.randn(1, latents, 10))
        self.q, self.key, self.value = nn.Linear(10, 9), nn.Linear(16, 9), nn.Linear(16, 8)
        self.out = nn.Linear(8, 10)
        self.head = nn.Linear(10, 3)

    def forward(self, x):
        queries = self.queries.expand(x.size(0), -1, -1)
        for _ in range(2):
            attn = torch.bmm(self.q(queries), self.key(x).mT).mul(1 / 3).softmax(-1)
            queries = queries + self.out(torch.bmm(attn, self.value(x)))
        return self.head(queries)


@case(
    "linear_attention_over_channels",
    inputs=(2, 3, 6, 6),
    other=(1, 3, 8, 5),
    share=0.99,
    expected=[
        axis("theta:0 phi:0", 6),
        axis("g:0 w.weight:1", 5),
        axis("stem:0 theta.weight:1 phi.weight:1 g.weight:1 w:0 head.weight:1", 8),
    ],
)
class NonLocal(nn.Module):
    """A non-local block: attention between the pixels of an image."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.theta, self.phi, self.g = nn.Conv2d(8, 6, 1), nn.Conv2d(8, 6, 1), nn.Conv2d(8, 5, 1)
        self.w = nn.Conv2d(5, 8, 1)
        self.head = nn.Conv2d(8, 2, 1)

    def forward(self, x):
        x = self.stem(x)
        theta = self.theta(x).flatten(2).permute(0, 2, 1)
        phi = F.max_pool2d(self.phi(x), 2).flatten(2)
        g = F.max_pool2d(self.g(x), 2).flatten(2).transpose(1, 2)
        y = torch.bmm(torch.softmax(torch.bmm(theta, phi), dim=-1), g)
        y = y.permute(0, 2, 1).contiguous().view(x.size(0), -1, *x.size()[2:])
        return self.head(x + self.w(y))


@case(
    "key_value_cache_output",
    **SEQUENCE,
    share=0.21,
    expected=[axis("o:0 head.weight:1", 12)],
    frozen={"k.weight:0": "output", "v.weight:0": "output"},
)
class ReturnsKeysAndValues(nn.Module):
    """What is returned stays as it is: the keys, the values, and the queries tied to them."""

    def __init__(self, heads=4):
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v = nn.Linear(16, 20), nn.Linear(16, 20), nn.Linear(16, 20)
        self.o = nn.Linear(20, 12)
        self.head = nn.Linear(12, 3)

    def forward(self, x, past=None):
        q, k, v = (split_heads(t, self.heads) for t in (self.q(x), self.k(x), self.v(x)))
        if past is not None:
            k, v = torch.cat((past[0], k), dim=2), torch.cat((past[1], v), dim=2)
        out = F.scaled_dot_product_attention(q, k, v)
        return self.head(self.o(merge_heads(out)).relu()), (k, v)


@case(
    "grouped_queries_another_path",
    inputs=(2, 4, 12),
    other=(3, 9, 12),
    share=0.99,
    expected=[
        axis("q:0 k:0 v:0 out.weight:1", 2, label="groups"),
        axis("v:0 out.weight:1", 6, label="v"),
        axis("q:0 k:0", 6, False, label="d"),
        axis("out:0 head.weight:1", 8),
    ],
    frozen={"q.weight:0": "may have its size in .*queries_per_group"},
    sizes={"groups": "groups", "queries_per_group": "2", "q.out_features": "2 * groups * d"},
)
class AnotherPath(nn.Module):
    """Short inputs let the kernel share key heads, long ones repeat them by a number that short ones never use."""

    def __init__(self):
        super().__init__()
        self.groups, self.queries_per_group = 2, 2
        self.q, self.k, self.v = nn.Linear(12, 24), nn.Linear(12, 12), nn.Linear(12, 12)
        self.out, self.head = nn.Linear(24, 8), nn.Linear(8, 3)

    def forward(self, x):
        b, n, _ = x.shape
        q = self.q(x).view(b, n, -1, self.q.out_features // (self.groups * 2)).transpose(1, 2)
        k, v = (layer(x).unflatten(-1, (self.groups, -1)).transpose(1, 2) for layer in (self.k, self.v))
        if n > 6:
            k, v = (one.repeat_interleave(self.queries_per_group, 1) for one in (k, v))
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.head(self.out(y.transpose(1, 2).flatten(2)))


@case(
    "heads_without_the_width",
    inputs=(2, 4, 12),
    other=(3, 9, 12),
    share=0.99,
    expected=[
        axis("q:0 k:0 v:0 out.weight:1", 4, label="h"),
        axis("v:0 out.weight:1", 3, label="v"),
        axis("q:0 k:0", 3, label="d"),
        axis("out:0 head.weight:1", 8),
    ],
    sizes={"num_heads": "h", "head_dim": "d", "q.out_features": "h * d"},
)
class HeadsWithoutTheWidth(nn.Module):
    """An attribute ``embed_dim`` that the forward never reads says nothing of ``head_dim``."""

    def __init__(self):
        super().__init__()
        self.embed_dim, self.num_heads = 12, 4
        self.head_dim = self.embed_dim // self.num_heads
        self.q, self.k, self.v = (nn.Linear(12, 12) for _ in range(3))
        self.out, self.head = nn.Linear(12, 8), nn.Linear(8, 3)

    def forward(self, x):
        b, n, _ = x.shape
        q, k = (layer(x).view(b, n, self.num_heads, self.head_dim).transpose(1, 2) for layer in (self.q, self.k))
        v = self.v(x).view(b, n, self.num_heads, -1).transpose(1, 2)
        y = (q @ k.transpose(-1, -2) / 2).softmax(-1) @ v
        return self.head(self.out(y.transpose(1, 2).flatten(2)))


@case(
    "bias_padded_to_all_heads",
    inputs=(2, 5, 6),
    other=(3, 7, 6),
    share=0.99,
    expected=[
        axis("stem:0 qkv.weight:1 out.weight:0 out.bias:0 head.weight:1", 12),
        axis("qkv.weight:0 qkv.bias:0 slopes:0 out.weight:1", 2, label="biased"),
        axis("qkv.weight:0 qkv.bias:0 out.weight:1", 3, label="values"),
    ],
    frozen={"qkv.weight:0": "is padding"},
    sizes={"heads": "biased + 2"},
)
class BiasPaddedToAllHeads(nn.Module):
    """Some heads have a bias by distance; it is padded with zeros for the others, which stay as many."""

    def __init__(self, width=12, heads=4, biased=2):
        super().__init__()
        self.heads = heads
        self.stem, self.qkv = nn.Linear(6, width), nn.Linear(width, 3 * width)
        self.slopes = nn.Parameter(torch.rand(biased))
        self.out, self.head = nn.Linear(width, width), nn.Linear(width, 2)

    def forward(self, x):
        x = self.stem(x)
        batch, length, _ = x.shape
        q, k, v = (one.view(batch, length, self.heads, -1).transpose(1, 2) for one in self.qkv(x).chunk(3, -1))
        places = torch.arange(length).to(x)
        bias = -self.slopes[:, None, None] * (places[:, None] - places).abs()
        bias = F.pad(bias, (0, 0, 0, 0, 0, self.heads - bias.shape[0]))
        y = (q @ k.transpose(-1, -2) + bias).softmax(-1) @ v
        return self.head(x + self.out(y.transpose(1, 2).flatten(2)))


@case(
    "rotary_complex_in_part",
    inputs=(2, 5, 16),
    other=(3, 7, 16),
    share=1.0,
    expected=[
        axis("wq:0 wk:0 wo.weight:1", 4, label="h"),
        axis("wq:0 wk:0", 6, label="plain"),
        axis("wq:0 wk:0 freqs_cis:1", 3, label="d"),
    ],
    sizes={"heads": "h", "plain": "plain", "turned": "2 * d"},
)
class ComplexRotaryInPart(nn.Module):
    """Only the end of each head is turned, read in place as complex numbers: a head keeps an even length."""

    def __init__(self, heads=4, plain=6, turned=6):
        super().__init__()
        self.heads, self.plain, self.turned = heads, plain, turned
        self.wq, self.wk = (nn.Linear(16, heads * (plain + turned), bias=False) for _ in range(2))
        self.wo = nn.Linear(heads, 7, bias=False)
        freqs = 1.0 / (100.0 ** (torch.arange(0, turned, 2).float() / turned))
        freqs = torch.outer(torch.arange(32).float(), freqs)
        self.register_buffer("freqs_cis", torch.polar(torch.ones_like(freqs), freqs))

    rotate = ComplexRotary.rotate

    def forward(self, x):
        b, n, _ = x.shape
        parts = [w(x).view(b, n, self.heads, -1).split([self.plain, self.turned], dim=-1) for w in (self.wq, self.wk)]
        q, k = (torch.cat([plain, self.rotate(turned)], dim=-1) for plain, turned in parts)
        return self.wo((q * k).sum(-1))


class GroupedAttention(nn.Module):
    """How many queries share a key is found by dividing, and said by code on longer inputs only."""

    def __init__(self, width, heads, groups, head_dim, place):
        super().__init__()
        self.head_dim, self.place = head_dim, place
        self.per_group = heads // groups
        self.q, self.k, self.v = (nn.Linear(width, many * head_dim) for many in (heads, groups, groups))
        self.out = nn.Linear(heads * head_dim, width)

    def forward(self, x):
        q, k, v = (layer(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        if x.shape[1] > 6:
            k, v = (one.repeat_interleave(self.per_group, 1) for one in (k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.5, enable_gqa=x.shape[1] <= 6)
        return self.out(y.transpose(1, 2).flatten(2))


@case(
    "grouped_queries_found_by_dividing",
    inputs=(2, 4, 12),
    other=(3, 9, 12),
    share=0.99,
    expected=[
        *(
            axis(f"layers.{layer}.q:0 layers.{layer}.k:0 layers.{layer}.v:0 layers.{layer}.out.weight:1", 2)
            for layer in (0, 1, 2)
        ),
        *(axis(f"layers.{layer}.q:0 layers.{layer}.out.weight:1", 2, label=f"r{layer}") for layer in (0, 1, 2)),
    ],
    sizes={f"layers.{layer}.per_group": f"r{layer}" for layer in (0, 1, 2)} | {"layers.2.place": "2"},
)
class GroupedQueriesFoundByDividing(nn.Module):
    """The third layer holds another integer of that size, its own number."""

    def __init__(self, width=12):
        super().__init__()
        self.stem, self.head = nn.Linear(12, width), nn.Linear(width, 3)
        self.layers = nn.ModuleList([GroupedAttention(width, 4, 2, 6, place) for place in range(3)])

    def forward(self, x):
        x = self.stem(x)
        for layer in self.layers:
            x = x + layer(x)
        return self.head(x)
