"""Random models: whatever a forward does, what is found free can be removed, and where it is exact masking agrees."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from netopt.axes import find_axes
from netopt.plan import Plan

WIDTHS = (4, 6, 8, 12)


class Step(nn.Module):
    """One instruction: reads tensors of shape (batch, length, width) from those made before, and makes another."""

    def __init__(self, sources: tuple[int, ...]) -> None:
        super().__init__()
        self.sources = sources


class Dense(Step):
    def __init__(self, sources, width, out):
        super().__init__(sources)
        self.layer = nn.Linear(width, out, bias=out % 4 == 0)

    def forward(self, x):
        return self.layer(x)


class Pointwise(Step):
    def __init__(self, sources, name):
        super().__init__(sources)
        self.name = name

    def forward(self, x):
        return {"relu": F.relu, "gelu": F.gelu, "sigmoid": torch.sigmoid, "scaled": lambda v: 3 * v}[self.name](x)


class Norm(Step):
    def __init__(self, sources, width):
        super().__init__(sources)
        self.norm = nn.LayerNorm(width)

    def forward(self, x):
        return self.norm(x)


class Channelwise(Step):
    """A depthwise convolution along the sequence."""

    def __init__(self, sources, width):
        super().__init__(sources)
        self.conv = nn.Conv1d(width, width, 3, padding=1, groups=width)

    def forward(self, x):
        return self.conv(x.transpose(1, 2)).transpose(1, 2)


class Add(Step):
    def forward(self, x, y):
        return x + y


class Multiply(Step):
    def forward(self, x, y):
        return x * y


class Join(Step):
    def forward(self, x, y):
        return torch.cat([x, y], -1)


class Half(Step):
    def __init__(self, sources, which):
        super().__init__(sources)
        self.which = which

    def forward(self, x):
        return x.chunk(2, -1)[self.which]


class Gate(Step):
    def forward(self, x):
        return F.glu(x, -1)


class Rotate(Step):
    def forward(self, x):
        half = x.shape[-1] // 2
        return torch.cat([-x[..., half:], x[..., :half]], -1)


class Regroup(Step):
    """Heads and positions exchanged in the order of one dimension."""

    def __init__(self, sources, heads):
        super().__init__(sources)
        self.heads = heads

    def forward(self, x):
        batch, length, width = x.shape
        parts = x.view(batch, length, self.heads, width // self.heads)
        return parts.transpose(2, 3).reshape(batch, length, width)


class Attend(Step):
    def __init__(self, sources, heads):
        super().__init__(sources)
        self.heads = heads

    def forward(self, q, k, v):
        q, k, v = (x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in (q, k, v))
        y = (q @ k.transpose(-1, -2)).tanh() @ v
        return y.transpose(1, 2).flatten(2)


class PerHead(Step):
    """A matrix a head, stacked in one parameter."""

    def __init__(self, sources, width, heads):
        super().__init__(sources)
        self.heads = heads
        self.weight = nn.Parameter(torch.randn(heads, width // heads, width // heads) / width**0.5)

    def forward(self, x):
        parts = x.view(*x.shape[:2], self.heads, -1)
        return torch.einsum("blhd,hde->blhe", parts, self.weight).flatten(2)


class Random(nn.Module):
    def __init__(self, steps: list[Step], widths: list[int]) -> None:
        super().__init__()
        self.steps = nn.ModuleList(steps)
        self.heads = nn.ModuleList(nn.Linear(width, 2) for width in widths[-2:])

    def forward(self, x: Tensor) -> Tensor:
        made = [x]
        for step in self.steps:
            made.append(step(*(made[index] for index in step.sources)))
        return sum(head(value) for head, value in zip(self.heads, made[-len(self.heads) :], strict=True))


def next_step(draw, widths):
    """A random step on tensors of these widths, and the width of what it makes."""
    one = draw(st.integers(0, len(widths) - 1))
    width = widths[one]
    alike = [index for index, other in enumerate(widths) if other == width]
    kinds = ["dense", "dense", "pointwise", "norm", "channelwise", "add", "multiply"]
    kinds += ["join"] if width <= 12 else []
    kinds += ["half", "gate", "rotate", "regroup", "attend", "per head"] if width % 2 == 0 else []
    kind = draw(st.sampled_from(kinds))
    other, third = draw(st.sampled_from(alike)), draw(st.sampled_from(alike))
    heads = draw(st.sampled_from([heads for heads in (2, 3) if width % heads == 0] or [1]))
    if kind == "dense":
        out = draw(st.sampled_from(WIDTHS))
        return Dense((one,), width, out), out
    if kind == "join":
        second = draw(st.integers(0, len(widths) - 1))
        return Join((one, second)), width + widths[second]
    if kind in ("half", "gate"):
        return (Half((one,), draw(st.integers(0, 1))) if kind == "half" else Gate((one,))), width // 2
    makers = {
        "pointwise": lambda: Pointwise((one,), draw(st.sampled_from(["relu", "gelu", "sigmoid", "scaled"]))),
        "norm": lambda: Norm((one,), width),
        "channelwise": lambda: Channelwise((one,), width),
        "add": lambda: Add((one, other)),
        "multiply": lambda: Multiply((one, other)),
        "rotate": lambda: Rotate((one,)),
        "regroup": lambda: Regroup((one,), heads),
        "attend": lambda: Attend((one, other, third), heads),
        "per head": lambda: PerHead((one,), width, heads),
    }
    return makers[kind](), width


@st.composite
def models(draw, longest=8):
    """A model of random steps; the first tensor is its input, which stays."""
    torch.manual_seed(draw(st.integers(0, 99), label="seed"))
    widths, steps = [6], []
    for _ in range(draw(st.integers(2, longest), label="steps")):
        step, width = next_step(draw, widths)
        steps.append(step)
        widths.append(width)
    return Random(steps, widths).double()


def plan_for(axes, counts, draw_seed):
    generator = torch.Generator().manual_seed(draw_seed)
    kept = {
        axis.name: torch.randperm(axis.size, generator=generator)[: counts[axis.name]].sort().values
        for axis in axes.free
        if counts[axis.name] < axis.size
    }
    attributes = tuple((change.path, change.value) for change in axes.attribute_values(counts))
    return kept, Plan(axes.tensor_indices(kept), attributes=attributes, values=axes.values(kept))


@torch.no_grad()
def masked(model, axes, kept):
    model = copy.deepcopy(model)
    for name, positions in kept.items():
        for tensor, dim, label in axes.members(axes[name]):
            gone = (label >= 0) & ~torch.isin(label, positions)
            model.get_parameter(tensor).index_fill_(dim, gone.nonzero().flatten(), 0.0)
    return model


RANDOM = settings(
    max_examples=50, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large]
)


@RANDOM
@given(models(), st.data())
def test_any_wish_that_is_feasible_can_be_carried_out(model, data):
    x = torch.randn(2, 3, 6).double()
    axes = find_axes(model, x)
    wanted = {axis.name: data.draw(st.integers(1, axis.size), label=axis.name) for axis in axes.free}
    counts = axes.feasible(wanted)
    assert all(1 <= counts[axis.name] <= axis.size for axis in axes.free)
    assert axes.feasible(counts) == counts
    _, plan = plan_for(axes, counts, 0)
    plan.apply(model)
    assert model(x).shape == (2, 3, 2)
    assert model(torch.randn(3, 5, 6).double()).shape == (3, 5, 2)
    model(x).square().sum().backward()
    assert len(find_axes(model, x)) > 0


@RANDOM
@given(models(), st.integers(0, 99))
def test_removing_exact_axes_equals_masking_them(model, seed):
    x = torch.randn(2, 3, 6).double()
    axes = find_axes(model, x)
    full = {axis.name: axis.size for axis in axes.free}
    counts = dict(full)
    for axis in axes.free:
        if axis.exact:
            trial = axes.feasible({**counts, axis.name: max(1, axis.size // 2)})
            if all(trial[other.name] == other.size or other.exact for other in axes.free):
                counts = trial
    kept, plan = plan_for(axes, counts, seed)
    expected = masked(model, axes, kept)(x)
    plan.apply(model)
    torch.testing.assert_close(model(x), expected, rtol=1e-9, atol=1e-10)


@settings(RANDOM, max_examples=20)
@given(models())
def test_the_same_model_has_the_same_axes_wherever_it_is(model):
    x = torch.randn(2, 3, 6).double()
    axes = find_axes(model, x)
    assert find_axes(model, x) == axes
    assert find_axes(model, torch.randn(3, 5, 6).double()) == axes
    elsewhere = copy.deepcopy(model).to("meta")
    assert find_axes(elsewhere, x.to("meta")) == axes


@pytest.mark.parametrize("kind", [Add, Multiply])
def test_two_layers_that_meet_are_one_axis(kind):
    model = Random([Dense((0,), 6, 8), Dense((0,), 6, 8), kind((1, 2))], [6, 8, 8, 8])
    model.heads = nn.ModuleList([nn.Linear(8, 2)])
    axes = find_axes(model, torch.randn(2, 3, 6))
    assert axes["steps.0.layer"] is axes["steps.1.layer"]
