"""Which tensors are layer weights: several matrices in one, weights behind a norm, and nothing left out in silence."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from conftest import unchanged
from netopt import importance, masking, prune_weights
from netopt.errors import ArgumentTypeError, InvalidArgumentError, NothingToPruneError, UnknownNameError
from netopt.model.parameters import places


class Experts(nn.Module):
    """Four experts in two tensors, in the ways in which libraries multiply with them; each token has its own."""

    def __init__(self, way):
        super().__init__()
        self.way = way
        self.router = nn.Linear(8, 4)
        transposed = way in ("bmm", "einsum")
        self.up = nn.Parameter(torch.randn(4, 8, 16) if transposed else torch.randn(4, 16, 8))
        self.down = nn.Parameter(torch.randn(4, 16, 8) if transposed else torch.randn(4, 8, 16))
        self.bias = nn.Parameter(torch.zeros(4, 8))

    def forward(self, x):
        x = x.flatten(0, -2)
        pick = self.router(x).argmax(-1)
        if self.way in ("bmm", "einsum"):
            every = x.expand(4, *x.shape)
            product = torch.bmm if self.way == "bmm" else lambda a, b: torch.einsum("eti,eio->eto", a, b)
            out = product(product(every, self.up).relu(), self.down) + self.bias[:, None]
            return out[pick, torch.arange(len(x))]
        if self.way == "loop":
            return torch.stack(
                [
                    F.linear(F.linear(one, self.up[at]).relu(), self.down[at])
                    for one, at in zip(x, pick.tolist(), strict=True)
                ]
            )
        order = pick.argsort(stable=True)
        ends = torch.bincount(pick, minlength=4).cumsum(0).int()
        product = grouped_by_library if self.way == "library" else F.grouped_mm
        hidden = product(x[order], self.up.mT, offs=ends).relu()
        return product(hidden, self.down.mT, offs=ends)[order.argsort()]


def grouped_by_library(x, weights, offs):
    transformers = pytest.importorskip("transformers.integrations.moe")
    assert transformers
    return torch.ops.transformers.grouped_mm_fallback(x, weights, offs)


WAYS = ["bmm", "einsum", "loop", "grouped", "library"]
LAYERS = importance.names("layers")
EVERY = [name for name in (*importance.names("weights"), *LAYERS) if name != "distance_to_one"]


def batches(model):
    torch.manual_seed(3)
    return [(torch.randn(2, 24, 8), torch.zeros(1)) for _ in range(2)]


def loss(result, _):
    return result.square().sum()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", EVERY)
def test_experts_in_one_tensor_are_pruned_by_every_criterion(name, way):
    model = Experts(way)
    if way in ("grouped", "library") and name in LAYERS:
        model.router.weight.requires_grad_(False)
    report = prune_weights(
        model, 0.5, importance=name, data=batches(model), loss_fn=loss, scope="layer", progress=False
    )
    assert {row.name for row in report.rows} == {"router.weight", "up", "down"}
    for tensor in ("up", "down", "router.weight"):
        assert masking.sparsity(model)[tensor] == 0.5
    assert torch.isfinite(model(batches(model)[0][0])).all()


@pytest.mark.parametrize("way", WAYS)
def test_the_inputs_of_experts_are_what_each_of_them_met(way):
    model = Experts(way)
    seen = importance.collect(model, {"up": places(model)["up"]}, {"input_norm"}, data=batches(model))["up"].input_norm
    with torch.no_grad():
        x = torch.cat([batch.flatten(0, 1) for batch, _ in batches(model)])
        pick = model.router(x).argmax(-1)
    for expert in range(4):
        met = x if way in ("bmm", "einsum") else x[pick == expert]
        norms = met.square().sum(0).sqrt()
        want = norms[:, None] if way in ("bmm", "einsum") else norms[None]
        torch.testing.assert_close(seen[expert], want.expand_as(seen[expert]))


def test_everything_left_out_is_listed_with_its_share():
    model = nn.Sequential(nn.Embedding(50, 8), Experts("loop"), nn.LayerNorm(8), nn.Linear(8, 2))
    model.register_parameter("table", nn.Parameter(torch.randn(5, 7)))
    report = prune_weights(model, 0.5)
    total = sum(parameter.numel() for parameter in model.parameters())
    assert list(report.frozen) == ["0.weight", "table", "1.bias", "4 biases, norms and scales"]
    for name, count in (("0.weight", 400), ("table", 35), ("1.bias", 32), ("4 biases, norms and scales", 22)):
        assert report.frozen[name].startswith(f"{100 * count / total:.1f} % of the parameters: ")
    assert "left out:" in str(report)
    assert "is an embedding" in str(report)
    listed = sum(place.parameter.numel() for place in places(model).values() if place.prunable) + 400 + 35 + 32 + 22
    assert listed == total


def test_the_headline_says_what_is_zero_and_was():
    model = nn.Linear(10, 10)
    for amount, before in ((0.5, 0), (0.8, 0.5), (0.9, 0.8)):
        report = prune_weights(model, amount)
        assert str(report).startswith(
            f"prune_weights: {amount * 100:.1f} % zero ({before * 100:.1f} % before) of 100 entries"
        )
        assert report.removed == pytest.approx(amount)


NORMED = {
    "weight_norm": parametrizations.weight_norm,
    "weight_norm along 1": lambda layer: parametrizations.weight_norm(layer, dim=1),
    "spectral_norm": parametrizations.spectral_norm,
    "old weight_norm": nn.utils.weight_norm,
    "old spectral_norm": nn.utils.spectral_norm,
}
LAYERS_OF = {
    "linear": lambda: nn.Linear(6, 4),
    "conv": lambda: nn.Conv1d(6, 4, 3, padding=1),
    "transposed": lambda: nn.ConvTranspose1d(6, 4, 3, padding=1),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("kind", LAYERS_OF)
@pytest.mark.parametrize("norm", NORMED)
def test_what_a_normed_layer_computes_with_is_pruned(norm, kind, mode):
    layer = NORMED[norm](LAYERS_OF[kind]())
    model = nn.Sequential(layer, nn.Flatten(), nn.LazyLinear(3))
    x = torch.randn(2, 6) if kind == "linear" else torch.randn(2, 6, 5)
    model(x)
    getattr(model, mode)()
    with unchanged(model):
        known = places(model)
        normed = [name for name, place in known.items() if place.prunable]
    assert len(normed) == 2
    assert not any(name.endswith(("_g", "original0")) for name in normed)
    report = prune_weights(model, 0.5, scope="layer")
    model.eval()(x)
    assert (layer.weight == 0).float().mean() == 0.5
    assert [row.name for row in report.rows] == normed
    model.train()(x).sum().backward()
    masking.bake(model)
    model.eval()(x)
    assert (layer.weight == 0).float().mean() == 0.5


def test_the_smallest_of_the_normalised_weights_go():
    layer = parametrizations.weight_norm(nn.Linear(6, 4))
    with torch.no_grad():
        layer.parametrizations.weight.original1[0] *= 100  # the direction's length is nothing the layer computes with
    magnitudes = layer.weight.detach().abs()
    prune_weights(layer, 0.5)
    zero = layer.weight == 0
    assert magnitudes[zero].max() <= magnitudes[~zero].min()


def test_nothing_whose_norm_is_taken_is_lost():
    layer = parametrizations.weight_norm(nn.Linear(6, 40))
    with torch.no_grad():
        layer.parametrizations.weight.original0[:8] *= 1e-3
    prune_weights(layer, 0.8)
    assert torch.isfinite(layer.weight).all()
    assert (layer.weight == 0).float().mean() == 0.8
    assert (layer.weight != 0).any(1).all()
    with unchanged(layer), pytest.raises(InvalidArgumentError, match=r"nothing would be left of a part of"):
        prune_weights(layer, 0.95)


class Antisymmetric(nn.Module):
    def forward(self, x):
        return x.triu(1) - x.triu(1).mT


def test_a_weight_whose_zeros_are_lost_is_named():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    parametrize.register_parametrization(model[0], "weight", Antisymmetric())
    report = prune_weights(model, 0.5)
    assert [row.name for row in report.rows] == ["1.weight"]
    assert "no zeros there" in report.frozen["0.parametrizations.weight.original"]
    with pytest.raises(NothingToPruneError, match=r"parametrizations.weight.original"):
        prune_weights(model[:1], 0.5)


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_lengths_of_rows_are_no_weights_of_an_lstm():
    model = nn.utils.weight_norm(nn.LSTM(6, 5), "weight_hh_l0")
    prune_weights(model, 0.5, scope="layer")
    assert "weight_hh_l0_g" not in masking.masks(model)
    model(torch.randn(3, 1, 6))
    assert (model.weight_hh_l0 == 0).float().mean() == 0.5
    assert (model.weight_hh_l0 != 0).any(1).all()


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("norm", NORMED)
def test_normed_layers_meet_their_inputs(norm):
    model = nn.Sequential(NORMED[norm](nn.Linear(6, 4)), nn.Linear(4, 3))
    report = prune_weights(model, 0.5, importance="wanda", data=[torch.randn(5, 6)], scope="row")
    assert len(report.rows) == 2


class Unused(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.idle, self.idler = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return self.conv1(x)


def test_what_meets_no_inputs_is_left_out_unless_it_is_named():
    data = [torch.randn(3, 4)]
    model = Unused()
    report = prune_weights(model, 0.5, importance="wanda", data=data)
    assert list(masking.masks(model)) == ["conv1.weight"]
    assert "met no inputs" in report.frozen["idle.weight"]
    assert masking.sparsity(model)["conv1.weight"] == 0.5
    model = Unused()
    with unchanged(model), pytest.raises(InvalidArgumentError, match=r"'idle.weight', 'idler.weight' met no inputs"):
        prune_weights(model, 0.5, importance="wanda", data=data, include=["idle.weight", "idler.weight", "conv1"])
    prune_weights(model, 0.5, importance="wanda", data=data, include="conv1*")
    assert list(masking.masks(model)) == ["conv1.weight"]


@pytest.mark.filterwarnings("ignore:.*nested tensors.*:UserWarning", "ignore:Sparse")
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: torch.randn(4, 4).to(torch.float8_e4m3fn), "float8_e4m3fn"),
        (lambda: torch.eye(4).to_sparse(), "no dense tensor"),
        (lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]), "no dense tensor"),
        (lambda: torch.ones(4, 4, dtype=torch.complex64), "complex64"),
    ],
)
def test_tensors_that_cannot_be_masked_are_listed_and_refused_by_name(make, message):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[0].weight = nn.Parameter(make(), requires_grad=False)
    with pytest.raises(ArgumentTypeError, match=f"'0.weight'.*{message}"):
        prune_weights(model, 0.5, include="0.weight")
    report = prune_weights(model, 0.5)
    assert [row.name for row in report.rows] == ["1.weight"]
    assert message in report.frozen["0.weight"]


def test_only_criteria_of_neurons_are_suggested_for_neurons():
    with pytest.raises(UnknownNameError) as raised:
        importance.lookup("nothing like it", of="neurons")
    assert "sparsegpt" not in str(raised.value)
    with pytest.raises(UnknownNameError, match="sparsegpt"):
        prune_weights(nn.Linear(2, 2), 0.5, importance="nothing like it")


@pytest.mark.filterwarnings("ignore")
def test_sharded_weights_are_refused(tmp_path):
    fully_shard = pytest.importorskip("torch.distributed.fsdp").fully_shard
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    try:
        model = nn.Sequential(nn.Linear(4, 4))
        fully_shard(model, mesh=torch.distributed.init_device_mesh("cpu", (1,)))
        with pytest.raises(InvalidArgumentError, match="before fully_shard"):
            prune_weights(model, 0.5)
    finally:
        torch.distributed.destroy_process_group()


def test_torch_prunes_behind_a_norm_too():
    layer = parametrizations.weight_norm(nn.Linear(6, 4))
    prune_weights(layer, 0.5)
    assert prune.is_pruned(layer)
