"""What is written as other libraries write it is answered with our word for it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import netopt
from netopt.errors import NetoptError

X = torch.zeros(4, 5)


def perceptron() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3))


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)
    return nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)


HINTS: dict[str, tuple[Any, str]] = {
    "l1 of neurons": (lambda m: netopt.prune_neurons(m, X, 0.5, importance="l1"), "'magnitude'"),
    "L2 of weights": (lambda m: netopt.prune_weights(m, 0.5, importance="L2"), "'magnitude'"),
    "cosine of blocks": (lambda m: netopt.prune_blocks(m, X, 1, importance="cosine"), "'influence'"),
    "usage of experts": (lambda m: netopt.prune_experts(m, X, 1, importance="usage"), "'frequency'"),
    "KL": (lambda m: netopt.distill(m, copy.deepcopy(m), [X], loss="KL"), "'kl'"),
    "L2": (lambda m: netopt.distill(m, copy.deepcopy(m), [X], loss="L2"), "'mse'"),
    "cross_entropy": (lambda m: netopt.distill(m, copy.deepcopy(m), [X], loss="cross_entropy"), "'kl'"),
    "rows of weights": (lambda m: netopt.prune_weights(m, 0.5, scope="rows"), "'row'"),
    "rows of neurons": (lambda m: netopt.prune_neurons(m, X, 0.5, scope="rows"), "'layer'"),
    "uniform": (lambda m: netopt.prune_neurons(m, X, 0.5, scope="uniform"), "'layer'"),
    "(2, 4)": (lambda m: netopt.prune_weights(m, pattern=(2, 4)), '"2:4"'),
    "90 neurons": (lambda m: netopt.prune_neurons(m, X, 90), r"90 percent is 0\.9"),
    "90.0 neurons": (lambda m: netopt.prune_neurons(m, X, 90.0), r"90 percent is 0\.9"),
    "90 weights": (lambda m: netopt.prune_weights(m, 90), r"90 percent is 0\.9"),
    "90 blocks": (lambda _: netopt.prune_blocks(encoder(), torch.zeros(1, 3, 4), 90), r"90 percent is 0\.9"),
    "90.0 blocks": (lambda m: netopt.prune_blocks(m, X, 90.0), r"90 percent is 0\.9"),
    "90.0 experts": (lambda m: netopt.prune_experts(m, X, 90.0), r"90 percent is 0\.9"),
    "layers": (lambda m: netopt.prune_blocks(m, X, 1, kind="layers"), "'blocks'"),
    "attention": (lambda m: netopt.prune_blocks(m, X, 1, kind="attention"), "'branches'"),
    "no name at all": (lambda m: netopt.prune_blocks(m, X, 1, kind=3), "unknown kind of blocks 3"),
    "filters": (lambda m: netopt.GradualPruner(m, end=3, kind="filters"), "'neurons'"),
    "polynomial": (lambda m: netopt.GradualPruner(m, end=3, schedule="polynomial"), "'cubic'"),
}


@pytest.mark.parametrize("case", HINTS)
def test_what_was_meant_is_said(case: str) -> None:
    call, meant = HINTS[case]
    with pytest.raises(NetoptError, match=meant):
        call(perceptron())
