"""What errors in layers cost at the outputs, and how a global amount is shared out by it."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import netopt
from netopt.errors import MissingDataError
from netopt.importance.activations import float_outputs
from netopt.importance.output_costs import output_costs
from netopt.model.parameters import places


class Attended(nn.Module):
    """Fused projections, one of which is read transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(6, 18), nn.Parameter(torch.randn(6, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        return (nn.functional.scaled_dot_product_attention(q, k, v) @ self.out).mean(1)


NETS = {
    "linear": lambda: (nn.Sequential(nn.Linear(5, 7), nn.GELU(), nn.Linear(7, 1)), (6, 5)),
    "tokens": lambda: (
        nn.Sequential(nn.Linear(5, 7), nn.GELU(), nn.Linear(7, 1), nn.Flatten(1), nn.Linear(3, 1)),
        (6, 3, 5),
    ),
    "convolutions": lambda: (
        nn.Sequential(
            nn.Conv2d(4, 6, 3), nn.SiLU(), nn.Conv2d(6, 8, 3, groups=2, stride=2), nn.Flatten(), nn.Linear(8, 1)
        ),
        (4, 4, 6, 6),
    ),
    "one dimension": lambda: (
        nn.Sequential(nn.ConvTranspose1d(3, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(28, 1)),
        (5, 3, 5),
    ),
    "attention": lambda: (Attended(), (4, 3, 6)),
}


def built(kind):
    torch.manual_seed(0)
    model, shape = NETS[kind]()
    return model.double().eval(), torch.randn(shape, dtype=torch.float64)


def costs_of(model, data, **options):
    chosen = {name: place for name, place in places(model).items() if place.parameter.dim() > 1}
    return output_costs(model, chosen, data, outputs=float_outputs, **options)


@pytest.mark.parametrize("kind", NETS)
def test_of_one_output_they_are_the_squares_that_autograd_finds(kind):
    """With one output a sample a random sign does not matter."""
    model, x = built(kind)
    found = costs_of(model, [x[:2], x[2:]])
    layers = {name: one for name, one in model.named_modules() if isinstance(one, (nn.Linear, nn.modules.conv._ConvNd))}
    seen = {}
    for name, layer in layers.items():
        layer.register_forward_hook(lambda _, __, out, name=name: seen.update({name: out}))
    result = model(x).sum()
    assert layers
    for name, layer in layers.items():
        (gradient,) = torch.autograd.grad(result, seen[name], retain_graph=True)
        channels = 1 if isinstance(layer, nn.modules.conv._ConvNd) else -1
        squares = gradient.square().movedim(channels, 0).flatten(1).sum(1) / len(x)
        torch.testing.assert_close(found[f"{name}.weight"].outputs.flatten(), squares)


@pytest.mark.parametrize("kind", NETS)
def test_they_scale_with_what_reads_a_layer(kind):
    model, x = built(kind)
    before = costs_of(model, [x])
    first, *_, last = before
    with torch.no_grad():
        dict(model.named_parameters())[last].mul_(3)
    after = costs_of(model, [x])
    torch.testing.assert_close(after[first].outputs, 9 * before[first].outputs)
    torch.testing.assert_close(after[last].outputs, before[last].outputs)
    torch.testing.assert_close(after[first].inputs, before[first].inputs)


@pytest.mark.parametrize("importance", ["admm", "sparsegpt", "wanda_layerwise"])
@pytest.mark.parametrize("kind", NETS)
def test_a_global_amount_is_met_and_taken_where_it_costs_least(kind, importance):
    model, x = built(kind)
    data, names = list(x.split(1)), list(costs_of(model, [x]))
    total = sum(dict(model.named_parameters())[name].numel() for name in names)
    report = netopt.prune_weights(model, 0.5, importance=importance, data=data, include=names, progress=False)
    assert sum(row.before - row.after for row in report.rows) == round(total / 2)
    assert all(torch.isfinite(one).all() for one in model.parameters())


@pytest.mark.parametrize("importance", ["admm", "sparsegpt", "wanda_layerwise"])
def test_layers_and_outputs_that_matter_little_lose_more(importance):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 4)).double()
    with torch.no_grad():
        model[2].weight[:, :16] *= 0.05
    data = [torch.randn(64, 16, dtype=torch.float64) for _ in range(4)]
    netopt.prune_weights(model, 0.5, importance=importance, data=data, include="0", progress=False)
    mask = model[0].weight_mask
    assert mask.sum() == 256
    assert mask[:16].sum() < mask[16:].sum() / 4


@pytest.mark.parametrize("importance", ["admm", "sparsegpt", "wanda_layerwise"])
def test_sharing_out_leaves_more_of_the_outputs_than_equal_shares(importance):
    """Of nets whose layers and units matter unequally, on other data, in each of five."""
    for seed in range(5):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(24, 48), nn.ReLU(), nn.Linear(48, 48), nn.ReLU(), nn.Linear(48, 8)).double()
        with torch.no_grad():
            for layer in (model[0], model[2]):
                layer.weight.mul_(torch.rand(48, 1, dtype=torch.float64).mul(4).exp())
        data, unseen = [torch.randn(96, 24, dtype=torch.float64) for _ in range(4)], torch.randn(512, 24).double()
        wanted, lost = model(unseen).detach(), {}
        for scope in ("global", "layer"):
            pruned = copy.deepcopy(model)
            netopt.prune_weights(pruned, 0.6, importance=importance, data=data, scope=scope, progress=False)
            lost[scope] = float((pruned(unseen).detach() - wanted).square().mean())
        assert lost["global"] < lost["layer"]


def test_without_gradients_an_error_says_what_to_write():
    class Counted(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 3)

        def forward(self, x):
            return self.fc(x).argmax(-1)

    model, data = Counted(), [torch.randn(8, 4) for _ in range(2)]
    before = model.fc.weight.clone()
    with pytest.raises(MissingDataError, match="scope='layer'"):
        netopt.prune_weights(model, 0.5, importance="admm", data=data, progress=False)
    assert torch.equal(model.fc.weight, before)
    netopt.prune_weights(model, 0.5, importance="admm", data=data, scope="layer", progress=False)
    assert (model.fc.weight == 0).sum() == 6
