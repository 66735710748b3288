"""Configurations: kept in step where they can say what the model has become, and named where they cannot."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from netopt.prune import prune_neurons

transformers = pytest.importorskip("transformers")

SMALL = {
    "vocab_size": 50,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "bos_token_id": None,
    "eos_token_id": None,
}
IDS = {"input_ids": torch.tensor([[1, 2, 3, 4]])}


def bert() -> nn.Module:
    return transformers.BertModel(transformers.BertConfig(**SMALL))


def llama() -> nn.Module:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL, tie_word_embeddings=True))


def gpt2() -> nn.Module:
    sizes = {"vocab_size": 50, "n_embd": 16, "n_layer": 2, "n_head": 2, "bos_token_id": None, "eos_token_id": None}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes))


CASES = {
    "bert": (bert, "*intermediate*", {"intermediate_size": 12}),
    "llama": (llama, "*gate_proj", {"intermediate_size": 12}),
    "llama width": (llama, "model.embed_tokens", {"hidden_size": 8, "head_dim": 8, "rms_norm_eps": 2e-6}),
    "gpt2": (gpt2, "*c_fc", {"n_inner": 32}),
}


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("name", CASES)
def test_what_a_configuration_can_say_survives_saving(name, tmp_path):
    build, include, sizes = CASES[name]
    model = build().eval()
    report = prune_neurons(model, IDS, 0.5, importance="magnitude", scope="layer", include=include, progress=False)
    assert "config" not in report.settings
    assert {key: getattr(model.config, key) for key in sizes} == sizes
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    torch.testing.assert_close(loaded(**IDS)[0], model(**IDS)[0])


def test_what_it_cannot_say_is_named():
    model = bert()
    kept = {"encoder.layer.0.intermediate.dense": 0.5}
    report = prune_neurons(model, IDS, kept, importance="magnitude", progress=False)
    assert "`encoder.layer.0.intermediate.dense.weight` has shape (12, 16)" in report.settings["config"]
    assert model.config.intermediate_size == 24


def test_what_the_constructor_would_compute_anew_is_named():
    model = llama()
    report = prune_neurons(model, IDS, 0.5, importance="magnitude", scope="layer", progress=False)
    assert "inv_freq` is computed from it" in report.settings["config"]


def test_a_config_that_builds_nothing_is_left_alone():
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    model.config = {"hidden": 8}
    report = prune_neurons(model, torch.randn(2, 4), 0.5, progress=False)
    assert model.config == {"hidden": 8}
    assert "config" not in report.settings


# What a configuration can say of each family: the axes that shrink (a pattern of their names) and what it says then.
FOUND = {
    "bert": [("*intermediate.dense", {"intermediate_size": 40})],
    "roberta": [("*intermediate.dense", {"intermediate_size": 40})],
    "distilbert": [("*ffn.lin1", {"hidden_dim": 40})],
    "albert": [("*word_embeddings", {"embedding_size": 10}), ("*.ffn", {"intermediate_size": 40})],
    "electra": [("*word_embeddings", {"embedding_size": 10}), ("*intermediate.dense", {"intermediate_size": 40})],
    "deberta_v2": [("*intermediate.dense", {"intermediate_size": 40})],
    "gpt2": [("*c_fc", {"n_inner": 40})],
    "gpt_neox": [("*dense_h_to_4h", {"intermediate_size": 40})],
    "opt": [("*fc1", {"ffn_dim": 40})],
    "falcon": [("*dense_h_to_4h", {"ffn_hidden_size": 96})],
    "falcon.grouped": [("*dense_h_to_4h", {"ffn_hidden_size": 96})],
    "llama": [
        ("model.embed_tokens", {"hidden_size": 24}),
        ("*gate_proj", {"intermediate_size": 40}),
        ("*q_proj/0", {"num_attention_heads": 2, "num_key_value_heads": 1}),
    ],
    "mistral": [
        ("model.embed_tokens", {"hidden_size": 24}),
        ("*q_proj/0", {"num_attention_heads": 2, "num_key_value_heads": 1}),
    ],
    "qwen2": [
        ("model.embed_tokens", {"hidden_size": 24, "head_dim": 12}),
        ("*q_proj/0", {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 12}),
    ],
    "qwen3": [("*gate_proj", {"intermediate_size": 40})],
    "gemma2": [("*gate_proj", {"intermediate_size": 40})],
    "phi3": [
        ("model.embed_tokens", {"hidden_size": 24, "head_dim": 12}),
        ("*gate_up_proj", {"intermediate_size": 40}),
    ],
    "deepseek_v3": [
        ("model.embed_tokens", {"hidden_size": 24}),
        ("*kv_b_proj", {"v_head_dim": 6}),
        ("*.experts.gate_up_proj", {"moe_intermediate_size": 12, "n_shared_experts": 2}),
    ],
    "mixtral": [
        ("model.embed_tokens", {"hidden_size": 24, "head_dim": 12}),
        ("*gate_up_proj", {"intermediate_size": 40}),
        ("*q_proj/0", {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 12}),
    ],
    "qwen2_moe": [
        ("model.embed_tokens", {"hidden_size": 24, "head_dim": 12}),
        ("*.experts.gate_up_proj", {"moe_intermediate_size": 12}),
        ("*shared_expert.gate_proj", {"shared_expert_intermediate_size": 14}),
    ],
    "mamba": [("*", {"hidden_size": 24, "intermediate_size": 48, "state_size": 3, "time_step_rank": 2})],
    "t5": [("*", {"d_ff": 40, "d_kv": 5, "num_heads": 2})],
    "t5.gated": [("*", {"d_ff": 40, "d_kv": 5, "num_heads": 2})],
    "bart": [("*encoder*fc1", {"encoder_ffn_dim": 40}), ("*decoder*fc1", {"decoder_ffn_dim": 40})],
    "whisper": [("*encoder*fc1", {"encoder_ffn_dim": 40}), ("*decoder*fc1", {"decoder_ffn_dim": 40})],
    "vit": [("*fc1", {"intermediate_size": 40})],
    "deit": [("*fc1", {"intermediate_size": 40})],
    "beit": [("*fc1", {"intermediate_size": 40})],
    "swin": [("*fc1", {"mlp_ratio": 2.0})],
    "clip": [
        ("text*fc1", {"text_config.intermediate_size": 40}),
        ("vision*fc1", {"vision_config.intermediate_size": 40}),
    ],
    "segformer": [("*fc1", {"mlp_ratios": (2, 2, 2, 2)})],
    "detr": [("*encoder*fc1", {"encoder_ffn_dim": 40}), ("*decoder*fc1", {"decoder_ffn_dim": 40})],
    "wav2vec2": [("*conv_layers*", {"conv_dim": (10, 10, 10)}), ("*intermediate_dense", {"intermediate_size": 40})],
}  # fmt: skip
# Nothing of it is said by one number: inner widths are four times the width, which is heads times their size.
WITHOUT = {"bloom", "bert.masked"}


def family(name: str) -> tuple[nn.Module, object]:
    from tests.zoo.language import CASES

    torch.manual_seed(0)
    case = CASES[f"transformers.{name}"]
    return case.make().eval(), case.make_inputs()


def families() -> list[str]:
    from tests.zoo.language import CASES

    return [name.removeprefix("transformers.") for name in CASES if not name.endswith(".loop")]


def halved(model: nn.Module, inputs: object, include: object = None) -> str | None:
    """Halves the axes, and says why the configuration cannot say it."""
    report = prune_neurons(
        model, inputs, 0.5, importance="magnitude", scope="layer", include=include, verify=False, progress=False
    )
    assert report.params_after < report.params_before
    return report.settings.get("config")


def round_trips(model: nn.Module, inputs: object, folder: object) -> None:
    model.save_pretrained(folder)
    loaded = type(model).from_pretrained(folder).eval()
    for one, other in zip(shown(loaded, inputs), shown(model, inputs), strict=True):
        torch.testing.assert_close(one, other)


def shown(model: nn.Module, inputs: object) -> list[torch.Tensor]:
    from tests.zoo.laws import tensors

    torch.manual_seed(0)
    with torch.no_grad():
        return [one for one in tensors(model(**inputs)) if one.is_floating_point()]


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("name", FOUND)
def test_a_configuration_that_can_say_it_is_found_and_round_trips(name, tmp_path):
    for place, (include, sizes) in enumerate(FOUND[name]):
        model, inputs = family(name)
        assert halved(model, inputs, include) is None, include
        for key, value in sizes.items():
            holder = model.config
            for step in key.split("."):
                holder = getattr(holder, step)
            assert holder == value, (include, key)
        round_trips(model, inputs, tmp_path / str(place))


def test_every_family_is_named():
    assert set(families()) == set(FOUND) | WITHOUT


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("name", families())
def test_everything_at_once_round_trips_or_is_named(name, tmp_path):
    model, inputs = family(name)
    before = model.config.to_dict()
    why = halved(model, inputs)
    if why is None:
        round_trips(model, inputs, tmp_path)
        return
    assert "cannot express it: `" in why
    assert set(model.config.to_dict()) == set(before)
