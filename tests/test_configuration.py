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
