"""The contract of the three calls: in place, a report, repeatable, and nothing else changed."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable

import pytest
import torch
from torch import nn

from conftest import random_state, state_of
from netopt.distillation import DistillationReport, distill
from netopt.prune import prune_neurons, prune_weights
from netopt.report import PruningReport


class Net(nn.Module):
    """Linear, convolution, norm, pooling, dropout, flatten and a residual sum, as the first models of anyone have."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, width, 3, padding=1)
        self.norm = nn.BatchNorm2d(width)
        self.inner = nn.Conv2d(width, width, 3, padding=1)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Sequential(nn.Flatten(), nn.Linear(width * 9, 12), nn.ReLU(), nn.Linear(12, 3))

    def forward(self, x):
        x = torch.relu(self.norm(self.stem(x)))
        x = x + torch.relu(self.inner(x))
        return self.head(self.drop(nn.functional.max_pool2d(x, 2)))


X = torch.randn(6, 1, 6, 6, generator=torch.Generator().manual_seed(1))
Y = torch.tensor([0, 1, 2, 0, 1, 2])


def teacher() -> nn.Module:
    return Net(width=16)


CALLS: dict[str, Callable] = {
    "prune_neurons": lambda model: prune_neurons(model, X, amount=0.5),
    "prune_neurons by random": lambda model: prune_neurons(model, X, amount=0.5, importance="random"),
    "prune_neurons as masks": lambda model: prune_neurons(model, X, amount=0.5, mode="mask"),
    "prune_weights": lambda model: prune_weights(model, amount=0.7),
    "prune_weights with data": lambda model: prune_weights(model, amount=0.7, importance="saliency", data=[X]),
    "distill": lambda model: distill(model, TEACHER, (X, Y), epochs=2, batch_size=2, hard=0.5, seed=0, progress=False),
}
torch.manual_seed(3)
TEACHER = teacher()


def prepared() -> nn.Module:
    """A model in the middle of something: mixed modes, a frozen bias, hooks, gradients."""
    model = Net()
    model(X).sum().backward()
    model.norm.eval()
    model.inner.bias.requires_grad_(False)
    model.drop.register_forward_hook(lambda *_: None)
    model.register_forward_pre_hook(lambda *_: None)
    return model


def surroundings(model: nn.Module) -> dict[str, object]:
    """Everything of a model but its tensors: modes and hooks of each module, flags of each parameter."""
    kept = {key: value for key, value in state_of(model).items() if key.endswith("[training]")}
    for name, module in model.named_modules():
        kept[f"{name} hooks"] = [id(hook) for hook in module._forward_hooks.values()]
        plain = [hook for hook in module._forward_pre_hooks.values() if "lambda" in repr(hook)]
        kept[f"{name} pre-hooks"] = [id(hook) for hook in plain]
    for name, parameter in model.named_parameters():
        kept[f"{name.removesuffix('_orig')} flag"] = parameter.requires_grad
    return kept


@pytest.mark.parametrize("call", CALLS)
def test_in_place_and_a_report(call):
    model = prepared()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    report = CALLS[call](model)
    assert isinstance(report, (PruningReport, DistillationReport))
    after = dict(model.named_parameters())
    same = [
        name in after and after[name].shape == old.shape and torch.equal(after[name], old)
        for name, old in before.items()
    ]
    assert not all(same)
    assert torch.isfinite(model(X)).all()


@pytest.mark.parametrize("call", CALLS)
def test_surroundings_stay(call):
    model = prepared()
    before, chance = surroundings(model), random_state()
    CALLS[call](model)
    assert surroundings(model) == before
    assert random_state() == chance


@pytest.mark.parametrize("call", CALLS)
def test_repeatable_under_a_seed(call):
    model = prepared()
    results = []
    for _ in range(2):
        torch.manual_seed(11)
        one = copy.deepcopy(model)
        CALLS[call](one)
        results.append(one.state_dict())
    assert results[0].keys() == results[1].keys()
    for name, value in results[0].items():
        assert torch.equal(value, results[1][name]), name


@pytest.mark.parametrize("call", CALLS)
def test_no_gradient_is_lost_that_still_has_a_place(call):
    model = prepared()
    kept = {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}
    CALLS[call](model)
    for name, parameter in model.named_parameters():
        grad = kept.get(name.removesuffix("_orig"))
        if call != "distill" and grad is not None:
            assert parameter.grad is not None, name
            assert parameter.grad.shape == parameter.shape, name
            if grad.shape == parameter.shape:
                assert torch.equal(parameter.grad, grad), name
    assert kept


def test_the_teacher_is_untouched():
    guide = teacher()
    guide.train()
    guide.norm.eval()
    before = state_of(guide)
    distill(prepared(), guide, (X, Y), epochs=1, batch_size=2, progress=False)
    assert state_of(guide) == before


SIGNATURES = {
    prune_neurons: (
        "model, example_inputs, amount, threshold, max_params, max_macs, importance, data, loss_fn, scope, include, "
        "exclude, outputs, round_to, optimizer, repair, mode, verify, progress"
    ),
    prune_weights: ("model, amount, threshold, importance, data, loss_fn, scope, pattern, include, exclude, progress"),
    distill: "student, teacher, data, epochs, loss, optimizer, scheduler",
}
DEFAULTS = {
    prune_neurons: {"amount": None, "importance": "saliency", "scope": "global", "round_to": 1, "mode": "remove"},
    prune_weights: {"amount": None, "importance": "magnitude", "scope": "global", "pattern": "unstructured"},
    distill: {"epochs": 1, "loss": "mse", "progress": True},
}


@pytest.mark.parametrize("function", SIGNATURES, ids=lambda function: function.__name__)
def test_signatures_are_those_promised(function):
    parameters = inspect.signature(function).parameters
    promised = SIGNATURES[function].split(", ")
    assert [name for name in promised if name not in parameters] == []
    for name, default in DEFAULTS[function].items():
        assert parameters[name].default == default
    positional = [name for name, one in parameters.items() if one.kind is one.POSITIONAL_OR_KEYWORD]
    expected = {"prune_neurons": 3, "prune_weights": 2, "distill": 3}
    assert positional == promised[: expected[function.__name__]]


def test_threshold_is_the_source_formulation():
    model = nn.Sequential(nn.Linear(2, 2, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[-3.0, 0.05], [0.5, -0.01]]))
    prune_weights(model, threshold=0.1)
    assert torch.equal(model[0].weight_mask.bool(), torch.tensor([[True, False], [True, False]]))


def test_neurons_below_the_threshold_go_and_those_above_stay():
    model = nn.Sequential(nn.Linear(2, 3, bias=False), nn.ReLU(), nn.Linear(3, 1, bias=False))
    with torch.no_grad():
        model[2].weight.copy_(torch.tensor([[-2.0, 0.1, 1.0]]))
    # Behind a ReLU whose units are on or off the saliency of a unit is the squared weight that reads it.
    report = prune_neurons(model, torch.randn(4, 2), threshold=0.5)
    assert report.plan.tensors["2.weight"][1].tolist() == [0, 2]
    assert model[0].out_features == 2
