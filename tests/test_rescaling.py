"""Compensation: where a size enters as a factor, a weight takes the inverse, and removing is masking again."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from netopt.prune import prune_neurons
from netopt.prune.exactness import rescaling as compensation
from netopt.surgery import named_tensors


class Attention(nn.Module):
    """Heads with torch's default scale, fused or not."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.heads, self.dim = kind, 2, 4
        if kind == "separate":
            self.query, self.key, self.value = (nn.Linear(6, 8) for _ in range(3))
        else:
            self.qkv = nn.Linear(6, 24)
        self.out = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        size, length, _ = x.shape
        if self.kind == "separate":
            parts = [one(x).view(size, length, self.heads, self.dim) for one in (self.query, self.key, self.value)]
            query, key, value = (part.transpose(1, 2) for part in parts)
        elif self.kind == "outer":
            query, key, value = self.qkv(x).reshape(size, length, 3, self.heads, self.dim).permute(2, 0, 3, 1, 4)
        else:
            query, key, value = self.qkv(x).reshape(size, length, self.heads, 3, self.dim).permute(3, 0, 2, 1, 4)
        seen = nn.functional.scaled_dot_product_attention(query, key, value)
        return self.out(seen.transpose(1, 2).reshape(size, length, self.heads * self.dim))


class Rooted(nn.Module):
    """A residual stream under RMS norms."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 12)
        self.norm = nn.RMSNorm(12, eps=1e-2)
        self.inner, self.back = nn.Linear(12, 7), nn.Linear(7, 12)
        self.last = nn.RMSNorm(12)
        self.head = nn.Linear(12, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        return self.head(self.last(x + self.back(self.inner(self.norm(x)).relu())))


class Layered(Rooted):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.last = nn.LayerNorm(12), nn.LayerNorm(12)


def masked_like(model, plan):
    masked = copy.deepcopy(model)
    tensors = named_tensors(masked)
    with torch.no_grad():
        for name, dims in plan.tensors.items():
            for dim, kept in dims.items():
                gone = [place for place in range(tensors[name].shape[dim]) if place not in kept]
                tensors[name].index_fill_(dim, torch.tensor(gone), 0)
    return masked


CASES = {
    "separate": (lambda: Attention("separate"), (2, 5, 6)),
    "outer": (lambda: Attention("outer"), (2, 5, 6)),
    "inner": (lambda: Attention("inner"), (2, 5, 6)),
    "root mean square": (Rooted, (4, 5)),
}


@pytest.mark.parametrize("name", CASES)
def test_removing_is_masking(name):
    torch.manual_seed(0)
    build, shape = CASES[name]
    model = build().double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
    x = torch.randn(shape, dtype=torch.float64)
    dense = copy.deepcopy(model)
    report = prune_neurons(model, x, 0.5, scope="layer", importance="magnitude", progress=False)
    assert report.plan.scales
    assert report.plan.exact
    assert all(row.exact for row in report.rows)
    other = torch.randn(shape, dtype=torch.float64)
    masked = masked_like(dense, report.plan)
    torch.testing.assert_close(model.eval()(other), masked.eval()(other), rtol=1e-6, atol=1e-7)


def test_what_has_no_compensation_stays_inexact():
    torch.manual_seed(0)
    report = prune_neurons(Layered(), torch.randn(4, 5), 0.5, scope="layer", importance="magnitude", progress=False)
    rows = {row.name: row.exact for row in report.rows}
    assert rows == {"first": False, "inner": True}
    assert not report.plan.exact
    assert not report.plan.scales


def test_nothing_is_tried_where_no_factor_can_help(monkeypatch):
    class Averaged(nn.Sequential):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            hidden = self[0](x).relu()
            return self[1](hidden) + hidden.mean(1, keepdim=True)

    monkeypatch.setattr(compensation, "reference_outputs", None)
    model, x = Averaged(nn.Linear(5, 8), nn.Linear(8, 3)), torch.randn(4, 5)
    report = prune_neurons(model, x, 0.5, scope="layer", importance="magnitude", verify=False, progress=False)
    assert [(row.name, row.after, row.exact) for row in report.rows] == [("0", 4, False)]


def test_one_that_has_one_is_exact_beside_one_that_has_none():
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.norm = nn.Linear(6, 10), nn.LayerNorm(10)
            self.middle, self.attention = nn.Linear(10, 6), Attention("outer")

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.attention(self.middle(self.norm(self.first(x))))

    torch.manual_seed(0)
    model, x = Both().double(), torch.randn(2, 5, 6, dtype=torch.float64)
    report = prune_neurons(model, x, 0.5, scope="layer", importance="magnitude", progress=False)
    exact = {row.name: row.exact for row in report.rows}
    assert not exact["first"]
    assert sum(exact.values()) == len(exact) - 1
    assert "attention.qkv.weight" in report.plan.scales
    again = type(report.plan).from_dict(report.plan.to_dict())
    assert again == report.plan
