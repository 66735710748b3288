"""prune_weights removes exactly what is asked, of exactly the weights meant, and nothing else changes."""

from __future__ import annotations

import copy
import random

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from conftest import unchanged
from netopt import importance, masking
from netopt.errors import (
    ArgumentTypeError,
    InvalidArgumentError,
    MissingDataError,
    NonFiniteError,
    NothingToPruneError,
    SelectorError,
    UnknownNameError,
)
from netopt.model.parameters import Orientation, places
from netopt.prune import prune_weights

SOLVERS = tuple(name for name in importance.names("layers") if name != "wanda_layerwise")


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(12, 6)
        self.conv = nn.Conv1d(6, 8, 3, padding=1)
        self.norm = nn.BatchNorm1d(8)
        self.recurrent = nn.GRU(8, 5, batch_first=True)
        self.scale = nn.Parameter(torch.randn(5, 7))
        self.head = nn.Linear(7, 4)

    def forward(self, tokens):
        x = self.norm(self.conv(self.embed(tokens).transpose(1, 2))).relu()
        return self.head(self.recurrent(x.transpose(1, 2))[0].mean(1) @ self.scale)


DEFAULT = ["conv.weight", "recurrent.weight_ih_l0", "recurrent.weight_hh_l0", "head.weight"]
DATA = [(torch.randint(0, 12, (4, 9)), torch.randint(0, 4, (4,))) for _ in range(3)]


def prune(model, amount=None, **kwargs):
    return prune_weights(model, amount, progress=False, **kwargs)


def removed(model):
    """How many entries of each mask are False."""
    return {name: int((~mask).sum()) for name, mask in masking.masks(model).items()}


def sizes(model, names):
    return sum(model.get_parameter(name).numel() for name in names)


def scored(name):
    return {"importance": name, "data": DATA, "loss_fn": F.cross_entropy}


@pytest.mark.parametrize("amount", [0.0, 0.1, 1 / 3, 0.5, 0.77, 0.999, 0, 1, 100])
@pytest.mark.parametrize("name", importance.names("weights"))
def test_exactly_as_many_as_asked(name, amount):
    model = Net()
    size = sizes(model, DEFAULT)
    prune(model, amount, **scored(name))
    assert list(removed(model)) == DEFAULT
    assert sum(removed(model).values()) == (amount if isinstance(amount, int) else round(amount * size))


@pytest.mark.parametrize("name", importance.names("weights"))
@pytest.mark.parametrize("between", [lambda model: None, masking.bake], ids=["masked", "baked"])
def test_the_amount_is_the_total(name, between):
    model = Net()
    prune(model, 0.5, **scored(name))
    first, total = removed(model), masking.sparsity(model).total
    between(model)
    prune(model, 0.5, **scored(name))
    assert removed(model) == first
    assert masking.sparsity(model).total == total
    prune(model, 0.8, **scored(name))
    assert sum(removed(model).values()) == round(0.8 * sum(p.numel() for n, p in plain(model)))
    prune(model, 0.2, **scored(name))
    assert sum(removed(model).values()) == round(0.8 * sum(p.numel() for n, p in plain(model)))


def plain(model):
    return [(name, place.parameter) for name, place in places(model).items() if name in DEFAULT]


def test_the_smallest_go_and_values_stay_below_the_mask():
    model = Net()
    before = {name: parameter.detach().clone() for name, parameter in plain(model)}
    prune(model, 0.6)
    kept = torch.cat([before[name][mask].abs() for name, mask in masking.masks(model).items()])
    gone = torch.cat([before[name][~mask].abs() for name, mask in masking.masks(model).items()])
    assert kept.min() >= gone.max()
    masking.strip(model)
    assert all(torch.equal(parameter, before[name]) for name, parameter in plain(model))


def test_a_negative_weight_of_large_magnitude_is_kept():
    layer = nn.Linear(4, 1, bias=False)
    layer.weight.data = torch.tensor([[-5.0, 0.1, 1.0, -0.2]])
    prune(layer, threshold=0.2)
    assert layer.weight.tolist() == [[-5.0, 0.0, 1.0, pytest.approx(-0.2)]]


@pytest.mark.parametrize("name", ["magnitude", "lamp", "wanda", "saliency"])
def test_threshold_removes_what_scores_below(name):
    model = Net()
    found = importance.scores(model, DATA, name)
    threshold = float(torch.cat([score.flatten() for score in found.values()]).median())
    prune(model, threshold=threshold, **scored(name))
    for key, mask in masking.masks(model).items():
        assert torch.equal(mask, found[key] >= threshold)


def test_scope_layer_and_row():
    model = Net()
    prune(model, 0.3, scope="layer")
    assert removed(model) == {name: round(0.3 * parameter.numel()) for name, parameter in plain(model)}
    model = Net()
    prune(model, 0.3, scope="row", **scored("wanda"))
    for name, place in places(model).items():
        if name in DEFAULT:
            rows = place.orientation.rows(place.mask)
            assert ((~rows).sum(1) == round(0.3 * rows.shape[1])).all()


@pytest.mark.parametrize("pattern", ["2:4", "1:4", "3:4", "1:2", "5:8", "2:3"])
@pytest.mark.parametrize("name", ["magnitude", "wanda", "random"])
def test_n_of_m_along_the_inputs(pattern, name):
    model = Net()
    n, m = map(int, pattern.split(":"))
    prune(model, pattern=pattern, **scored(name))
    for key, place in places(model).items():
        if key in DEFAULT:
            rows = place.orientation.rows(place.mask)
            for start in range(0, rows.shape[1], m):
                group = rows[:, start : start + m]
                assert (group.sum(1) == min(n, group.shape[1])).all()


def test_n_of_m_of_a_convolution_runs_over_its_channels():
    layer = nn.Conv2d(8, 3, 3)
    prune(layer, pattern="2:4")
    by_position = layer.weight_mask.permute(0, 2, 3, 1).reshape(-1, 4)
    assert (by_position.sum(1) == 2).all()


def test_n_of_m_after_n_of_m_keeps_one_mask():
    layer = nn.Linear(16, 4)
    prune(layer, pattern="4:8")
    first = layer.weight_mask.clone()
    prune(layer, pattern="2:8")
    assert (layer.weight_mask.view(-1, 8).sum(1) == 2).all()
    assert not layer.weight_mask[~first].any()


@pytest.mark.parametrize("scope", ["global", "layer"])
def test_blocks(scope):
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 6))
    prune(model, 0.5, pattern=("block", 4, 2), scope=scope)
    blocks = []
    for mask in masking.masks(model).values():
        for i in range(0, mask.shape[0], 4):
            for j in range(0, mask.shape[1], 2):
                block = mask[i : i + 4, j : j + 2]
                assert block.all() or not block.any()
                blocks.append(bool(block.all()))
    assert sum(blocks) == len(blocks) // 2
    before = removed(model)
    prune(model, 0.5, pattern=("block", 4, 2), scope=scope)
    assert removed(model) == before


ORIENTED = {
    "linear": (nn.Linear(6, 4), lambda w: w),
    "conv": (nn.Conv2d(6, 4, (3, 2), groups=2), lambda w: w.permute(0, 2, 3, 1).reshape(4, -1)),
    "transposed": (nn.ConvTranspose1d(6, 4, 3), lambda w: w.permute(1, 2, 0).reshape(4, -1)),
}


@pytest.mark.parametrize("case", ORIENTED)
def test_a_weight_as_a_matrix_has_one_row_an_output(case):
    layer, rows = ORIENTED[case]
    orientation = places(layer)["weight"].orientation
    found = orientation.rows(layer.weight)
    assert torch.equal(found, rows(layer.weight))
    assert torch.equal(orientation.back(found, layer.weight), layer.weight)


def test_rows_of_a_grouped_transposed_convolution_are_its_outputs():
    layer = nn.ConvTranspose1d(6, 4, 3, groups=2, bias=False)
    rows = Orientation(inputs=0, groups=2).rows(layer.weight)
    changed = torch.zeros_like(rows)
    changed[3] = rows[3]
    with torch.no_grad():
        layer.weight.copy_(Orientation(inputs=0, groups=2).back(changed, layer.weight))
    out = layer(torch.randn(2, 6, 5))
    assert out[:, 3].any()
    assert not out[:, :3].any()


def test_an_amount_for_each_pattern():
    model = Net()
    prune(model, {"conv": 0.25, "recurrent.*_hh_*": 10, "*": 0.5})
    found = removed(model)
    rest = sizes(copy.deepcopy(Net()), ["recurrent.weight_ih_l0", "head.weight"])
    assert found["conv.weight"] == 36
    assert found["recurrent.weight_hh_l0"] == 10
    assert found["recurrent.weight_ih_l0"] + found["head.weight"] == round(0.5 * rest)
    model = Net()
    prune(model, {"head": 0.5})
    assert list(removed(model)) == ["head.weight"]


INCLUDED = {
    "a layer": ("head", ["head.weight"]),
    "a type": (nn.GRU, ["recurrent.weight_ih_l0", "recurrent.weight_hh_l0"]),
    "an embedding": ("embed", ["embed.weight"]),
    "embeddings": (nn.Embedding, ["embed.weight"]),
    "a norm": (nn.BatchNorm1d, ["norm.weight"]),
    "a bias by name": ("head.bias", ["head.bias"]),
    "biases": ("*.bias", ["conv.bias", "norm.bias", "head.bias"]),
    "everything is weights": ("*", DEFAULT),
    "a functional weight": ("scale", ["scale"]),
    "several": (["scale", "conv"], ["conv.weight", "scale"]),
    "a predicate": (lambda name, module: name == "conv", ["conv.weight"]),
}


@pytest.mark.parametrize("case", INCLUDED)
def test_what_include_means(case):
    include, names = INCLUDED[case]
    model = Net()
    prune(model, 0.5, include=include)
    assert sorted(removed(model)) == sorted(names)


def test_include_a_module_itself_and_exclude():
    model = Net()
    prune(model, 0.5, include=[model.conv, model.embed], exclude="conv")
    assert list(removed(model)) == ["embed.weight"]
    model = Net()
    prune(model, 0.5, exclude=nn.GRU)
    assert list(removed(model)) == ["conv.weight", "head.weight"]


def test_attention_is_pruned_in_all_projections():
    layer = nn.MultiheadAttention(8, 2, kdim=6, vdim=4)
    prune(layer, 0.5)
    assert list(removed(layer)) == ["q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj.weight"]


def test_a_tied_weight_is_counted_once():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    report = prune(model, 0.25)
    assert removed(model) == {"0.weight": 4}
    assert len(report.rows) == 1
    assert torch.equal(model[0].weight, model[1].weight)


def test_embeddings_tied_to_a_head_are_left_alone_unless_named():
    model = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 4), nn.Linear(4, 10, bias=False))
    model[2].weight = model[0].weight
    prune(model, 0.5)
    assert list(removed(model)) == ["1.weight"]
    prune(model, 0.5, include="2.weight")
    assert removed(model) == {"0.weight": 20, "1.weight": 8}


@pytest.mark.parametrize(
    "dtypes", [(torch.bfloat16,) * 2, (torch.float16, torch.float64), (torch.float32, torch.bfloat16)]
)
def test_mixed_dtypes_are_compared_as_numbers(dtypes):
    model = nn.Sequential(nn.Linear(30, 30).to(dtypes[0]), nn.Linear(30, 30).to(dtypes[1]))
    values = torch.cat([layer.weight.detach().double().flatten() for layer in model]).abs()
    prune(model, 0.5)
    keep = torch.cat([mask.flatten() for mask in masking.masks(model).values()])
    assert int(keep.sum()) == 900
    assert values[keep].min() >= values[~keep].max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", [*importance.names("weights"), *SOLVERS])
def test_every_way_in_every_dtype(name, dtype):
    model = Net().to(dtype)
    prune(model, 0.5, **scored(name))
    assert sum(removed(model).values()) == round(0.5 * sizes(Net(), DEFAULT))
    assert all(parameter.dtype == dtype for parameter in model.parameters())
    assert torch.isfinite(model(DATA[0][0])).all()


def test_ties_keep_the_first():
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    for layer in model:
        nn.init.constant_(layer.weight, 0.5)
    prune(model, 6)
    keep = torch.cat([mask.flatten() for mask in masking.masks(model).values()])
    assert keep.tolist() == [True] * 4 + [False] * 6


def test_nothing_but_the_masks_changes():
    model = Net().train()
    model.head.weight.requires_grad_(False)
    model(DATA[0][0]).sum().backward()
    handle = model.head.register_forward_hook(lambda *_: None)
    other = copy.deepcopy(model)
    for name, parameter in model.named_parameters():
        other.get_parameter(name).grad = None if parameter.grad is None else parameter.grad.clone()
    python, state = random.getstate(), torch.get_rng_state()
    prune(model, 0.5, **scored("fisher"))
    masking.strip(model)
    assert (random.getstate(), torch.equal(torch.get_rng_state(), state)) == (python, True)
    assert handle.id in model.head._forward_hooks
    for name, parameter in model.named_parameters():
        mine, theirs = parameter, other.get_parameter(name)
        assert torch.equal(mine, theirs)
        assert (mine.grad is None) == (theirs.grad is None)
        assert mine.requires_grad == theirs.requires_grad
        assert mine.grad is None or torch.equal(mine.grad, theirs.grad)
    assert all(part.training for part in model.modules())
    assert all(torch.equal(one, two) for one, two in zip(model.buffers(), other.buffers(), strict=True))


def test_the_report_counts_what_happened():
    model = Net()
    report = prune(model, 0.5)
    assert report.call == "prune_weights"
    assert report.params_before == report.params_after
    assert report.nonzero_before - report.nonzero_after == sum(removed(model).values())
    assert [row.name for row in report.rows] == DEFAULT
    assert report.removed == pytest.approx(0.5, abs=5e-3)
    assert report.settings["importance"] == "magnitude"


def test_an_optimizer_made_before_goes_on():
    model = Net()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for step in range(4):
        if step == 2:
            prune(model, 0.7)
            zeros = {name: place.value == 0 for name, place in places(model).items() if place.mask is not None}
        optimizer.zero_grad()
        F.cross_entropy(model(DATA[0][0]), DATA[0][1]).backward()
        optimizer.step()
    for name, zero in zeros.items():
        assert torch.equal(places(model)[name].value == 0, zero)
    kept = [parameter for _, parameter in plain(model)]
    assert all(parameter in optimizer.state for parameter in kept)


WRONG = {
    "both": ({"amount": 0.5, "threshold": 0.1}, InvalidArgumentError, "exactly one.*both"),
    "neither": ({}, InvalidArgumentError, "exactly one.*neither"),
    "percent": ({"amount": 50.0}, InvalidArgumentError, r"50.*\[0, 1\).*0\.5"),
    "one": ({"amount": 1.0}, InvalidArgumentError, r"\[0, 1\)"),
    "nan": ({"amount": float("nan")}, InvalidArgumentError, "nan"),
    "negative count": ({"amount": -3}, InvalidArgumentError, "-3.*negative"),
    "too many": ({"amount": 10**6}, InvalidArgumentError, "1000000 is more than"),
    "too many in a layer": (
        {"amount": 100, "scope": "layer"},
        InvalidArgumentError,
        r"more than.*recurrent\.weight_hh_l0",
    ),
    "bool": ({"amount": True}, ArgumentTypeError, "True.*bool"),
    "text": ({"amount": "half"}, ArgumentTypeError, "half"),
    "threshold text": ({"threshold": "low"}, ArgumentTypeError, "threshold.*low"),
    "threshold nan": ({"threshold": float("nan")}, InvalidArgumentError, "NaN"),
    "scope": ({"amount": 0.5, "scope": "rows"}, UnknownNameError, "rows.*Did you mean 'row'"),
    "row of blocks": (
        {"amount": 0.5, "scope": "row", "pattern": ("block", 2, 2)},
        InvalidArgumentError,
        "blocks span rows",
    ),
    "amount of n:m": ({"amount": 0.5, "pattern": "2:4"}, InvalidArgumentError, "2:4.*leave out amount"),
    "pattern": ({"amount": 0.5, "pattern": "block"}, InvalidArgumentError, "block"),
    "amounts": ({"amount": {"head": 0.5, "tail": 0.5}}, NothingToPruneError, "tail"),
    "amounts by type": ({"amount": {nn.Linear: 0.5}}, ArgumentTypeError, "Linear"),
    "include": ({"amount": 0.5, "include": "haed"}, SelectorError, "haed"),
    "all excluded": ({"amount": 0.5, "exclude": "*"}, NothingToPruneError, "leave no weight"),
    "importance": ({"amount": 0.5, "importance": "sparsgpt"}, UnknownNameError, "sparsegpt"),
    "no data": ({"amount": 0.5, "importance": "admm"}, MissingDataError, "data="),
    "no loss": ({"amount": 0.5, "importance": "snip", "data": DATA}, MissingDataError, "loss_fn"),
    "admm blocks": (
        {"amount": 0.5, "importance": "admm", "data": DATA, "pattern": ("block", 2, 2)},
        InvalidArgumentError,
        "no a block pattern|block",
    ),
    "admm embedding": (
        {"amount": 0.5, "importance": "admm", "data": DATA, "include": ["embed", "head"]},
        InvalidArgumentError,
        "embed.weight.*linear",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_pruned_is_said_and_nothing_changes(case):
    given, error, message = WRONG[case]
    model = Net()
    with unchanged(model), pytest.raises(error, match=message):
        prune(model, **given)


def test_integers_lazy_weights_and_nan_are_refused_by_name():
    model = nn.Sequential(nn.Linear(2, 2), nn.LazyLinear(3))
    with pytest.raises(InvalidArgumentError, match=r"1\.weight.*not initialised"):
        prune(model, 0.5, include="1.weight")
    layer = nn.Linear(2, 2)
    layer.table = nn.Parameter(torch.ones(3, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ArgumentTypeError, match=r"table.*int8"):
        prune(layer, 0.5, include="table")
    for pattern in ({"amount": 0.5}, {"pattern": "1:2"}, {"amount": 0.5, "scope": "row"}, {"threshold": 0.1}):
        broken = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        nn.init.constant_(broken[1].weight, float("nan"))
        with pytest.raises(NonFiniteError, match=r"1\.weight"):
            prune(broken, **pattern)


class HalfUsed(nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.idle = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        return self.used(x)


class Small(nn.Module):
    """Linear and convolutional layers, grouped, shared, and behind one another."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(4, 8, 3, padding=1, groups=2)
        self.shared = nn.Linear(8, 8)
        self.q, self.k = nn.Linear(8, 8), nn.Linear(8, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        x = self.conv(x).relu().transpose(1, 2)
        x = self.shared(self.shared(x).relu()).relu()
        return self.head(self.q(x) * self.k(x).sigmoid())


def small_data():
    generator = torch.Generator().manual_seed(5)
    mixing = torch.randn(4, 4, generator=generator)
    return [mixing @ torch.randn(8, 4, 6, generator=generator) for _ in range(4)]


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize(
    "asked",
    [{"amount": 0.5}, {"amount": 0.6, "scope": "layer"}, {"amount": 0.5, "scope": "row"}, {"pattern": "2:4"}],
    ids=str,
)
def test_reconstruction_is_exact_in_number_and_better_than_zeroing(solver, asked):
    data = small_data()
    torch.manual_seed(1)
    dense = Small()
    models = {name: copy.deepcopy(dense) for name in (solver, "magnitude")}
    for name, model in models.items():
        prune(model, importance=name, data=data, **asked)
    counts = [removed(model) for model in models.values()]
    assert sum(counts[0].values()) == sum(counts[1].values())
    if asked.get("scope", "global") != "global" or "pattern" in asked:
        assert counts[0] == counts[1]
    with torch.no_grad():
        errors = {
            name: sum(float((model(x) - dense(x)).square().sum()) for x in data) for name, model in models.items()
        }
    assert errors[solver] < 0.7 * errors["magnitude"]


@pytest.mark.parametrize("solver", SOLVERS)
def test_reconstruction_on_masked_models_keeps_the_total(solver):
    model, data = Small(), small_data()
    prune(model, 0.3)
    before = masking.masks(model)
    prune(model, 0.5, importance=solver, data=data)
    total = sum(mask.numel() for mask in before.values())
    assert sum(removed(model).values()) == pytest.approx(0.5 * total, abs=0.05 * total)
    for name, mask in masking.masks(model).items():
        assert not mask[~before[name]].any()


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_failing_reconstruction_leaves_everything(solver):
    data = [*small_data()[:2], torch.full((2, 4, 6), float("nan"))]
    model = Small()
    with unchanged(model), pytest.raises(NonFiniteError, match=r"conv\.weight"):
        prune(model, 0.5, importance=solver, data=data)
    unused = HalfUsed()
    batch = [torch.randn(2, 8)]
    with unchanged(unused), pytest.raises(InvalidArgumentError, match=r"idle\.weight.*met no inputs"):
        prune(unused, 0.5, importance=solver, data=batch)


@pytest.mark.parametrize("solver", SOLVERS)
def test_reconstruction_reaches_recurrent_layers(solver):
    model = Net()
    before = model.recurrent.weight_hh_l0.detach().clone()
    prune(model, 0.5, importance=solver, data=DATA)
    assert sum(removed(model).values()) == round(0.5 * sizes(Net(), DEFAULT))
    masking.strip(model)
    assert not torch.equal(model.recurrent.weight_hh_l0[:, :1], before[:, :1])
