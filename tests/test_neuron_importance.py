"""Scores of neurons: equal to their definitions, computed another way, and without a trace."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import netopt
from conftest import unchanged
from netopt import importance
from netopt.axes import find_axes
from netopt.errors import InvalidArgumentError, MissingDataError, NonFiniteError, ShapeMismatchError, UnknownNameError
from netopt.importance import activations as activations_module
from netopt.importance import names, registry
from netopt.importance.activations import saliency
from netopt.importance.neurons import neuron_scores, reduce
from netopt.importance.scoring import Precision, ScoredAxes, Scoring
from netopt.prune.candidates import scored
from netopt.surgery import named_tensors


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.act = nn.ReLU(inplace=True)
        self.head = nn.Linear(4 * 4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.act(self.norm(self.stem(x)))
        x = x.tanh() + self.conv(x).tanh()
        return self.head(nn.functional.adaptive_avg_pool2d(x, 2).flatten(1))


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 3))


MODELS = {
    "mlp": (mlp, (4, 5)),
    "residual": (Residual, (3, 2, 4, 4)),
}


def built(name, dtype=torch.float64):
    torch.manual_seed(0)
    build, shape = MODELS[name]
    return build().to(dtype), torch.randn(shape, dtype=dtype)


def read(model, x):
    axes = find_axes(model, x)
    return scored(axes, axes.free)


def brute_force(model, module, x, positions_dim=1):
    """Sum over outputs and positions of squared Jacobian entries at a module's input, one sample at a time."""
    total = 0
    for one in x.split(1):
        seen = []
        handle = module.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0].detach().clone()))
        model.eval()(one)
        handle.remove()

        def rest(value, one=one):
            handle = module.register_forward_pre_hook(lambda _, args: (value,))
            try:
                return model(one)
            finally:
                handle.remove()

        jacobian = torch.autograd.functional.jacobian(rest, seen[0])
        squares = jacobian.square().flatten(0, 1).movedim(1 + positions_dim, 0).flatten(1)
        total = total + squares.sum(1)
    return total / len(x)


def test_saliency_is_the_squared_jacobian_of_a_perceptron():
    model, x = built("mlp")
    axes = read(model, x)
    found = saliency(model, axes, [x[:3], (x[3:], torch.zeros(1))])
    assert found.exact
    assert (found.error, found.probes, found.samples) == (0, 0, 4)
    torch.testing.assert_close(found.scores["0"], brute_force(model, model[2], x), rtol=1e-10, atol=0)
    torch.testing.assert_close(found.scores["2"], brute_force(model, model[4], x), rtol=1e-10, atol=0)


def test_saliency_counts_pixels_and_every_consumer_once():
    model, x = built("residual")
    axes = read(model, x)
    found = saliency(model, axes, [x]).scores
    assert len(found) == 1
    whole = brute_force(model.eval(), model.head, x, 1).view(4, -1).sum(1)

    def through(value):
        return model.head(nn.functional.adaptive_avg_pool2d(value.tanh() + model.conv(value).tanh(), 2).flatten(1))

    for one in x.split(1):
        value = model.norm(model.stem(one)).relu().detach()
        jacobian = torch.autograd.functional.jacobian(through, value)
        whole = whole + jacobian.square().sum((0, 1, 2, 4, 5)) / len(x)
    torch.testing.assert_close(next(iter(found.values())), whole, rtol=1e-10, atol=0)


def test_random_signs_converge_to_the_exact_sum():
    model, x = built("mlp")
    axes = read(model, x)
    exact = saliency(model, axes, [x]).scores
    few = saliency(model, axes, [x], precision=Precision(0.3, 0))
    many = saliency(model, axes, [x] * 200, precision=Precision(exact_outputs=0))
    assert 0 < few.probes <= 64
    assert not few.exact
    assert 0 < many.error < few.error <= 0.5
    for name, one in exact.items():
        error = (many.scores[name] - one).norm() / one.norm()
        assert float(error) < 4 * many.error
        assert float(error) < 0.03


def test_the_error_of_an_estimate_can_be_asked_for():
    model, x = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 500)), torch.randn(3, 6)
    errors = []
    for wanted in (0.2, 0.02):
        report = netopt.prune_neurons(
            copy.deepcopy(model), x, 0.5, importance=importance.saliency_within(wanted), progress=False
        )
        said = report.settings["saliency"]
        assert "random signs" in said
        errors.append(float(said.partition("relative error ")[2].partition("%")[0]) / 100)
        assert errors[-1] <= wanted
    assert errors[1] < errors[0]
    with pytest.raises(InvalidArgumentError, match="relative_error must be above 0"):
        importance.saliency_within(0)


def test_batches_of_any_size_give_the_same():
    model, _ = built("mlp")
    x = torch.randn(150, 5, dtype=torch.float64)
    axes = read(model, x)
    whole = saliency(model, axes, [x]).scores
    parts = saliency(model, axes, list(x.split(7))).scores
    singles = saliency(model, axes, list(x.split(1))).scores
    for name, one in whole.items():
        torch.testing.assert_close(parts[name], one)
        torch.testing.assert_close(singles[name], one)


def test_memory_is_bounded_by_parts_of_batches_and_of_outputs(monkeypatch):
    model, x = built("residual")
    axes = read(model, x)
    x = torch.randn(11, 2, 4, 4, dtype=torch.float64)
    whole = saliency(model, axes, [x]).scores
    seen = []
    model.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    monkeypatch.setattr(activations_module, "ENTRIES_AT_ONCE", 300)
    parts = saliency(model, axes, [x]).scores
    assert max(seen[1:]) < 11
    for name, one in whole.items():
        torch.testing.assert_close(parts[name], one)


class OverSamples(nn.Module):
    """Sequences first: what looks like samples acts on one another."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.first(x).tanh().cumsum(0))


def test_samples_that_act_on_one_another_are_noticed():
    torch.manual_seed(0)
    model, x = OverSamples().double(), torch.randn(5, 3, dtype=torch.float64)
    axes = read(model, x)
    found = saliency(model, axes, [x]).scores["first"] * 5
    seen = model.first(x).tanh().cumsum(0).detach()
    jacobian = torch.autograd.functional.jacobian(model.last, seen)
    torch.testing.assert_close(found, jacobian.square().sum((0, 1, 2)))


@pytest.mark.parametrize("name", [*names("neurons"), "magnitude", "fisher", "taylor"])
def test_scoring_leaves_no_trace_and_repeats(name):
    model, x = built("residual", torch.float32)
    nn.init.normal_(model.norm.weight)
    axes = read(model, x)
    model.head.weight.requires_grad_(False)
    model.train()
    model.conv.eval()
    model(x).sum().backward()
    before = {key: (id(t), t.detach().clone(), t.requires_grad, t.grad) for key, t in named_tensors(model).items()}
    data = [(x, torch.tensor([0, 1, 2]))]

    def score():
        with torch.no_grad():
            return neuron_scores(model, axes, Scoring(name, data, nn.functional.cross_entropy)).scores

    state = torch.get_rng_state()
    first, second = score(), score()
    assert torch.equal(state, torch.get_rng_state())
    for axis, one in first.items():
        assert one.shape == (axes.sizes[axis],)
        assert torch.equal(one, second[axis])
        assert float(one.std()) > 0
    for key, tensor in named_tensors(model).items():
        identity, value, flag, grad = before[key]
        assert id(tensor) == identity
        assert torch.equal(tensor, value)
        assert tensor.requires_grad is flag
        assert tensor.grad is grad
    assert model.training
    assert not model.conv.training


def test_scores_of_weights_are_summed_over_every_member():
    model, x = built("mlp")
    axes = read(model, x)
    found = neuron_scores(model, axes, Scoring("magnitude")).scores["0"]
    expected = model[0].weight.abs().sum(1) + model[0].bias.abs() + model[2].weight.abs().sum(0)
    torch.testing.assert_close(found, expected.detach())
    squares = neuron_scores(model, axes, Scoring("l2")).scores["0"]
    expected = model[0].weight.square().sum(1) + model[0].bias.square() + model[2].weight.square().sum(0)
    torch.testing.assert_close(squares, expected.detach().sqrt())


@pytest.mark.filterwarnings("ignore:.*spectral_norm.*is deprecated")
def test_weights_behind_a_norm_by_hooks_are_scored():
    plain = mlp().double()
    normed = copy.deepcopy(plain)
    nn.utils.spectral_norm(normed[0])
    axes = find_axes(plain, torch.randn(2, 5, dtype=torch.float64))
    expected = neuron_scores(plain, scored(axes, [axes["0"]]), Scoring("magnitude"))
    axes = find_axes(normed, torch.randn(2, 5, dtype=torch.float64))
    found = axes.free[0]
    again = neuron_scores(normed, ScoredAxes({"0": 6}, {"0": axes.members(found)}, axes.taps), Scoring("magnitude"))
    # The vector of the power iteration is one more member, and no weight.
    assert torch.allclose(again.scores["0"], expected.scores["0"])


def test_products_and_concatenations_reduce_alike():
    weight = torch.arange(12.0).view(6, 2)
    rows = weight.sum(1)
    product = reduce({"w": weight}, [("w", 0, torch.tensor([0, 0, 1, 1, 2, 2]))], 3)
    torch.testing.assert_close(product, rows.view(3, 2).sum(1).double())
    part = reduce({"w": weight}, [("w", 0, torch.tensor([-1, -1, -1, 0, 1, 2])), ("absent", 0, torch.arange(3))], 3)
    torch.testing.assert_close(part, rows[3:].double())


def test_the_geometric_median_is_found_by_distances():
    model, x = built("mlp")
    axes = read(model, x)
    found = neuron_scores(model, axes, Scoring("fpgm")).scores["0"]
    vectors = torch.cat([model[0].weight, model[0].bias[:, None], model[2].weight.T], 1).detach()
    torch.testing.assert_close(found, torch.cdist(vectors, vectors).sum(1))


def test_activations_are_averaged_over_positions():
    model, x = built("mlp")
    axes = read(model, x)
    found = neuron_scores(model, axes, Scoring("activation"), (x,)).scores
    torch.testing.assert_close(found["0"], model[:2](x).abs().mean(0).detach())


def test_scales_of_normalisations():
    model, x = built("residual")
    axes = read(model, x)
    nn.init.normal_(model.norm.weight)
    found = neuron_scores(model, axes, Scoring("bn_scale")).scores
    torch.testing.assert_close(next(iter(found.values())), model.norm.weight.detach().abs())
    plain, x = built("mlp")
    axes = read(plain, x)
    with pytest.raises(MissingDataError, match="axis `0` has none"):
        neuron_scores(plain, axes, Scoring("bn_scale"))


def test_functions_and_tensors_serve_as_importance():
    model, x = built("mlp")
    axes = read(model, x)
    given = {"0": torch.arange(6), "2": torch.arange(4)}
    assert neuron_scores(model, axes, Scoring(given)).scores["0"].tolist() == list(range(6))
    squares = neuron_scores(model, axes, Scoring(lambda seen: seen.weight.square())).scores
    torch.testing.assert_close(
        squares["0"],
        (model[0].weight.square().sum(1) + model[0].bias.square() + model[2].weight.square().sum(0)).detach(),
    )
    with pytest.raises(ShapeMismatchError, match=r"axis `0` has 6 neurons and scores of shape \(5,\)"):
        neuron_scores(model, axes, Scoring({"0": torch.ones(5)}))
    with pytest.raises(UnknownNameError, match="Did you mean 'saliency'"):
        neuron_scores(model, axes, Scoring("salliency"))


def test_what_cannot_be_scored_is_refused():
    model, x = built("mlp")
    axes = read(model, x)
    with pytest.raises(MissingDataError, match="pass data="):
        neuron_scores(model, axes, Scoring())
    blind = copy.deepcopy(model)
    blind.forward = torch.no_grad()(blind.forward)
    with pytest.raises(MissingDataError, match="differentiable"):
        neuron_scores(blind, axes, Scoring(), x)
    with torch.no_grad():
        model[0].weight[0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match=r"0\.weight"):
        neuron_scores(model, axes, Scoring("magnitude"))


@pytest.mark.parametrize("frozen", ["all", "stem"])
def test_frozen_parameters_do_not_hide_activations(frozen):
    model, x = built("residual")
    axes = read(model, x)
    expected = saliency(model, axes, [x]).scores
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(frozen != "all" and not name.startswith("stem"))
    found = saliency(model, axes, [x]).scores
    for name, one in expected.items():
        torch.testing.assert_close(found[name], one)


@pytest.mark.parametrize("name", MODELS)
def test_judged_in_parts_or_together_is_judged_one_by_one(monkeypatch, name):
    model, x = built(name, torch.float32)
    axes = read(model, x)
    seen = []

    def cubes(evidence):
        seen.append(evidence.weight.shape)
        return evidence.weight.abs() ** 3

    alone = importance.Criterion("cubes", cubes)
    each = neuron_scores(model, axes, Scoring(alone)).scores
    one_by_one = len(seen)
    monkeypatch.setattr(registry, "PART", 24)
    monkeypatch.setattr(registry, "MANY", 2)
    parts = neuron_scores(model, axes, Scoring(importance.Criterion("cubes", cubes, entrywise=True))).scores
    vectors = [shape for shape in seen[one_by_one:] if len(shape) == 1]
    assert len(vectors) == 1
    assert len([shape for shape in seen[one_by_one:] if len(shape) > 1]) > one_by_one // 2
    for axis in axes.sizes:
        torch.testing.assert_close(parts[axis], each[axis], rtol=1e-6, atol=0)


def test_scores_share_no_memory_with_the_weights_they_are():
    model, x = built("mlp")
    axes = read(model, x)
    with unchanged(model):
        neuron_scores(model, axes, Scoring(lambda evidence: evidence.weight))


class Tree(nn.Module):
    """Sums up the nodes of a tree from the leaves to the root; the first dimension lists nodes and no samples."""

    def __init__(self, strict):
        super().__init__()
        self.inner, self.out, self.strict = nn.Linear(6, 10), nn.Linear(10, 3), strict
        self.register_buffer("parent", torch.tensor([0, 0, 0, 1, 1, 2, 2]))

    def forward(self, nodes):
        if self.strict and len(nodes) != 7:
            raise ValueError("seven nodes")
        hidden = self.inner(nodes).tanh()
        return self.out(hidden + torch.zeros_like(hidden).index_add(0, self.parent[: len(nodes)], hidden))


@pytest.mark.parametrize("strict", [False, True])
def test_what_is_no_batch_is_run_whole(strict):
    torch.manual_seed(0)
    model, x = Tree(strict), torch.randn(7, 6)
    axes = netopt.find_axes(model, x)
    axis = axes["inner"]
    found = saliency(model, scored(axes, [axis]), [x])
    hidden = model.inner(x).tanh().detach().requires_grad_()
    read = hidden + torch.zeros_like(hidden).index_add(0, model.parent, hidden)
    grad = torch.autograd.functional.jacobian(model.out, read.detach())
    expected = grad.square().sum((0, 1, 2)).double()
    torch.testing.assert_close(found.scores[axis.name] * found.samples, expected, rtol=1e-4, atol=1e-8)


def test_samples_share_random_signs(monkeypatch):
    """Where outputs are many, all samples together take at most twenty forwards' time."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 500)), torch.randn(256, 6)
    axes = netopt.find_axes(model, x)
    axes = scored(axes, [axes["0"]])
    exact = saliency(model, axes, [x], precision=Precision(exact_outputs=500)).scores["0"]
    found = saliency(model, axes, list(x.split(16)))
    assert not found.exact
    assert 2 <= found.probes < 5
    assert found.error <= 0.1
    assert float((found.scores["0"] - exact).norm() / exact.norm()) < 0.3
    monkeypatch.setattr("netopt.importance.activations.PROBES_AT_MOST", 3)
    assert saliency(model, axes, [x[:1]]).probes == 3


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_re_entrant_checkpoints_are_refused_by_name():
    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 2)

        def forward(self, x):
            return checkpoint(self.last, self.first(x), use_reentrant=True)

    with pytest.raises(InvalidArgumentError, match="use_reentrant=False"):
        netopt.prune_neurons(Checkpointed(), torch.ones(2, 4), 0.5, progress=False)
