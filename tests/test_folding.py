"""Folding: a neuron that is a constant goes, and what it added is added elsewhere, or the report says why it stays."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn

from conftest import unchanged
from netopt.axes import find_axes
from netopt.measure import nonzero_of
from netopt.model.view import ModelView
from netopt.plan import Plan
from netopt.prune import plan_neurons, prune_neurons, shrink
from netopt.prune.exactness.dead_neurons import may_exist

DEAD = [1, 4]


class Net(nn.Module):
    """``first`` makes the neurons of which some are dead; ``rest`` reads them."""

    def __init__(self, first: nn.Module, rest: nn.Module) -> None:
        super().__init__()
        self.first, self.rest = first, rest
        with torch.no_grad():
            for module in self.modules():
                if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
                    if module.track_running_stats:
                        module.running_mean.normal_()
                        module.running_var.uniform_(0.5, 2)
                    module.weight.uniform_(0.5, 2)
                    module.bias.normal_()
            first.weight[DEAD] = 0
            first.bias[DEAD] = torch.tensor([2.0, -1.5])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.rest(self.first(x))


class Rest(nn.Module):
    """What comes after, as a function of the module; parts are its attributes."""

    def __init__(self, call: Callable[..., torch.Tensor], **parts: nn.Module | nn.Parameter) -> None:
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)
        self.call = call

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.call(self, x)


def parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape))


def dense(*rest: nn.Module) -> Net:
    return Net(nn.Linear(5, 6), nn.Sequential(*rest))


def images(*rest: nn.Module, first: nn.Module | None = None) -> Net:
    return Net(first or nn.Conv2d(2, 6, 3), nn.Sequential(nn.SiLU(), *rest, nn.ReLU(), nn.Conv2d(4, 2, 1)))


def by_hand(call: Callable[..., torch.Tensor], **parts: nn.Module | nn.Parameter) -> Net:
    return Net(nn.Linear(5, 6), Rest(call, **parts))


def padded(mode: str) -> Net:
    return images(nn.Conv2d(6, 4, 3, padding=1, padding_mode=mode))


FLAT, IMAGE = (7, 5), (3, 2, 9, 8)
CASES: dict[str, tuple[Callable[[], Net], tuple[int, ...]]] = {
    "linear": (lambda: dense(nn.Linear(6, 3)), FLAT),
    "through activation and norm": (
        lambda: dense(nn.GELU(), nn.BatchNorm1d(6), nn.Softplus(), nn.Linear(6, 3), nn.ReLU(), nn.Linear(3, 2)),
        FLAT,
    ),
    "convolution": (lambda: images(nn.Conv2d(6, 4, 3)), IMAGE),
    "padding circular": (lambda: padded("circular"), IMAGE),
    "padding replicate": (lambda: padded("replicate"), IMAGE),
    "padding reflect": (lambda: padded("reflect"), IMAGE),
    "grouped": (lambda: images(nn.Conv2d(6, 4, 3, groups=2), first=nn.Conv2d(2, 6, 1)), IMAGE),
    "transposed": (lambda: images(nn.ConvTranspose2d(6, 4, 1)), IMAGE),
    "depthwise between": (
        lambda: images(nn.Conv2d(6, 6, 3, padding=1, groups=6, padding_mode="circular"), nn.ELU(), nn.Conv2d(6, 4, 1)),
        IMAGE,
    ),
    "running mean": (lambda: images(nn.Conv2d(6, 4, 3, bias=False), nn.BatchNorm2d(4)), IMAGE),
    "statistics of the batch": (
        lambda: images(nn.Conv2d(6, 4, 3, bias=False), nn.BatchNorm2d(4, track_running_stats=False)),
        IMAGE,
    ),
    "instance norm": (lambda: images(nn.Conv2d(6, 4, 3, bias=False), nn.InstanceNorm2d(4, affine=True)), IMAGE),
    "flattened": (
        lambda: Net(nn.Conv2d(2, 6, 3), nn.Sequential(nn.ReLU(), nn.MaxPool2d(3), nn.Flatten(), nn.Linear(24, 3))),
        IMAGE,
    ),
    "a product and a sum in one": (
        lambda: by_hand(lambda own, x: torch.addmm(own.b, x.tanh(), own.w), w=parameter(6, 4), b=parameter(4)),
        FLAT,
    ),
    "two that read": (
        lambda: by_hand(lambda own, x: own.a(x.relu()).relu() * own.b(x.relu()), a=nn.Linear(6, 3), b=nn.Linear(6, 3)),
        FLAT,
    ),
    "one that reads twice": (
        lambda: by_hand(lambda own, x: own.a(x.relu()).relu() * own.a(x.relu()).tanh(), a=nn.Linear(6, 3)),
        FLAT,
    ),
    "a sum, then what reads it": (
        lambda: by_hand(
            lambda own, x: own.c((own.a(x.relu()) + own.b(x).sigmoid()).relu()),
            a=nn.Linear(6, 3),
            b=nn.Linear(6, 3),
            c=nn.Linear(3, 2),
        ),
        FLAT,
    ),
    "a vector is read": (
        lambda: by_hand(lambda own, x: own.a(x.mean(0).relu()), a=nn.Linear(6, 3)),
        FLAT,
    ),
}  # fmt: skip


def built(name: str) -> tuple[Net, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    build, shape = CASES[name]
    model = build().double().eval()
    return model, torch.randn(shape, dtype=torch.float64), torch.randn((5, *shape[1:]), dtype=torch.float64)


@pytest.mark.parametrize("name", CASES)
def test_shrinking_changes_nothing(name):
    model, x, other = built(name)
    other = other if x.dim() != 3 else torch.randn(4, 5, 5, dtype=torch.float64)
    before, whole = model(other), copy.deepcopy(model)
    report = shrink(model, x)
    assert len(model.first.bias) == 4
    torch.testing.assert_close(model(other), before, rtol=1e-9, atol=1e-11)
    plan = Plan.from_dict(report.plan.to_dict())
    plan.apply(whole)
    torch.testing.assert_close(whole(other), before, rtol=1e-9, atol=1e-11)
    assert "first" not in report.frozen


def scores(model: nn.Module, x: torch.Tensor) -> tuple[dict[str, torch.Tensor], dict[str, int]]:
    """The dead neurons first, and how many they are; of two groups with one each, one neuron is dead in both."""
    found = {axis.name: torch.ones(axis.size) for axis in find_axes(model, x).free}
    name = next(name for name, one in found.items() if name.startswith("first") and len(one) in (3, 6))
    dead = DEAD if len(found[name]) == 6 else DEAD[:1]
    found[name][dead] = 0
    return found, {name: len(dead)}


@pytest.mark.parametrize("name", CASES)
def test_removing_constants_changes_nothing(name):
    model, x, other = built(name)
    before, whole = model(other), copy.deepcopy(model)
    found, amount = scores(model, x)
    with unchanged(model):
        plan = plan_neurons(model, x, amount, importance=found, progress=False)
    report = prune_neurons(model, x, amount, importance=found, progress=False)
    assert len(model.first.bias) == 4
    torch.testing.assert_close(model(other), before, rtol=1e-9, atol=1e-11)
    assert report.plan.exact
    assert report.plan == plan
    plan.apply(whole)
    torch.testing.assert_close(whole(other), before, rtol=1e-9, atol=1e-11)


def test_other_neurons_go_as_masked_ones_beside_folded_ones():
    model, x, other = built("through activation and norm")
    masked = copy.deepcopy(model)
    with torch.no_grad():
        masked.rest[3].weight[:, 5] = 0
    found, _ = scores(model, x)
    found["first"][5] = 0.5
    report = prune_neurons(model, x, {"first": 3}, importance=found, progress=False)
    assert len(model.first.bias) == 3
    torch.testing.assert_close(model(other), masked(other), rtol=1e-9, atol=1e-11)
    assert "constants folded" in next(row.note for row in report.rows if row.name == "first")


def test_masks_are_not_folded_as_they_can_be_taken_off():
    model, x, _ = built("linear")
    report = prune_neurons(model, x, {"first": 2}, importance=scores(model, x)[0], mode="mask", progress=False)
    assert not report.plan.shifts


def test_a_bias_that_shrinks_itself_takes_what_stays_of_it():
    model, x, other = built("through activation and norm")
    masked = copy.deepcopy(model)
    with torch.no_grad():
        masked.rest[5].weight[:, 1] = 0
    found, _ = scores(model, x)
    found["rest.3"][1] = 0
    prune_neurons(model, x, {"first": 2, "rest.3": 1}, importance=found, progress=False)
    torch.testing.assert_close(model(other), masked(other), rtol=1e-9, atol=1e-11)


REFUSED: dict[str, tuple[Callable[[], Net], tuple[int, ...], str]] = {
    "zeros at the border": (
        lambda: padded("zeros"),
        IMAGE,
        "they are read differently from place to place by `rest.1`",
    ),
    "no bias before an activation": (
        lambda: dense(nn.Linear(6, 4, bias=False), nn.Tanh(), nn.Linear(4, 2)),
        FLAT,
        "`rest.0`, which reads them, has no bias to take them",
    ),
    "no bias before the output": (
        lambda: dense(nn.Linear(6, 4, bias=False)),
        FLAT,
        "`rest.0`, which reads them, has no bias to take them",
    ),
    "a product with the input": (
        lambda: by_hand(
            lambda own, x: own.b(own.a(x.relu()) * own.c(x)),
            a=nn.Linear(6, 4, bias=False),
            c=nn.Linear(6, 4),
            b=nn.Linear(4, 2),
        ),
        FLAT,
        "`rest.a`, which reads them, has no bias to take them",
    ),
    "one bias for two needs": (
        lambda: by_hand(lambda own, x: own.a(x.relu()) + own.a(x.tanh()), a=nn.Linear(6, 4)),
        FLAT,
        "they would need different values of `rest.a.bias` where it is used",
    ),
    "a layer norm between": (
        lambda: dense(nn.Linear(6, 4, bias=False), nn.LayerNorm(4), nn.Linear(4, 2)),
        FLAT,
        "`rest.0`, which reads them, has no bias to take them",
    ),
    "not the same everywhere": (
        lambda: images(nn.ZeroPad2d(1), nn.Conv2d(6, 4, 3)),
        IMAGE,
        "2 dead neurons stay: what they carry is not the same everywhere it is read",
    ),
    "dropped at random": (
        lambda: by_hand(
            lambda own, x: own.b(nn.functional.dropout(own.a(x.relu()), 0.0)),
            a=nn.Linear(6, 4, bias=False),
            b=nn.Linear(4, 2),
        ),
        FLAT,
        "`rest.a`, which reads them, has no bias to take them",
    ),
    "pools after": (
        lambda: images(nn.Conv2d(6, 4, 3, bias=False), nn.MaxPool2d(2), nn.AvgPool2d(2), nn.Conv2d(4, 4, 1)),
        IMAGE,
        "`rest.1`, which reads them, has no bias to take them",
    ),
    "a scale, then another layer": (
        lambda: by_hand(
            lambda own, x: own.b((own.a(x.relu()) * own.scale / 3).unsqueeze(1).squeeze(1)),
            a=nn.Linear(6, 4, bias=False),
            b=nn.Linear(4, 2),
            scale=parameter(4),
        ),
        FLAT,
        "`rest.a`, which reads them, has no bias",
    ),
    "a parameter added": (
        lambda: by_hand(
            lambda own, x: (x.tanh() @ own.w + own.b).relu() @ own.v,
            w=parameter(6, 4),
            b=parameter(4),
            v=parameter(4, 2),
        ),
        FLAT,
        "matmul in `rest`, which reads them, has no bias",
    ),
    "a parameter taken away": (
        lambda: by_hand(
            lambda own, x: (x.tanh() @ own.w - own.b).relu() @ own.v,
            w=parameter(6, 4),
            b=parameter(4),
            v=parameter(4, 2),
        ),
        FLAT,
        "matmul in `rest`, which reads them, has no bias",
    ),
    "a residual": (
        lambda: by_hand(
            lambda own, x: own.c(torch.cat([own.a(x.relu()) + own.b(x), own.b(x)], -1)),
            a=nn.Linear(6, 3, bias=False),
            b=nn.Linear(6, 3),
            c=nn.Linear(6, 2),
        ),
        FLAT,
        "`rest.a`, which reads them, has no bias",
    ),
    "a softmax": (
        lambda: by_hand(
            lambda own, x: (own.a(x.relu()).unsqueeze(-1) + own.b).softmax(1).squeeze(-1),
            a=nn.Linear(6, 3, bias=False),
            b=parameter(3, 1),
        ),
        FLAT,
        "`rest.a`, which reads them, has no bias",
    ),
    "an lstm": (
        lambda: by_hand(lambda own, x: own.a(x.relu())[0], a=nn.LSTM(6, 3, 2, bidirectional=True)),
        (4, 3, 5),
        "lstm in `rest.a`, which reads them, has no bias",
    ),
    "a gru": (
        lambda: by_hand(lambda own, x: own.a(x.relu())[0], a=nn.GRU(6, 3)),
        (4, 3, 5),
        "gru in `rest.a`, which reads them, has no bias",
    ),
    "a gru cell": (
        lambda: by_hand(lambda own, x: own.a(x.relu()), a=nn.GRUCell(6, 3)),
        FLAT,
        "gru_cell in `rest.a`, which reads them, has no bias",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_folded_stays_and_is_named(name):
    torch.manual_seed(0)
    build, shape, why = REFUSED[name]
    model, x = build().double().eval(), torch.randn(shape, dtype=torch.float64)
    before = model(x)
    report = shrink(model, x)
    assert why in report.frozen["first"]
    # With -1.5 and a rectifier one of the two is zero, and goes.
    assert len(model.first.bias) in (5, 6)
    torch.testing.assert_close(model(x), before)


def test_a_constant_that_only_the_example_makes_stays():
    """One sample of one position makes everything look constant; other inputs of the same kind tell."""
    model = by_hand(lambda own, x: own.a(x * x.sum(-1, keepdim=True)), a=nn.Linear(6, 3)).double().eval()
    x, other = torch.randn(1, 5, dtype=torch.float64), torch.randn(4, 5, dtype=torch.float64)
    before = model(other)
    report = shrink(model, x)
    assert len(model.first.bias) == 6
    assert "not the same everywhere" in report.frozen["first"]
    torch.testing.assert_close(model(other), before)


def test_zeros_here_and_there_are_no_dead_neuron():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    plan = Plan({"0.weight": {0: [0, 1, 2]}, "0.bias": {0: [0, 1, 2]}, "2.weight": {1: [0, 1, 2]}})
    held = ModelView(model)
    with torch.no_grad():
        for row in range(6):
            model[0].weight[row, row % 4] = 0
    assert not may_exist(held, plan, nonzero_of(held))
    with torch.no_grad():
        model[0].weight[1] = 0  # stays
    assert not may_exist(held, plan, nonzero_of(held))
    with torch.no_grad():
        model[0].weight[4] = 0
    assert may_exist(held, plan, nonzero_of(held))
