"""Mixtures of experts: routed by loops, by masks, by batched weights."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from tests.zoo.case import axis, case
from torch import nn

SEQUENCE = {"inputs": (2, 6, 10), "other": (3, 5, 10)}


class Expert(nn.Module):
    """A gated feed-forward layer, as Mixtral's."""

    def __init__(self, width, inner):
        super().__init__()
        self.w1 = nn.Linear(width, inner, bias=False)
        self.w2 = nn.Linear(inner, width, bias=False)
        self.w3 = nn.Linear(width, inner, bias=False)

    def forward(self, x):
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


@case(
    "experts_by_loop",
    **SEQUENCE,
    share=0.99,
    fake="it routes by value",
    expected=[
        axis("experts.0.w1:0 experts.0.w3:0 experts.0.w2.weight:1", 10),
        axis("experts.1.w1:0 experts.1.w3:0 experts.1.w2.weight:1", 10),
        axis("experts.2.w1:0 experts.2.w3:0 experts.2.w2.weight:1", 10),
        axis("embed:0 gate.weight:1 experts.0.w1.weight:1 experts.0.w3.weight:1 experts.0.w2:0 experts.1.w1.weight:1 "
             "experts.1.w3.weight:1 experts.1.w2:0 experts.2.w1.weight:1 experts.2.w3.weight:1 "
             "experts.2.w2:0 head.weight:1",
             8, label="e"),
    ],
)  # fmt: skip
class ExpertsByLoop(nn.Module):
    """Top-2 routing; every expert works on the tokens that chose it and adds into place."""

    def __init__(self):
        super().__init__()
        self.top_k = 2
        self.embed = nn.Linear(10, 8)
        self.gate = nn.Linear(8, 3, bias=False)
        self.experts = nn.ModuleList(Expert(8, 10) for _ in range(3))
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        x = self.embed(x)
        batch, length, width = x.shape
        flat = x.view(-1, width)
        weights = F.softmax(self.gate(flat), dim=1)
        weights, selected = torch.topk(weights, self.top_k, dim=-1)
        weights = weights / weights.sum(dim=-1, keepdim=True)
        out = torch.zeros((batch * length, width), dtype=flat.dtype, device=flat.device)
        chosen = F.one_hot(selected, num_classes=len(self.experts)).permute(2, 1, 0)
        for index, expert in enumerate(self.experts):
            place, token = torch.where(chosen[index])
            current = expert(flat[None, token].reshape(-1, width)) * weights[token, place, None]
            out.index_add_(0, token, current.to(flat.dtype))
        return self.head(x + out.reshape(batch, length, width))


@case(
    "experts_by_boolean_mask",
    **SEQUENCE,
    share=0.94,
    fake="it routes by value",
    expected=[
        axis("up.0:0 down.0.weight:1", 9),
        axis("up.1:0 down.1.weight:1", 9),
        axis("down:0 head.weight:1", 12),
    ],
    frozen={"router.weight:0!": "numbered by argmax"},
)
class ExpertsByMask(nn.Module):
    """Top-1 routing, results written where a mask is true."""

    def __init__(self):
        super().__init__()
        self.router = nn.Linear(10, 2)
        self.up = nn.ModuleList([nn.Linear(10, 9) for _ in range(2)])
        self.down = nn.ModuleList([nn.Linear(9, 12) for _ in range(2)])
        self.head = nn.Linear(12, 4)

    def forward(self, x):
        flat = x.reshape(-1, x.shape[-1])
        probabilities = self.router(flat).softmax(-1)
        best = probabilities.argmax(-1)
        out = flat.new_zeros(flat.shape[0], self.head.in_features)
        for i, (up, down) in enumerate(zip(self.up, self.down, strict=True)):
            mask = best == i
            if mask.any():
                out[mask] = down(up(flat[mask]).relu()) * probabilities[mask, i : i + 1]
        return self.head(out).unflatten(0, x.shape[:2])


@case(
    "experts_by_batched_weights",
    **SEQUENCE,
    share=0.99,
    expected=[
        axis("gate_up:2 gate_up_bias:1 down:1", 9, label="i"),
        axis("embed:0 router:1 gate_up:1 down:2 head.weight:1", 8, label="e"),
    ],
)
class BatchedExperts(nn.Module):
    """All experts compute, their weights in one tensor, and the unchosen are weighted zero (Llama 4, GPT-OSS)."""

    def __init__(self, experts=3):
        super().__init__()
        self.embed = nn.Linear(10, 8)
        self.router = nn.Parameter(0.3 * torch.randn(experts, 8))
        self.gate_up = nn.Parameter(0.3 * torch.randn(experts, 8, 18))
        self.gate_up_bias = nn.Parameter(torch.zeros(experts, 18))
        self.down = nn.Parameter(0.3 * torch.randn(experts, 9, 8))
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        x = self.embed(x)
        flat = x.flatten(0, 1)
        logits = F.linear(flat, self.router)
        best, index = logits.topk(2, dim=-1)
        scores = torch.full_like(logits, float("-inf")).scatter_(1, index, best).softmax(-1)
        hidden = flat.repeat(self.router.shape[0], 1).view(self.router.shape[0], -1, flat.shape[-1])
        gate, up = (torch.bmm(hidden, self.gate_up) + self.gate_up_bias[:, None, :]).chunk(2, dim=-1)
        out = torch.bmm(up * F.silu(gate), self.down) * scores.t().unsqueeze(-1)
        return self.head((flat + out.sum(0)).view_as(x))


@case(
    "experts_gathered_weights",
    inputs=(5, 10),
    other=(3, 10),
    share=0.92,
    expected=[axis("up:1 down:2", 9), axis("down:1 head.weight:1", 7)],
    frozen={"router.weight:0!": "numbered by argmax", "up:0!": "indexed"},
)
class GatheredExperts(nn.Module):
    """Each sample picks its expert's matrices by index: the router's outputs are numbers of matrices, and stay."""

    def __init__(self):
        super().__init__()
        self.router = nn.Linear(10, 3)
        self.up = nn.Parameter(0.3 * torch.randn(3, 9, 10))
        self.down = nn.Parameter(0.3 * torch.randn(3, 7, 9))
        self.head = nn.Linear(7, 4)

    def forward(self, x):
        best = self.router(x).argmax(-1)
        hidden = torch.einsum("bi,bhi->bh", x, self.up[best]).relu()
        return self.head(torch.einsum("bh,boh->bo", hidden, self.down.index_select(0, best)))


@case(
    "experts_soft",
    **SEQUENCE,
    share=0.99,
    expected=[
        axis("up:2 down:1", 9),
        axis("down:2 head.weight:1", 7),
        axis("slots:1 up:0 down:0", 3, False),
        axis("slots:2", 2, False),
    ],
)
class SoftExperts(nn.Module):
    """Soft mixture: slots are mixtures of tokens."""

    def __init__(self):
        super().__init__()
        self.slots = nn.Parameter(0.3 * torch.randn(10, 3, 2))
        self.up = nn.Parameter(0.3 * torch.randn(3, 10, 9))
        self.down = nn.Parameter(0.3 * torch.randn(3, 9, 7))
        self.head = nn.Linear(7, 4)

    def forward(self, x):
        logits = torch.einsum("btd,des->btes", x, self.slots)
        dispatch = logits.softmax(dim=1)
        combine = logits.flatten(2).softmax(-1).view_as(logits)
        slots = torch.einsum("btd,btes->besd", x, dispatch)
        hidden = torch.relu(slots @ self.up)
        out = torch.einsum("besh,eho->beso", hidden, self.down)
        return self.head(torch.einsum("beso,btes->bto", out, combine))


@case(
    "experts_sorted_tokens",
    **SEQUENCE,
    share=0.99,
    fake="it routes by value",
    expected=[
        axis("experts.0.w1:0 experts.0.w3:0 experts.0.w2.weight:1", 6),
        axis("experts.1.w1:0 experts.1.w3:0 experts.1.w2.weight:1", 6),
        axis("experts.2.w1:0 experts.2.w3:0 experts.2.w2.weight:1", 6),
        axis("shared.w1:0 shared.w3:0 shared.w2.weight:1", 12),
        axis(
            "embed:0 gate.weight:1 experts.0.w1.weight:1 experts.0.w3.weight:1 experts.0.w2:0 experts.1.w1.weight:1 "
            "experts.1.w3.weight:1 experts.1.w2:0 experts.2.w1.weight:1 experts.2.w3.weight:1 experts.2.w2:0 "
            "shared.w1.weight:1 shared.w3.weight:1 shared.w2:0 head.weight:1",
            8,
        ),
    ],
)
class SortedTokens(nn.Module):
    """Tokens sorted by expert, run in slices, and scattered back, with a shared expert (DeepSeek)."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(10, 8)
        self.gate = nn.Linear(8, 3, bias=False)
        self.experts = nn.ModuleList(Expert(8, 6) for _ in range(3))
        self.shared = Expert(8, 12)
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        x = self.embed(x)
        flat = x.view(-1, x.shape[-1])
        weight, expert_of = torch.topk(torch.sigmoid(self.gate(flat)), 2, dim=-1, sorted=False)
        counts = torch.bincount(expert_of.flatten(), minlength=3).tolist()
        order = expert_of.view(-1).argsort()
        tokens = flat[order // expert_of.shape[1]]
        outputs, start = [], 0
        for expert, count in zip(self.experts, counts, strict=True):
            if count:
                outputs.append(expert(tokens[start : start + count]))
            start += count
        results = torch.empty_like(tokens)
        results[order] = torch.cat(outputs, dim=0)
        results = (results.view(*expert_of.shape, -1) * weight.unsqueeze(-1)).sum(dim=1)
        return self.head((results + self.shared(flat)).view(*x.shape))


@case(
    "experts_not_all_reached",
    inputs=lambda: (torch.randn(2, 3, 10), torch.tensor([0, 2, 2])),
    other=lambda: (torch.randn(3, 4, 10), torch.tensor([1, 3, 0, 1])),
    share=0.99,
    fake="asks whether an expert has tokens",
    expected=[
        axis("lift:0 experts.0.0.weight:1 experts.1.0.weight:1 experts.2.0.weight:1 experts.3.0.weight:1 "
             "experts.0.2:0 experts.1.2:0 experts.2.2:0 experts.3.2:0 head.weight:1", 12),
        *(axis(f"experts.{one}.0:0 experts.{one}.2.weight:1", 8 + one) for one in range(4)),
    ],
)  # fmt: skip
class NotAllReached(nn.Module):
    """Two of four experts get no token of these inputs, and are as wide as the others afterwards."""

    def __init__(self):
        super().__init__()
        self.lift, self.head = nn.Linear(10, 12), nn.Linear(12, 3)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(12, 8 + one), nn.ReLU(), nn.Linear(8 + one, 12)) for one in range(4)
        )

    def forward(self, x, chosen):
        x = self.lift(x)
        out = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            where = chosen == number
            if where.any():
                out[:, where] = expert(x[:, where])
        return self.head(x + out)


@case(
    "heads_not_reached",
    inputs=(4, 6),
    other=(3, 6),
    # The biases of both heads have no neuron.
    share=0.94,
    expected=[axis("trunk:0 heads.a.weight:1 heads.b.weight:1", 9)],
    frozen={"heads.b.weight:0!": "not reach", "heads.a.weight:0!": "output"},
)
class HeadsNotReached(nn.Module):
    """One head for each task; these inputs ask for one of them."""

    def __init__(self):
        super().__init__()
        self.trunk = nn.Linear(6, 9)
        self.heads = nn.ModuleDict({"a": nn.Linear(9, 2), "b": nn.Linear(9, 5)})

    def forward(self, x, task="a"):
        return self.heads[task](self.trunk(x).relu())
