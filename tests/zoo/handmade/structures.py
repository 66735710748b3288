"""Models of things other than images and plain sequences: tables, graphs, points, densities."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from tests.zoo.case import axis, case
from torch import nn


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
    # Only the bias of the output has no neuron.
    share=0.98,
    expected=[
        axis("predict.0:0 predict.2.weight:1", 8),
        axis("last:0 head.weight:1", 6),
        axis("lift:0 predict.0.weight:1 predict.2:0 last.weight:1", 5, label="k"),
    ],
    sizes={"k": "k", "predict.2.out_features": "k * k"},
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
