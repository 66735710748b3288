"""Each criterion against a second way to compute it, and scoring leaves no trace."""

from __future__ import annotations

import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from conftest import unchanged
from netopt import importance, masking
from netopt.errors import (
    ArgumentTypeError,
    EmptyDataError,
    InvalidArgumentError,
    MissingDataError,
    NonFiniteError,
    ShapeMismatchError,
    UnknownNameError,
)
from netopt.importance.evidence import collect, samples
from netopt.importance.registry import lookup
from netopt.model.parameters import places


class Mixed(nn.Module):
    """Every kind of weight that is pruned, and some that are not."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.recurrent = nn.LSTM(8, 4, num_layers=2, bidirectional=True, batch_first=True)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.conv = nn.Conv1d(8, 12, 3, groups=2, padding=1, stride=2, dilation=2)
        self.back = nn.ConvTranspose1d(12, 6, 2, groups=3)
        self.free = nn.Parameter(torch.randn(6, 5))
        self.norm = nn.LayerNorm(5)
        self.head = nn.Linear(5, 3)

    def forward(self, tokens):
        x = self.recurrent(self.embed(tokens))[0]
        x = self.attention(x, x, x)[0] + x
        x = self.back(self.conv(x.transpose(1, 2)).relu())
        return self.head(self.norm(x.mean(-1) @ self.free))


def mixed_data():
    generator = torch.Generator().manual_seed(0)
    return [
        (torch.randint(0, 11, (size, 6), generator=generator), torch.randint(0, 3, (size,), generator=generator))
        for size in (3, 2)
    ]


WEIGHTS = importance.names("weights")


@pytest.mark.parametrize("name", WEIGHTS)
def test_scoring_leaves_no_trace_and_repeats(name):
    model, data = Mixed(), mixed_data()
    model.embed.weight.requires_grad_(False)
    model(data[0][0]).sum().backward()
    with unchanged(model):
        first = importance.scores(model, data, name, loss_fn=F.cross_entropy)
        second = importance.scores(model, data, name, loss_fn=F.cross_entropy)
    assert list(first) == [key for key, place in places(model).items() if place.prunable]
    for key, score in first.items():
        assert score.shape == model.get_parameter(key).shape
        assert torch.equal(score, second[key])
        assert not score.requires_grad


@pytest.mark.parametrize("name", [name for name in WEIGHTS if lookup(name).needs])
def test_scoring_runs_under_no_grad_and_from_training_mode(name):
    model, data = Mixed().train(), mixed_data()
    expected = importance.scores(model, data, name, loss_fn=F.cross_entropy)
    with torch.no_grad():
        found = importance.scores(model, data, name, loss_fn=F.cross_entropy)
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def net():
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def batches(sizes=(3, 2)):
    generator = torch.Generator().manual_seed(0)
    return [
        (
            torch.randn(size, 4, generator=generator, dtype=torch.float64),
            torch.randint(0, 3, (size,), generator=generator),
        )
        for size in sizes
    ]


def gradients(model, scalar):
    weights = [model[0].weight, model[2].weight]
    return dict(zip(("0.weight", "2.weight"), torch.autograd.grad(scalar, weights, retain_graph=True), strict=True))


def sample_by_sample(model):
    """The gradients of each sample's loss and of each of its outputs, one backward pass each."""
    losses, outputs = [], []
    for x, y in batches():
        for index in range(len(x)):
            out = model(x[index : index + 1])
            losses.append(gradients(model, F.cross_entropy(out, y[index : index + 1])))
            outputs.append([gradients(model, value) for value in out.flatten()])
    return losses, outputs


def mean(values):
    return torch.stack(list(values)).mean(0)


BY_HAND = {
    "magnitude": lambda w, losses, outputs: w.abs(),
    "fisher": lambda w, losses, outputs: 0.5 * w**2 * mean(g**2 for g in losses),
    "taylor": lambda w, losses, outputs: mean((w * g).abs() for g in losses),
    "snip": lambda w, losses, outputs: (w * mean(losses)).abs(),
    "movement": lambda w, losses, outputs: -w * mean(losses),
    "saliency": lambda w, losses, outputs: mean(sum(g**2 for g in own) for own in outputs),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_against_one_backward_pass_a_sample(name):
    model = net()
    losses, outputs = sample_by_sample(model)
    found = importance.scores(model, batches(), name, loss_fn=F.cross_entropy)
    for key, score in found.items():
        weight = model.get_parameter(key).detach()
        expected = BY_HAND[name](weight, [one[key] for one in losses], [[one[key] for one in own] for own in outputs])
        torch.testing.assert_close(score, expected, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("name", WEIGHTS)
def test_how_samples_are_batched_does_not_matter(name):
    model, whole = net(), batches((6,))
    parts = [(whole[0][0][:2], whole[0][1][:2]), (whole[0][0][2:], whole[0][1][2:])]
    results = [importance.scores(model, data, name, loss_fn=F.cross_entropy) for data in (whole, parts)]
    for key in results[0]:
        torch.testing.assert_close(results[0][key], results[1][key])


def test_many_outputs_are_estimated_without_bias():
    model = nn.Sequential(nn.Linear(3, 200, bias=False)).double()
    data = [torch.randn(40, 3, dtype=torch.float64)]
    found = importance.scores(model, data, "saliency")["0.weight"]
    # d y_j / d w_ji = x_i, so the exact value is the mean of x_i squared, for every output alike.
    torch.testing.assert_close(found.mean(0), data[0].square().mean(0), rtol=0.05, atol=0)


def test_lamp_by_its_definition():
    model = nn.Linear(4, 3).double()
    score = importance.scores(model, None, "lamp")["weight"]
    weight = model.weight.detach()
    for i in range(3):
        for j in range(4):
            larger = weight.square()[weight.square() >= weight[i, j].square()]
            torch.testing.assert_close(score[i, j], weight[i, j].square() / larger.sum())
    assert score.max() == 1


def test_random_follows_the_seed_and_takes_nothing_from_it():
    model = nn.Linear(4, 3)
    torch.manual_seed(3)
    first = importance.scores(model, None, "random")["weight"]
    state = torch.get_rng_state()
    assert torch.equal(first, importance.scores(model, None, "random")["weight"])
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(4)
    assert not torch.equal(first, importance.scores(model, None, "random")["weight"])


def norms(model, data, **kwargs):
    return {name: one.input_norm for name, one in collect(model, needs={"input_norm"}, data=data, **kwargs).items()}


def test_input_norms_of_linear_layers():
    model, data = net(), batches()
    found = norms(model, data)
    x = torch.cat([one for one, _ in data])
    torch.testing.assert_close(found["0.weight"], x.norm(dim=0).expand(5, 4))
    torch.testing.assert_close(found["2.weight"], model[:2](x).detach().norm(dim=0).expand(3, 5))


CONVOLUTIONS = {
    "1d": (nn.Conv1d(4, 6, 3, stride=2, padding=1, dilation=2), (2, 4, 11)),
    "2d grouped": (nn.Conv2d(4, 6, (3, 2), padding=(1, 0), groups=2), (2, 4, 6, 5)),
    "depthwise": (nn.Conv2d(4, 8, 3, padding="same", groups=4), (2, 4, 6, 5)),
    "3d": (nn.Conv3d(2, 3, 2), (2, 2, 4, 3, 3)),
    "reflected": (nn.Conv2d(2, 3, 3, padding=1, padding_mode="reflect"), (2, 2, 5, 5)),
}


@pytest.mark.parametrize("case", CONVOLUTIONS)
def test_input_norms_of_convolutions_by_their_definition(case):
    layer, shape = CONVOLUTIONS[case]
    layer = layer.double()
    x = torch.randn(shape, dtype=torch.float64)
    found = norms(layer, [x])["weight"]
    # Output o of the layer with one weight set to 1 is that weight's input at every position.
    for index in [(0,) * layer.weight.dim(), tuple(size - 1 for size in layer.weight.shape)]:
        probe = torch.zeros_like(layer.weight)
        probe[index] = 1
        out = torch.func.functional_call(layer, {"weight": probe, "bias": torch.zeros_like(layer.bias)}, (x,))
        torch.testing.assert_close(found[index], out[:, index[0]].norm())


def test_input_norms_reach_every_kind_of_weight():
    model, data = Mixed().eval(), mixed_data()
    wanted = {name: place for name, place in places(model).items() if place.parameter.dim() > 1}
    found = norms(model, data, wanted=wanted)
    assert set(found) == set(wanted)
    tokens = torch.cat([x for x, _ in data])
    embedded = model.embed(tokens)
    hidden = model.recurrent(embedded)[0]
    counts = torch.bincount(tokens.flatten(), minlength=11).sqrt()
    torch.testing.assert_close(found["embed.weight"], counts[:, None].expand(11, 8))
    flat = embedded.detach().flatten(0, 1).norm(dim=0)
    torch.testing.assert_close(found["recurrent.weight_ih_l0"], flat.expand(16, 8))
    torch.testing.assert_close(found["attention.in_proj_weight"][0], hidden.detach().flatten(0, 1).norm(dim=0))
    # The last layer's hidden states but the last, forward in time.
    forward = hidden.detach()[:, :-1, :4].flatten(0, 1).norm(dim=0)
    torch.testing.assert_close(found["recurrent.weight_hh_l1"], forward.expand(16, 4))


def test_input_norms_of_parts_of_a_fused_projection():
    class Cross(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(4, 1, batch_first=True)

        def forward(self, query, memory):
            return self.attention(query, memory, memory)[0]

    query, memory = torch.randn(2, 3, 4), torch.randn(2, 5, 4)
    found = norms(Cross(), [((query, memory), None)])["attention.in_proj_weight"]
    torch.testing.assert_close(found[:4], query.flatten(0, 1).norm(dim=0).expand(4, 4))
    torch.testing.assert_close(found[4:], memory.flatten(0, 1).norm(dim=0).expand(8, 4))


def test_input_norms_of_batched_and_turned_weights():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.up = nn.Parameter(torch.randn(2, 4, 3))
            self.down = nn.Parameter(torch.randn(2, 4, 3))
            self.left = nn.Parameter(torch.randn(5, 6))

        def forward(self, x):
            hidden = torch.bmm(x, self.up)
            return self.left @ torch.bmm(hidden, self.down.mT)

    model, x = Experts(), torch.randn(2, 6, 4)
    found = norms(model, [x], wanted=places(model))
    torch.testing.assert_close(found["up"], x.norm(dim=1)[..., None].expand(2, 4, 3))
    hidden = torch.bmm(x, model.up).detach()
    torch.testing.assert_close(found["down"], hidden.norm(dim=1)[:, None].expand(2, 4, 3))
    out = torch.bmm(hidden, model.down.detach().mT)
    torch.testing.assert_close(found["left"], out.norm(dim=(0, 2)).expand(5, 6))


def test_evidence_through_masks_is_of_the_masked_model():
    model, data = net(), batches()
    masking.put(model, {"0.weight": torch.rand(5, 4) > 0.5})
    other = net()
    other.load_state_dict(masking.state_dict(model))
    for name in ("wanda", "magnitude", "fisher"):
        ours = importance.scores(model, data, name, loss_fn=F.cross_entropy)
        theirs = importance.scores(other, data, name, loss_fn=F.cross_entropy)
        for key in theirs:
            torch.testing.assert_close(ours[key], theirs[key])


def test_the_data_is_read_once_and_only_if_needed():
    read = []

    class Counted:
        def __iter__(self):
            read.append(1)
            return iter(batches())

    importance.scores(net(), Counted(), "magnitude")
    assert read == []
    collect(
        net(),
        needs=["grad", "grad_sq", "grad_abs", "output_grad_sq", "input_norm"],
        data=Counted(),
        loss_fn=F.cross_entropy,
    )
    assert read == [1]


def test_the_loss_a_model_returns_is_used():
    class WithLoss(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net()

        def forward(self, x, labels):
            logits = self.net(x)
            return {"loss": F.cross_entropy(logits, labels), "logits": logits}

    model = WithLoss()
    found = importance.scores(model, [{"x": x, "labels": y} for x, y in batches()], "fisher")
    expected = importance.scores(model.net, batches(), "fisher", loss_fn=F.cross_entropy)
    for key, score in expected.items():
        torch.testing.assert_close(found[f"net.{key}"], score)


def test_a_batch_is_cut_into_samples():
    x, y = torch.arange(6).view(3, 2), torch.arange(3)
    pieces = list(samples(({"x": x, "scale": torch.tensor(2.0)}, y)))
    assert [piece[1].tolist() for piece in pieces] == [[0], [1], [2]]
    assert torch.equal(torch.cat([piece[0]["x"] for piece in pieces]), x)
    assert all(piece[0]["scale"].dim() == 0 for piece in pieces)


@pytest.fixture
def registered():
    before = dict(importance.registry._REGISTERED)
    yield
    importance.registry._REGISTERED.clear()
    importance.registry._REGISTERED.update(before)


@pytest.mark.usefixtures("registered")
def test_criteria_can_be_added_but_not_twice():
    @importance.criterion("largest", needs=["grad"])
    def largest(seen):
        return torch.maximum(seen.weight.abs(), seen.grad.abs())

    assert "largest" in importance.names("weights")
    assert "largest" not in importance.names("neurons")
    assert importance.scores(net(), batches(), "largest", loss_fn=F.cross_entropy)
    with pytest.raises(InvalidArgumentError, match=r"largest.*exists"):
        importance.criterion("largest")(largest)


def test_a_function_or_scores_serve_too():
    model = net()
    by_function = importance.scores(model, None, lambda seen: -seen.weight)
    given = importance.scores(model, None, {name: -p.detach() for name, p in model.named_parameters()})
    assert all(torch.equal(given[key], by_function[key]) for key in by_function)


WRONG = {
    "unknown": ({"importance": "magnitud"}, UnknownNameError, "Did you mean 'magnitude'"),
    "no kind": ({"importance": 3}, ArgumentTypeError, "importance.*int"),
    "no data": ({"data": None, "importance": "wanda"}, MissingDataError, "input_norm.*data="),
    "no loss": ({"importance": "fisher", "loss_fn": None}, MissingDataError, "loss_fn="),
    "empty": ({"data": [], "importance": "wanda"}, EmptyDataError, "no batch"),
    "bad shape": ({"importance": lambda seen: seen.weight[0]}, ShapeMismatchError, r"0.weight.*\(4,\)"),
    "no tensor": ({"importance": lambda seen: 1.0}, ArgumentTypeError, "0.weight.*float"),
    "nan score": ({"importance": lambda seen: seen.weight / 0 * 0}, NonFiniteError, "0.weight"),
    "missing": ({"importance": {"0.weight": torch.ones(5, 4)}}, UnknownNameError, "2.weight"),
    "loss": ({"importance": "snip", "loss_fn": lambda out, y: out.sum() / 0}, NonFiniteError, "inf"),
    "no graph": ({"importance": "snip", "loss_fn": lambda out, y: out.detach().sum()}, InvalidArgumentError, "detach"),
    "evidence": ({"importance": lambda seen: seen.grad}, AttributeError, "grad.*needs"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_scored_is_said(case):
    given, error, message = WRONG[case]
    model = net()
    arguments = {"data": batches(), "importance": "magnitude", "loss_fn": F.cross_entropy} | given
    with unchanged(model), pytest.raises(error, match=message):
        importance.scores(model, arguments.pop("data"), arguments.pop("importance"), **arguments)


def test_nan_weights_and_unseen_weights_are_named():
    model = net()
    model[2].weight.data[0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match=r"2\.weight"):
        importance.scores(model)

    class Unused(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return self.used(x)

    with pytest.raises(InvalidArgumentError, match=r"unused\.weight.*exclude"):
        importance.scores(Unused(), [torch.randn(2, 4)], "wanda")
    assert not importance.scores(Unused(), [torch.randn(2, 4)], "saliency")["unused.weight"].any()


@pytest.mark.parametrize("of", ["weights", "neurons", "layers"])
def test_every_criterion_cites_its_source(of):
    known = [importance.lookup(name, of=of) for name in importance.names(of)]
    # Examples of docstrings may have registered some, which no file holds.
    ours = [one for one in known if getattr(sys.modules[one.function.__module__], one.function.__name__, None)]
    assert len([one for one in ours if one.function.__module__.startswith("netopt")]) > 2
    assert not [one.name for one in ours if one.function.__module__.startswith("netopt") and not one.paper]
