"""Scores by what is lost after reconstruction: equal to brute force, and blind to nothing that reads an axis."""

import copy
import itertools

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaModel

import netopt
from netopt.errors import MissingDataError
from netopt.importance.elimination import Consumer, eliminate, shrunk
from netopt.prune.allocation import reconstruction_scores


def problem(size, each, outputs, seed):
    """A consumer of ``size`` neurons with ``each`` columns."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    columns = size * each + 1
    mixed, gradients, weight = draw(columns, 3 * columns), draw(outputs, 5 * outputs), draw(outputs, columns)
    gradient = gradients @ gradients.T / (5 * outputs)
    at = torch.randperm(columns, generator=generator)[: size * each].view(size, each)
    return Consumer(weight.T @ gradient @ weight, mixed @ mixed.T / (3 * columns), at), weight, gradient


def least_loss(consumer, weight, gradient, gone):
    """The least cost of a weight without the columns of these neurons, by solving for the others."""
    moment = consumer.moment.clone()
    moment.diagonal().add_(1e-3 * moment.diagonal().mean() + 1e-12)
    lost = consumer.columns[list(gone)].flatten()
    left = [column for column in range(len(moment)) if column not in set(lost.tolist())]
    new = weight.clone()
    new[:, lost] = 0
    new[:, left] += weight[:, lost] @ torch.linalg.solve(moment[left][:, left], moment[left][:, lost]).T
    change = new - weight
    return float(torch.trace(change.T @ gradient @ change @ moment))


@pytest.mark.parametrize(("size", "each", "consumers"), [(6, 1, 1), (5, 3, 1), (6, 1, 2), (4, 2, 3)])
@pytest.mark.parametrize("seed", range(3))
def test_greedy_elimination_is_that_of_brute_force(size, each, consumers, seed):
    problems = [problem(size, each, outputs, seed + 10 * outputs) for outputs in range(2, 2 + consumers)]

    def loss(gone):
        return sum(least_loss(*one, gone) for one in problems)

    gone, expected, least = [], torch.zeros(size, dtype=torch.float64), 0.0
    while len(gone) < size - 1:
        rises = {one: loss([*gone, one]) - (loss(gone) if gone else 0.0) for one in range(size) if one not in gone}
        chosen = min(rises, key=rises.get)
        least = max(least, rises[chosen])
        expected[chosen] = least
        gone.append(chosen)
    scores = eliminate([one[0] for one in problems], size, at_once=0)
    assert scores.argsort().tolist() == [*gone, *(set(range(size)) - set(gone))]
    torch.testing.assert_close(scores[gone], expected[gone], rtol=1e-5, atol=1e-9)
    assert float(scores.max()) == float(scores[list(set(range(size)) - set(gone))])


def test_sums_of_the_lowest_scores_are_the_loss_of_the_best_small_sets():
    consumer, weight, gradient = problem(6, 1, 4, 0)
    scores = eliminate([consumer], 6, at_once=0).sort().values
    losses = {
        count: min(least_loss(consumer, weight, gradient, gone) for gone in itertools.combinations(range(6), count))
        for count in (1, 2, 3)
    }
    for count, loss in losses.items():
        assert loss <= float(scores[:count].sum()) * (1 + 1e-6) <= 2 * loss


def test_correlations_are_shrunk_as_far_as_samples_are_few():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4000, 30, generator=generator, dtype=torch.float64)
    few, many = x[:20].T @ x[:20] / 20, x.T @ x / 4000
    off = ~torch.eye(30, dtype=torch.bool)
    assert shrunk(few, 20)[off].abs().mean() < 0.5 * few[off].abs().mean()
    assert shrunk(many, 4000).diagonal().equal(many.diagonal())
    one = torch.ones(1, 1, dtype=torch.float64)
    assert shrunk(one, 1).equal(one)


class Twins(nn.Module):
    """Every hidden channel is there twice, with different weights behind."""

    def __init__(self, kind):
        super().__init__()
        if kind == "linear":
            self.first, self.last = nn.Linear(6, 16), nn.Linear(16, 3)
        elif kind == "conv":
            self.first, self.last = nn.Conv2d(2, 16, 3), nn.Conv2d(16, 3, 3)
        elif kind == "flattened":
            self.first, self.last = nn.Conv1d(2, 16, 3), nn.Linear(16 * 6, 3)
        else:
            self.first, self.last = nn.Conv2d(2, 16, 3), nn.Conv2d(16, 4, 3, groups=2)
        self.kind = kind
        with torch.no_grad():
            half = 8 if kind != "grouped" else 4
            for part in self.first.weight, self.first.bias:
                for start in range(0, 16, 2 * half):
                    part[start + half : start + 2 * half] = part[start : start + half]

    def forward(self, x):
        hidden = self.first(x).relu()
        return self.last(hidden.flatten(1) if self.kind == "flattened" else hidden)


SIZES = {"linear": (6,), "conv": (2, 8, 8), "flattened": (2, 8), "grouped": (2, 8, 8)}


@pytest.mark.parametrize("kind", SIZES)
def test_of_twins_one_goes_and_nothing_is_lost(kind):
    torch.manual_seed(0)
    model, data = Twins(kind), [torch.randn(200, *SIZES[kind]) for _ in range(3)]
    dense = copy.deepcopy(model)
    netopt.prune_neurons(model, data[0][:4], 0.5, importance="reconstruction", data=data[:2], progress=False)
    assert model.first.weight.shape[0] == 8
    with torch.no_grad():
        difference = (model(data[2]) - dense(data[2])).square().mean() / dense(data[2]).var()
    assert float(difference) < 1e-3


class Cut(nn.Module):
    """Outputs of which the loss sees one."""

    def __init__(self):
        super().__init__()
        self.hidden, self.out = nn.Linear(6, 8), nn.Linear(8, 2)
        with torch.no_grad():
            self.out.weight.zero_()
            self.out.weight[0, :4] = 1
            self.out.weight[1, 4:] = 1

    def forward(self, x):
        return self.out(self.hidden(x).tanh())


def test_gradients_are_those_of_the_loss_where_it_is_given():
    torch.manual_seed(0)
    model, data = Cut(), [(torch.randn(64, 6), torch.randn(64)) for _ in range(2)]

    def loss_fn(result, target):
        return (result[:, 0] - target).square().mean()

    options = {"amount": 4, "importance": "reconstruction", "data": data, "repair": False, "progress": False}
    report = netopt.prune_neurons(model, data[0][0][:4], loss_fn=loss_fn, **options)
    assert report.plan.axes[0].kept.tolist() == [0, 1, 2, 3]


def test_nothing_of_the_model_changes_and_what_is_not_differentiable_is_said():
    torch.manual_seed(0)
    model, x = Cut(), torch.randn(32, 6)
    before = copy.deepcopy(model.state_dict())
    plan = netopt.plan_neurons(model, x, 0.5, importance="reconstruction", progress=False)
    assert len(plan.axes) == 1
    assert all(torch.equal(one, before[name]) for name, one in model.state_dict().items())
    assert all(one.requires_grad and one.grad is None for one in model.parameters())

    class Rounded(Cut):
        def forward(self, x):
            return super().forward(x).detach()

    with pytest.raises(MissingDataError, match="differentiable"):
        netopt.plan_neurons(Rounded(), x, 0.5, importance="reconstruction", progress=False)


@pytest.mark.parametrize("kind", SIZES)
def test_measured_scores_say_how_far_the_outputs_change(kind):
    """On data not measured on, the change of the outputs is near the sum of the scores of what is removed."""
    torch.manual_seed(0)
    model, data = Twins(kind), [torch.randn(64, *SIZES[kind]) for _ in range(4)]
    with torch.no_grad():
        model.first.weight.add_(torch.randn_like(model.first.weight), alpha=0.1)
    dense, before = copy.deepcopy(model), copy.deepcopy(model.state_dict())
    scores = reconstruction_scores(model, data[0][:4], data, measured=True, progress=False)
    assert all(torch.equal(one, before[name]) for name, one in model.state_dict().items())
    report = netopt.prune_neurons(model, data[0][:4], 0.5, importance=scores, data=data, progress=False)
    cut = report.plan.axes[0]
    gone = [place for place in range(cut.size) if place not in cut.kept.tolist()]
    predicted = float(scores[cut.name][gone].sum())
    x = torch.randn(256, *SIZES[kind])
    with torch.no_grad():
        seen = float((model(x) - dense(x)).square().sum()) / 256
    assert 0.4 * seen < predicted < 2.5 * seen
    assert report.plan.predicted["output_change"] == pytest.approx(predicted / scores.scale)


@pytest.mark.parametrize("silent", [0, 1])
def test_positions_that_several_layers_share_are_judged_by_all_of_them(silent):
    """Rotated queries and keys lose the same positions in every layer; one whose heads go nowhere says nothing."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaModel(LlamaConfig(vocab_size=50, use_cache=False, **sizes)).eval()
    inputs = {"input_ids": torch.randint(50, (6, 10))}
    axis = next(one for one in netopt.find_axes(model, inputs).free if one.name.endswith("q_proj/head_dim"))
    assert {member.tensor.split(".")[1] for member in axis.members} >= {"0", "1"}
    model.layers[silent].self_attn.o_proj.weight.data.zero_()
    scores = reconstruction_scores(model, inputs, [inputs], progress=False)[axis.name]
    assert bool((scores > 1e-9 * scores.max()).all())
    model.layers[1 - silent].self_attn.o_proj.weight.data.zero_()
    none = reconstruction_scores(model, inputs, [inputs], progress=False)[axis.name]
    assert none.max() < 1e-6 * scores.max()
