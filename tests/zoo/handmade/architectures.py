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


@case(
    "recommender_interactions",
    inputs=lambda: (torch.randn(3, 5), torch.randint(9, (3, 2))),
    other=lambda: (torch.randn(2, 5), torch.randint(9, (2, 2))),
    share=0.99,
    expected=[
        axis("dense.0:0 dense.2.weight:1", 8),
        axis("dense.2:0 tables:1 top.0.weight:1", 6),
        axis("top.0:0 top.2.weight:1", 7),
    ],
)
class Interactions(nn.Module):
    """DLRM: products of all pairs of features, below the diagonal, beside the dense feature."""

    def __init__(self):
        super().__init__()
        self.dense = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 6))
        self.tables = nn.ModuleList(nn.Embedding(9, 6) for _ in range(2))
        self.top = nn.Sequential(nn.Linear(6 + 3, 7), nn.ReLU(), nn.Linear(7, 1))

    def forward(self, x, ids):
        x = self.dense(x)
        rows = torch.stack([x, *(table(ids[:, i]) for i, table in enumerate(self.tables))], dim=1)
        pairs = torch.bmm(rows, rows.transpose(1, 2))
        i, j = torch.tril_indices(rows.shape[1], rows.shape[1], offset=-1)
        return self.top(torch.cat([x, pairs[:, i, j]], dim=1))


@case(
    "factorisation_machine",
    inputs=lambda: torch.randint(9, (3, 4)),
    other=lambda: torch.randint(9, (2, 4)),
    share=0.96,
    expected=[axis("vectors:1 deep.0.weight:1", 6), axis("deep.0:0 deep.2.weight:1", 8)],
)
class FactorisationMachine(nn.Module):
    """DeepFM: half the square of a sum less the sum of squares, and a network on the flattened vectors."""

    def __init__(self):
        super().__init__()
        self.linear, self.vectors = nn.Embedding(9, 1), nn.Embedding(9, 6)
        self.deep = nn.Sequential(nn.Linear(24, 8), nn.ReLU(), nn.Linear(8, 1))

    def forward(self, ids):
        v = self.vectors(ids)
        pairs = 0.5 * (v.sum(1).square() - v.square().sum(1)).sum(1, keepdim=True)
        return torch.sigmoid(self.linear(ids).sum(1) + pairs + self.deep(v.flatten(1)))


@case(
    "graph_attention",
    inputs=lambda: (torch.randn(6, 10), torch.randint(6, (2, 9))),
    other=lambda: (torch.randn(4, 10), torch.randint(4, (2, 5))),
    share=0.98,
    expected=[
        axis("fc:0 source:1 target:1 bias:0 out.weight:1", 3, label="h"),
        axis("fc:0 source:2 target:2 bias:0 out.weight:1", 4, label="f"),
    ],
    sizes={"heads": "h", "fc.out_features": "h * f", "features": "f"},
)
class GraphAttention(nn.Module):
    """GAT: heads with attention vectors of their own, concatenated."""

    def __init__(self, heads=3, features=4):
        super().__init__()
        self.heads, self.features = heads, features
        self.fc = nn.Linear(10, heads * features, bias=False)
        self.source = nn.Parameter(torch.randn(1, heads, features))
        self.target = nn.Parameter(torch.randn(1, heads, features))
        self.bias = nn.Parameter(torch.zeros(heads * features))
        self.out = nn.Linear(heads * features, 3)

    def forward(self, x, edges):
        h = self.fc(x).view(-1, self.heads, self.features)
        score = (h * self.source).sum(-1)[edges[0]] + (h * self.target).sum(-1)[edges[1]]
        score = F.leaky_relu(score, 0.2).exp()
        index = edges[1].unsqueeze(-1).expand_as(score)
        total = torch.zeros(x.size(0), self.heads, dtype=x.dtype).scatter_add_(0, index, score)
        messages = h[edges[0]] * (score / total[edges[1]]).unsqueeze(-1)
        gathered = torch.zeros_like(h).index_add(0, edges[1], messages)
        return self.out(F.elu(gathered.flatten(1) + self.bias))


@case(
    "point_transform",
    inputs=(2, 3, 9),
    other=(3, 3, 7),
    share=0.86,
    expected=[axis("predict.0:0 predict.2.weight:1", 8), axis("last:0 head.weight:1", 6)],
    frozen={"lift.weight:0!": "."},
)
class PointTransform(nn.Module):
    """PointNet's T-Net: a square matrix is predicted and the identity added, so rows are columns."""

    def __init__(self, k=5):
        super().__init__()
        self.k = k
        self.lift = nn.Conv1d(3, k, 1)
        self.predict = nn.Sequential(nn.Linear(k, 8), nn.ReLU(), nn.Linear(8, k * k))
        self.last, self.head = nn.Conv1d(k, 6, 1), nn.Linear(6, 4)

    def forward(self, x):
        x = self.lift(x)
        t = self.predict(x.amax(2)).view(-1, self.k, self.k) + torch.eye(self.k).to(x)
        x = torch.bmm(x.transpose(2, 1), t).transpose(2, 1)
        return self.head(self.last(x).relu().amax(2))


@case(
    "relative_shift",
    inputs=(2, 6, 16),
    other=(3, 4, 16),
    share=0.99,
    expected=[
        axis("q:0 k:0 r:0 content:0 position:0 v:0 out.weight:1", 4, label="h"),
        axis("q:0 k:0 r:0 content:1 position:1", 5, None, "d"),
        axis("v:0 out.weight:1", 5, None, "v"),
    ],
    sizes={"heads": "h"},
)
class RelativeShift(nn.Module):
    """Transformer-XL: scores of distances, shifted into place by a padded view."""

    def __init__(self, heads=4, entries=5):
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.r = (nn.Linear(16, heads * entries, bias=False) for _ in range(4))
        self.content = nn.Parameter(0.2 * torch.randn(heads, entries))
        self.position = nn.Parameter(0.2 * torch.randn(heads, entries))
        self.out = nn.Linear(heads * entries, 7)

    def forward(self, x):
        b, n, width = x.shape
        q, k, v = (layer(x).view(b, n, self.heads, -1) for layer in (self.q, self.k, self.v))
        sines = torch.outer(torch.arange(n - 1, -1, -1.0), torch.ones(width)).sin().to(x)
        r = self.r(sines).view(n, self.heads, -1)
        content = torch.einsum("bihd,bjhd->bhij", q + self.content, k)
        place = torch.einsum("bihd,jhd->bhij", q + self.position, r)
        place = F.pad(place, (1, 0)).view(b, self.heads, n + 1, n)[:, :, 1:].reshape_as(place)
        weights = ((content + place) * 0.4).softmax(-1)
        return self.out(torch.einsum("bhij,bjhd->bihd", weights, v).reshape(b, n, -1))


@case(
    "affine_coupling_flow",
    inputs=(4, 6),
    other=(2, 6),
    share=0.92,
    expected=[axis("nets.0.0:0 nets.0.2.weight:1", 8), axis("nets.1.0:0 nets.1.2.weight:1", 8)],
)
class AffineCoupling(nn.Module):
    """RealNVP: masked halves of the input scale and shift the others; the log-determinant is summed."""

    def __init__(self):
        super().__init__()
        self.nets = nn.ModuleList(nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 12)) for _ in range(2))
        self.register_buffer("masks", torch.tensor([[1.0, 0, 1, 0, 1, 0], [0.0, 1, 0, 1, 0, 1]]))

    def forward(self, x):
        log_det = x.new_zeros(len(x))
        for mask, net in zip(self.masks, self.nets, strict=True):
            scale, shift = net(x * mask).chunk(2, dim=1)
            scale = torch.tanh(scale) * (1 - mask)
            x = x * scale.exp() + shift * (1 - mask)
            log_det = log_det + scale.sum(1)
        return x, log_det


@case(
    "capsule_routing",
    inputs=(2, 3, 6, 6),
    other=(3, 3, 6, 6),
    share=0.99,
    expected=[
        axis("conv:0 weight:0", 3, None, "c"),
        axis("conv:0 weight:3", 4, None, "i"),
        axis("weight:2 head.weight:1", 5, None, "o"),
    ],
    sizes={"primary": "c"},
)
class CapsuleRouting(nn.Module):
    """Capsules that agree, by three rounds of routing."""

    def __init__(self, primary=3):
        super().__init__()
        self.primary = primary
        self.conv = nn.Conv2d(3, primary * 4, 3)
        self.weight = nn.Parameter(0.3 * torch.randn(primary, 2, 5, 4))
        self.head = nn.Linear(5, 3)

    def forward(self, x):
        u = self.conv(x).view(x.size(0), self.primary, -1, *self.conv(x).shape[2:]).mean((-1, -2))
        votes = torch.einsum("pcoi,bpi->bpco", self.weight, u)
        logits = votes.new_zeros(votes.shape[:-1])
        for _ in range(3):
            coupling = logits.softmax(dim=2)
            s = (coupling.unsqueeze(-1) * votes).sum(dim=1)
            norm = s.pow(2).sum(-1, keepdim=True)
            v = norm / (1 + norm) * s / (norm + 1e-8).sqrt()
            logits = logits + (votes * v.unsqueeze(1)).sum(-1)
        return self.head(v)
