"""What a forward does in training mode alone or in another precision, with modules in two places, weights anywhere."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import netopt
from conftest import unchanged
from netopt.errors import (
    ArgumentTypeError,
    CheckpointError,
    EmptyDataError,
    ForwardError,
    InvalidArgumentError,
    NothingToPruneError,
)

X = torch.randn(9, 5, generator=torch.Generator().manual_seed(3))


class Mixture(nn.Module):
    """Two of six experts, with one habit."""

    def __init__(self, habit: str = "") -> None:
        super().__init__()
        self.habit = habit
        self.router, self.experts = nn.Linear(8, 6), nn.ModuleList([nn.Linear(8, 8) for _ in range(6)])
        if habit == "noise":
            self.noise = nn.Linear(8, 6)
        if habit == "twice in the list":
            self.experts[2] = self.experts[0]

    def forward(self, x: Tensor) -> Tensor:
        scores = self.router(x)
        if self.habit == "noise" and self.training:
            scores = scores + torch.randn_like(scores) * functional.softplus(self.noise(x))
        if self.habit == "six of them" and self.training:
            scores = scores * torch.ones(6)
        gates, chosen = scores.softmax(-1).topk(2)
        made = x
        for place, expert in enumerate(self.experts):
            made = made + (gates * (chosen == place)).sum(-1, keepdim=True) * expert(x).relu()
        return made


class Mixtures(nn.Module):
    def __init__(self, habit: str = "") -> None:
        super().__init__()
        self.first, self.last, self.habit = nn.Linear(5, 8), nn.Linear(8, 3), habit
        self.layers = nn.ModuleList([Mixture(habit), Mixture(habit)])
        if habit == "twice in the model":
            self.layers[1] = self.layers[0]

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=self.habit == "autocast"):
            x = self.first(x)
            for layer in self.layers:
                x = layer(x)
        return self.last(x.float())


@pytest.mark.parametrize("importance", ["reap", "magnitude"])
@pytest.mark.parametrize("habit", ["", "noise", "autocast", "twice in the list", "twice in the model"])
def test_mixtures_are_trained_on(habit: str, importance: Any) -> None:
    model = Mixtures(habit)
    dense, optimizer = copy.deepcopy(model).eval(), torch.optim.AdamW(model.parameters())
    model(X).square().sum().backward()
    report = netopt.prune_experts(model, X, 2, importance=importance, optimizer=optimizer, progress=False)
    assert {id(one) for one in optimizer.param_groups[0]["params"]} == {id(one) for one in model.parameters()}
    for cut in report.plan.mixtures:
        gone = torch.tensor(cut.removed)
        router: Any = dense.get_submodule(f"{cut.name}.router")
        router.register_forward_hook(lambda _, __, made, gone=gone: made.index_fill(-1, gone, -torch.inf))
    torch.testing.assert_close(copy.deepcopy(model).eval()(-X), dense(-X), rtol=1e-2, atol=1e-2)
    model(X).square().sum().backward()
    optimizer.step()


def test_mixtures_that_could_not_be_trained_stay() -> None:
    model = Mixtures("six of them")
    with unchanged(model), pytest.raises(NothingToPruneError, match="training mode"):
        netopt.prune_experts(model, X, 2, progress=False)


def test_masked_mixtures_are_refused_with_what_to_do() -> None:
    model = Mixtures()
    netopt.prune_weights(model, 0.5, progress=False)
    with unchanged(model), pytest.raises(NothingToPruneError, match=r"netopt\.finish"):
        netopt.prune_experts(model, X, 2, progress=False)


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(5, 5)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x).relu()


class Supervised(nn.Module):
    """Looks at its third block too, while it is trained."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks, self.last = nn.ModuleList([Residual() for _ in range(3)]), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Any:
        for block in self.blocks:
            x = block(x)
        return (self.last(x), self.blocks[2](x)) if self.training else self.last(x)


def test_blocks_that_training_needs_stay() -> None:
    model = Supervised()
    with unchanged(model), pytest.raises(NothingToPruneError, match="training mode"):
        netopt.prune_blocks(model, X, 1, progress=False)


def test_an_optimizer_forgets_blocks_that_have_two_names() -> None:
    model = nn.Sequential(nn.Sequential(*[Residual() for _ in range(3)]), nn.Linear(5, 2))
    model.add_module("again", nn.Identity())
    model[2].held = model[0]
    optimizer = torch.optim.AdamW(model.parameters())
    netopt.prune_blocks(model, X, 1, optimizer=optimizer, progress=False)
    assert {id(one) for one in optimizer.param_groups[0]["params"]} == {id(one) for one in model.parameters()}


class Merged(nn.Sequential):
    """Adds a correction to its weights when it is evaluated, and takes it away when it is trained."""

    merged = False

    def train(self, mode: bool = True) -> Merged:
        if mode == self.merged:
            with torch.no_grad():
                self[0].inner.weight.add_(-0.1 if mode else 0.1)
            self.merged = not mode
        return super().train(mode)


@pytest.mark.parametrize("mode", [True, False])
@pytest.mark.parametrize("call", [netopt.plan_blocks, netopt.plan_experts])
def test_what_a_change_of_mode_writes_is_undone(call: Any, mode: bool) -> None:
    model = Merged(Residual(), nn.Sequential(Mixtures(), nn.Linear(3, 2)))
    model.train(mode)
    with unchanged(model):
        call(model, X, 1, include=["0", "1.0.layers.*"], progress=False)


class ReturnsNothing(nn.Sequential):
    def train(self, mode: bool = True) -> None:  # type: ignore[override]
        super().train(mode)


class Refuses(nn.Sequential):
    def train(self, mode: bool = True) -> None:  # type: ignore[override]
        raise RuntimeError("no modes here")


def test_a_train_of_its_own_may_return_anything() -> None:
    model = ReturnsNothing(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 2))
    netopt.prune_neurons(model, X, 0.5, progress=False)
    assert model[0].out_features == 4


def test_a_train_of_its_own_that_raises_is_named() -> None:
    model = Refuses(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 2))
    with unchanged(model), pytest.raises(ForwardError, match="Refuses failed"):
        netopt.prune_neurons(model, X, 0.5, progress=False)


class Cast(nn.Sequential):
    """Enters autocast itself."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return super().forward(x).float()


def perceptron(kind: type[nn.Sequential] = nn.Sequential) -> Any:
    torch.manual_seed(1)
    return kind(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))


CALLS: dict[str, Any] = {
    "saliency": lambda model: netopt.prune_neurons(model, X, 0.5, progress=False),
    "reconstruction": lambda model: netopt.prune_neurons(
        model, X, 0.5, importance="reconstruction", data=[X], progress=False
    ),
    "repair": lambda model: netopt.prune_neurons(model, X, 0.5, importance="magnitude", data=[X, -X], progress=False),
    "sparsegpt": lambda model: netopt.prune_weights(model, 0.5, importance="sparsegpt", data=[X], progress=False),
    "wanda": lambda model: netopt.prune_weights(model, 0.5, importance="wanda", data=[X], progress=False),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("where", ["inside", "around"])
def test_what_autocast_keeps_hides_nothing(call: str, where: str) -> None:
    """Its casts of weights are those of the weights as they are, whoever has entered it, also where a forward was."""
    model = perceptron(Cast if where == "inside" else nn.Sequential)
    with torch.autocast("cpu", torch.bfloat16, enabled=where == "around"):
        model(X)
        CALLS[call](model)
        assert torch.is_autocast_cache_enabled()
        found = model(-X)
    fresh = copy.deepcopy(model)
    with torch.autocast("cpu", torch.bfloat16, enabled=where == "around"):
        assert torch.equal(found, fresh(-X))


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("kind", ["masked", "with gaps"])
def test_reconstruction_reads_weights_wherever_they_lie(call: str, kind: str) -> None:
    model = perceptron()
    if kind == "masked":
        netopt.prune_weights(model, 0.3, progress=False)
    else:
        wide = torch.zeros(8, 10)
        wide[:, ::2] = model[0].weight.detach()
        model[0].weight = nn.Parameter(wide[:, ::2])
    dense = copy.deepcopy(model) if kind == "masked" else perceptron()
    CALLS[call](model)
    CALLS[call](dense)
    torch.testing.assert_close(model(-X), dense(-X), rtol=1e-4, atol=1e-5)


def test_without_a_sample_there_is_nothing_to_score_on() -> None:
    model = perceptron()
    with unchanged(model), pytest.raises(EmptyDataError, match="length of 0"):
        netopt.prune_neurons(model, X[:0], 0.5, progress=False)


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("masks", [False, True])
def test_any_plan_of_neurons_is_read_again_and_fits_the_bare_model(call: str, masks: bool, tmp_path: Any) -> None:
    model = perceptron()
    if masks:
        netopt.prune_weights(model, 0.3, progress=False)
    report = CALLS[call](model)
    if report.call == "prune_weights":
        return
    again = netopt.Plan.from_dict(json.loads(json.dumps(report.plan.to_dict())))
    assert dict(again.predicted) == pytest.approx(dict(report.plan.predicted))
    netopt.finish(model)
    netopt.save_pruned(model, again, tmp_path / "small")
    loaded = netopt.load_pruned(perceptron, tmp_path / "small")
    assert torch.equal(loaded(X), model(X))


def test_masked_models_are_not_saved_as_they_are(tmp_path: Any) -> None:
    model = perceptron()
    netopt.prune_weights(model, 0.3, progress=False)
    report = netopt.prune_neurons(model, X, 0.5, progress=False)
    with pytest.raises(InvalidArgumentError, match=r"netopt\.finish"):
        netopt.save_pruned(model, report.plan, tmp_path / "small")
    assert not (tmp_path / "small").exists()


def test_weights_that_are_parts_of_others_are_named_when_saved(tmp_path: Any) -> None:
    model = perceptron()
    plan = netopt.plan_neurons(model, X, {"2": 2}, progress=False)
    plan.apply(model)
    model[0].weight = nn.Parameter(torch.randn(8, 10)[:, ::2])
    with pytest.raises(CheckpointError, match="cannot be written"):
        netopt.save_pruned(model, plan, tmp_path / "small")


@pytest.mark.parametrize("value", [0.0, 3.0])
def test_inputs_that_never_differ_can_be_repaired_on(value: float) -> None:
    dense = perceptron()
    model = copy.deepcopy(dense)
    plan = netopt.plan_neurons(model, X, 0.5, progress=False)
    plan.apply(model)
    netopt.repair(model, plan, dense, [torch.full((32, 5), value) for _ in range(4)], progress=False)
    assert all(bool(one.isfinite().all()) for one in model.parameters())


@pytest.mark.parametrize("call", [netopt.plan_neurons, netopt.plan_blocks, netopt.plan_experts])
def test_outputs_must_be_names(call: Any) -> None:
    model = Mixtures()
    with unchanged(model), pytest.raises(ArgumentTypeError, match="outputs must be names"):
        call(model, X, 1, outputs=3, progress=False)


@pytest.mark.parametrize("state", [None, 3])
def test_a_state_of_a_pruner_must_be_one(state: Any) -> None:
    pruner = netopt.GradualPruner(perceptron(), end=3)
    with unchanged(pruner.model), pytest.raises(ArgumentTypeError, match="state_dict"):
        pruner.load_state_dict(state)
