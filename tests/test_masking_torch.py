"""What goes wrong with the masks of ``torch.nn.utils.prune``, each shown beside what happens with ours."""

from __future__ import annotations

import copy
import io
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import prune
from torch.utils.checkpoint import checkpoint

from netopt import masking


def net():
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))


def half_of(parameter):
    return torch.rand(parameter.shape) > 0.5


def masked(model=None, names=("0.weight",)):
    model = net() if model is None else model
    masking.put(model, {name: half_of(model.get_parameter(name)) for name in names})
    return model


def test_copying_at_any_moment():
    theirs, ours = net(), masked()
    prune.l1_unstructured(theirs[0], "weight", amount=0.5)
    x = torch.randn(3, 6)
    for model in (theirs, ours):
        model(x).sum().backward()
    with pytest.raises(RuntimeError, match="deepcopy"):
        copy.deepcopy(theirs)
    copies = [copy.deepcopy(ours), pickle.loads(pickle.dumps(ours)), copy.deepcopy(copy.deepcopy(ours))]
    buffer = io.BytesIO()
    torch.save(ours, buffer)
    buffer.seek(0)
    copies.append(torch.load(buffer, weights_only=False))
    for one in copies:
        assert torch.equal(one(x), ours(x))
        assert prune.is_pruned(one)
        one[0].weight_orig.data.fill_(1)
        masking.bake(one)
        assert type(one[0]) is nn.Linear
    assert not torch.equal(ours[0].weight_orig, copies[0][0].weight)


def test_copying_inside_a_forward():
    seen = []

    class Watcher(nn.Linear):
        def forward(self, x):
            out = super().forward(x)
            seen.append(copy.deepcopy(self))
            return out

    model = nn.Sequential(Watcher(4, 4))
    masked(model)
    out = model(torch.ones(1, 4))
    assert torch.equal(seen[0].weight, model[0].weight)
    assert out.requires_grad


def test_pruning_again_keeps_one_mask():
    theirs, ours = nn.Linear(8, 8), nn.Linear(8, 8)
    for _ in range(3):
        prune.custom_from_mask(theirs, "weight", half_of(theirs.weight))
        masking.put(ours, {"weight": half_of(ours.weight)})
    container = next(iter(theirs._forward_pre_hooks.values()))
    assert len(list(container)) == 3
    hook = next(iter(ours._forward_pre_hooks.values()))
    assert [value for value in vars(hook).values() if isinstance(value, torch.Tensor)] == []
    assert len(ours._forward_pre_hooks) == 1


def train_twice(attention):
    optimizer = torch.optim.SGD(attention.parameters(), lr=0.5)
    x = torch.randn(2, 3, 8)
    for _ in range(2):
        optimizer.zero_grad()
        attention(x, x, x, need_weights=False)[0].square().sum().backward()
        optimizer.step()


def test_the_projection_of_attention_that_no_hook_reaches():
    theirs, ours = nn.MultiheadAttention(8, 2, batch_first=True), nn.MultiheadAttention(8, 2, batch_first=True)
    prune.l1_unstructured(theirs.out_proj, "weight", amount=0.5)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        train_twice(theirs)
    masked(ours, ["out_proj.weight", "in_proj_weight"])
    before = ours.out_proj.weight_orig.detach().clone()
    train_twice(ours)
    kept = ours.out_proj.weight_mask
    assert (ours.out_proj.weight_orig != before)[kept].any()
    assert torch.equal(ours.out_proj.weight != 0, kept)


@pytest.mark.filterwarnings("ignore:.*nested_tensor.*")
def test_attention_without_gradients_takes_the_masked_weights():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    other = copy.deepcopy(layer)
    names = ["self_attn.in_proj_weight", "self_attn.out_proj.weight", "linear1.weight", "linear2.weight"]
    masked(layer, names)
    other.load_state_dict(masking.state_dict(layer))
    x = torch.randn(2, 5, 8)
    with torch.inference_mode():
        torch.testing.assert_close(layer(x), other(x))


def test_tied_weights_stay_tied():
    def tied():
        model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
        model[1].weight = model[0].weight
        return model

    theirs, ours = tied(), tied()
    prune.l1_unstructured(theirs[0], "weight", amount=0.5)
    assert not torch.equal(theirs[0].weight, theirs[1].weight)
    masked(ours)
    assert torch.equal(ours[0].weight, ours[1].weight)
    masking.bake(ours)
    assert ours[0].weight is ours[1].weight


def test_the_order_of_parameters_after_making_masks_permanent():
    theirs, ours = net(), net()
    order = [name for name, _ in ours.named_parameters()]
    prune.l1_unstructured(theirs[0], "weight", amount=0.5)
    prune.remove(theirs[0], "weight")
    assert [name for name, _ in theirs.named_parameters()] != order
    masked(ours)
    assert [name.removesuffix("_orig") for name, _ in ours.named_parameters()] == order
    prune.remove(ours[0], "weight")
    assert [name for name, _ in ours.named_parameters()] == order


def test_a_dense_checkpoint_into_a_masked_model():
    theirs, ours, dense = net(), masked(), net()
    prune.l1_unstructured(theirs[0], "weight", amount=0.5)
    with pytest.raises(RuntimeError, match="Missing key"):
        theirs.load_state_dict(dense.state_dict())
    ours.load_state_dict(dense.state_dict())
    assert torch.equal(ours[0].weight_orig, dense[0].weight)
    with pytest.raises(RuntimeError, match="Missing key"):
        ours.load_state_dict({"0.bias": torch.zeros(8)})


def test_a_masked_checkpoint_into_a_dense_model():
    theirs, ours, x = net(), masked(), torch.randn(3, 6)
    prune.l1_unstructured(theirs[0], "weight", amount=0.5)
    with pytest.raises(RuntimeError, match="Unexpected key"):
        net().load_state_dict(theirs.state_dict())
    for source in (theirs, ours):
        for state in (source.state_dict(), masking.state_dict(source), masking.state_dict(source, bits=True)):
            dense = net()
            masking.load_state_dict(dense, state)
            assert torch.equal(dense(x), source(x))


def test_a_checkpoint_does_not_double():
    """Torch saves a mask as large as the weight."""

    def size(state):
        return sum(value.numel() * value.element_size() for value in state.values())

    plain = nn.Linear(64, 64, bias=False)
    theirs, ours = copy.deepcopy(plain), masked(copy.deepcopy(plain), ["weight"])
    prune.l1_unstructured(theirs, "weight", amount=0.5)
    dense = size(plain.state_dict())
    assert size(theirs.state_dict()) == 2 * dense
    assert size(masking.state_dict(ours)) == dense
    assert size(masking.state_dict(ours, bits=True)) == dense * (1 + 1 / 32)


def test_taking_masks_off_a_second_time_and_off_whole_models():
    theirs, ours = net(), masked(names=["0.weight", "2.weight"])
    for layer in (theirs[0], theirs[2]):
        prune.l1_unstructured(layer, "weight", amount=0.5)
    with pytest.raises(ValueError, match="has to be pruned before"):
        prune.remove(theirs, "weight")
    prune.remove(theirs[0], "weight")
    with pytest.raises(ValueError, match="has to be pruned before"):
        prune.remove(theirs[0], "weight")
    assert sorted(masking.bake(ours)) == ["0.weight", "2.weight"]
    assert masking.bake(ours) == masking.strip(ours) == {}


def test_what_is_read_between_a_step_and_the_next_forward():
    theirs, ours = net(), masked()
    prune.l1_unstructured(theirs[0], "weight", amount=0.5)
    for model in (theirs, ours):
        with torch.no_grad():
            model[0].weight_orig.mul_(2)
    assert not torch.equal(theirs[0].weight, theirs[0].weight_orig * theirs[0].weight_mask)
    assert torch.equal(ours[0].weight, ours[0].weight_orig * ours[0].weight_mask)


@pytest.mark.parametrize(
    "make",
    [lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), lambda p: torch.optim.Adam(p, lr=0.1)],
    ids=["momentum", "adam"],
)
def test_zeros_after_a_step_with_a_memory(make):
    theirs, ours = net(), net()
    optimizers = [make(model.parameters()) for model in (theirs, ours)]
    for model, optimizer in zip((theirs, ours), optimizers, strict=True):
        model(torch.randn(4, 6)).square().sum().backward()
        optimizer.step()
    prune.l1_unstructured(theirs[0], "weight", amount=0.5)
    prune.remove(theirs[0], "weight")
    masked(ours)
    masking.bake(ours)
    handle = masking.hold(ours, optimizers[1])
    zeros = ours[0].weight == 0
    for model, optimizer in zip((theirs, ours), optimizers, strict=True):
        model(torch.randn(4, 6)).square().sum().backward()
        optimizer.step()
    assert not (theirs[0].weight == 0).any()
    assert torch.equal(ours[0].weight == 0, zeros)
    handle.release()


def test_a_second_pruning_sees_the_whole_tensor():
    """Torch hands a method of type "unstructured" the survivors, flattened: blocks are lost."""
    shapes = []

    class Theirs(prune.BasePruningMethod):
        PRUNING_TYPE = "unstructured"

        def compute_mask(self, t, default_mask):
            shapes.append(tuple(t.shape))
            return torch.ones_like(t)

    layer = nn.Linear(4, 4)
    prune.l1_unstructured(layer, "weight", amount=4)
    Theirs.apply(layer, "weight")
    assert shapes == [(12,)]
    ours = nn.Linear(4, 4)
    for _ in range(2):
        masking.put(ours, {"weight": masking.keep_n_of_m(ours.weight.abs(), 2, 4)})
    assert (ours.weight_mask.view(-1, 4).sum(1) == 2).all()


def test_nothing_is_recomputed_while_nothing_changes():
    theirs, ours = net(), masked()
    prune.l1_unstructured(theirs[0], "weight", amount=0.5)
    x = torch.randn(1, 6)
    products = {}
    for model in (theirs, ours):
        with torch.no_grad():
            model(x)
            first = model[0].weight
            model(x)
            products[model] = first is model[0].weight
    assert products == {theirs: False, ours: True}


def in_place(layer):
    with torch.no_grad():
        layer.weight_orig.mul_(2)


def exchanged(layer):
    layer.weight_orig.data = layer.weight_orig.data * 2


def behind_the_back(layer):
    layer.weight_orig.data.mul_(2)


def replaced(layer):
    layer.weight_orig = nn.Parameter(layer.weight_orig.detach() * 2)


def loaded(layer):
    layer.load_state_dict({name: value * 2 if "orig" in name else value for name, value in layer.state_dict().items()})


def cast(layer):
    layer.double()
    in_place(layer)
    layer.float()


def stepped(layer):
    optimizer = torch.optim.SGD([layer.weight_orig], lr=1.0)
    layer.weight_orig.grad = -layer.weight_orig.detach().clone()
    optimizer.step()


def swapped(layer):
    torch.utils.swap_tensors(layer.weight_orig, nn.Parameter(layer.weight_orig.detach() * 2))


@pytest.mark.parametrize(
    "change", [in_place, exchanged, behind_the_back, replaced, loaded, cast, stepped, swapped], ids=lambda f: f.__name__
)
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode], ids=lambda f: f.__name__)
def test_what_is_kept_never_goes_stale(change, context):
    layer = masked(nn.Linear(5, 5), ["weight"])
    with context():
        before = layer.weight.clone()
    change(layer)
    with context():
        torch.testing.assert_close(layer.weight, before * 2)


def test_a_mask_changed_in_place_shows():
    layer = masked(nn.Linear(5, 5), ["weight"])
    with torch.no_grad():
        assert layer.weight.any()
        layer.weight_mask.zero_()
        assert not layer.weight.any()


def test_frozen_weights_take_part_in_training():
    layer = masked(nn.Linear(5, 5), ["weight"]).requires_grad_(False)
    with torch.inference_mode():
        layer(torch.randn(1, 5))
    x = torch.randn(2, 5, requires_grad=True)
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, layer.weight.sum(0).expand(2, 5))


def test_masks_survive_a_change_of_dtype():
    theirs, model = net(), masked()
    prune.l1_unstructured(theirs[0], "weight", amount=0.5)
    assert theirs.to(torch.bfloat16)[0].weight.dtype == torch.float32  # stale until the next forward
    mask = model[0].weight_mask.clone()
    for dtype in (torch.bfloat16, torch.float64):
        model.to(dtype)
        assert model[0].weight.dtype == dtype
        assert torch.equal(model[0].weight != 0, mask)
        assert model(torch.randn(2, 6, dtype=dtype)).dtype == dtype


def test_masks_survive_a_change_of_device():
    theirs, model = net(), masked().to("meta")
    prune.l1_unstructured(theirs[0], "weight", amount=0.5)
    assert theirs.to("meta")[0].weight.device.type == "cpu"
    assert model[0].weight.device.type == "meta"
    assert model[0].weight_mask.dtype == torch.bool
    model.to_empty(device="cpu")
    assert model[0].weight.device.type == "cpu"


def test_masks_under_autocast():
    model, x = masked(), torch.randn(2, 6)
    plain = net()
    plain.load_state_dict(masking.state_dict(model))
    with torch.autocast("cpu", torch.bfloat16):
        out, expected = model(x), plain(x)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, expected)
    out.float().sum().backward()
    assert not model[0].weight_orig.grad[~model[0].weight_mask].any()


def test_what_a_functional_call_leaves_behind():
    theirs, ours, x = net(), masked(), torch.randn(2, 6)
    prune.l1_unstructured(theirs[0], "weight", amount=0.5)
    own = {}
    for model in (theirs, ours):
        twice = {name: value.detach() * 2 for name, value in model.named_parameters()}
        torch.func.functional_call(model, twice, (x,))
        own[model] = torch.equal(model[0].weight, model[0].weight_orig * model[0].weight_mask)
    assert own == {theirs: False, ours: True}


def test_masks_under_functional_call():
    model, x = masked(), torch.randn(2, 6)
    twice = {name: value.detach() * 2 for name, value in model.named_parameters()}
    expected = F.linear(
        F.linear(x, model[0].weight * 2, model[0].bias * 2).relu(), *(twice["2.weight"], twice["2.bias"])
    )
    torch.testing.assert_close(torch.func.functional_call(model, twice, (x,)), expected)
    per_sample = torch.func.vmap(
        torch.func.grad(lambda p, one: torch.func.functional_call(model, p, (one,)).sum()), in_dims=(None, 0)
    )(dict(model.named_parameters()), x)
    assert per_sample["0.weight_orig"].shape == (2, 8, 6)
    assert not per_sample["0.weight_orig"][:, ~model[0].weight_mask].any()


@pytest.mark.parametrize("reentrant", [True, False])
def test_masks_under_checkpointing(reentrant):
    model, x = masked(), torch.randn(2, 6, requires_grad=True)
    grads = []
    for run in (model, lambda value: checkpoint(model, value, use_reentrant=reentrant)):
        model.zero_grad()
        run(x).square().sum().backward()
        grads.append(model[0].weight_orig.grad.clone())
    assert torch.equal(*grads)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_masks_under_compile(backend):
    model, x = masked(), torch.randn(2, 6)
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    torch.testing.assert_close(compiled(x), model(x))
    compiled(x).sum().backward()
    assert not model[0].weight_orig.grad[~model[0].weight_mask].any()
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x))
        model[0].weight_orig.mul_(2)
        torch.testing.assert_close(compiled(x), model(x))


def test_masks_under_export_and_tracing():
    model, x = masked().eval(), torch.randn(2, 6)
    torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), model(x))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(model, (x,))
    torch.testing.assert_close(traced(x), model(x))


@pytest.fixture
def group(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore")
def test_masks_under_data_parallel_training(group):
    model = masked()
    wrapped = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.1, momentum=0.9)
    mask, before = model[0].weight_mask.clone(), model[0].weight.detach().clone()
    for _ in range(2):
        optimizer.zero_grad()
        wrapped(torch.randn(4, 6)).square().sum().backward()
        optimizer.step()
    assert torch.equal(model[0].weight != 0, mask)
    assert not torch.equal(model[0].weight, before)


@pytest.mark.filterwarnings("ignore")
def test_masks_under_fully_sharded_training(group):
    fully_shard = pytest.importorskip("torch.distributed.fsdp").fully_shard
    model, plain, x = masked(), net(), torch.randn(4, 6)
    plain.load_state_dict(masking.state_dict(model))
    mask = model[0].weight_mask.clone()
    mesh = torch.distributed.init_device_mesh("cpu", (1,))
    fully_shard(model[0], mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    torch.testing.assert_close(model(x), plain(x))
    model(x).square().sum().backward()
    optimizer.step()
    grad = model[0].weight_orig.grad.full_tensor()
    assert grad[mask].any()
    assert not grad[~mask].any()
