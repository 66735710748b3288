"""Random programs of indexed reads and writes: what is found free can go, and where it is exact masking agrees.

A program is a list of steps on matrices, rows by features. Rows are indexed by constants, features by buffers of the
model, so that some axes are followed through a permutation, some are frozen, some are tied by what is written.
"""

from __future__ import annotations

import contextlib
import copy
import random

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from netopt.axes import find_axes
from netopt.plan import Plan

PROGRAMS = 200
REDUCTIONS = ("sum", "prod", "mean", "amax", "amin")


class Program(nn.Module):
    """Steps drawn one after the other; each is written on sizes of the tensors at hand."""

    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.draw = draw = random.Random(seed)
        self.steps: list = []
        self.double()
        self.first = nn.ModuleList(nn.Linear(4, draw.choice([4, 6, 8])).double() for _ in range(2))
        self.layers = nn.ModuleList()
        values = [layer(torch.randn(5, 4).double()) for layer in self.first]
        for _ in range(draw.randint(2, 6)):
            step = self.drawn(values)
            with contextlib.suppress(IndexError, RuntimeError):  # numbers of positions that are not there
                values.append(step(self, values))
                self.steps.append(step)
        self.heads = nn.ModuleList(nn.Linear(value.shape[1], 2).double() for value in values[-2:])

    def forward(self, x):
        values = [layer(x) for layer in self.first]
        for step in self.steps:
            values.append(step(self, values))
        return sum(head(value).sum(0) for head, value in zip(self.heads, values[-2:], strict=True))

    def drawn(self, values):
        """A step on some of the values."""
        while True:
            one = self.draw.randrange(len(values))
            alike = [at for at, value in enumerate(values) if value.shape == values[one].shape]
            step = self.draw.choice(STEPS)(self, one, self.draw.choice(alike), *values[one].shape)
            if step is not None:
                return step

    def held(self, tensor):
        """A buffer of the model, by name."""
        name = f"at{len(self._buffers)}"
        self.register_buffer(name, tensor)
        return name

    def places(self, size, count):
        return torch.tensor([self.draw.randrange(size) for _ in range(count)])

    def distinct(self, size, count):
        return torch.tensor(self.draw.sample(range(size), count))

    def start(self):
        return self.draw.choice([torch.zeros_like, torch.ones_like, torch.clone])


def linear(p, one, other, rows, width):
    p.layers.append(nn.Linear(width, p.draw.choice([4, 6, 8])).double())
    at = len(p.layers) - 1
    return lambda m, v: m.layers[at](v[one])


def pointwise(p, one, other, rows, width):
    function = p.draw.choice([F.relu, torch.sigmoid, torch.tanh, lambda h: h + 1, lambda h: 2 * h, torch.square])
    return lambda m, v: function(v[one])


def combined(p, one, other, rows, width):
    function = p.draw.choice([torch.add, torch.mul, torch.maximum, lambda a, b: torch.cat([a, b], 1)])
    return lambda m, v: function(v[one], v[other])


def reduced(p, one, other, rows, width):
    function = p.draw.choice([torch.sum, torch.amax, torch.mean, lambda h, d, keepdim: h.norm(dim=d, keepdim=keepdim)])
    dim = p.draw.choice([0, 1])
    return lambda m, v: v[one] * function(v[one], dim, keepdim=True)


def rows_read(p, one, other, rows, width):
    at = p.places(rows, p.draw.choice([3, 5]))
    kind = p.draw.choice(["index", "select", "embedding", "gather", "along"])
    return lambda m, v: {
        "index": lambda h: h[at],
        "select": lambda h: h.index_select(0, at),
        "embedding": lambda h: F.embedding(at, h),
        "gather": lambda h: h.gather(0, at[:, None].expand(-1, h.shape[1])),
        "along": lambda h: torch.take_along_dim(h, at[:, None], 0),
    }[kind](v[one])


def features_read(p, one, other, rows, width):
    at = p.held(p.places(width, p.draw.choice([width, 4])))
    mask = p.held(torch.rand(width) > 0.4)
    kind = p.draw.choice(["index", "select", "gather", "mask", "opposite"])
    if kind in ("mask", "opposite") and (getattr(p, mask).all() or not getattr(p, mask).any()):
        return None
    return lambda m, v: {
        "index": lambda h: h[:, getattr(m, at)],
        "select": lambda h: h.index_select(1, getattr(m, at)),
        "gather": lambda h: h.gather(1, getattr(m, at)[None].expand(len(h), -1)),
        "mask": lambda h: h[:, getattr(m, mask)],
        "opposite": lambda h: h[:, ~getattr(m, mask)],
    }[kind](v[one])


def rows_scattered(p, one, other, rows, width):
    at, start, how, own = p.places(rows, rows), p.start(), p.draw.choice(REDUCTIONS), p.draw.random() < 0.5
    kind = p.draw.choice(["scatter", "add", "reduce", "value"])

    def step(m, v):
        h, index = start(v[one]), at[:, None].expand(-1, v[one].shape[1])
        if kind == "scatter":
            return h.scatter(0, index, v[other])
        if kind == "add":
            return h.scatter_add(0, index, v[other])
        if kind == "value":
            return h.scatter(0, index, float(own))
        return h.scatter_reduce(0, index, v[other], how, include_self=own)

    return step


def features_scattered(p, one, other, rows, width):
    at, start, is_small = p.held(p.places(4, width)), p.start(), p.draw.random() < 0.5
    kind = p.draw.choice(["scatter", "scatter_add"])

    def step(m, v):
        target = v[one].new_zeros(len(v[one]), 4) if is_small else start(v[one])
        return getattr(target, kind)(1, getattr(m, at)[None].expand(len(target), -1), v[other])

    return step


def slices_written(p, one, other, rows, width):
    dim, start, how = p.draw.choice([0, 1]), p.start(), p.draw.choice(REDUCTIONS[1:])
    size = (rows, width)[dim]
    if size < 2:
        return None
    place = p.distinct(size, size) if p.draw.random() < 0.5 else p.distinct(size, size // 2)
    name = p.held(place) if dim else None
    kind = p.draw.choice(["index_copy", "index_add", "index_fill", "index_reduce"])
    number = p.draw.choice([0.0, 1.0])

    def step(m, v):
        h, at = start(v[one]), place if name is None else getattr(m, name)
        count = at.shape[0]
        if kind == "index_fill":
            return h.index_fill(dim, at, number)
        source = v[other].narrow(dim, 0, count) if count < v[other].shape[dim] else v[other]
        extra = (how,) if kind == "index_reduce" else ()
        return getattr(h, kind)(dim, at, source, *extra)

    return step


def put(p, one, other, rows, width):
    at, start, number = p.distinct(rows, 3), p.start(), p.draw.choice([0.0, 1.0])
    across = p.held(p.distinct(width, width))
    mask = p.held(torch.rand(width) > 0.4)
    lines = torch.rand(rows) > 0.4
    kind = p.draw.choice(["rows", "number", "features", "mask", "lines", "positive", "pairs", "added", "one row"])

    def step(m, v):
        h = start(v[one]) if start is not torch.clone else v[one].clone()
        if kind == "rows":
            h[at] = v[other][: len(at)]
        elif kind == "one row":
            h[at] = v[other][0]
        elif kind == "number":
            h[at] = number
        elif kind == "features":
            h[:, getattr(m, across)] = v[other]
        elif kind == "mask":
            h[:, getattr(m, mask)] = number
        elif kind == "lines":
            h[lines] = number
        elif kind == "positive":
            h[v[other] > 0] = number
        elif kind == "pairs":
            h[at, at] = number
        else:
            h.index_put_((at,), v[other][: len(at)], accumulate=True)
        return h

    return step if kind != "pairs" or max(at) < width else None


def canvas(p, one, other, rows, width):
    at, start = p.distinct(7, rows), p.draw.choice(["zeros", "ones"])
    kind = p.draw.choice(["columns", "added", "deep"])

    def step(m, v):
        h = v[one]
        made = getattr(torch, start)(h.shape[1], 7, dtype=h.dtype)
        if kind == "deep":
            made = getattr(torch, start)(2, h.shape[1], 7, dtype=h.dtype)
            made[:, :, at] = h.t()
            return made.sum(0).t()[at]
        if kind == "added":
            return made.index_add(1, at, h.t()).t()
        made[:, at] = h.t()
        return made.t()

    return step


def masked(p, one, other, rows, width):
    mask, lines, number = p.held(torch.rand(width) > 0.4), torch.rand(rows, 1) > 0.4, p.draw.choice([0.0, 1.0])
    kind = p.draw.choice(["fill", "buffer", "lines", "where", "scatter", "tensor"])
    return lambda m, v: {
        "fill": lambda h, g: h.masked_fill(g > 0, number),
        "buffer": lambda h, g: h.masked_fill(getattr(m, mask), number),
        "lines": lambda h, g: h.masked_fill(lines, number),
        "where": lambda h, g: torch.where(g > 0, h, number),
        "scatter": lambda h, g: h.masked_scatter(g > 0, g),
        "tensor": lambda h, g: h.masked_fill(g > 0, torch.tensor(number).double()),
    }[kind](v[one], v[other])


def parts_written(p, one, other, rows, width):
    dim, at = p.draw.choice([0, 1]), p.draw.choice([0, 1])  # numbers above one would be followed
    kind = p.draw.choice(["select", "slice", "diagonal", "flat", "put"])
    return lambda m, v: {
        "select": lambda h, g: torch.select_scatter(h, g.select(dim, 0), dim, at),
        "slice": lambda h, g: torch.slice_scatter(h, g.narrow(dim, 0, 1), dim, at, at + 1),
        "diagonal": lambda h, g: h @ torch.diagonal_scatter(g.t() @ h, g[0]),
        "flat": lambda h, g: h * g.take(torch.tensor([0, 3])).sum(),
        "put": lambda h, g: h.put(torch.tensor([0, 3]), g.flatten()[:2]),
    }[kind](v[one], v[other])


STEPS = [linear, pointwise, combined, reduced, rows_read, features_read, rows_scattered, features_scattered,
         slices_written, put, canvas, masked, parts_written]  # fmt: skip


@torch.no_grad()
def masked_copy(model, axes, kept):
    model = copy.deepcopy(model)
    for name, positions in kept.items():
        for tensor, dim, label in axes.members(axes[name]):
            if tensor in dict(model.named_parameters()):
                gone = (label >= 0) & ~torch.isin(label, positions)
                model.get_parameter(tensor).index_fill_(dim, gone.nonzero().flatten(), 0.0)
    return model


def exact_half(axes):
    """Half of every axis that is exact, where no other has to follow."""
    full = {axis.name: axis.size for axis in axes.free}
    counts = dict(full)
    for axis in axes.free:
        trial = axes.feasible({**counts, axis.name: max(1, axis.size // 2)})
        if axis.exact and all(trial[other.name] == full[other.name] or other.exact for other in axes.free):
            counts = trial
    return counts


def plan_for(axes, counts, seed):
    generator = torch.Generator().manual_seed(seed)
    kept = {
        axis.name: torch.randperm(axis.size, generator=generator)[: counts[axis.name]].sort().values
        for axis in axes.free
        if counts[axis.name] < axis.size
    }
    attributes = tuple((change.path, change.value) for change in axes.attribute_values(counts))
    return kept, Plan(axes.tensor_indices(kept), attributes=attributes, values=axes.values(kept))


COUNTS = {"cut": 0, "programs": 0}


@pytest.mark.filterwarnings("ignore:index_reduce")
@pytest.mark.parametrize("seed", range(PROGRAMS))
def test_what_is_exact_is_masked_as_it_is_removed(seed):
    model, x = Program(seed), torch.randn(5, 4, generator=torch.Generator().manual_seed(seed)).double()
    axes = find_axes(model, x)
    counts = exact_half(axes)
    kept, plan = plan_for(axes, counts, seed)
    smaller = copy.deepcopy(model)
    plan.apply(smaller)
    torch.testing.assert_close(smaller(x), masked_copy(model, axes, kept)(x), rtol=1e-8, atol=1e-9)
    COUNTS["programs"] += 1
    COUNTS["cut"] += bool(kept)
    _, plan = plan_for(axes, axes.feasible({axis.name: max(1, axis.size // 2) for axis in axes.free}), seed)
    plan.apply(model)
    assert model(x).shape == (2,)


def test_most_programs_could_be_cut():
    if COUNTS["programs"] < PROGRAMS:
        pytest.skip("a part of the programs was chosen")
    assert COUNTS["cut"] > PROGRAMS / 2
