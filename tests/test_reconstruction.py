"""Solvers and layers against brute force, and blocks run by themselves against the whole model."""

from __future__ import annotations

import contextlib
import copy
import functools
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers.pytorch_utils import Conv1D

from conftest import unchanged
from netopt import masking
from netopt.errors import InvalidArgumentError, MissingDataError, ShapeMismatchError
from netopt.importance import Criterion, criterion, inputs, lookup, names, registry, scores
from netopt.importance.evidence import collect
from netopt.model.parameters import places
from netopt.prune import prune_neurons, prune_weights
from netopt.reconstruction import Demand, Problem, replay, solvers
from netopt.reconstruction.solvers import _polished
from netopt.reconstruction.stages import moments, stages, watched_forward

SOLVERS = tuple(name for name in names("layers") if name != "wanda_layerwise")  # which updates nothing


def solve(solver, weight, moment, target, demand, **settings):
    """The solution of one matrix, or of several side by side."""
    function = lookup(solver, of="layers").function
    if weight.dim() == 3:
        return function(Problem(weight, moment, target, demand, torch.ones_like(weight[..., :1])), **settings)
    problem = Problem(weight[None], moment[None], target[None], demand, torch.ones_like(weight[None, :, :1]))
    return (one[0] for one in function(problem, **settings))


def without_dampening(solver):
    settings = {"polish": 100} if solver == "admm" else {}
    function = functools.partial(lookup(solver, of="layers").function, dampening=1e-9, **settings)
    return Criterion(solver, function, of="layers")


def problem(rows=3, columns=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, generator=generator, dtype=torch.float64)
    inputs = torch.randn(200, columns, generator=generator, dtype=torch.float64) @ mixing
    weight = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    return weight, inputs.T @ inputs


def loss(found, weight, moment):
    return float(((weight - found) @ moment * (weight - found)).sum())


def best_for(weight, moment, kept):
    """The least-squares fit of each row, with what the mask leaves."""
    found = torch.zeros_like(weight)
    for row, mask in enumerate(kept):
        found[row, mask] = torch.linalg.solve(moment[mask][:, mask], (weight[row] @ moment)[mask])
    return found


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("seed", range(5))
def test_solvers_come_near_the_best_of_all_masks(solver, seed):
    weight, moment = problem(1, 8, seed)
    found, kept = solve(solver, weight, moment, weight @ moment, Demand(8, 4))
    assert int(kept.sum()) == 4
    assert not found[~kept].any()
    masks = [
        torch.zeros(1, 8).bool().index_fill(1, torch.tensor(chosen), True)
        for chosen in itertools.combinations(range(8), 4)
    ]
    losses = sorted(loss(best_for(weight, moment, mask), weight, moment) for mask in masks)
    zeroed = loss(weight * masking.keep_per_row(weight.abs(), 4), weight, moment)
    assert loss(found, weight, moment) <= max(losses[len(losses) // 5], 0.1 * zeroed)


def test_fitting_to_a_mask_is_least_squares():
    weight, moment = problem(5, 12)
    kept = torch.rand(5, 12) > 0.5
    found = _polished(weight * kept, weight @ moment, moment, kept, steps=100)
    torch.testing.assert_close(found, best_for(weight, moment, kept), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("demand", [Demand(40, 97), Demand(40, group=(1, 3)), Demand(40, 13, per_row=True)], ids=str)
def test_sparsegpt_makes_up_for_each_column_by_least_squares_in_the_rest(demand, monkeypatch):
    monkeypatch.setattr(solvers, "STRIP", 4)
    weight, moment = problem(6, 40)
    found, kept = solve("sparsegpt", weight, moment, weight @ moment, demand, dampening=0.0, block=10)
    for column in range(40):
        # What the columns from here on would be, all of them free, given those before.
        left = (weight[:, :column] - found[:, :column]) @ moment[:column, column:]
        best = weight[:, column:] + torch.linalg.solve(moment[column:, column:], left, left=False)
        here = kept[:, column]
        torch.testing.assert_close(found[here, column], best[here, 0], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("group", [(2, 4), (1, 3), (5, 7), (3, 200)])
def test_groups_are_whole_whatever_the_blocks(solver, group):
    weight, moment = problem(3, 300)
    moment += 300 * torch.eye(300)
    _, kept = solve(solver, weight, moment, weight @ moment, Demand(300, group=group))
    for start in range(0, 300, group[1]):
        part = kept[:, start : start + group[1]]
        assert (part.sum(1) == min(group[0], part.shape[1])).all()


@pytest.mark.parametrize("solver", SOLVERS)
def test_groups_side_by_side_are_solved_each_on_its_inputs(solver):
    problems = [problem(3, 8, seed) for seed in range(4)]
    weight, moment = (torch.stack(one) for one in zip(*problems, strict=True))
    together, kept = solve(solver, weight, moment, weight @ moment, Demand(8, 4, per_row=True))
    for index, (one, own) in enumerate(problems):
        alone, kept_alone = solve(solver, one, own, one @ own, Demand(8, 4, per_row=True))
        assert torch.equal(kept[index], kept_alone)
        torch.testing.assert_close(together[index], alone, rtol=1e-5, atol=1e-7)
    _, kept = solve(solver, weight, moment, weight @ moment, Demand(8, 37))
    assert int((~kept).sum()) == 37


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize(
    "demand",
    [Demand(10, 0), Demand(10, 17), Demand(10, 4, per_row=True), Demand(10, group=(2, 4))],
    ids=["none", "some", "row", "2:4"],
)
def test_demands_are_met_exactly(solver, demand):
    weight, moment = problem(4, 10)
    found, kept = solve(solver, weight, moment, weight @ moment, demand)
    if demand.group:
        assert (kept[:, :8].unflatten(1, (2, 4)).sum(-1) == 2).all()
    elif demand.per_row:
        assert ((~kept).sum(1) == demand.remove).all()
    else:
        assert int((~kept).sum()) == demand.remove
    if demand.remove == 0 and not demand.group:
        torch.testing.assert_close(found, weight, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("solver", SOLVERS)
def test_inputs_that_are_always_zero_do_no_harm(solver):
    weight, moment = problem(4, 10)
    moment[3] = moment[:, 3] = 0
    found, _ = solve(solver, weight, moment, weight @ moment, Demand(10, 20))
    assert torch.isfinite(found).all()
    nothing = torch.zeros_like(moment)
    found, kept = solve(solver, weight, nothing, weight @ nothing, Demand(10, 20))
    assert torch.isfinite(found).all()
    assert int((~kept).sum()) == 20


@pytest.mark.parametrize("solver", SOLVERS)
def test_changed_inputs_are_made_up_for(solver):
    """With inputs twice as large half the weights give the old outputs; the pull towards the old ones adds a little."""
    weight, moment = problem(4, 6)[0], 200 * torch.eye(6, dtype=torch.float64)
    found, _ = solve(solver, weight, 4 * moment, 2 * weight @ moment, Demand(6, 0))
    torch.testing.assert_close(found, weight * (0.5 + 0.1) / (1 + 0.1))


class Applied(nn.Module):
    """A parameter that a function applies to the inputs, with no layer around it."""

    def __init__(self, shape, function):
        super().__init__()
        self.weight, self.function = nn.Parameter(torch.randn(shape)), function

    def forward(self, x):
        return self.function(x, self.weight)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.other = nn.Linear(8, 5), nn.Linear(8, 5)
        self.other.weight = self.one.weight

    def forward(self, x):
        return torch.stack([self.one(x[:, 0]), self.other(x[:, 1])])


# What is pruned of each, and the shape of a sample. All are linear in their weight.
LAYERS = {
    "linear": (lambda: nn.Linear(8, 5), (3, 8)),
    "one vector": (lambda: nn.Sequential(nn.Flatten(0), nn.Linear(8, 5)), None),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, padding=2, stride=2), (4, 9)),
    "conv2d grouped dilated": (lambda: nn.Conv2d(4, 6, (3, 2), groups=2, dilation=(2, 1), padding=(1, 0)), (4, 7, 5)),
    "conv2d depthwise": (lambda: nn.Conv2d(4, 8, 3, groups=4, padding="same"), (4, 5, 6)),
    "conv3d": (lambda: nn.Conv3d(2, 3, 2, stride=(1, 2, 1)), (2, 3, 4, 3)),
    "transposed 1d": (lambda: nn.ConvTranspose1d(4, 3, 3, stride=2, padding=1, output_padding=1), (4, 6)),
    "transposed 1d cropped": (lambda: nn.ConvTranspose1d(4, 3, 2, padding=3), (4, 9)),
    "transposed 2d grouped dilated": (
        lambda: nn.ConvTranspose2d(4, 6, (3, 2), groups=2, dilation=(1, 2), stride=(2, 3), padding=(0, 1)),
        (4, 4, 3),
    ),
    "transposed 2d depthwise": (lambda: nn.ConvTranspose2d(4, 4, 3, groups=4, padding=1), (4, 4, 5)),
    "transposed 3d": (lambda: nn.ConvTranspose3d(3, 2, 2, stride=2), (3, 2, 2, 3)),
    "functional conv": (lambda: Applied((6, 2, 3), lambda x, w: F.conv1d(x, w, groups=2)), (4, 6)),
    "functional product": (lambda: Applied((8, 5), lambda x, w: x @ w), (3, 8)),
    "functional linear": (lambda: Applied((5, 8), F.linear), (3, 8)),
    "einsum to heads": (lambda: Applied((8, 2, 3), lambda x, w: torch.einsum("bsd,dhk->bshk", x, w)), (3, 8)),
    "einsum from heads": (lambda: Applied((2, 4, 5), lambda x, w: torch.einsum("bshk,hkd->bsd", x, w)), (3, 2, 4)),
    "experts": (lambda: Applied((3, 8, 5), lambda x, w: torch.bmm(x.transpose(0, 1), w)), (3, 8)),
    "two halves": (lambda: Applied((6, 8), lambda x, w: (x[:, 0] @ w[:2].T, x[:, 1] @ w[2:].T)), (2, 8)),
    "Conv1D of transformers": (lambda: Conv1D(5, 8), (3, 8)),
    "tied": (Tied, (2, 8)),
}


def layer_and_inputs(case):
    make, shape = LAYERS[case]
    torch.manual_seed(3)
    layer = make().double().requires_grad_(False)
    if shape is None:
        return layer, [torch.randn(8).double() for _ in range(50)]
    mixing = torch.randn(shape[0], shape[0]).double()
    last = torch.randn(shape[-1], shape[-1]).double()
    return layer, [torch.einsum("ij,bj...->bi...", mixing, torch.randn(20, *shape).double()) @ last for _ in range(3)]


def outputs(layer, data):
    found = [layer(x) for x in data]
    return torch.cat([one.flatten() for result in found for one in (result if isinstance(result, tuple) else [result])])


def best_outputs(layer, name, kept, data):
    """The dense outputs' projection onto what the kept entries can do, by a column for every entry."""
    weight, dense = layer.get_parameter(name), outputs(layer, data)
    held = weight.clone()
    weight.zero_()
    empty, columns = outputs(layer, data), []
    for index in kept.flatten().nonzero().flatten():
        weight.view(-1)[index] = 1
        columns.append(outputs(layer, data) - empty)
        weight.view(-1)[index] = 0
    weight.copy_(held)
    matrix = torch.stack(columns, 1)
    return empty + matrix @ torch.linalg.lstsq(matrix, (dense - empty)[:, None], driver="gelsd").solution[:, 0]


@pytest.mark.parametrize("asked", [{"amount": 0.5, "scope": "layer"}, {"pattern": "1:2"}], ids=["half", "1:2"])
@pytest.mark.parametrize("case", LAYERS)
def test_what_is_kept_is_the_least_squares_fit_to_the_real_outputs(case, asked):
    dense, data = layer_and_inputs(case)
    (name,) = [name for name, parameter in dense.named_parameters() if parameter.dim() > 1]
    wanted = outputs(dense, data)

    def loss(layer):
        return float((outputs(layer, data) - wanted).square().sum())

    for solver in SOLVERS:
        pruned = copy.deepcopy(dense)
        prune_weights(
            pruned,
            importance=without_dampening(solver),
            data=[(x,) for x in data],
            include=name,
            progress=False,
            **asked,
        )
        kept = masking.masks(pruned)[name]
        if "amount" in asked:
            assert int((~kept).sum()) == round(0.5 * kept.numel())
        least = float((best_outputs(dense, name, kept, data) - wanted).square().sum())
        assert least <= loss(pruned) * (1 + 1e-6) + 1e-9
        # Of the same inputs the other makes up column by column, and does not fit again what comes first.
        slack = 1e-3 * least if solver == "admm" else 0.5 * float(wanted.square().sum())
        assert loss(pruned) <= least + slack + 1e-6


@pytest.mark.parametrize("case", LAYERS)
def test_inputs_times_the_matrix_are_the_outputs(case):
    """The norm that Wanda takes is that of the outputs' derivatives by a weight, whatever the operation."""
    layer, data = layer_and_inputs(case)
    (name,) = [name for name, parameter in layer.named_parameters() if parameter.dim() > 1]
    wanted = {name: places(layer)[name]}
    norm = collect(layer, wanted, ["input_norm"], data=[(x,) for x in data])[name].input_norm
    weight, expected = layer.get_parameter(name), []
    before = outputs(layer, data)
    for index in range(weight.numel()):
        weight.view(-1)[index] += 1
        expected.append((outputs(layer, data) - before).norm())
        weight.view(-1)[index] -= 1
    torch.testing.assert_close(norm, torch.stack(expected).view(weight.shape), rtol=1e-6, atol=1e-8)


class Branches(nn.Module):
    """Different convolutions of the same inputs, one after the other."""

    def __init__(self):
        super().__init__()
        self.wide, self.far = nn.Conv1d(4, 6, 3, padding=1), nn.Conv1d(4, 6, 3, padding=2, dilation=2)
        self.point, self.steps = nn.Conv1d(4, 6, 1), nn.Conv1d(4, 6, 3, stride=1, padding=1, groups=2)

    def forward(self, x):
        return self.wide(x) + self.far(x) + self.point(x) + self.steps(x)


class Overwritten(nn.Module):
    """What a layer has read is written to before another reads it, and before the layer reads again."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x):
        x = x.clone()
        found = self.one(x)
        x.mul_(torch.linspace(-1, 2, 6))
        found = found + self.two(x)
        x.abs_()
        return found + self.one(x)


class Crossed(nn.Module):
    """The rows of one weight meet different inputs."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x):
        return self.attention(x, x.flip(1) @ torch.diag(torch.arange(8.0)), x.flip(1) @ torch.diag(torch.arange(8.0)))[
            0
        ]


@pytest.mark.parametrize(("make", "shape"), [(Branches, (4, 9)), (Overwritten, (6,)), (Crossed, (5, 8))])
@pytest.mark.parametrize("solver", SOLVERS)
def test_moments_are_of_what_each_layer_read_when_it_did(make, shape, solver):
    torch.manual_seed(0)
    model, seen = make(), {}
    data = [torch.randn(30, *shape) for _ in range(2)]
    wanted = {name: place for name, place in places(model).items() if place.prunable}
    order, chain = stages(model, data, wanted)
    runner = replay.Runner(model, data, None, chain, unpruned=contextlib.nullcontext)
    found = {name: one for stage in order for name, one in moments(runner, stage, wanted).items()}

    def see(reading):
        (inputs,) = reading.samples()
        sums = seen.setdefault((reading.name, reading.matrix), [])
        sums.append(inputs.mT @ inputs)
        return False

    for x in data:
        watched_forward(lambda x=x: model(x), wanted, see)
    matrices = {name: one for stage in order for name, one in stage.matrices.items()}
    assert set(seen) == {(name, matrix) for name in found for matrix in matrices[name]}
    for name, parts in found.items():
        for matrix, part in zip(matrices[name], parts, strict=True):
            for moment in (part.own.sum(0), part.cross.sum(0)):
                torch.testing.assert_close(moment, sum(seen[name, matrix]), rtol=1e-4, atol=1e-3)
    prune_weights(model, 0.5, importance=solver, data=data, progress=False)
    assert masking.sparsity(model).total == 0.5


@pytest.mark.parametrize("case", ["conv2d grouped dilated", "transposed 2d grouped dilated", "conv1d"])
def test_windows_are_taken_in_parts_of_bounded_size(case, monkeypatch):
    layer, data = layer_and_inputs(case)
    sizes, wanted = [], places(layer)

    def see(reading):
        parts = list(reading.samples())
        sizes.append((len(parts), max(part.numel() for part in parts), torch.cat(parts, 1)))
        return True

    for chunk in (1 << 24, 1000):
        monkeypatch.setattr(inputs, "CHUNK", chunk)
        watched_forward(lambda: layer(data[0]), {"weight": wanted["weight"]}, see)
    (whole, _, expected), (parts, most, found) = sizes
    assert whole == 1
    assert parts > 1
    assert most <= max(1000, expected.numel() // len(data[0]))
    assert torch.equal(found, expected)


class Routed(nn.Module):
    """Each expert sees the rows that come to it, which are others once what is before has been pruned."""

    def __init__(self):
        super().__init__()
        self.before, self.experts = nn.Linear(6, 6), nn.ModuleList(nn.Linear(6, 6) for _ in range(2))

    def forward(self, x):
        x = self.before(x)
        first = x[:, 0] > 0
        out = torch.empty_like(x)
        for expert, rows in zip(self.experts, (first, ~first), strict=True):
            if rows.any():
                out[rows] = expert(x[rows])
        return out


@pytest.mark.parametrize("solver", SOLVERS)
def test_experts_are_solved_on_what_comes_to_them_in_any_batch(solver):
    torch.manual_seed(0)
    model = Routed()
    with torch.no_grad():
        x = torch.randn(60, 6)
        first = model.before(x)[:, 0] > 0
    data = [x[first], x[~first], x]
    dense, zeroed = copy.deepcopy(model), copy.deepcopy(model)
    prune_weights(model, 0.5, importance=solver, data=data, progress=False)
    prune_weights(zeroed, 0.5, scope="layer", progress=False)
    assert masking.sparsity(model).total == 0.5
    with torch.no_grad():
        errors = [float((one(x) - dense(x)).square().sum()) for one in (model, zeroed)]
    assert errors[0] < errors[1]


class Turned(nn.Module):
    def __init__(self):
        super().__init__()
        self.code = nn.Linear(6, 4, bias=False)

    def forward(self, x):
        return F.linear(self.code(x).relu(), self.code.weight.T)


class Part(nn.Module):
    def __init__(self):
        super().__init__()
        self.wide = nn.Linear(6, 8, bias=False)

    def forward(self, x):
        return F.linear(x, self.wide.weight[:3])


class Fickle(nn.Module):
    def __init__(self):
        super().__init__()
        self.wide = nn.Linear(6, 8, bias=False)

    def forward(self, x):
        return F.linear(x, self.wide.weight) if len(x) > 2 else F.linear(x, self.wide.weight[:3])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (Turned, r"code\.weight.*share entries"),
        (Part, r"only 18 of the 48 entries of 'wide\.weight'"),
        (Fickle, "other ways"),
    ],
)
def test_what_no_outputs_determine_is_refused_by_name(make, message):
    model, data = make(), [torch.randn(4, 6), torch.randn(2, 6)]
    for solver in SOLVERS:
        with unchanged(model), pytest.raises(InvalidArgumentError, match=message):
            prune_weights(model, 0.5, importance=solver, data=data, progress=False)


def test_ones_own_criterion_of_layers(monkeypatch):
    monkeypatch.setattr(registry, "_REGISTERED", dict(registry._REGISTERED))

    @criterion("halves", of="layers")
    def halves(problem):
        kept = problem.demand.keep(problem.weight.abs())
        return problem.weight.masked_fill(~kept, 0) / 2, kept

    @criterion("askew", of="layers")
    def askew(problem):
        return problem.weight[..., 1:], problem.weight[..., 1:] > 0

    assert names("layers") == ("admm", "askew", "halves", "sparsegpt", "wanda_layerwise")
    for importance in ("halves", lookup("halves", of="layers")):
        model = nn.Linear(4, 4)
        before = model.weight.detach().clone()
        report = prune_weights(model, 0.5, importance=importance, data=[torch.randn(2, 4)], progress=False)
        assert torch.equal(model.weight, before / 2 * model.weight_mask)
        assert report.settings["importance"] == "halves"
    model, x = nn.Linear(4, 4), torch.randn(2, 4)
    with unchanged(model), pytest.raises(ShapeMismatchError, match=r"'askew'.*\(1, 4, 4\).*'weight'.*\(1, 4, 3\)"):
        prune_weights(model, 0.5, importance="askew", data=[x], progress=False)


@pytest.mark.parametrize("name", SOLVERS)
def test_what_updates_layers_is_in_the_one_registry_and_scores_nothing(name):
    assert name in names()
    assert name not in names("weights")
    assert name not in names("neurons")
    model, x = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)), torch.randn(2, 4)
    with unchanged(model), pytest.raises(InvalidArgumentError, match=f"{name}.*no single neuron.*prune_weights"):
        prune_neurons(model, x, 0.5, importance=name, progress=False)
    with unchanged(model), pytest.raises(InvalidArgumentError, match=f"{name}.*no single weight.*prune_weights"):
        scores(model, [x], name)
    with unchanged(model), pytest.raises(MissingDataError, match=f"{name}.*data="):
        prune_weights(model, 0.5, importance=lookup(name, of="layers"), progress=False)


class Block(nn.Module):
    def __init__(self, width, spoil):
        super().__init__()
        self.up, self.down, self.spoil = nn.Linear(width, 2 * width), nn.Linear(2 * width, width), spoil

    def forward(self, x, scale, length=None, memory=None):
        x = x.mul_(1.0) if self.spoil else x
        return (x + self.down(self.up(x[:, :length]).relu()) * scale, None)


class Deep(nn.Module):
    """Blocks in a row, with a mask-like tensor for all, an integer of the batch, and layers before and after."""

    def __init__(self, spoil=False):
        super().__init__()
        self.before, self.after = nn.Linear(5, 8), nn.Linear(8, 3)
        self.blocks = nn.ModuleList(Block(8, spoil) for _ in range(4))

    def forward(self, x):
        scale = x.mean((1, 2), keepdim=True)
        x = self.before(x)
        for block in self.blocks:
            x = block(x, scale, length=x.shape[1])[0]
        return self.after(x)


class Remembering(Deep):
    """A chain it is not: each block also sees something made anew."""

    def forward(self, x):
        scale = x.mean((1, 2), keepdim=True)
        x = self.before(x)
        for block in self.blocks:
            x = block(x, scale * 1.0)[0]
        return self.after(x)


class Opaque(Deep):
    """One block is given something that might remember, so that no chain leads through it."""

    def forward(self, x):
        scale = x.mean((1, 2), keepdim=True)
        x = self.before(x)
        for index, block in enumerate(self.blocks):
            x = block(x, scale, memory=object() if index == 1 else None)[0]
        return self.after(x)


def sequential():
    return nn.Sequential(nn.Linear(5, 8), nn.ReLU(inplace=True), nn.Linear(8, 8), nn.Dropout(), nn.Linear(8, 3))


@pytest.mark.parametrize("make", [Deep, lambda: Deep(spoil=True), Remembering, Opaque, sequential])
@pytest.mark.parametrize("solver", SOLVERS)
def test_blocks_by_themselves_give_what_the_whole_model_gives(make, solver, monkeypatch):
    data = [torch.randn(4, length, 5) for length in (3, 7, 5)]
    results = []
    model = make()
    for whole in (True, False):
        copied = copy.deepcopy(model)
        with monkeypatch.context() as patch:
            if whole:
                patch.setattr(replay.Runner, "_reach", lambda self, block: None)
            prune_weights(copied, 0.5, importance=solver, data=data, progress=False)
        assert not any(part._forward_hooks for part in copied.modules())
        results.append({name: place.value for name, place in places(copied).items()})
    for name, value in results[0].items():
        torch.testing.assert_close(results[1][name], value, rtol=1e-4, atol=1e-5)


def test_the_model_is_not_run_for_every_layer(monkeypatch):
    counts = {}
    for make in (Deep, Remembering):
        model, seen = make(), []
        model.before.register_forward_hook(lambda *_, seen=seen: seen.append(1))
        prune_weights(model, 0.5, importance="admm", data=[torch.randn(4, 3, 5)], include="blocks", progress=False)
        counts[make] = len(seen)
    # Once for the shares, once to find the order, three times to reach the first block; where no other follows from it,
    # twice a layer.
    assert counts == {Deep: 5, Remembering: 5 + 2 * 6}


def test_stages_follow_the_forward():
    model = Deep()
    wanted = {name: place for name, place in places(model).items() if place.prunable}
    order, chain = stages(model, [torch.randn(2, 3, 5)], wanted, model.blocks)
    assert chain.blocks == list(model.blocks)
    assert [list(stage.readings) for stage in order] == [[name] for name in wanted if name != "after.weight"] + [
        ["after.weight"]
    ]
    assert [stage.block for stage in order] == [None, *[block for block in model.blocks for _ in range(2)], None]


@pytest.mark.parametrize("request_", [{"amount": 0.5, "scope": "row"}, {"pattern": "2:4"}], ids=str)
def test_wanda_layer_after_layer_reads_what_the_pruned_layers_before_it_make(request_):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 6))
    data = [torch.randn(40, 8) for _ in range(3)]
    dense, x = copy.deepcopy(model), torch.cat(data)
    prune_weights(model, importance="wanda_layerwise", data=data, progress=False, **request_)
    for index in (0, 2):
        weight = dense[index].weight.detach()
        scores = weight.abs() * x.norm(dim=0)
        demand = Demand(weight.shape[1], weight.shape[1] // 2, per_row=True)
        if "pattern" in request_:
            demand = Demand(weight.shape[1], group=(2, 4))
        expected = weight * demand.keep(scores[None])[0]
        torch.testing.assert_close(model[index].weight.detach(), expected)
        x = nn.functional.linear(x, expected, dense[index].bias).relu().detach()


@pytest.mark.parametrize("request_", [{"amount": 0.5, "scope": "row"}, {"pattern": "2:4"}], ids=str)
def test_wanda_prunes_block_after_block_and_reads_each_before_any_of_it_is_pruned(request_):
    torch.manual_seed(0)
    model, data, runs = Deep(), [torch.randn(4, length, 5) for length in (3, 7)], []
    expected = copy.deepcopy(model).requires_grad_(False)
    for block in expected.blocks:
        seen = {layer: [] for layer in (block.up, block.down)}
        hooks = [
            layer.register_forward_pre_hook(lambda _, args, rows=rows: rows.append(args[0].flatten(0, 1)))
            for layer, rows in seen.items()
        ]
        for x in data:
            expected(x)
        for hook in hooks:
            hook.remove()
        for layer, rows in seen.items():
            columns = layer.in_features
            demand = Demand(columns, columns // 2, per_row=True)
            if "pattern" in request_:
                demand = Demand(columns, group=(2, 4))
            layer.weight *= demand.keep((layer.weight.abs() * torch.cat(rows).norm(dim=0))[None])[0]
    model.before.register_forward_hook(lambda *_: runs.append(1))
    prune_weights(model, importance="wanda_layerwise", data=data, include="blocks", progress=False, **request_)
    for name, place in places(model).items():
        torch.testing.assert_close(place.value, expected.get_parameter(name))
    # Once to find the order, twice a batch to reach the first block, and the unpruned model not at all.
    assert len(runs) == 1 + 2 * len(data)
