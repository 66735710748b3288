"""Any calls in any order: each does what it says or raises and changes nothing, and the model has one function."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import netopt
from conftest import state_of
from netopt import masking
from netopt.distillation import distill
from netopt.errors import NetoptError


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(6, 16), nn.LayerNorm(16), nn.Linear(16, 3)
        self.attention = nn.MultiheadAttention(16, 4, batch_first=True)

    def forward(self, x):
        h = self.first(x)
        return self.last(self.norm(h + self.attention(h, h, h, need_weights=False)[0]))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.LSTM(6, 8, batch_first=True), nn.Linear(8, 3)

    def forward(self, x):
        return self.last(self.first(x)[0])


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = parametrizations.weight_norm(nn.Linear(6, 12)), nn.Linear(12, 3)

    def forward(self, x):
        return self.last(self.first(x).tanh())


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.one, self.two, self.last = (nn.Linear(*size) for size in ((6, 8), (8, 8), (8, 8), (8, 3)))
        self.two.weight = self.one.weight

    def forward(self, x):
        return self.last(self.two(self.one(self.first(x)).relu()).relu())


class Grouped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Conv1d(6, 8, 1), nn.BatchNorm1d(8), nn.Conv1d(8, 3, 1)
        self.inner = nn.Conv1d(8, 8, 1, groups=2)

    def forward(self, x):
        return self.last(self.inner(self.norm(self.first(x.mT)).relu()).relu()).mT


class Embedded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.table, self.last = nn.Linear(6, 8), nn.Embedding(5, 8, max_norm=1.0), nn.Linear(8, 3)

    def forward(self, x):
        return self.last((self.first(x) + self.table(torch.arange(x.shape[1]))).relu())


KINDS = (Attention, Recurrent, Normed, Tied, Grouped, Embedded)
X = torch.randn(4, 5, 6, generator=torch.Generator().manual_seed(1))
DATA = [X, -X, X.flip(0), X.roll(1, 2)]
QUIET: dict[str, Any] = {"progress": False}
LOOKS: dict[str, Callable[[nn.Module], Any]] = {
    "plan_neurons": lambda model: netopt.plan_neurons(model, X, 0.3, **QUIET),
    "find_axes": lambda model: netopt.find_axes(model, X),
    "sensitivity": lambda model: netopt.sensitivity(model, X, lambda one: float(one(X).sum()), amounts=(0.3,), **QUIET),
}
CALLS: dict[str, Callable[[nn.Module], Any]] = {
    **LOOKS,
    "prune_weights": lambda model: netopt.prune_weights(model, 0.4, **QUIET),
    "by layer": lambda model: netopt.prune_weights(model, 0.6, scope="layer", **QUIET),
    "2:4": lambda model: netopt.prune_weights(model, 0.5, pattern="2:4", **QUIET),
    "wanda": lambda model: netopt.prune_weights(model, 0.5, importance="wanda", data=DATA, **QUIET),
    "sparsegpt": lambda model: netopt.prune_weights(model, 0.5, importance="sparsegpt", data=DATA, **QUIET),
    "prune_neurons": lambda model: netopt.prune_neurons(model, X, 0.25, **QUIET),
    "repaired": lambda model: netopt.prune_neurons(model, X, 0.25, data=DATA, **QUIET),
    "masked": lambda model: netopt.prune_neurons(model, X, 0.25, mode="mask", **QUIET),
    "shrink": lambda model: netopt.shrink(model, X),
    "bake": masking.bake,
    "strip": masking.strip,
    "finish": netopt.finish,
    "reload": lambda model: masking.load_state_dict(model, masking.state_dict(model)),
    "reload bits": lambda model: masking.load_state_dict(model, masking.state_dict(model, bits=True)),
    "rewind": lambda model: netopt.rewind(model, {name: one + 1 for name, one in masking.state_dict(model).items()}),
    "distill": lambda model: distill(model, copy.deepcopy(model), DATA, epochs=1, **QUIET),
    "write": lambda model: [parameter.data.mul_(1.01) for parameter in model.parameters()],
    "train": lambda model: model(X).square().mean().backward(),
}


def answers(model: nn.Module) -> list[torch.Tensor]:
    """What the model computes, by every way that leads to its weights."""
    mode = model.training
    model.eval()
    found = [model(X).detach(), copy.deepcopy(model)(X).detach()]
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            found += [model(X).clone(), copy.deepcopy(model)(X).clone()]
    model.train(mode)
    return found


@pytest.mark.parametrize("seed", range(60))
def test_calls_in_any_order(seed):
    chance = random.Random(seed)
    torch.manual_seed(seed)
    model = chance.choice(KINDS)()
    model.train(chance.random() < 0.5)
    done = []
    for name in chance.choices(list(CALLS), k=6):
        done.append(name)
        before = state_of(model)
        try:
            CALLS[name](model)
        except NetoptError:
            assert state_of(model) == before, f"{done}: it raised and changed something"
        else:
            assert name not in LOOKS or state_of(model) == before, f"{done}: a look changed something"
        first, *others = answers(model)
        assert torch.isfinite(first).all(), done
        for other in others:
            torch.testing.assert_close(other, first, rtol=1e-4, atol=1e-5, msg=lambda text: f"{done}: {text}")
    first, *_ = answers(model)
    netopt.finish(model)
    assert not masking.masks(model)
    torch.testing.assert_close(answers(model)[0], first, rtol=1e-4, atol=1e-5)
