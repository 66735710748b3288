"""What a forward, or a change of mode, writes into the model's own parameters is undone by every call that runs it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import netopt
from conftest import bits
from netopt.distillation import distill

X = torch.randn(4, 4, generator=torch.Generator().manual_seed(1))
DATA = [X, 2 * X[:3], X - 1]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 8), nn.Linear(8, 3)

    def write(self) -> None:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        self.write()
        return self.last(torch.relu(self.first(x)))


class Scaled(Net):
    @torch.no_grad()
    def write(self) -> None:
        self.first.weight.mul_(0.9)


class Clipped(Net):
    def write(self) -> None:
        for parameter in self.parameters():
            parameter.data.clamp_(-0.1, 0.1)


class Averaged(Net):
    """As the slow copy of an encoder follows the fast one."""

    def __init__(self) -> None:
        super().__init__()
        self.slow = nn.Linear(4, 8).requires_grad_(False)

    def write(self) -> None:
        for slow, fast in zip(self.slow.parameters(), self.first.parameters(), strict=True):
            slow.data.lerp_(fast.data, 0.5)

    def forward(self, x: Tensor) -> Tensor:
        self.write()
        return self.last(torch.relu(self.first(x) + self.slow(x)))


class AveragedInTraining(Averaged):
    def write(self) -> None:
        if self.training:
            super().write()


class Embedded(Net):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(9, 4, max_norm=0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.first(x + self.table(torch.arange(len(x)) % 9))))


class OneMemory(Net):
    """Parameters that are views of one flat tensor, written to through that."""

    def __init__(self) -> None:
        super().__init__()
        self.flat = [torch.randn(56)]
        self.first.weight = nn.Parameter(self.flat[0][:32].view(8, 4))
        self.last.weight = nn.Parameter(self.flat[0][32:].view(3, 8))

    def write(self) -> None:
        with torch.no_grad():
            self.first.weight.add_(0.01)
            self.last.weight.add_(0.01)


class Merged(Net):
    """A low-rank update that is added to the weight for evaluation, and taken off for training."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up, self.merged = nn.Parameter(torch.randn(2, 4)), nn.Parameter(torch.randn(8, 2)), False

    def train(self, mode: bool = True) -> Any:
        super().train(mode)
        if self.merged == mode:
            self.first.weight.data += (self.up @ self.down).data * (-1 if mode else 1)
            self.merged = not mode
        return self

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x) if self.merged else self.first(x) + x @ self.down.T @ self.up.T
        return self.last(torch.relu(h))


KINDS = {one.__name__: one for one in (Scaled, Clipped, Averaged, AveragedInTraining, Embedded, OneMemory, Merged)}
LOOKS: dict[str, Callable[[nn.Module], Any]] = {
    "find_axes": lambda model: netopt.find_axes(model, X),
    "plan_neurons": lambda model: netopt.plan_neurons(model, X, 0.5, progress=False),
    "plan_neurons by data": lambda model: netopt.plan_neurons(
        model, X, 0.5, importance="reconstruction", data=DATA, progress=False
    ),
    "count_macs": lambda model: netopt.measure.count_macs(model, X),
    "latency": lambda model: netopt.measure.latency(model, X, repeats=2, warmup=1),
    "scores": lambda model: netopt.importance.scores(model, DATA, "saliency"),
    "sensitivity": lambda model: netopt.sensitivity(model, X, lambda one: float(one(X).sum()), progress=False),
    "shrink": lambda model: netopt.shrink(model, X),
    "distill from": lambda model: distill(nn.Linear(4, 3), model, DATA, epochs=2, progress=False),
}
CHANGES: dict[str, Callable[[nn.Module], Any]] = {
    "prune_neurons": lambda model: netopt.prune_neurons(model, X, 0.5, progress=False),
    "prune_neurons by masks": lambda model: netopt.prune_neurons(model, X, 0.5, mode="mask", progress=False),
    "prune_neurons to a budget": lambda model: netopt.prune_neurons(model, X, max_macs=0.8, progress=False),
    "prune_weights": lambda model: netopt.prune_weights(model, 0.5, progress=False),
    "prune_weights wanda": lambda model: netopt.prune_weights(
        model, 0.5, importance="wanda", data=DATA, progress=False
    ),
    "repaired": lambda model: netopt.prune_neurons(model, X, 0.5, data=DATA, progress=False),
    "sparsegpt": lambda model: netopt.prune_weights(model, 0.5, importance="sparsegpt", data=DATA, progress=False),
}
REFITTED = {"first.weight", "first.bias", "last.weight", "last.bias", "slow.weight", "slow.bias"}


def made(kind: str) -> nn.Module:
    torch.manual_seed(0)
    return KINDS[kind]()


@pytest.mark.parametrize("call", LOOKS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_look_leaves_the_parameters_alone(kind, call):
    model = made(kind)
    before = {name: (bits(one), one.data_ptr()) for name, one in model.named_parameters()}
    LOOKS[call](model)
    assert {name: (bits(one), one.data_ptr()) for name, one in model.named_parameters()} == before


@pytest.mark.parametrize("call", CHANGES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_change_is_made_of_the_values_there_were(kind, call):
    model = made(kind)
    expected = {name: one.detach().clone() for name, one in model.named_parameters()}
    plan = CHANGES[call](model).plan
    if call.startswith(("prune_neurons", "repaired")) and "masks" not in call:
        for name, dims in plan.tensors.items():
            for dim, kept in dims.items():
                expected[name] = expected[name].index_select(dim, kept)
    found = {name.removesuffix("_orig"): one for name, one in model.named_parameters()}
    for name, value in expected.items():
        if call not in ("repaired", "sparsegpt") or name not in REFITTED:
            assert torch.equal(found[name], value), name
