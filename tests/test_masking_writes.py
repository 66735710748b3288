"""Whatever is written to a masked weight from outside reaches the one function the model has, or is refused at once."""

from __future__ import annotations

import contextlib
import copy
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import prune
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from conftest import unchanged
from netopt import importance, masking
from netopt.errors import MaskError
from netopt.prune import prune_weights


def setting(values):
    def write(layer):
        layer.weight.data = values(layer.weight)

    return write


def augmented(layer):
    layer.weight *= 2


def merged(layer):
    layer.weight.data += torch.ones(5, 6)


def clipped(layer):
    layer.weight.data.clamp_(-0.05, 0.05)


def renormed(layer):
    layer.weight.data = torch.renorm(layer.weight.data, 2, 0, 0.1)


def averaged(layer):
    layer.weight.lerp_(torch.ones(5, 6), 0.5)


def one_entry(layer):
    layer.weight[1, 2] = 5.0
    layer.weight[0] = 3.0


def one_mask(layer):
    layer.weight[layer.weight > 0] = 7.0


def parts(layer):
    for part in layer.weight.chunk(2, dim=1):
        part.fill_(4.0)
    layer.weight.t()[2].mul_(3)


def flat(layer):
    layer.weight.view(-1)[3:9].fill_(2.0)
    layer.weight.data.flatten().add_(1)
    layer.weight.detach().unsqueeze(0).sub_(0.5)


def by_vector(layer):
    nn.utils.vector_to_parameters(torch.arange(30.0), [layer.weight])


def through_a_function(layer):
    torch.clamp_(layer.weight, min=0.01)
    F.relu(layer.weight, inplace=True)


def by_list(layer):
    torch._foreach_mul_([layer.weight, layer.bias], 3.0)


def as_output(layer):
    torch.add(torch.ones(5, 6), 1, out=layer.weight)


def twice(layer):
    weight = layer.weight
    weight.fill_(1.0)
    weight.mul_(4.0)


def another_parameter(layer):
    layer.weight = nn.Parameter(torch.full((5, 6), 2.0))


def by_array(layer):
    layer.weight.detach().numpy()[:] = 1.0


def by_swapping(layer):
    torch.utils.swap_tensors(layer.weight, nn.Parameter(torch.ones(5, 6)))


def by_another_tensor(layer):
    layer.weight = torch.ones(5, 6)


def by_a_parameter_of_it(layer):
    nn.Parameter(layer.weight.data)


def of_another_shape(layer):
    layer.weight.data = torch.ones(2, 2)


def by_resizing(layer):
    layer.weight.resize_(2, 2)


WRITES = {
    "copy_": lambda layer: layer.weight.copy_(torch.ones(5, 6)),
    "data.copy_": lambda layer: layer.weight.data.copy_(torch.ones(5, 6)),
    "detach().copy_": lambda layer: layer.weight.detach().copy_(torch.ones(5, 6)),
    "data =": setting(torch.ones_like),
    "data = data": setting(lambda weight: weight.data),
    "reset_parameters": lambda layer: layer.reset_parameters(),
    "masked_fill_": lambda layer: layer.weight.data.masked_fill_(layer.weight < 0, 1.0),
    "index_fill_": lambda layer: layer.weight.data.index_fill_(0, torch.tensor([1]), 1.0),
} | {
    f"init.{one.__name__}": lambda layer, one=one: one(layer.weight)
    for one in (
        nn.init.uniform_,
        nn.init.normal_,
        nn.init.ones_,
        nn.init.xavier_uniform_,
        nn.init.kaiming_normal_,
        nn.init.trunc_normal_,
        nn.init.orthogonal_,
    )
}
for function in (augmented, merged, clipped, renormed, averaged, one_entry, one_mask, parts, flat, by_vector):
    WRITES[function.__name__] = function
for function in (through_a_function, by_list, as_output, twice, another_parameter):
    WRITES[function.__name__] = function
WRITES["init.sparse_"] = lambda layer: nn.init.sparse_(layer.weight, 0.5)
REFUSED = {
    one.__name__: one
    for one in (by_array, by_swapping, by_another_tensor, by_a_parameter_of_it, of_another_shape, by_resizing)
}
MODES = {"grad": torch.enable_grad, "no_grad": torch.no_grad, "inference_mode": torch.inference_mode}


def masked_and_plain(frozen=False):
    """A masked layer and an unmasked one that computes the same."""
    masked = nn.Linear(6, 5)
    masking.put(masked, {"weight": torch.rand(5, 6) > 0.5})
    plain = nn.Linear(6, 5)
    plain.load_state_dict(masking.state_dict(masked))
    for layer in (masked, plain):
        layer.requires_grad_(not frozen)
    return masked, plain


def attempt(write, layer, mode):
    torch.manual_seed(1)
    try:
        with MODES[mode]():
            write(layer)
    except (RuntimeError, ValueError, TypeError, KeyError) as error:
        return error
    return None


def answers(layer):
    """What the layer computes, by every way that leads to its weights."""
    x = torch.eye(6)
    found = {"train": layer.train()(x) - layer.bias}
    for name, context in MODES.items():
        with context():
            found[name] = (layer.eval()(x) - layer.bias).clone()
    dense = nn.Linear(6, 5)
    dense.load_state_dict(masking.state_dict(layer))
    found["saved"] = dense.weight.T
    again = copy.deepcopy(layer)
    found["copied"] = again.weight.T
    again.load_state_dict(layer.state_dict())
    found["loaded"] = again.weight.T
    found["pickled"] = pickle.loads(pickle.dumps(layer)).weight.T
    masking.bake(again)
    found["baked"] = again.weight.T
    found["below"] = (layer.weight_orig * layer.weight_mask).T
    return {name: value.detach().clone() for name, value in found.items()}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
@pytest.mark.parametrize("seen", ["unread", "read"])
@pytest.mark.parametrize("name", WRITES)
def test_a_write_reaches_the_weight_below_the_mask(name, seen, frozen, mode):
    masked, plain = masked_and_plain(frozen)
    kept = masked.weight_mask.clone()
    if seen == "read":
        answers(masked)
    before = masked.weight_orig.detach().clone()
    expected, found = attempt(WRITES[name], plain, mode), attempt(WRITES[name], masked, mode)
    assert (expected is None) == (found is None), (expected, found)
    if found is not None:
        # As a parameter that is not masked refuses to be written to where autograd records.
        assert torch.equal(masked.weight_orig, before)
    want = (plain.weight * kept).T.detach()
    for way, value in answers(masked).items():
        torch.testing.assert_close(value, want, rtol=1e-5, atol=1e-6, msg=lambda text, way=way: f"{way}: {text}")
    assert torch.equal(masked.weight_mask, kept)
    if name != "another_parameter":
        assert torch.equal(masked.weight_orig[~kept], before[~kept]), "what lies below the mask has changed"


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_reach_it_is_refused(name, mode):
    masked, plain = masked_and_plain()
    answers(masked)
    assert attempt(REFUSED[name], masked, mode) is not None
    for way, value in answers(masked).items():
        torch.testing.assert_close(value, plain.weight.T.detach(), msg=lambda text, way=way: f"{way}: {text}")


@pytest.mark.parametrize("context", [torch.no_grad, contextlib.nullcontext], ids=["no_grad", "grad"])
def test_what_was_read_before_a_step_does_not_undo_it(context):
    masked, _ = masked_and_plain()
    with context():
        weight = masked.weight
    with torch.no_grad():
        masked.weight_orig.add_(1)
    after = masked.weight_orig.clone()
    with pytest.raises(MaskError, match=r"read module.weight again"):
        weight.data.mul_(2)
    assert torch.equal(masked.weight_orig, after)
    torch.testing.assert_close(masked.weight, after * masked.weight_mask)


def test_gradient_and_flag_are_those_of_the_weight_below():
    masked, _ = masked_and_plain()
    masked(torch.ones(1, 6)).sum().backward()
    assert masked.weight.grad is masked.weight_orig.grad
    masked.weight.grad = None
    assert masked.weight_orig.grad is None
    masked.weight.requires_grad = False
    assert not masked.weight_orig.requires_grad


def test_one_masked_weight_for_all_who_share_it():
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    model[1].weight = model[0].weight
    masking.put(model, {"0.weight": torch.eye(4).bool()})
    with torch.no_grad():
        model(torch.randn(2, 4))
        model[1].weight.fill_(3.0)
        torch.testing.assert_close(model(torch.eye(4)), 9 * torch.eye(4))


def test_a_constraint_inside_the_forward():
    """As networks for electroencephalograms have it: each forward clips the norm of its weight."""

    class Constrained(nn.Linear):
        def forward(self, x):
            self.weight.data = torch.renorm(self.weight.data, p=2, dim=0, maxnorm=0.3)
            return super().forward(x)

    masked = Constrained(6, 5)
    masking.put(masked, {"weight": torch.rand(5, 6) > 0.5})
    masked(torch.randn(2, 6)).sum().backward()
    norms = masked.weight_orig.mul(masked.weight_mask).norm(dim=1)
    assert (norms < 0.3 + 1e-5).all()
    with torch.no_grad():
        torch.testing.assert_close(masked(torch.eye(6)) - masked.bias, masked.weight.T)


def test_where_a_mode_or_a_function_of_ones_own_uses_it():
    class Product(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, weight):
            ctx.save_for_backward(x)
            return x @ weight.mT

        @staticmethod
        def backward(ctx, grad):
            return None, grad.mT @ ctx.saved_tensors[0]

    masked, plain = masked_and_plain()
    x = torch.randn(2, 6)
    for layer in (masked, plain):
        Product.apply(x, layer.weight).sum().backward()
    torch.testing.assert_close(masked.weight_orig.grad, plain.weight.grad * masked.weight_mask)
    compiled = torch.compile(lambda x, weight: x @ weight.mT, backend="eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(x, masked.weight), x @ plain.weight.mT)
    with torch.device("cpu"), torch.no_grad():
        masked.weight.fill_(2.0)
    torch.testing.assert_close(masked.weight, 2.0 * masked.weight_mask)


class EveryOperation(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("mode", [EveryOperation, lambda: FlopCounterMode(display=False)], ids=["own", "counter"])
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_a_write_where_a_mode_sees_every_operation(mode, context):
    masked, _ = masked_and_plain()
    with context(), mode():
        weight = masked.weight
        with torch.no_grad():
            weight.fill_(3.0)
    torch.testing.assert_close(masked.weight.detach(), 3.0 * masked.weight_mask)


def test_a_write_to_a_weight_made_in_inference_mode():
    with torch.inference_mode():
        layer = nn.Linear(6, 5)
    masking.put(layer, {"weight": torch.rand(5, 6) > 0.5})
    for value in (3.0, 4.0):
        with torch.inference_mode():
            layer.weight.fill_(value)
            torch.testing.assert_close(layer.weight, value * layer.weight_mask)
            torch.testing.assert_close(layer(torch.eye(6)) - layer.bias, value * layer.weight_mask.T)


@pytest.mark.parametrize("change", [lambda w: w.resize_(2, 2), lambda w: w.t_(), lambda w: w.unsqueeze_(0)])
def test_a_form_that_is_refused_leaves_the_layer_as_it_was(change):
    masked, plain = masked_and_plain()
    x = torch.randn(2, 6)
    with torch.no_grad():
        with pytest.raises(MaskError):
            change(masked.weight)
        torch.testing.assert_close(masked(x), plain(x))
        masked.weight.fill_(2.0)
    torch.testing.assert_close(masked.weight.detach(), 2.0 * masked.weight_mask)


def test_torch_may_mask_further():
    masked, _ = masked_and_plain()
    prune.random_unstructured(masked, "weight", amount=5)
    masked(torch.randn(2, 6)).sum().backward()
    with torch.no_grad():
        masked.weight.fill_(1.0)
        torch.testing.assert_close(masked(torch.eye(6)) - masked.bias, masked.weight_mask.float().T)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore:torch.quantize_per_tensor")
def test_a_quantization_that_goes_by_classes_is_warned_of():
    masked, _ = masked_and_plain()
    model = nn.Sequential(masked, masked_and_plain()[0], nn.ReLU())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for _ in range(2):
            torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    assert sum("masking.bake" in str(one.message) for one in caught) == 1
    masking.bake(masked)
    quantized = torch.ao.quantization.quantize_dynamic(nn.Sequential(masked), {nn.Linear}, dtype=torch.qint8)
    assert "quantized" in type(quantized[0]).__module__


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_export_to_onnx(tmp_path):
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    masked, x = masked_and_plain()[0].eval(), torch.randn(2, 6)
    torch.onnx.export(masked, (x,), tmp_path / "masked.onnx", dynamo=True, verbose=False)
    session = runtime.InferenceSession(str(tmp_path / "masked.onnx"))
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), masked(x).detach())


class Pretrained(nn.Module):
    """A model that writes what its ``state_dict`` holds, as hubs of models do."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6, bias=False))
        self.layers[1].weight = self.layers[0].weight
        self.written = {}

    def save_pretrained(self, folder, state_dict=None):
        del folder
        self.written.update(self.state_dict() if state_dict is None else state_dict)


@pytest.mark.parametrize("passed", ["nothing", "by name", "by place"])
def test_a_model_that_saves_itself_writes_the_names_it_is_built_with(passed):
    model = Pretrained()
    kind, names = type(model), list(model.state_dict())
    masking.put(model, {"layers.0.weight": torch.rand(6, 6) > 0.5})
    model = copy.deepcopy(model)
    for one in (model, pickle.loads(pickle.dumps(model))):
        one.save_pretrained(
            "",
            *[one.state_dict()] * (passed == "by place"),
            **{"state_dict": one.state_dict()} if passed == "by name" else {},
        )
        assert list(one.written) == names
        assert torch.equal(one.written["layers.0.weight"], one.layers[0].weight)
        assert one.written["layers.0.weight"].data_ptr() == one.written["layers.1.weight"].data_ptr()
        assert "layers.0.weight_orig" in one.state_dict(), "torch's names, for whoever uses torch's masks"
    masking.bake(model)
    assert type(model) is kind


class Stop(Exception):
    pass


class Unwilling(nn.Linear):
    """The last layer, whose values cannot be loaded."""

    def _load_from_state_dict(self, *arguments):
        super()._load_from_state_dict(*arguments)
        raise Stop


def stopping(monkeypatch, module, name, count, after):
    real, calls = getattr(module, name), []

    def wrapped(*arguments, **named):
        calls.append(name)
        if len(calls) == count and not after:
            raise Stop
        result = real(*arguments, **named)
        if len(calls) == count:
            raise Stop
        return result

    monkeypatch.setattr(module, name, wrapped)


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("call", ["put", "put again", "bake", "strip", "load_state_dict"])
def test_a_call_that_fails_at_any_step_has_not_happened(monkeypatch, call, count, after):
    model = nn.Sequential(nn.Linear(4, 4), nn.LSTM(4, 4), nn.Linear(4, 4))
    masks = {
        "0.weight": torch.eye(4).bool(),
        "1.weight_hh_l0": torch.rand(16, 4) > 0.5,
        "2.weight": torch.eye(4).bool(),
    }
    if call != "put":
        masking.put(model, masks)
    state = copy.deepcopy(masking.state_dict(model, bits=True))
    for value in state.values():
        value.add_(1) if value.is_floating_point() else value
    other = {name: torch.rand(mask.shape) > 0.5 for name, mask in masks.items()}
    run = {
        "put": lambda: masking.put(model, masks),
        "put again": lambda: masking.put(model, other),
        "bake": lambda: masking.bake(model),
        "strip": lambda: masking.strip(model),
        "load_state_dict": lambda: masking.load_state_dict(model, state),
    }[call]
    stopping(monkeypatch, masking.lifecycle, "dress" if call.startswith("put") else "undress", count, after)
    with unchanged(model), pytest.raises(Stop):
        run()


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("mode", ["new", "masked before"])
@pytest.mark.parametrize("name", importance.names("layers"))
def test_weights_that_were_solved_come_back(monkeypatch, name, mode, count, after):
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))
    if mode != "new":
        masking.put(model, {"0.weight": torch.rand(8, 4) > 0.3})
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.randn(4, 4)).sum().backward()
    optimizer.step()
    stopping(monkeypatch, masking.lifecycle, "dress", count, after)
    data = [torch.randn(32, 4)]
    with unchanged(model, optimizer), pytest.raises(Stop):
        prune_weights(model, 0.6, importance=name, data=data, progress=False)


def test_values_that_were_loaded_come_back():
    model = nn.Sequential(nn.Linear(4, 4), Unwilling(4, 4))
    masking.put(model, {"0.weight": torch.eye(4).bool()})
    state = {name: torch.ones_like(value) for name, value in masking.state_dict(model).items()}
    with unchanged(model), pytest.raises(Stop):
        masking.load_state_dict(model, state)


def test_zeros_that_were_written_come_back(monkeypatch):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def refuse(hook):
        raise Stop

    monkeypatch.setattr(optimizer, "register_step_post_hook", refuse)
    with unchanged(model, optimizer), pytest.raises(Stop):
        masking.hold(model, optimizer, {"0.weight": torch.eye(4).bool()})
