"""A finished model leaves netopt: exporters, compilers, quantizers and savers take it, and agree with it."""

from __future__ import annotations

import copy
import functools
import io
import warnings

import pytest
import torch
from torch import nn

import netopt
from conftest import state_of
from netopt import masking


class Convolutional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm = nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv2, self.fc = nn.Conv2d(8, 12, 3, padding=1), nn.Linear(12, 5)

    def forward(self, x):
        x = torch.relu(self.norm(self.conv1(x)))
        return self.fc(torch.relu(self.conv2(x)).mean((2, 3)))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.fc = nn.LSTM(6, 16, batch_first=True), nn.Linear(16, 5)

    def forward(self, x):
        return self.fc(self.lstm(x)[0][:, -1])


class Logits(nn.Module):
    """A Hugging Face model as a function from one tensor to one tensor, as exporters want it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x):
        # Without a mask of its own a language model looks for packed sequences, which the old exporter cannot say.
        return self.model(x, **({} if x.is_floating_point() else {"attention_mask": torch.ones_like(x)})).logits


def vit() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    config = transformers.ViTConfig(**sizes, image_size=16, patch_size=8, num_channels=1, num_labels=5)
    return transformers.ViTForImageClassification(config)


def gpt2() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=32, n_positions=16, n_embd=16, n_layer=2, n_head=2, use_cache=False)
    return transformers.GPT2LMHeadModel(config)


def llama() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    config = transformers.LlamaConfig(
        vocab_size=32, **sizes, num_key_value_heads=2, max_position_embeddings=16, use_cache=False
    )
    return transformers.LlamaForCausalLM(config)


IMAGES, TOKENS = torch.randn(3, 1, 16, 16), torch.arange(24).view(3, 8) % 32
CASES = {
    "cnn": (Convolutional, IMAGES, 0.5),
    "vit": (vit, IMAGES, {"*mlp*": 0.5}),
    "lstm": (Recurrent, torch.randn(3, 4, 6), 0.5),
    "gpt2": (gpt2, TOKENS, {"*mlp*": 0.5}),
    "llama": (llama, TOKENS, {"*mlp*": 0.5}),
}
PRETRAINED = ["vit", "gpt2", "llama"]


@functools.cache
def made(case: str, how: str) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    """A model that was pruned or masked and then finished, its inputs and what it computes."""
    build, inputs, amount = CASES[case]
    torch.manual_seed(0)
    model = build().eval()
    if how == "pruned":
        netopt.prune_neurons(model, inputs, amount)
    else:
        netopt.prune_weights(model, 0.7)
    done = netopt.finish(model)
    assert bool(done.masks) == (how == "masked")
    whole = Logits(model) if case in PRETRAINED else model
    with torch.no_grad():
        return whole.eval(), inputs, whole(inputs)


every = pytest.mark.parametrize(("case", "how"), [(case, how) for case in CASES for how in ("pruned", "masked")])


def agrees(found: object, expected: torch.Tensor, tolerance: float = 1e-4) -> None:
    found = torch.as_tensor(found)
    assert found.shape == expected.shape
    assert torch.allclose(found, expected, atol=tolerance, rtol=tolerance)


@pytest.fixture(autouse=True)
def quiet():
    """Exporters warn of themselves; the laws are about what they give."""
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        yield


@every
def test_nothing_of_masks_is_left(case, how):
    model, _, _ = made(case, how)
    for module in model.modules():
        assert not any(name.startswith("_netopt") for name in [*vars(type(module)), *vars(module)])
        assert not module._forward_pre_hooks
    assert not any(name.endswith(("_orig", "_mask")) for name in model.state_dict())


@every
def test_export(case, how):
    model, inputs, expected = made(case, how)
    agrees(torch.export.export(model, (inputs,)).module()(inputs), expected)


@every
def test_compile(case, how):
    model, inputs, expected = made(case, how)
    torch._dynamo.reset()
    agrees(torch.compile(model, backend="eager")(inputs), expected)


@every
def test_trace(case, how):
    model, inputs, expected = made(case, how)
    agrees(torch.jit.trace(model, (inputs,), check_trace=False)(inputs), expected)


@pytest.mark.slow
@every
@pytest.mark.parametrize("dynamo", [True, False], ids=["dynamo", "torchscript"])
def test_onnx(case, how, dynamo, tmp_path):
    pytest.importorskip("onnx")
    runtime = pytest.importorskip("onnxruntime")
    if dynamo:
        pytest.importorskip("onnxscript")
    model, inputs, expected = made(case, how)
    path = str(tmp_path / "model.onnx")
    torch.onnx.export(model, (inputs,), path, dynamo=dynamo, verbose=False, opset_version=18)
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    agrees(session.run(None, {session.get_inputs()[0].name: inputs.numpy()})[0], expected)


@every
def test_dynamic_quantization(case, how):
    model, inputs, expected = made(case, how)
    smaller = torch.ao.quantization.quantize_dynamic(model, {nn.Linear, nn.LSTM}, dtype=torch.qint8)
    assert any(".dynamic." in type(module).__module__ for module in smaller.modules())
    agrees(smaller(inputs), expected, tolerance=0.05 * float(expected.abs().max()))


@pytest.mark.slow
@every
def test_torchao(case, how):
    """Weights of linear layers as int8, whose error on a layer of random weights is below a hundredth."""
    quantization = pytest.importorskip("torchao.quantization")
    model, inputs, expected = copy.deepcopy(made(case, how))
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    linear = [one.weight for one in model.modules() if isinstance(one, nn.Linear)]
    assert linear
    assert all(hasattr(weight, "qdata") for weight in linear)
    agrees(model(inputs), expected, 0.05)


@every
def test_save_and_load(case, how):
    model, inputs, expected = made(case, how)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    agrees(torch.load(file, weights_only=False)(inputs), expected, tolerance=0.0)


@every
def test_safetensors(case, how, tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    model, inputs, expected = made(case, how)
    path = str(tmp_path / "model.safetensors")
    safetensors.save_model(model, path)
    safetensors.load_model(model, path)
    agrees(model(inputs), expected, tolerance=0.0)


@pytest.mark.parametrize("how", ["pruned", "masked"])
@pytest.mark.parametrize("case", PRETRAINED)
def test_save_pretrained(case, how, tmp_path):
    model, inputs, expected = made(case, how)
    model.model.save_pretrained(tmp_path)
    agrees(type(model.model).from_pretrained(tmp_path).eval()(inputs).logits, expected, tolerance=0.0)


def test_what_it_says():
    model = Convolutional()
    assert "nothing changed" in str(netopt.finish(model))
    netopt.prune_weights(model, 0.5)
    kinds = [type(module) for module in Convolutional().modules()]
    assert [type(module) for module in model.modules()] != kinds
    done = netopt.finish(model)
    assert str(done) == repr(done)
    assert "\n" not in str(done)
    assert "50.0 % of" in str(done)
    assert [type(module) for module in model.modules()] == kinds
    assert masking.sparsity(model).total == pytest.approx(0.5, abs=1e-3)


def test_a_second_time_nothing_happens():
    model = Convolutional()
    netopt.prune_weights(model, 0.5)
    netopt.finish(model)
    before = state_of(model)
    assert not netopt.finish(model).masks
    assert state_of(model) == before


def test_an_optimizer_goes_on():
    model = Convolutional()
    netopt.prune_weights(model, 0.5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    netopt.finish(model)
    assert {id(one) for one in model.parameters()} == {id(one) for one in optimizer.param_groups[0]["params"]}


def test_tables_of_masks_print_as_one_line_and_load_as_plain_tensors():
    model = Convolutional()
    netopt.prune_weights(model, 0.5)
    loaded = masking.load_state_dict(model, masking.state_dict(model, bits=True))
    for table in (masking.masks(model), loaded, masking.strip(model)):
        assert isinstance(table, dict)
        assert "\n" not in repr(table)
        assert "50.0 % of" in repr(table)
        file = io.BytesIO()
        torch.save(table, file)
        file.seek(0)
        again = torch.load(file, weights_only=True)
        assert all(torch.equal(again[name], mask) for name, mask in table.items())
    assert repr(masking.bake(model)) == "no masks"
