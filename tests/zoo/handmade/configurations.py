"""Where the integers of a model live: configurations, class bodies, closures; and state that forwards change."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from tests.zoo.case import axis, case
from torch import nn

SEQUENCE = {"inputs": (2, 6, 10), "other": (3, 9, 10)}
HEADS = [
    axis("q:0 k:0 v:0 out.weight:1", 4, label="h"),
    axis("q:0 k:0", 5, label="d"),
    axis("v:0 out.weight:1", 5, label="v"),
    axis("out:0 head.weight:1", 8),
]
# Where no attribute of the model's own holds the number, it stays.
PLAIN = {"share": 0.99, "expected": HEADS[1:], "frozen": {"q.weight:0": "meets the literal 4 in view"}}


class ConfiguredAttention(nn.Module):
    """Attention whose number of heads is wherever :meth:`heads` finds it."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = nn.Linear(10, 20), nn.Linear(10, 20), nn.Linear(10, 20)
        self.out, self.head = nn.Linear(20, 8), nn.Linear(8, 3)

    def forward(self, x):
        b, n, _ = x.shape
        q, k, v = (layer(x).view(b, n, self.heads(), -1).transpose(1, 2) for layer in (self.q, self.k, self.v))
        weights = torch.softmax(q @ k.mT * 0.4, dim=-1)
        return self.head(self.out((weights @ v).transpose(1, 2).flatten(2)))


@dataclass(frozen=True)
class FrozenConfig:
    """Cannot be assigned to."""

    hidden: int = 10
    heads: int = 4
    extra: dict = field(default_factory=dict)


@case("config_frozen_dataclass", **SEQUENCE, share=0.99, expected=HEADS, sizes={"config.heads": "h"})
class WithFrozenConfig(ConfiguredAttention):
    def __init__(self):
        super().__init__()
        self.config = FrozenConfig()

    def heads(self):
        return self.config.heads


class TupleConfig(NamedTuple):
    """A configuration that is a tuple."""

    hidden: int
    heads: int


@case("config_named_tuple", **SEQUENCE, share=0.99, expected=HEADS, sizes={"config.1": "h"})
class WithTupleConfig(ConfiguredAttention):
    def __init__(self):
        super().__init__()
        self.config = TupleConfig(hidden=10, heads=4)

    def heads(self):
        return self.config.heads


@case("config_dict_of_namespaces", **SEQUENCE, share=0.99, expected=HEADS, sizes={"config.attention.heads": "h"})
class WithNestedConfig(ConfiguredAttention):
    def __init__(self):
        super().__init__()
        self.config = {"attention": SimpleNamespace(heads=4), "layers": [1, 2]}

    def heads(self):
        return self.config["attention"].heads


@case("config_class_attribute", **SEQUENCE, **PLAIN)
class WithClassAttribute(ConfiguredAttention):
    num_heads = 4

    def heads(self):
        return self.num_heads


@case("config_shared_by_layers", **SEQUENCE, share=0.99, expected=[
    axis("layers.0.q:0 layers.0.k:0 layers.0.v:0 layers.0.out.weight:1", 4, label="h"),
    axis("layers.1.q:0 layers.1.k:0 layers.1.v:0 layers.1.out.weight:1", 4, label="g"),
    axis("layers.0.out:0 layers.0.head.weight:1", 8),
    axis("layers.0.head:0 widen.weight:1", 3),
    axis("widen:0 layers.1.q.weight:1 layers.1.k.weight:1 layers.1.v.weight:1", 10),
], sizes={"config.heads": "h", "layers.1.config.heads": "g"})  # fmt: skip
class SharedConfig(nn.Module):
    """One configuration object, read by every layer: their counts must stay equal."""

    def __init__(self):
        super().__init__()
        self.config = SimpleNamespace(heads=4)
        self.layers = nn.ModuleList(WithSharedConfig(self.config) for _ in range(2))
        self.widen = nn.Linear(3, 10)

    def forward(self, x):
        return self.layers[1](self.widen(self.layers[0](x).tanh()))


class WithSharedConfig(ConfiguredAttention):
    """A layer of :class:`SharedConfig`."""

    def __init__(self, config):
        super().__init__()
        self.config = config

    def heads(self):
        return self.config.heads


def split_by(x, heads):
    """(batch, tokens, heads · entries) to (batch, heads, tokens, entries)."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


@case("config_in_partial", **SEQUENCE, share=0.99, expected=HEADS)
class WithPartial(ConfiguredAttention):
    def __init__(self):
        super().__init__()
        self.split = functools.partial(split_by, heads=4)

    def forward(self, x):
        q, k, v = (self.split(layer(x)) for layer in (self.q, self.k, self.v))
        weights = torch.softmax(q @ k.mT * 0.4, dim=-1)
        return self.head(self.out((weights @ v).transpose(1, 2).flatten(2)))


@case(
    "hidden_size_computed_in_forward",
    **SEQUENCE,
    share=0.99,
    expected=[
        axis("qkv:0 out.weight:1", 4, None, "h"),
        axis("qkv:0 out.weight:1", 5, None, "d"),
        axis("out:0 head.weight:1", 8),
    ],
    sizes={"num_heads": "h", "all_head_size": "h * d"},
)
class AllHeadSize(nn.Module):
    """A product kept beside its factors, and used in the forward, as BERT's."""

    def __init__(self, num_heads=4, head_size=5):
        super().__init__()
        self.num_heads = num_heads
        self.all_head_size = num_heads * head_size
        self.qkv = nn.Linear(10, 3 * self.all_head_size)
        self.out, self.head = nn.Linear(self.all_head_size, 8), nn.Linear(8, 3)

    def forward(self, x):
        q, k, v = self.qkv(x).split(self.all_head_size, dim=-1)
        shape = q.size()[:-1] + (self.num_heads, self.all_head_size // self.num_heads)  # noqa: RUF005
        q, k, v = (t.view(shape).permute(0, 2, 1, 3) for t in (q, k + 0 * v, v + 0 * q))
        context = (q @ k.transpose(-1, -2) * 0.4).softmax(-1) @ v
        context = context.permute(0, 2, 1, 3).contiguous()
        shape = context.size()[:-2] + (self.all_head_size,)  # noqa: RUF005
        return self.head(self.out(context.view(shape)))


@case(
    "counters_and_history",
    inputs=(4, 10),
    other=(2, 10),
    share=0.97,
    expected=[axis("fc:0 head.weight:1", 8)],
)
class Counters(nn.Module):
    """Every forward changes plain attributes; what it stores are the traced sizes."""

    def __init__(self):
        super().__init__()
        self.fc, self.head = nn.Linear(10, 8), nn.Linear(8, 3)
        self.calls = 2
        self.history = []
        self.state = SimpleNamespace(seen=3, shape=None)
        self.nested = {"inner": {"width": 0}}

    def forward(self, x):
        x = self.fc(x)
        self.calls += 1
        self.history.append(x.shape[1])
        self.state.seen += len(x)
        self.state.shape = x.shape
        self.nested["inner"]["width"] = x.size(1)
        self.last_width = x.shape[-1]
        return self.head(x.relu())


@case(
    "parameters_written_in_forward",
    inputs=(4, 10),
    other=(2, 10),
    share=0.97,
    expected=[axis("student.0:0 teacher.0:0 student.2.weight:1 teacher.2.weight:1", 8)],
)
class MomentumTeacher(nn.Module):
    """In training mode a teacher follows the student, entry by entry (BYOL); its values are the model's own."""

    def __init__(self):
        super().__init__()
        self.student = nn.Sequential(nn.Linear(10, 8), nn.ReLU(), nn.Linear(8, 3))
        self.teacher = nn.Sequential(nn.Linear(10, 8), nn.ReLU(), nn.Linear(8, 3))
        self.teacher.requires_grad_(False)

    def forward(self, x):
        if self.training:
            with torch.no_grad():
                for slow, fast in zip(self.teacher.parameters(), self.student.parameters(), strict=True):
                    slow.mul_(0.9).add_(fast, alpha=0.1)
        with torch.no_grad():
            target = self.teacher(x)
        return self.student(x), target


@case(
    "embedding_with_a_largest_norm",
    inputs=lambda: torch.randint(11, (3, 6)),
    other=lambda: torch.randint(11, (2, 4)),
    share=0.98,
    expected=[axis("embed:1 fc.weight:1", 8, None), axis("fc:0 head.weight:1", 6)],
)
class MaxNormEmbedding(nn.Module):
    """The table is renormalised in place by every look-up."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 8, max_norm=1.0)
        self.fc, self.head = nn.Linear(8, 6), nn.Linear(6, 3)

    def forward(self, ids):
        return self.head(self.fc(self.embed(ids).clone()).relu())


@case(
    "queue_buffer",
    inputs=(4, 10),
    other=(4, 10),
    share=1.0,
    fake="its pointer is read by value",
    expected=[axis("encoder.0:0 encoder.2.weight:1", 9), axis("encoder.2:0 queue:0", 6, None)],
)
class Queue(nn.Module):
    """A queue of past features (MoCo), written at a pointer in training mode."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(10, 9), nn.ReLU(), nn.Linear(9, 6))
        self.register_buffer("queue", F.normalize(torch.randn(6, 16), dim=0))
        self.register_buffer("pointer", torch.zeros(1, dtype=torch.long))

    def forward(self, x):
        features = F.normalize(self.encoder(x), dim=1)
        logits = torch.einsum("nc,ck->nk", features, self.queue.clone().detach())
        if self.training:
            with torch.no_grad():
                start = int(self.pointer)
                self.queue[:, start : start + len(x)] = features.T
                self.pointer[0] = (start + len(x)) % 16
        return logits / 0.2
