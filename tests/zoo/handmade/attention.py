"""Attention written by hand: heads, and the entries of a head, are axes of their own."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from tests.zoo.case import axis, case
from torch import nn

SEQUENCE = {"inputs": (2, 6, 16), "other": (3, 9, 16)}


@case(
    "attention_inner_width",
    **SEQUENCE,
    share=0.99,
    expected=[
        axis("to_q:0 to_k:0 to_v:0 to_out.weight:1", 4, label="h"),
        axis("to_q:0 to_k:0", 5, label="d"),
        axis("to_v:0 to_out.weight:1", 5, label="v"),
        axis("to_out:0 head.weight:1", 12),
    ],
    sizes={"heads": "h", "to_q.out_features": "h * d", "to_out.in_features": "h * v"},
)
class InnerWidth(nn.Module):
    """Queries, keys and values by three layers, the scale fixed at construction."""

    def __init__(self, dim=16, heads=4, dim_head=5):
        super().__init__()
        self.heads = heads
        self.scale = dim_head**-0.5
        self.to_q = nn.Linear(dim, heads * dim_head, bias=False)
        self.to_k = nn.Linear(dim, heads * dim_head, bias=False)
        self.to_v = nn.Linear(dim, heads * dim_head)
        self.to_out = nn.Linear(heads * dim_head, 12)
        self.head = nn.Linear(12, 3)

    def forward(self, x):
        b, n, _ = x.shape
        q, k, v = (to(x).view(b, n, self.heads, -1).transpose(1, 2) for to in (self.to_q, self.to_k, self.to_v))
        scores = torch.matmul(q, k.transpose(-2, -1)) * self.scale
        out = scores.softmax(dim=-1) @ v
        return self.head(self.to_out(out.transpose(1, 2).reshape(b, n, -1)))


class Attention(nn.Module):
    """As the vision transformers of timm: one fused layer, 3 · h · d."""

    def __init__(self, dim, num_heads=4, qkv_bias=True):
        super().__init__()
        self.num_heads = num_heads
        self.head_dim = dim // num_heads
        self.qkv = nn.Linear(dim, dim * 3, bias=qkv_bias)
        self.q_norm = nn.LayerNorm(self.head_dim)
        self.k_norm = nn.LayerNorm(self.head_dim)
        self.attn_drop = nn.Dropout(0.1)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x):
        B, N, C = x.shape
        qkv = self.qkv(x).reshape(B, N, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        q, k = self.q_norm(q), self.k_norm(k)
        dropout = self.attn_drop.p if self.training else 0.0
        x = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout)
        return self.proj(x.transpose(1, 2).reshape(B, N, C))


@case(
    "vit_fused_qkv",
    inputs=(2, 3, 8, 8),
    other=(3, 3, 8, 8),
    share=0.99,
    expected=[
        axis("patch:0 cls:2 pos:2 norm1:0 attn.qkv.weight:1 attn.proj:0 "
             "norm2:0 mlp.0.weight:1 mlp.2:0 norm:0 head.weight:1",
             16, False, "e"),
        axis("attn.qkv:0 attn.proj.weight:1", 4, None, "h"),
        axis("attn.qkv:0 attn.q_norm:0 attn.k_norm:0 attn.proj.weight:1", 4, False, "d"),
        axis("mlp.0:0 mlp.2.weight:1", 20),
    ],
    sizes={
        "attn.num_heads": "h", "attn.head_dim": "d", "attn.qkv.out_features": "3 * h * d",
        "attn.proj.in_features": "h * d",
        "attn.q_norm.normalized_shape.0": "d", "norm.normalized_shape.0": "e",
    },
)  # fmt: skip
class ViT(nn.Module):
    """A small vision transformer: class token, learned positions, pre-norm."""

    def __init__(self, embed_dim=16):
        super().__init__()
        self.patch = nn.Conv2d(3, embed_dim, kernel_size=4, stride=4)
        self.cls = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos = nn.Parameter(torch.zeros(1, 5, embed_dim))
        self.norm1 = nn.LayerNorm(embed_dim)
        self.attn = Attention(embed_dim)
        self.norm2 = nn.LayerNorm(embed_dim)
        self.mlp = nn.Sequential(nn.Linear(embed_dim, 20), nn.GELU(), nn.Linear(20, embed_dim))
        self.norm = nn.LayerNorm(embed_dim)
        self.head = nn.Linear(embed_dim, 5)

    def forward(self, x):
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(x.shape[0], -1, -1), x], dim=1) + self.pos
        x = x + self.attn(self.norm1(x))
        x = x + self.mlp(self.norm2(x))
        return self.head(self.norm(x)[:, 0])


@case(
    "fused_heads_first",
    **SEQUENCE,
    share=0.99,
    expected=[
        axis("query_key_value:0 dense.weight:1", 4, None, "h"),
        axis("query_key_value:0", 5, False, "d"),
        axis("query_key_value:0 dense.weight:1", 5, None, "v"),
        axis("dense:0 head.weight:1", 12),
    ],
    sizes={
        "num_heads": "h",
        "head_size": "d",
        "query_key_value.out_features": "3 * h * d",
        "dense.in_features": "h * d",
    },
)
class FusedHeadsFirst(nn.Module):
    """One fused layer, h · 3 · d, as in GPT-NeoX and BLOOM; chunk(3) ties the values' width to the queries'."""

    def __init__(self, num_heads=4, head_size=5):
        super().__init__()
        self.num_heads, self.head_size = num_heads, head_size
        self.query_key_value = nn.Linear(16, 3 * num_heads * head_size)
        self.dense = nn.Linear(num_heads * head_size, 12)
        self.head = nn.Linear(12, 3)

    def forward(self, x):
        b, n, _ = x.shape
        qkv = self.query_key_value(x).view(b, n, self.num_heads, 3 * self.head_size)
        q, k, v = (t.transpose(1, 2) for t in qkv.chunk(3, dim=-1))
        mask = torch.ones(n, n, dtype=torch.bool, device=x.device).tril()
        scores = q @ k.transpose(2, 3) / math.sqrt(self.head_size)
        weights = scores.masked_fill(~mask, float("-inf")).softmax(-1)
        out = (weights @ v).transpose(1, 2).contiguous().view(b, n, self.num_heads * self.head_size)
        return self.head(self.dense(out))


def rotate_half(x):
    """The halves of the head dimension turned by a right angle."""
    x1, x2 = x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]
    return torch.cat((-x2, x1), dim=-1)


def repeat_kv(x, n_rep):
    """Every key-value head serves n_rep query heads."""
    b, heads, n, d = x.shape
    if n_rep == 1:
        return x
    return x[:, :, None, :, :].expand(b, heads, n_rep, n, d).reshape(b, heads * n_rep, n, d)


@case(
    "grouped_query_rotary",
    **SEQUENCE,
    share=0.99,
    expected=[
        axis("q_proj:0 k_proj:0 v_proj:0 o_proj.weight:1", 2, label="h"),
        axis("q_proj:0 o_proj.weight:1", 3, label="r"),
        axis("q_proj:0 k_proj:0 inv_freq:0", 4, label="d"),
        axis("v_proj:0 o_proj.weight:1", 8, label="v"),
        axis("o_proj:0 head.weight:1", 12),
    ],
    sizes={
        "num_heads": "h * r", "num_kv_heads": "h", "q_proj.out_features": "h * r * 2 * d",
        "k_proj.out_features": "h * 2 * d",
        "v_proj.out_features": "h * v", "head_dim": "2 * d", "n_rep": "r",
    },
)  # fmt: skip
class GroupedQueryRotary(nn.Module):
    """As Llama: key-value heads shared by groups of query heads, rotary halves."""

    def __init__(self, num_heads=6, num_kv_heads=2, head_dim=8):
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, head_dim
        self.n_rep = num_heads // num_kv_heads
        self.scaling = head_dim**-0.5
        self.q_proj = nn.Linear(16, num_heads * head_dim, bias=False)
        self.k_proj = nn.Linear(16, num_kv_heads * head_dim, bias=False)
        self.v_proj = nn.Linear(16, num_kv_heads * head_dim, bias=False)
        self.o_proj = nn.Linear(num_heads * head_dim, 12, bias=False)
        self.head = nn.Linear(12, 3)
        inv_freq = 1.0 / (10000 ** (torch.arange(0, head_dim, 2).float() / head_dim))
        self.register_buffer("inv_freq", inv_freq, persistent=False)

    def forward(self, x):
        b, n, _ = x.shape
        q = self.q_proj(x).view(b, n, self.num_heads, self.head_dim).transpose(1, 2)
        k = self.k_proj(x).view(b, n, self.num_kv_heads, self.head_dim).transpose(1, 2)
        v = self.v_proj(x).view(b, n, self.num_kv_heads, self.head_dim).transpose(1, 2)
        angles = torch.outer(torch.arange(n, device=x.device).to(self.inv_freq), self.inv_freq)
        angles = torch.cat((angles, angles), dim=-1)
        cos, sin = angles.cos(), angles.sin()
        q, k = q * cos + rotate_half(q) * sin, k * cos + rotate_half(k) * sin
        k, v = repeat_kv(k, self.n_rep), repeat_kv(v, self.n_rep)
        weights = F.softmax(torch.matmul(q, k.transpose(2, 3)) * self.scaling, dim=-1)
        out = torch.matmul(weights, v).transpose(1, 2).contiguous()
        return self.head(self.o_proj(out.reshape(b, n, -1)))


@case(
    "multi_query",
    **SEQUENCE,
    share=0.99,
    expected=[
        axis("q:0 out.weight:1", 4, label="h"),
        axis("q:0 kv:0", 6, False, "d"),
        axis("kv:0 out.weight:1", 6, label="v"),
        axis("out:0 head.weight:1", 12),
    ],
    sizes={"num_heads": "h", "dim_head": "d", "q.out_features": "h * d", "kv.out_features": "d + v"},
)
class MultiQuery(nn.Module):
    """One key-value head for all queries; torch's own kernel and its default scale."""

    def __init__(self, num_heads=4, dim_head=6):
        super().__init__()
        self.num_heads, self.dim_head = num_heads, dim_head
        self.q = nn.Linear(16, num_heads * dim_head)
        self.kv = nn.Linear(16, 2 * dim_head)
        self.out = nn.Linear(num_heads * dim_head, 12)
        self.head = nn.Linear(12, 3)

    def forward(self, x):
        q = self.q(x).unflatten(-1, (self.num_heads, self.dim_head)).transpose(1, 2)
        k, v = self.kv(x).split(self.dim_head, dim=-1)
        out = F.scaled_dot_product_attention(q, k.unsqueeze(1), v.unsqueeze(1), is_causal=True)
        return self.head(self.out(out.transpose(1, 2).flatten(2)))


@case(
    "grouped_query_enable_gqa",
    **SEQUENCE,
    share=0.99,
    expected=[
        axis("q:0 k:0 v:0 out.weight:1", 2, label="h"),
        axis("q:0 out.weight:1", 3, label="r"),
        axis("q:0 k:0", 4, label="d"),
        axis("v:0 out.weight:1", 4, label="v"),
        axis("out:0 head.weight:1", 12),
    ],
    sizes={"heads": "h * r", "kv_heads": "h"},
)
class EnableGQA(nn.Module):
    """Grouped queries inside torch's kernel, the scale given."""

    def __init__(self, heads=6, kv_heads=2, dim=4):
        super().__init__()
        self.heads, self.kv_heads = heads, kv_heads
        self.q, self.k, self.v = (
            nn.Linear(16, heads * dim),
            nn.Linear(16, kv_heads * dim),
            nn.Linear(16, kv_heads * dim),
        )
        self.out = nn.Linear(heads * dim, 12)
        self.head = nn.Linear(12, 3)

    def forward(self, x):
        b, n = x.shape[:2]
        q = self.q(x).view(b, n, self.heads, -1).transpose(1, 2)
        k = self.k(x).view(b, n, self.kv_heads, -1).transpose(1, 2)
        v = self.v(x).view(b, n, self.kv_heads, -1).transpose(1, 2)
        out = F.scaled_dot_product_attention(q, k, v, scale=0.5, enable_gqa=True)
        return self.head(self.out(out.transpose(1, 2).reshape(b, n, -1)))


@case(
    "relative_bias_window",
    inputs=(2, 16, 8, 8),
    other=(3, 16, 4, 12),
    share=0.99,
    expected=[
        axis("qkv:0 relative_position_bias_table:1 proj.weight:1", 4, label="h"),
        axis("qkv:0 proj.weight:1", 5, label="d"),
        axis("proj:0 head.weight:1", 12),
    ],
    sizes={"num_heads": "h", "qkv.out_features": "3 * h * d"},
)
class WindowAttention(nn.Module):
    """Attention in windows with a bias looked up by relative position, as Swin's."""

    def __init__(self, window=4, num_heads=4, dim=5):
        super().__init__()
        self.window, self.num_heads, self.scale = window, num_heads, dim**-0.5
        self.qkv = nn.Linear(16, 3 * num_heads * dim)
        self.proj = nn.Linear(num_heads * dim, 12)
        self.head = nn.Linear(12, 3)
        self.relative_position_bias_table = nn.Parameter(0.02 * torch.randn((2 * window - 1) ** 2, num_heads))
        coords = torch.stack(torch.meshgrid(torch.arange(window), torch.arange(window), indexing="ij")).flatten(1)
        relative = (coords[:, :, None] - coords[:, None, :]).permute(1, 2, 0) + window - 1
        self.register_buffer("relative_position_index", relative[..., 0] * (2 * window - 1) + relative[..., 1])

    def forward(self, x):
        b, c, h, w = x.shape
        s = self.window
        x = x.view(b, c, h // s, s, w // s, s).permute(0, 2, 4, 3, 5, 1).reshape(-1, s * s, c)
        qkv = self.qkv(x).reshape(len(x), s * s, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        q, k, v = qkv[0], qkv[1], qkv[2]
        bias = self.relative_position_bias_table[self.relative_position_index.view(-1)].view(s * s, s * s, -1)
        attn = (q * self.scale) @ k.transpose(-2, -1) + bias.permute(2, 0, 1).unsqueeze(0)
        x = (attn.softmax(-1) @ v).transpose(1, 2).flatten(2)
        x = self.head(self.proj(x)).view(b, h // s, w // s, s, s, -1)
        return x.permute(0, 5, 1, 3, 2, 4).reshape(b, -1, h, w)


@case(
    "relative_bias_embedding",
    **SEQUENCE,
    share=1.0,
    expected=[
        axis("qk:0 relative_attention_bias.weight:1 v:0 o.weight:1", 4, label="h"),
        axis("qk:0", 5, label="d"),
        axis("v:0 o.weight:1", 5, label="v"),
    ],
    sizes={"n_heads": "h", "relative_attention_bias.embedding_dim": "h"},
)
class RelativeEmbedding(nn.Module):
    """T5's bias: an embedding of the clipped distance, a column per head; no scale."""

    def __init__(self, n_heads=4):
        super().__init__()
        self.n_heads = n_heads
        self.qk = nn.Linear(16, 2 * 20, bias=False)
        self.v = nn.Linear(16, 20, bias=False)
        self.o = nn.Linear(20, 6, bias=False)
        self.relative_attention_bias = nn.Embedding(7, n_heads)

    def forward(self, x):
        n = x.shape[1]
        split = lambda t: t.view(t.shape[0], n, self.n_heads, -1).transpose(1, 2)  # noqa: E731
        q, k = torch.chunk(self.qk(x), 2, dim=-1)
        q, k, v = split(q), split(k), split(self.v(x))
        position = torch.arange(n, device=x.device)
        distance = (position[None, :] - position[:, None]).clamp(-3, 3) + 3
        scores = torch.einsum("bhid,bhjd->bhij", q, k)
        scores += self.relative_attention_bias(distance).permute([2, 0, 1]).unsqueeze(0)
        out = torch.matmul(F.softmax(scores.float(), dim=-1).type_as(scores), v)
        return self.o(out.transpose(1, 2).contiguous().view(len(x), n, -1))
