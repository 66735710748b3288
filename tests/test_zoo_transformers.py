"""Families of transformers, with no hint of any kind, keep the laws of removal."""

from __future__ import annotations

import pytest
import torch
import transformers
from tests.zoo.at_once import check_all_laws
from tests.zoo.language import CASES, GROUPED
from tests.zoo.laws import rows
from torch._subclasses.fake_tensor import FakeTensorMode

from netopt.axes import find_axes
from netopt.errors import InvalidArgumentError
from netopt.prune import prune_neurons


@pytest.mark.parametrize("case", CASES.values(), ids=str)
@pytest.mark.filterwarnings("ignore::DeprecationWarning:transformers")
def test_a_family_keeps_the_laws(case):
    check_all_laws(case)
    assert case.share > 0


def test_the_families_named_by_the_promise_are_here():
    promised = """
    bert roberta distilbert albert electra deberta_v2 gpt2 gpt_neox opt bloom falcon llama mistral qwen2 qwen3
    gemma2 phi3 deepseek_v3 mixtral qwen2_moe t5 bart vit deit beit swin clip segformer detr whisper wav2vec2
    mamba
    """
    assert not {f"transformers.{name}" for name in promised.split()} - set(CASES)


def test_outputs_says_which_results_keep_their_shape():
    """T5 returns its encoder's states beside the logits; who needs only the logits can narrow the states too."""
    case = CASES["transformers.t5"]
    model, inputs = case.build(), case.inputs()
    frozen = [axis for axis in find_axes(model, inputs) if "output" in (axis.frozen or "")]
    assert {axis.size for axis in frozen} >= {model.config.d_model}
    for outputs in ("logits", ["logits"], lambda result: result.logits, lambda name, tensor: name == "logits"):
        axes = find_axes(model, inputs, outputs=outputs)
        width = next(axis for axis in axes if "shared.weight:1" in map(str, axis.members))
        assert width.frozen is None
    with pytest.raises(InvalidArgumentError, match="names no result"):
        find_axes(model, inputs, outputs="logit")


@pytest.mark.parametrize("name", ["mixtral", "mixtral.loop", "qwen2_moe", "deepseek_v3"])
def test_the_inner_neurons_of_experts_can_be_removed(name):
    case = CASES[f"transformers.{name}"]
    model = case.build()
    axes = find_axes(model, case.inputs())
    inner = getattr(model.config, "moe_intermediate_size", model.config.intermediate_size)
    experts = [
        axis for axis in axes.free if axis.size == inner and any(".experts." in one.tensor for one in axis.members)
    ]
    assert experts
    assert all(axis.exact for axis in experts)


def test_heads_and_their_dimensions_are_axes_of_their_own():
    """Four query heads in two groups, of twelve dimensions: three axes, one integer each in the configuration."""
    case = CASES["transformers.llama"]
    model = case.build()
    axes = find_axes(model, case.inputs())
    query = {axis.size for axis in axes.free if "model.layers.0.self_attn.q_proj.weight:0" in map(str, axis.members)}
    value = {axis.size for axis in axes.free if "model.layers.0.self_attn.v_proj.weight:0" in map(str, axis.members)}
    assert query == {2, 6}  # groups, queries of a group, and pairs of rotary halves
    assert value == {2, 12}


@pytest.mark.parametrize("kind", ["Llama", "Mistral", "Qwen2", "Qwen3"])
def test_queries_that_share_a_key_can_be_removed(kind):
    """Without padding no call says how many there are; the number kept for inputs with padding follows."""
    torch.manual_seed(0)
    sizes = {**GROUPED, "num_attention_heads": 8, "head_dim": 6, "bos_token_id": 1, "eos_token_id": 2}
    model = getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, f"{kind}Config")(**sizes))
    inputs = {"input_ids": torch.randint(3, 60, (2, 6))}
    axes = find_axes(model, inputs)
    shared = [axis for axis in axes.free if axis.name.endswith("num_key_value_groups")]
    assert [axis.size for axis in shared] == [4, 4]
    prune_neurons(model, inputs, {axis.name: 1 for axis in shared}, importance="magnitude", progress=False)
    assert [layer.self_attn.num_key_value_groups for layer in model.model.layers] == [3, 3]
    assert (model.config.num_attention_heads, model.config.num_key_value_heads) == (6, 2)
    mask = torch.ones(2, 6, dtype=torch.long)
    mask[0, :2] = 0
    with torch.no_grad():
        padded = model.eval()(**inputs, attention_mask=mask).logits
        plain = model(inputs["input_ids"][1:]).logits
    torch.testing.assert_close(padded[1:], plain, rtol=1e-3, atol=1e-4)


def llama() -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    """A small Llama, made on whatever device is in force."""
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**GROUPED, bos_token_id=1, eos_token_id=2))
    return model, {"input_ids": torch.zeros(1, 6, dtype=torch.long)}


def test_a_model_without_values_has_the_same_axes():
    """Under a fake-tensor mode and on the meta device no weight exists, and none is needed."""
    expected = rows(find_axes(*llama()))
    with FakeTensorMode():
        assert rows(find_axes(*llama())) == expected
    with torch.device("meta"):
        model, inputs = llama()
    assert rows(find_axes(model, inputs)) == expected
