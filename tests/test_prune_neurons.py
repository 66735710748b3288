"""prune_neurons: the least important neurons go, everything coupled goes with them, and all or nothing happens."""

from __future__ import annotations

import contextlib
import copy
import itertools
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import netopt
from conftest import state_of, unchanged
from netopt import masking, measure
from netopt.axes import find_axes
from netopt.errors import ArgumentTypeError, NothingToPruneError, VerificationError
from netopt.importance.neurons import neuron_scores
from netopt.plan import Plan
from netopt.prune import plan_neurons, prune_neurons
from netopt.prune.verify import Reference
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
    found = neuron_scores(
        model,
        {axis.name: axes.members(axis) for axis in axes.free},
        lambda name: axes.taps(axes[name]),
        {axis.name: axis.size for axis in axes.free},
        example_inputs=x,
    ).scores["0"]
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
        "3.*": {"6"},
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


def test_a_wrong_answer_is_noticed_and_undone(monkeypatch):
    model, x = built("mlp")
    optimizer = torch.optim.Adam(model.parameters())
    train(model, optimizer, x)
    original = Plan.prepare

    def crooked(self, model, optimizer=None):
        cuts = {name: dict(dims) for name, dims in self.tensors.items()}
        kept = cuts["3.weight"][1]
        cuts["3.weight"][1] = torch.cat([kept[:-1], torch.tensor([9 if 9 not in kept else kept[-1] - 1])]).unique()
        if len(cuts["3.weight"][1]) < len(kept):
            cuts["3.weight"][1] = torch.arange(len(kept))
        return original(Plan(cuts), model, optimizer)

    monkeypatch.setattr(Plan, "prepare", crooked)
    state = repr(optimizer.state_dict())
    with unchanged(model), pytest.raises(VerificationError, match="everything was put back"):
        prune_quietly(model, x, 0.3, optimizer=optimizer)
    assert repr(optimizer.state_dict()) == state


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
    reference = Reference([torch.zeros(3, 2)], equal=True, steady=[steady])

    class Result(nn.Module):
        def forward(self, x):
            return torch.zeros(shape)

    with contextlib.nullcontext() if kept else pytest.raises(VerificationError, match="have shapes"):
        reference.check(Result(), torch.zeros(1), lambda result: [result])


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

    def __call__(self, frame, event, arg):
        if not frame.f_code.co_filename.startswith(self.FILES):
            return None
        if event == "line":
            self.left -= 1
            if self.left == -1:
                raise KeyboardInterrupt
        return self


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
