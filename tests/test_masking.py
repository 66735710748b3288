"""Masks are put on, made permanent, taken off, saved, loaded and held, and the model stays what it was otherwise."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from conftest import bits, unchanged
from netopt import masking
from netopt.errors import ArgumentTypeError, MaskError, ShapeMismatchError, UnknownNameError
from netopt.model.parameters import places


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(6, 6, bias=False)
        self.second = nn.Linear(6, 6)
        self.second.weight = self.first.weight
        self.free = nn.Parameter(torch.randn(6, 3))

    def forward(self, x):
        return self.second(self.first(x).relu()) @ self.free


class Recurrent(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.cell = kind(6, 5, num_layers=2, bidirectional=True, batch_first=True)

    def forward(self, x):
        return self.cell(x.view(-1, 1, 6))[0]


class Attentive(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)

    def forward(self, x):
        x = x.view(-1, 1, 6)
        return self.attention(x, x, x)[0]


MODELS = {
    "linear": lambda: nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)),
    "conv": lambda: nn.Sequential(nn.Unflatten(1, (2, 3)), nn.Conv1d(2, 4, 2), nn.ConvTranspose1d(4, 2, 2, groups=2)),
    "tied": Tied,
    "lstm": lambda: Recurrent(nn.LSTM),
    "gru": lambda: Recurrent(nn.GRU),
    "attention": Attentive,
    "encoder": lambda: nn.Sequential(nn.Unflatten(1, (1, 6)), nn.TransformerEncoderLayer(6, 2, 8, batch_first=True)),
    "half": lambda: nn.Linear(6, 4).bfloat16(),
}


@pytest.fixture(params=MODELS)
def model(request):
    return MODELS[request.param]().eval()


def inputs(model):
    return torch.randn(3, 6, generator=torch.Generator().manual_seed(1)).to(next(model.parameters()).dtype)


def random_masks(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.rand(place.parameter.shape, generator=generator) > 0.4
        for name, place in places(model).items()
        if place.parameter.dim() > 1
    }


def zeroed(model, masks):
    """The law's other side: a model whose entries are zeros, and that knows of no mask."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        for name, place in places(other).items():
            if name in masks:
                place.parameter.mul_(masks[name])
    return other


def test_masked_computes_what_zeroed_computes(model):
    masks, x = random_masks(model), inputs(model)
    expected = zeroed(model, masks)(x)
    masking.put(model, masks)
    for context in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        with context():
            torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-6)
    assert {name: bits(mask) for name, mask in masking.masks(model).items()} == {
        name: bits(mask) for name, mask in masks.items()
    }


def test_masked_gets_the_gradients_of_zeroed_and_none_below_the_mask(model):
    masks, x = random_masks(model), inputs(model)
    other = zeroed(model, masks)
    masking.put(model, masks)
    model(x).sum().backward()
    other(x).sum().backward()
    for name, place in places(model).items():
        wanted = places(other)[name].parameter.grad
        if name in masks and wanted is not None:
            wanted = wanted * masks[name]
        torch.testing.assert_close(place.parameter.grad, wanted, rtol=1e-4, atol=1e-6)


def test_strip_is_the_inverse_of_put(model):
    before = {name: (id(parameter), bits(parameter)) for name, parameter in model.named_parameters()}
    classes, keys = [type(part) for part in model.modules()], list(model.state_dict())
    x = inputs(model)
    expected = model(x)
    masks = random_masks(model)
    masking.put(model, masks)
    taken = masking.strip(model)
    assert {name: bits(mask) for name, mask in taken.items()} == {name: bits(mask) for name, mask in masks.items()}
    assert {name: (id(parameter), bits(parameter)) for name, parameter in model.named_parameters()} == before
    assert ([type(part) for part in model.modules()], list(model.state_dict())) == (classes, keys)
    torch.testing.assert_close(model(x), expected)
    assert not prune.is_pruned(model)


def test_bake_writes_the_zeros_and_keeps_objects_order_and_ties(model):
    order = [(name, id(parameter)) for name, parameter in model.named_parameters()]
    every = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    masks, x = random_masks(model), inputs(model)
    masking.put(model, masks)
    expected = model(x)
    masking.bake(model)
    assert [(name, id(parameter)) for name, parameter in model.named_parameters()] == order
    assert [name for name, _ in model.named_parameters(remove_duplicate=False)] == every
    torch.testing.assert_close(model(x), expected)
    for name, mask in masks.items():
        assert not places(model)[name].parameter[~mask].any()
    assert not list(model.buffers())


@pytest.mark.parametrize("take_off", [masking.bake, masking.strip])
def test_taking_off_twice_is_taking_off_once(model, take_off):
    masking.put(model, random_masks(model))
    take_off(model)
    with unchanged(model):
        assert take_off(model) == {}


def test_torch_sees_the_masks(model):
    masks = random_masks(model)
    masking.put(model, masks)
    assert prune.is_pruned(model)
    for name in masks:
        place = places(model)[name]
        for module, attribute in place.owners:
            assert f"{attribute}_orig" in module._parameters
            assert f"{attribute}_mask" in module._buffers
            prune.remove(module, attribute)
            assert torch.equal(module._parameters[attribute] != 0, masks[name])
    assert not prune.is_pruned(model)
    assert torch.isfinite(model(inputs(model))).all()


def test_torch_may_prune_further_and_the_mask_stays_one():
    layer = nn.Linear(8, 8)
    mask = torch.rand(8, 8) > 0.3
    masking.put(layer, {"weight": mask})
    prune.l1_unstructured(layer, "weight", amount=10)
    after = int(layer.weight_mask.sum())
    assert after == int(mask.sum()) - 10
    copy.deepcopy(layer)(torch.randn(2, 8)).sum().backward()
    masking.put(layer, {"weight": torch.rand(8, 8) > 0.5})
    assert len(layer._forward_pre_hooks) == 1
    kept = masking.bake(layer)["weight"]
    assert torch.equal(layer.weight != 0, kept)
    assert not kept[~mask].any()


def test_masks_put_by_torch_are_taken_off_too():
    model = nn.Sequential(nn.Linear(4, 4), nn.LSTM(4, 4))
    prune.l1_unstructured(model[0], "weight", amount=5)
    prune.random_unstructured(model[1], "weight_hh_l0", amount=5)
    assert masking.sparsity(model).zeros["0.weight"] == 5
    masking.bake(model)
    assert int((model[0].weight == 0).sum()) == int((model[1].weight_hh_l0 == 0).sum()) == 5
    assert not prune.is_pruned(model)
    assert model[1](torch.randn(2, 1, 4))[0].shape == (2, 1, 4)


def test_two_masks_remove_what_either_removes(model):
    first, second = random_masks(model, 1), random_masks(model, 2)
    masking.put(model, first)
    masking.put(model, second)
    hooks = [hook for part in model.modules() for hook in part._forward_pre_hooks.values()]
    owners = sum(len(place.owners) for name, place in places(model).items() if name in first)
    assert len(hooks) == owners
    for name, mask in masking.masks(model).items():
        assert torch.equal(mask, first[name] & second[name])


def test_the_mask_given_is_copied():
    layer, mask = nn.Linear(2, 2), torch.ones(2, 2, dtype=torch.bool)
    masking.put(layer, {"weight": mask})
    mask.zero_()
    assert masking.sparsity(layer).total == 0


def test_a_tied_weight_goes_by_either_name():
    model = Tied()
    masking.put(model, {"second.weight": torch.eye(6, dtype=torch.bool)})
    assert model.first.weight_orig is model.second.weight_orig
    assert torch.equal(model.first.weight, model.second.weight)
    assert list(masking.masks(model)) == ["first.weight"]


@pytest.mark.parametrize(
    ("masks", "error", "message"),
    [
        ({"0.wieght": torch.ones(5, 6).bool()}, UnknownNameError, "0.wieght.*Did you mean '0.weight'"),
        ({"0.weight": torch.ones(5, 6)}, ArgumentTypeError, "0.weight.*boolean.*float32"),
        ({"0.weight": [[True]]}, ArgumentTypeError, "boolean tensor.*list"),
        ({"2.weight": torch.ones(3, 5).bool(), "0.weight": torch.ones(6, 5).bool()}, ShapeMismatchError, r"\(6, 5\)"),
    ],
)
def test_a_mask_that_does_not_fit_changes_nothing(masks, error, message):
    model = MODELS["linear"]()
    with unchanged(model), pytest.raises(error, match=message):
        masking.put(model, masks)


def test_sparsity_counts_each_tensor_and_all():
    model = nn.Sequential(nn.Linear(4, 2), nn.BatchNorm1d(2), nn.Linear(2, 2))
    masking.put(model, {"0.weight": torch.tensor([[True, False, False, False]] * 2)})
    counted = masking.sparsity(model)
    assert counted.tensors == {"0.weight": 0.75, "2.weight": 0.0}
    assert counted.total == float(counted) == 0.5
    assert counted["0.weight"] == 0.75
    assert "75.0000%" in str(counted)


def test_saving_takes_dense_names_and_no_more_memory(model):
    before = model.state_dict()
    masks = random_masks(model)
    masking.put(model, masks)
    state = masking.state_dict(model)
    assert list(state) == list(before)
    assert all(state[name].dtype == before[name].dtype for name in state)
    fresh = copy.deepcopy(model)
    masking.strip(fresh)
    fresh.load_state_dict(state)
    x = inputs(model)
    torch.testing.assert_close(fresh(x), model(x))


@pytest.mark.parametrize("masked", [True, False], ids=["into masked", "into dense"])
@pytest.mark.parametrize("form", ["dense", "torch", "bits", "zeros"])
def test_every_checkpoint_loads_into_every_model(model, form, masked):
    source = copy.deepcopy(model)
    for parameter in source.parameters():
        nn.init.normal_(parameter.data)
    masks = random_masks(model, 3)
    if form != "dense":
        masking.put(source, masks)
    state = masking.state_dict(source, bits=form == "bits") if form in ("bits", "zeros") else source.state_dict()
    state = pickle.loads(pickle.dumps(state))
    if masked:
        masking.put(model, random_masks(model, 4))
        old = masking.masks(model)
    result = masking.load_state_dict(model, state)
    x = inputs(model)
    if form in ("torch", "bits"):
        assert {name: bits(mask) for name, mask in result.items()} == {n: bits(m) for n, m in masks.items()}
    else:
        assert set(result) == (set(old) if masked else set())
        source = zeroed(source, old) if masked and form == "dense" else source
    if not (masked and form == "zeros"):
        torch.testing.assert_close(model(x), source(x))


def test_masks_are_derived_from_zeros_on_demand():
    source = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3))
    masking.put(source, {"0.weight": torch.rand(5, 6) > 0.5})
    target = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3))
    result = masking.load_state_dict(target, masking.state_dict(source), derive=True)
    assert list(result) == ["0.weight"]
    assert torch.equal(result["0.weight"], masking.masks(source)["0.weight"])


def test_loading_by_torch_goes_below_the_mask():
    model, dense = nn.Linear(4, 4), nn.Linear(4, 4)
    mask = torch.rand(4, 4) > 0.5
    masking.put(model, {"weight": mask})
    model.load_state_dict(dense.state_dict())
    assert torch.equal(model.weight, dense.weight * mask)
    masking.strip(model)
    assert torch.equal(model.weight, dense.weight)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda state: state.pop("0.weight"), MaskError, "0.weight_mask_bits"),
        (lambda state: state.pop("2.bias"), MaskError, "missing are: 2.bias"),
        (lambda state: state.update({"3.bias": torch.ones(1)}), MaskError, "not in the model are: 3.bias"),
        (lambda state: state.update({"2.bias": torch.ones(4)}), ShapeMismatchError, r"2.bias.*\(4,\).*\(3,\)"),
        (lambda state: state.update({"0.weight_mask_bits": torch.ones(2).byte()}), ShapeMismatchError, "2 bytes"),
    ],
)
def test_a_checkpoint_that_does_not_fit_changes_nothing(change, error, message):
    model = MODELS["linear"]()
    masking.put(model, random_masks(model))
    state = masking.state_dict(model, bits=True)
    change(state)
    with unchanged(model), pytest.raises(error, match=message):
        masking.load_state_dict(model, state)


OPTIMIZERS = {
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.01),
    "adam": lambda p: torch.optim.AdamW(p, lr=0.1),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.1, momentum=0.5),
}


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_held_zeros_stay_zero_and_the_rest_trains(make):
    model = MODELS["linear"]()
    optimizer = make(model.parameters())
    model(torch.randn(4, 6)).square().sum().backward()
    optimizer.step()
    masks = random_masks(model)
    masking.put(model, masks)
    masking.bake(model)
    before = copy.deepcopy(model.state_dict())
    with masking.hold(model, optimizer):
        for _ in range(3):
            optimizer.zero_grad()
            model(torch.randn(4, 6)).square().sum().backward()
            optimizer.step()
        for name, mask in masks.items():
            weight = model.get_parameter(name)
            assert not weight[~mask].any()
            assert (weight != before[name])[mask].all()
    model(torch.randn(4, 6)).square().sum().backward()
    optimizer.step()
    assert all(model.get_parameter(name)[~mask].any() for name, mask in masks.items())


def test_hold_takes_masks_by_name_and_writes_them_at_once():
    model = nn.Linear(4, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    handle = masking.hold(model, optimizer, {"weight": torch.eye(4).bool()})
    assert int((model.weight == 0).sum()) == 12
    handle.release()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (lambda m: (m, torch.optim.SGD(m.parameters(), lr=1)), MaskError, "nothing to hold"),
        (
            lambda m: (m, torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=1), {"0.weight": torch.ones(5, 6).bool()}),
            MaskError,
            "holds none",
        ),
        (lambda m: (m, "sgd"), ArgumentTypeError, "optimizer.*str"),
        (
            lambda m: (m, torch.optim.SGD(m.parameters(), lr=1), {"weight": torch.ones(1).bool()}),
            UnknownNameError,
            "weight",
        ),
        (
            lambda m: (m, torch.optim.SGD(m.parameters(), lr=1), {"0.weight": torch.ones(1).bool()}),
            ShapeMismatchError,
            "0.weight",
        ),
    ],
)
def test_what_cannot_be_held_is_said(arguments, error, message):
    model = MODELS["linear"]()
    given = arguments(model)
    with unchanged(model), pytest.raises(error, match=message):
        masking.hold(*given)
