"""prune_neurons: the least important neurons go, everything coupled goes with them, and all or nothing happens."""

from __future__ import annotations

import contextlib
import copy
import itertools
import linecache
import math
import sys
from pathlib import Path

import pytest
import torch
from tests.zoo.handmade import HANDMADE
from torch import nn
from torch.nn.utils import prune

import netopt
from conftest import state_of, unchanged
from netopt import masking, measure
from netopt.axes import find_axes
from netopt.errors import ArgumentTypeError, NothingToPruneError, VerificationError
from netopt.importance.neurons import neuron_scores
from netopt.importance.scoring import Scoring
from netopt.model.view import ModelView
from netopt.plan import Plan
from netopt.prune import plan_neurons, prune_neurons
from netopt.prune.candidates import scored
from netopt.prune.verify import Forward, Reference, differing, varied
from netopt.surgery import named_tensors

ROOT = str(Path(netopt.__file__).parent)


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.second = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.second(self.norm(self.first(x)).relu())


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Dropout(0.2), nn.Linear(10, 8), nn.Tanh(), nn.Linear(8, 3))


def cnn() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        Block(8),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(8 * 9, 12),
        nn.ReLU(),
        nn.Linear(12, 3),
    )


MODELS = {"mlp": (mlp, (4, 6)), "cnn": (cnn, (4, 1, 6, 6))}


def built(name: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    build, shape = MODELS[name]
    model = build().to(dtype)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.weight, 0.5, 1.5)
    return model, torch.randn(shape, dtype=dtype)


def prune_quietly(*args, **kwargs):
    return prune_neurons(*args, progress=False, **kwargs)


def train(model, optimizer, x, steps=1):
    for _ in range(steps):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("scope", ["global", "layer"])
@pytest.mark.parametrize("importance", ["saliency", "magnitude", "activation"])
def test_the_smaller_model_computes_what_the_masked_one_does(name, scope, importance):
    model, x = built(name, torch.float64)
    masked = copy.deepcopy(model)
    report = prune_quietly(model, x, 0.5, scope=scope, importance=importance)
    tensors = named_tensors(masked)
    with torch.no_grad():
        for tensor, dims in report.plan.tensors.items():
            for dim, kept in dims.items():
                gone = [place for place in range(tensors[tensor].shape[dim]) if place not in kept]
                tensors[tensor].index_fill_(dim, torch.tensor(gone), 0)
    other = torch.randn(7, *x.shape[1:], dtype=torch.float64)
    torch.testing.assert_close(model.eval()(other), masked.eval()(other), rtol=1e-9, atol=1e-12)
    assert report.plan.exact
    assert report.params_after == measure.count_parameters(model) < report.params_before
    assert report.macs_after < report.macs_before
    total = sum(row.before for row in report.rows)
    assert sum(row.after for row in report.rows) == total - int(total * 0.5 + 0.5)


def test_the_least_salient_neurons_go():
    model, x = built("mlp")
    axes = find_axes(model, x)
    found = neuron_scores(model, scored(axes, axes.free), Scoring(), x).scores["0"]
    weight = model[0].weight.detach().clone()
    prune_quietly(model, x, {"0": 4})
    best = found.topk(6).indices.sort().values
    torch.testing.assert_close(model[0].weight.detach(), weight[best])


def test_training_goes_on_with_the_same_optimizer():
    model, x = built("cnn")
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    train(model, optimizer, x, 2)
    weight, before = model[0].weight, measure.count_parameters(model)
    prune_quietly(model, x, 0.5, optimizer=optimizer)
    assert model[0].weight is weight
    assert measure.count_parameters(model) < before
    train(model, optimizer, x)
    assert all(optimizer.state[one]["exp_avg"].shape == one.shape for one in model.parameters())


@pytest.mark.parametrize("name", MODELS)
def test_a_plan_says_what_will_happen(name):
    model, x = built(name)
    with unchanged(model):
        plan = plan_neurons(model, x, 0.4, progress=False)
    report = prune_quietly(model, x, 0.4)
    assert report.plan == plan
    assert plan.predicted["params_after"] == report.params_after
    assert plan.predicted["macs_after"] == report.macs_after
    assert plan.predicted["bytes_after"] == report.bytes_after
    fresh, _ = built(name)
    Plan.from_dict(plan.to_dict()).apply(fresh)
    fresh.load_state_dict(model.state_dict())
    torch.testing.assert_close(fresh.eval()(x), model.eval()(x))


@pytest.mark.parametrize("budget", ["max_params", "max_macs"])
@pytest.mark.parametrize("share", [0.8, 0.5, 0.3])
@pytest.mark.parametrize("name", MODELS)
def test_budgets_are_met_as_tightly_as_whole_neurons_allow(budget, share, name):
    model, x = built(name)
    dense = copy.deepcopy(model)
    report = prune_quietly(model, x, **{budget: share})
    before, after = (
        (report.params_before, report.params_after)
        if budget == "max_params"
        else (report.macs_before, report.macs_after)
    )
    assert after <= share * before
    axes = find_axes(dense, x)
    kept = {cut.name: cut.kept for cut in report.plan.axes}
    costs = []
    for axis in axes.free:
        for position in range(axis.size) if axis.name in kept else ():
            if position not in kept[axis.name]:
                more = {**kept, axis.name: torch.cat([kept[axis.name], torch.tensor([position])]).sort().values}
                other = copy.deepcopy(dense)
                counts = {one: len(positions) for one, positions in more.items()}
                Plan(axes.tensor_indices(more), axes.attribute_values(counts)).apply(other)
                found = measure.count_parameters(other) if budget == "max_params" else measure.count_macs(other, x)
                costs.append(found)
                break
    assert max(costs) > share * before


@pytest.mark.parametrize("budget", ["max_params", "max_macs"])
@pytest.mark.parametrize("share", [0.8, 0.4])
@pytest.mark.parametrize("name", MODELS)
def test_a_budget_by_layer_takes_the_same_share_of_every_axis(budget, share, name):
    model, x = built(name)
    report = prune_quietly(model, x, **{budget: share}, scope="layer")
    left = report.params_after if budget == "max_params" else report.macs_after
    whole = report.params_before if budget == "max_params" else report.macs_before
    assert left <= share * whole
    shares = [(row.before - row.after) / row.before for row in report.rows]
    assert max(shares) - min(shares) < 1 / min(row.before for row in report.rows)
    assert report.to_dict()["settings"]["scope"] == "layer"
    # Of one share less at least as much stays of every axis, and it costs too much.
    other, _ = built(name)
    more = prune_quietly(other, x, max(0.0, max(shares) - 1.01 / min(row.before for row in report.rows)), scope="layer")
    assert (more.params_after if budget == "max_params" else more.macs_after) > share * whole


def test_rounding_keeps_multiples():
    model, x = built("cnn")
    report = prune_quietly(model, x, 0.6, round_to=4)
    assert {row.after % 4 for row in report.rows} == {0}


def test_what_is_named_is_kept_or_pruned():
    model, x = built("cnn")
    sizes = {row.name: row.before for row in plan_rows(model, x)}
    assert sizes == {"0": 8, "3.first": 8, "6": 12}
    choices = {
        "6": {"0", "3.first"},
        nn.Linear: {"0", "3.first"},
        lambda axis: axis.size == 12: {"0", "3.first"},
        ("0", "3.first"): {"6"},
        nn.BatchNorm2d: {"6"},
        "3.norm": {"0", "6"},
        "3.*": {"0", "6"},  # the other axis of that block is made before it
    }
    for exclude, left in choices.items():
        assert {row.name for row in plan_rows(model, x, exclude=exclude)} == left, exclude
    with unchanged(model):
        plan = plan_neurons(model, x, 0.5, exclude=model[3].norm, progress=False)
    assert {cut.name for cut in plan.axes} <= {"0", "6"}
    assert {row.name for row in plan_rows(model, x, include=nn.Linear)} == {"6"}
    assert {row.name for row in plan_rows(model, x, include="3.second")} == {"0"}
    assert {row.name for row in plan_rows(model, x, include=lambda axis: axis.size == 8)} == {"0", "3.first"}
    with pytest.raises(NothingToPruneError, match="is not included"):
        plan_rows(model, x, include="8")


def plan_rows(model, x, **choice):
    return prune_quietly(copy.deepcopy(model), x, 0.25, importance="magnitude", **choice).rows


def test_masks_hold_the_same_plan_and_can_be_taken_off():
    model, x = built("cnn", torch.float64)
    removed, dense = copy.deepcopy(model), copy.deepcopy(model)
    report = prune_quietly(model, x, 0.5, mode="mask")
    twin = prune_quietly(removed, x, 0.5)
    assert report.plan.tensors.keys() == twin.plan.tensors.keys()
    assert report.params_after == report.params_before
    assert report.nonzero_after < report.nonzero_before
    torch.testing.assert_close(model.eval()(x), removed.eval()(x))
    report.plan.apply(model)
    assert measure.count_parameters(model) == twin.params_after
    torch.testing.assert_close(model.eval()(x), removed.eval()(x))
    again = copy.deepcopy(dense)
    prune_quietly(again, x, 0.5, mode="mask")
    masking.strip(again)
    torch.testing.assert_close(again.eval()(x), dense.eval()(x))


def test_pruned_weights_stay_pruned_when_neurons_go():
    model, x = built("mlp")
    prune.l1_unstructured(model[0], "weight", 0.5)
    masked = model[0].weight.detach().clone()
    report = prune_quietly(model, x, 0.5, importance="magnitude")
    kept = report.plan.tensors["0.bias"][0]
    torch.testing.assert_close(model[0].weight.detach(), masked[kept])
    assert model[0].weight_mask.shape == model[0].weight.shape


class Hidden(nn.Sequential):
    """The width of one layer, by a way that no trace can follow, scales what the next reads."""

    def __init__(self, factor) -> None:
        super().__init__(nn.Linear(5, 8), nn.Linear(8, 6), nn.Linear(6, 4), nn.Linear(4, 2))
        self.factor = factor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self[1](self[0](x).relu()).relu()
        return self[3](self[2](self.factor(hidden)).tanh())


def over_size(hidden: torch.Tensor) -> torch.Tensor:
    return hidden * (2.0 / hidden.shape[-1])


def logarithm(hidden: torch.Tensor) -> torch.Tensor:
    return hidden * math.log(hidden.shape[-1])


def looked_up(hidden: torch.Tensor) -> torch.Tensor:
    return hidden * {6: 2.0}.get(hidden.shape[-1], 1.0)


class Sized(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden):
        return hidden * (1.0 / hidden.shape[-1])

    @staticmethod
    def backward(ctx, grad):
        return grad


@pytest.mark.parametrize(
    "factor", [over_size, logarithm, looked_up, Sized.apply], ids=["literal", "logarithm", "table", "function"]
)
def test_an_axis_that_differs_is_found_by_halving_and_marked(factor):
    torch.manual_seed(0)
    model, x = Hidden(factor).double(), torch.randn(3, 5, dtype=torch.float64)
    optimizer = torch.optim.Adam(model.parameters())
    train(model, optimizer, x)
    assert all(axis.exact for axis in find_axes(model, x).free)
    report = prune_quietly(model, x, 0.5, scope="layer", importance="magnitude", optimizer=optimizer)
    assert {row.name: (row.after, row.exact) for row in report.rows} == {
        "0": (4, True),
        "1": (3, False),
        "2": (2, True),
    }
    assert not report.plan.exact
    assert "found by comparison" in next(row.note for row in report.rows if row.name == "1")
    assert Plan.from_dict(report.plan.to_dict()) == report.plan
    train(model, optimizer, x)
    assert all(optimizer.state[one]["exp_avg"].shape == one.shape for one in model.parameters())


def test_exact_axes_are_compared_beside_one_that_is_not():
    class Normed(Hidden):
        def __init__(self) -> None:
            super().__init__(logarithm)
            self.norm = nn.LayerNorm(8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            hidden = self[1](self.norm(self[0](x))).relu()
            return self[3](self[2](self.factor(hidden)).tanh())

    torch.manual_seed(0)
    model, x = Normed().double(), torch.randn(3, 5, dtype=torch.float64)
    report = prune_quietly(model, x, 0.5, scope="layer", importance="magnitude")
    notes = {row.name: row.note for row in report.rows if not row.exact}
    assert notes.keys() == {"0", "1"}
    assert "layer_norm" in notes["0"]
    assert "found by comparison" in notes["1"]


@pytest.mark.parametrize(("name", "marked"), [("numbers_over_sizes", {"first", "second"}),
                                              ("size_in_a_custom_function", {"first"})])  # fmt: skip
def test_what_the_zoo_hides_from_a_trace_is_found_by_comparison(name, marked):
    case = next(one for one in HANDMADE if one.name == name)
    model, inputs = case.build(), case.inputs()
    report = prune_quietly(model, inputs, 0.5, scope="layer", importance="magnitude")
    assert {row.name for row in report.rows if not row.exact} == marked


@pytest.mark.parametrize("saturating", [
    lambda hidden: (hidden * 5).tanh(),
    lambda hidden: hidden.clamp(-1, 1),
    lambda hidden: hidden.round().clamp(-1, 1),
    lambda hidden: (hidden > 1).float(),
    lambda hidden: hidden.argmax(1, keepdim=True).float(),
], ids=["tanh", "clamp", "round", "threshold", "argmax"])  # fmt: skip
def test_what_saturates_on_the_example_is_compared_on_others(saturating):
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(4, 8, bias=False), nn.Linear(8, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            hidden = self.first(x).relu()
            return saturating(self.last(hidden * int(str(hidden.shape[-1]))))

    model, x = Scaled().double(), torch.full((1, 4), 3.0, dtype=torch.float64)
    with torch.no_grad():
        model.first.weight.fill_(0.1)
        model.last.weight.copy_(torch.tensor([0.5, 1.0, -0.5])[:, None].expand(3, 8))
        model.last.bias.copy_(torch.tensor([0.0, -1.5, 0.5]))
    whole, cut = model(x), copy.deepcopy(model)
    with torch.no_grad():
        cut.first.weight[4:] = 0
    assert torch.allclose(cut(x), whole), "the example tells nothing"
    report = prune_quietly(model, x, 0.5, importance="magnitude")
    assert [(row.after, row.exact) for row in report.rows] == [(4, False)]


def test_inputs_are_varied_in_kind():
    given = {
        "x": torch.randn(3, 4),
        "zeros": torch.zeros(2, 3),
        "ids": torch.arange(10).view(2, 5),
        "one": torch.ones(()),
        "mask": torch.tensor([True, False]),
        "none": torch.zeros(0),
        "name": "x",
    }
    kept = copy.deepcopy(given)
    found, again = varied(given), varied(given)
    assert str(found) == str(again)
    assert str(given) == str(kept)
    assert sorted(found["ids"].flatten().tolist()) == list(range(10))
    assert not torch.equal(found["ids"], given["ids"])
    assert varied(given, integers=False)["ids"] is given["ids"]
    assert found["mask"] is given["mask"]
    assert found["name"] == "x"
    for name in ("x", "zeros", "one"):
        assert found[name].shape == given[name].shape
        assert bool((found[name] != 0).all())
    assert float(found["x"].abs().max()) <= float(given["x"].abs().max())
    assert float(found["x"][0].abs().max()) <= 0.1 * float(given["x"].abs().max())


def test_inputs_that_cannot_be_varied_are_compared_as_they_are():
    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.first, self.last = nn.Embedding(3, 4), nn.Linear(4, 8), nn.Linear(8, 2)

        def forward(self, x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
            assert bool((rows.diff() >= 0).all())
            return self.last(self.first(self.table(rows) + x.long().float()).relu() * int(str(self.first.out_features)))

    x, rows = torch.full((3, 4), 2.0), torch.tensor([0, 1, 2])
    report = prune_quietly(Positions(), (x, rows), 0.5, importance="magnitude", include="first")
    assert [(row.after, row.exact) for row in report.rows] == [(4, False)]


def test_halving_marks_what_differs_only_together_and_what_cannot_be_cut_alone():
    names = list("abcdefgh")
    assert differing(names, lambda some: not {"c", "g"} & set(some)) == ["c", "g"]
    assert differing(["c"], lambda _: False) == ["c"]
    assert differing(names, lambda some: not {"b", "f"} <= set(some)) == names
    assert differing(names, lambda some: None if set(some) & {"a", "b"} else True) == ["a", "b", "c", "d"]


def test_a_difference_in_many_axes_takes_a_bounded_number_of_trials():
    tried = []

    def agree(some):
        tried.append(some)
        return False

    names = [str(number) for number in range(500)]
    assert sorted(differing(names, agree)) == sorted(names)
    assert len(tried) <= 65


def test_a_random_forward_is_not_mistaken_for_a_wrong_one():
    class Noisy(nn.Sequential):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            hidden = self[1](self[0](x))
            return self[2](hidden * torch.rand_like(hidden))

    model = Noisy(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    state = torch.get_rng_state()
    report = prune_quietly(model, torch.randn(3, 4, generator=torch.Generator().manual_seed(0)), 0.5)
    assert report.rows[0].after == 4
    assert torch.equal(state, torch.get_rng_state())


class Detector(nn.Module):
    """Returns the places whose score is high, as many as there are."""

    def __init__(self):
        super().__init__()
        self.fc, self.norm, self.boxes, self.scores = nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 4), nn.Linear(8, 1)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = self.norm(self.fc(x))
        scores = self.scores(x)[..., 0]
        return self.boxes(x)[scores > 0], scores


def test_how_many_results_the_values_select_may_change():
    torch.manual_seed(0)
    model, x = Detector(), torch.randn(50, 4)
    assert find_axes(model, x).steady == ((False, True), (False,))
    assert find_axes(nn.Linear(4, 2), x).steady is None
    found, _ = model(x)
    report = prune_quietly(model, x, 0.5, importance="magnitude")
    smaller, _ = model(x)
    assert report.rows[0].after == 4
    assert smaller.shape[0] != found.shape[0]
    assert smaller.shape[1] == found.shape[1]


@pytest.mark.parametrize(("shape", "steady", "kept"), [
    ((5, 2), (False, True), True),
    ((5, 3), (False, True), False),
    ((5, 2), (True, True), False),
    ((5, 2, 1), (False, True), False),
])  # fmt: skip
def test_only_sizes_that_depend_on_values_may_change(shape, steady, kept):
    class Result(nn.Module):
        def forward(self, x):
            return torch.zeros(shape)

    x = torch.zeros(1)
    forward = Forward(ModelView(Result()), x, lambda result: [result], [steady])
    reference = Reference(forward, [(x, [torch.zeros(3, 2)])], equal=True)
    with contextlib.nullcontext() if kept else pytest.raises(VerificationError, match="have shapes"):
        reference.check()


class UnitQueries(nn.Module):
    """Attention whose queries are made by rows of length one: a masked row is divided by zero."""

    def __init__(self):
        super().__init__()
        self.weight, self.k, self.v = nn.Parameter(torch.randn(8, 6)), nn.Linear(6, 8), nn.Linear(6, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q = nn.functional.linear(x, self.weight / self.weight.norm(dim=1, keepdim=True))
        q, k, v = (one.unflatten(-1, (2, -1)).transpose(1, 2) for one in (q, self.k(x), self.v(x)))
        y = nn.functional.scaled_dot_product_attention(q, k, v, scale=0.5)
        return self.head(y.transpose(1, 2).flatten(2))


def test_a_masked_row_divided_by_zero_is_no_wrong_answer():
    torch.manual_seed(0)
    model, x = UnitQueries(), torch.randn(2, 5, 6)
    wanted = {"weight:0", "k.weight:0"}
    axes = [axis for axis in find_axes(model, x).free if wanted <= {str(one) for one in axis.members}]
    queries = next(axis for axis in axes if axis.size == 4)
    assert queries.exact
    report = prune_quietly(model, x, {queries.name: 2}, importance="magnitude")
    assert model.k.out_features == 4
    assert report.plan.exact


def test_a_kernel_that_wants_multiples_is_undone_and_named():
    class Picky(nn.Sequential):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if len(self[0].bias) % 4:
                raise RuntimeError("strides should be multiples")
            return super().forward(x)

    model = Picky(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    x = torch.randn(3, 4)
    with unchanged(model), pytest.raises(VerificationError, match=r"strides should be multiples.*round_to=8"):
        prune_quietly(model, x, 0.4)
    assert prune_quietly(model, x, 0.4, round_to=4).rows[0].after == 4


class Interrupter:
    """Raises KeyboardInterrupt before the n-th line executed in what decides, changes and checks."""

    PLACES = ("prune", "plan", "surgery", "selection.py", "importance", "report.py")
    FILES = tuple(str(Path(ROOT, place)) for place in PLACES)

    def __init__(self, line: int) -> None:
        self.left = line
        self.entered = set()

    def __call__(self, frame, event, arg):
        if not frame.f_code.co_filename.startswith(self.FILES):
            return None
        if event == "line" and not self.is_left(frame):
            self.left -= 1
            if self.left == -1:
                raise KeyboardInterrupt
        return self

    def is_left(self, frame):
        """Whether a with block is being left: no signal is handled between its end and the call of ``__exit__``."""
        if not linecache.getline(frame.f_code.co_filename, frame.f_lineno).lstrip().startswith("with "):
            return False
        place = (frame, frame.f_lineno)  # held, so that no other frame is taken for it
        known = place in self.entered
        self.entered.add(place)
        return known


@pytest.mark.slow
def test_an_interruption_anywhere_leaves_everything_as_it_was():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2))
    x = torch.randn(2, 2)
    optimizer = torch.optim.Adam(model.parameters())
    train(model, optimizer, x)
    state, random = repr(optimizer.state_dict()), torch.get_rng_state()
    previous = sys.gettrace()
    interrupted = 0
    for line in itertools.count(0, 23):
        seen = state_of(model)
        sys.settrace(Interrupter(line))
        try:
            prune_quietly(model, x, 0.4, importance="magnitude", optimizer=optimizer)
            break
        except KeyboardInterrupt:
            interrupted += 1
        finally:
            sys.settrace(previous)
        assert state_of(model) == seen, f"changed by an interruption at line {line}"
        assert repr(optimizer.state_dict()) == state
        assert torch.equal(torch.get_rng_state(), random)
    assert interrupted > 20
    assert model[0].out_features == 2


def test_modes_gradients_and_random_state_are_left_alone():
    model, x = built("cnn")
    model.train()
    model[3].eval()
    model(x).sum().backward()
    model[6].weight.requires_grad_(False)
    state = torch.get_rng_state()
    grad = model[0].weight.grad.clone()
    report = prune_quietly(model, x, 0.5)
    assert torch.equal(state, torch.get_rng_state())
    assert model.training
    assert not model[3].training
    assert not model[6].weight.requires_grad
    torch.testing.assert_close(model[0].weight.grad, grad[report.plan.tensors["0.weight"][0]])


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_the_callers_mode_does_not_matter(mode):
    model, x = built("cnn")
    twin = copy.deepcopy(model)
    report = prune_quietly(model, x, 0.5)
    with mode():
        again = prune_quietly(twin, x.clone(), 0.5)
    assert again.plan == report.plan
    train(twin, torch.optim.SGD(twin.parameters(), lr=0.1), x)


def test_what_a_forward_keeps_is_put_back():
    class Keeping(nn.Sequential):
        last = None

        def __init__(self, *parts: nn.Module) -> None:
            super().__init__(*parts)
            self.seen, self.cache, self.count = [], {}, 0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            hidden = self[0](x)
            self.seen.append(hidden)
            self.cache[len(x)] = (hidden, 1)
            self.count = hidden.sum()
            return self[2](hidden.relu())

    model = Keeping(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    prune_quietly(model, torch.randn(3, 4), 0.5)
    assert all(len(one) == 3 for one in model.cache)
    assert model(torch.randn(5, 4)).shape == (5, 2)


def test_complex_outputs_are_compared():
    class Complex(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Parameter(torch.randn(3, 6, dtype=torch.complex128))
            self.last = nn.Parameter(torch.randn(6, 2, dtype=torch.complex128))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (x.to(torch.complex128) @ self.first) @ self.last

    model, x = Complex(), torch.randn(4, 3)
    report = prune_quietly(model, x, 0.5, importance="magnitude")
    assert report.plan.exact
    assert model.first.shape == (3, 3)


def test_two_calls_agree():
    reports = []
    for _ in range(2):
        model, x = built("cnn")
        reports.append(prune_quietly(model, x, 0.5).plan)
    assert reports[0] == reports[1]


def test_the_report_names_what_was_frozen_and_the_range_of_scores():
    model, x = built("mlp")
    report = prune_quietly(model, x, 0.5)
    assert report.frozen["5"] == "is a dimension of the model's output"
    assert all(row.note.startswith("scores ") for row in report.rows)
    assert report.to_dict()["plan"] == report.plan.to_dict()
    assert "prune_neurons" in str(report)


def test_repair_is_yes_no_or_by_default():
    model, x = built("mlp")
    with pytest.raises(ArgumentTypeError, match="repair must be True, False or None"):
        prune_quietly(model, x, 0.5, repair="least_squares")


@pytest.mark.parametrize("verify", [False, True])
@pytest.mark.parametrize("mode", ["remove", "mask"])
@pytest.mark.parametrize("zeros", ["none", "a few", "a neuron's", "a bias's"])
def test_what_is_not_zero_is_counted_before_and_after(zeros, mode, verify):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)), torch.randn(2, 8)
    with torch.no_grad():
        if zeros == "a few":
            model[0].weight[:, 3] = 0
        elif zeros == "a neuron's":
            model[0].weight[5] = 0
        elif zeros == "a bias's":
            model[2].bias.zero_()
    before = measure.nonzero_parameters(model)
    report = prune_quietly(model, x, 0.5, importance="magnitude", mode=mode, verify=verify)
    assert (report.nonzero_before, report.nonzero_after) == (before, measure.nonzero_parameters(model))
    assert (report.params_after, report.bytes_after) == (measure.count_parameters(model), measure.size_bytes(model))


@pytest.mark.parametrize("scope", ["global", "layer"])
@pytest.mark.parametrize("amount", [0.5, {"*": 0.5}], ids=["number", "mapping"])
def test_a_loop_over_amounts_of_the_original_ends_at_the_last(scope, amount):
    x = torch.randn(4, 8)
    loop = nn.Sequential(nn.Linear(8, 20), nn.ReLU(), nn.Linear(20, 10), nn.ReLU(), nn.Linear(10, 4))
    at_once, options = copy.deepcopy(loop), {"importance": "l2", "scope": scope, "progress": False}
    for share in (0.2, 0.4, 1.0):
        part = {"*": 0.5 * share} if isinstance(amount, dict) else 0.5 * share
        netopt.prune_neurons(loop, x, part, of="original", **options)
    netopt.prune_neurons(at_once, x, amount, **options)
    sizes = [[one.out_features for one in net if isinstance(one, nn.Linear)] for net in (loop, at_once)]
    assert sum(sizes[0]) == sum(sizes[1])
    assert scope == "global" or sizes[0] == sizes[1]
    with pytest.raises(netopt.errors.InvalidArgumentError, match="original"):
        netopt.prune_neurons(loop, x, max_params=0.5, of="original")
