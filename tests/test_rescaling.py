"""Rescaling: where a size scales what is computed, a weight takes the inverse factor, and removing is masking again."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from netopt.prune import prune_neurons
from netopt.prune.exactness import rescaling
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


class Written(Attention):
    """Attention by its parts: a product by one over the root of the size of a head, or attention called by names."""

    def __init__(self, how: str) -> None:
        super().__init__("separate")
        self.how = how

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        parts = [one(x).view(len(x), -1, self.heads, self.dim) for one in (self.query, self.key, self.value)]
        query, key, value = (part.transpose(1, 2) for part in parts)
        if self.how == "by names":
            seen = nn.functional.scaled_dot_product_attention(key=key, value=value, query=query)
        else:
            seen = self.logits(query, key).softmax(-1) @ value
        return self.out(seen.transpose(1, 2).flatten(2))

    def logits(self, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        if self.how == "keys divided":
            return query @ (key / math.sqrt(key.shape[-1])).transpose(-2, -1)
        if self.how == "a tensor's root":
            return query @ key.transpose(-2, -1) / torch.tensor(key.size(-1), dtype=query.dtype).sqrt()
        position = torch.arange(query.shape[2]).to(query)
        distances = (position - position[:, None]).expand(len(query) * self.heads, -1, -1)
        query, key = query.flatten(0, 1), key.flatten(0, 1)
        found = torch.baddbmm(distances, query, key.transpose(1, 2), alpha=query.size(-1) ** -0.5)
        return found.unflatten(0, (-1, self.heads))


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
    **{
        how: (lambda how=how: Written(how), (2, 5, 6))
        for how in ("by names", "keys divided", "a tensor's root", "added to distances")
    },
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


def test_what_has_no_factor_stays_inexact():
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

    monkeypatch.setattr(rescaling, "reference_outputs", None)
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


class Gated(nn.Module):
    """Queries, keys, values and a gate, made by one layer, in any order."""

    def __init__(self, order: str) -> None:
        super().__init__()
        self.order, self.heads, self.dim = order, 2, 4
        self.fused, self.out = nn.Linear(6, 32), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        parts = dict(zip(self.order, self.fused(x).chunk(4, -1), strict=True))
        query, key, value = (parts[one].view(len(x), -1, self.heads, self.dim).transpose(1, 2) for one in "qkv")
        seen = nn.functional.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        return self.out(seen * parts["g"].sigmoid())


@pytest.mark.parametrize("order", ["qkvg", "gqkv", "kqvg"])
@pytest.mark.parametrize(("tokens", "dtype"), [(1, torch.float64), (2, torch.float32), (5, torch.float64)])
def test_the_rows_of_queries_are_found_among_others(order, tokens, dtype):
    """A softmax over one key, and one of two that are nearly alike, tell nothing of a factor by their result."""
    torch.manual_seed(0)
    model = Gated(order).to(dtype)
    dense = copy.deepcopy(model)
    x = torch.randn(2, tokens, 6, dtype=dtype)
    report = prune_neurons(model, x, 0.5, importance="magnitude", scope="layer", progress=False)
    assert report.plan.exact
    factors = report.plan.scales["fused.weight"].flatten().chunk(4)
    expected = {one: math.sqrt(0.5) if one == "q" else 1.0 for one in order}
    for one, found in zip(order, factors, strict=True):
        torch.testing.assert_close(found, torch.full_like(found, expected[one]))
    other = torch.randn(3, 9, 6, dtype=dtype)
    torch.testing.assert_close(model(other), masked_like(dense, report.plan)(other))


class Codebook(nn.Module):
    """The nearest of some vectors, by distances written out; a result that says little of the distances."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.out = nn.Linear(4, 6), nn.Linear(6, 2)
        self.register_buffer("book", torch.randn(9, 6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        distances = self.book.square().sum(1) - 2 * self.first(x) @ self.book.T
        return self.out(self.book[distances.argmin(1)])


@pytest.mark.parametrize("examples", [1, 4, 16])
@pytest.mark.parametrize("seed", range(5))
def test_agreeing_outputs_earn_no_factor(examples, seed):
    torch.manual_seed(seed)
    report = prune_neurons(Codebook(), torch.randn(examples, 4), 0.5, importance="magnitude", progress=False)
    assert not report.plan.scales
    assert not report.plan.exact


class Averaging(Attention):
    """Attention without a softmax that divides by the size of a head itself: a factor of another power."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        parts = [one(x).view(len(x), -1, self.heads, self.dim) for one in (self.query, self.key, self.value)]
        query, key, value = (part.transpose(1, 2) for part in parts)
        seen = (query @ key.transpose(-2, -1) * (1 / query.shape[-1])).argmax(-1)
        return self.out(value.transpose(1, 2).flatten(2)) + seen.sum(1)[..., None]


def test_a_factor_of_another_power_is_not_believed_though_outputs_agree():
    torch.manual_seed(0)
    x = torch.randn(2, 5, 6)
    report = prune_neurons(Averaging("separate"), x, 0.5, importance="magnitude", scope="layer", progress=False)
    assert not report.plan.scales


def test_zeros_earn_no_factor():
    """Queries that are zero agree with every factor."""
    torch.manual_seed(0)
    model = Attention("separate")
    with torch.no_grad():
        model.query.weight.zero_()
        model.query.bias.zero_()
    report = prune_neurons(model, torch.randn(2, 5, 6), 0.5, importance="magnitude", scope="layer", progress=False)
    assert not report.plan.scales
