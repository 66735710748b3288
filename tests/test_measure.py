"""What a model costs, counted and, where it can be, computed a second way by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from conftest import unchanged
from netopt import measure
from netopt.errors import ForwardError, InvalidArgumentError
from netopt.model.view import ModelView


class Attention(nn.Module):
    def forward(self, query):
        return nn.functional.scaled_dot_product_attention(query, query, query)


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.positive, self.negative = nn.Linear(4, 4), nn.Linear(4, 4, bias=False)

    def forward(self, x):
        return torch.cond(x.sum() > 0, lambda x: self.positive(x) @ x.mT @ x, self.negative, (x,))


STEPS, BATCH, WIDTH, HIDDEN = 5, 2, 8, 16
SEQUENCE = torch.zeros(STEPS, BATCH, WIDTH)
MACS = {
    "linear": (nn.Linear(8, 3), torch.zeros(7, 8), 7 * 8 * 3),
    "vector": (nn.Linear(8, 3), torch.zeros(8), 8 * 3),
    "conv": (nn.Conv2d(4, 6, 3, padding=1), torch.zeros(2, 4, 5, 5), 2 * 25 * 6 * 4 * 9),
    "depthwise": (nn.Conv2d(4, 4, 3, groups=4), torch.zeros(1, 4, 5, 5), 9 * 4 * 9),
    "transposed": (nn.ConvTranspose1d(4, 6, 2, stride=2), torch.zeros(1, 4, 5), 5 * 4 * 6 * 2),
    "rnn": (nn.RNN(WIDTH, HIDDEN), SEQUENCE, STEPS * BATCH * (WIDTH + HIDDEN) * HIDDEN),
    "lstm": (nn.LSTM(WIDTH, HIDDEN), SEQUENCE, STEPS * BATCH * (WIDTH + HIDDEN) * 4 * HIDDEN),
    "two-way lstm": (nn.LSTM(8, 16, bidirectional=True), SEQUENCE, 2 * STEPS * BATCH * (WIDTH + HIDDEN) * 4 * HIDDEN),
    "gru": (nn.GRU(WIDTH, HIDDEN), SEQUENCE, STEPS * BATCH * (WIDTH + HIDDEN) * 3 * HIDDEN),
    "attention": (Attention(), torch.zeros(2, 3, 7, 4), 2 * 3 * 7 * 7 * 8),
    "bilinear": (nn.Bilinear(4, 5, 3), (torch.zeros(2, 4), torch.zeros(2, 5)), 2 * 4 * 5 * 3),
    "encoder": (
        nn.TransformerEncoderLayer(8, 2, 16, batch_first=True),
        torch.zeros(2, 5, 8),
        2 * 5 * (4 * 8 * 8 + 2 * 8 * 16) + 2 * 2 * 5 * 5 * (4 + 4),
    ),
    "branch": (Branching(), torch.zeros(2, 4), 2 * 4 * 4),
    "norm": (nn.LayerNorm(8), torch.zeros(2, 8), 0),
}


@pytest.mark.parametrize("case", MACS)
def test_macs_are_those_of_the_formula(case):
    model, inputs, expected = MACS[case]
    with unchanged(model):
        assert measure.count_macs(model, inputs) == expected
        with torch.inference_mode():
            assert measure.count_macs(model, inputs) == expected


def test_a_shared_parameter_counts_once():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    assert measure.count_parameters(model) == measure.nonzero_parameters(model) == 16 + 4 + 4
    assert measure.size_bytes(model) == 4 * 24


def test_each_parameter_is_counted_by_itself_and_a_shared_one_under_its_first_name():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.BatchNorm1d(4))
    model[1].weight = model[0].weight
    prune.l1_unstructured(model[0], "weight", amount=6)
    counts = measure.nonzero_of(ModelView(model))
    assert counts == {"0.bias": 4, "0.weight_orig": 10, "1.bias": 4, "2.weight": 4, "2.bias": 0}
    assert sum(counts.values()) == measure.cost(model).nonzero == measure.nonzero_parameters(model)


def test_nonzero_counts_what_the_masks_leave():
    model = nn.Sequential(nn.Linear(10, 10, bias=False), nn.Linear(10, 10, bias=False))
    prune.l1_unstructured(model[0], "weight", amount=30)
    with torch.no_grad():
        model[1].weight[0] = 0.0
    assert measure.nonzero_parameters(model) == 70 + 90
    prune.remove(model[0], "weight")
    assert measure.nonzero_parameters(model) == 70 + 90


def test_cost_without_inputs_runs_nothing():
    def fail(*_):
        raise AssertionError("the model ran")

    model = nn.Linear(3, 4)
    model.register_forward_pre_hook(fail)
    assert measure.cost(model) == measure.Cost(params=16, nonzero=16, bytes=64, macs=None)


def test_latency_leaves_no_trace_and_is_positive():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout())
    inputs = torch.randn(3, 4)
    with unchanged(model):
        fast, slow = measure.latencies([model, model], inputs, repeats=3, warmup=1)
    assert fast.median > 0
    assert slow.median > 0
    assert "ms" in str(fast)


def test_one_repeat_has_no_spread():
    assert measure.latency(nn.Linear(2, 2), torch.zeros(1, 2), repeats=1).spread == 0.0


def test_no_repeats_is_refused():
    with pytest.raises(InvalidArgumentError, match="repeats must be at least 1, not 0"):
        measure.latency(nn.Linear(2, 2), torch.zeros(1, 2), repeats=0)


def test_failing_forward_is_named_and_nothing_changes():
    model = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 2))
    with unchanged(model), pytest.raises(ForwardError, match=r"(?s)Sequential failed.*shape \(3, 5\).*running_mean"):
        measure.count_macs(model, torch.zeros(3, 5))
