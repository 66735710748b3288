"""Pruning that keeps to what a configuration can say: what is saved loads again, and computes the same."""

from __future__ import annotations

import copy
import itertools
import math

import pytest
import torch
from tests.test_configuration import family, shown
from torch import nn

from netopt.errors import InvalidArgumentError, NothingToPruneError
from netopt.integrations.huggingface.config import LOADS
from netopt.prune import prune_neurons
from netopt.prune.loadable import choose_alike, choose_within

transformers = pytest.importorskip("transformers")

BUDGETS = ({"amount": 0.3}, {"max_params": 0.7}, {"max_params": 0.5}, {"max_macs": 0.7})
FAMILIES = """
    bert roberta distilbert albert electra gpt2 gpt_neox opt falcon falcon.grouped llama mistral qwen2 qwen3 gemma2 phi3
    mamba t5 t5.gated bart whisper vit deit beit swin clip segformer detr wav2vec2 deberta_v2 bert.masked
    deepseek_v3 mixtral qwen2_moe
""".split()  # noqa: SIM905


def pruned(name, **choice):
    model, inputs = family(name)
    choice = {"importance": "magnitude", "progress": False, "loadable": True, **choice}
    return model, inputs, prune_neurons(model, inputs, **choice)


def loads_again(model: nn.Module, inputs, folder) -> None:
    model.save_pretrained(folder)
    loaded = type(model).from_pretrained(folder).eval()
    # A copy, since a mapped file's tensors are not aligned in memory, and kernels then add in another order.
    for one, other in zip(shown(copy.deepcopy(loaded), inputs), shown(model, inputs), strict=True):
        assert torch.equal(one, other)
    if loaded.can_generate() and set(inputs) == {"input_ids"}:
        made = [one.generate(**inputs, max_new_tokens=3, do_sample=False) for one in (loaded, model)]
        assert torch.equal(*made)


COUNTED = {"bart": "logits", "whisper": "logits", "clip": ["logits_per_image", "logits_per_text"]}
"""What else a model returns shows the width, which half of the parameters would do without."""


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("much", [{"max_params": 0.7}, {"max_params": 0.5}, {"amount": 0.3}], ids=str)
@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_pruned_loads_again(name, much, tmp_path):
    halved = much.get("max_params") == 0.5
    if halved and name == "detr":
        with pytest.raises(NothingToPruneError, match=r"width, 12\) is numbered by arange, at modeling_detr"):
            pruned(name, **much, outputs=["logits", "pred_boxes"])
        return
    model, inputs, report = pruned(name, **much, outputs=COUNTED.get(name) if halved else None)
    assert report.params_after <= much.get("max_params", 1) * report.params_before
    assert report.notes["configuration"] == LOADS
    loads_again(model, inputs, tmp_path)


@pytest.mark.parametrize("name", COUNTED)
def test_what_holds_the_width_is_named_with_the_way_out(name):
    with pytest.raises(NothingToPruneError, match=r"\(width, \d+\) is a dimension of the model's output.*outputs="):
        pruned(name, max_params=0.5)


def natural(name):
    """The families of the commonest calls, in sizes of their own."""
    torch.manual_seed(0)
    common = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 90}
    ids = {"input_ids": torch.randint(5, 90, (2, 8))}
    if name == "bert":
        config = transformers.BertConfig(**common, intermediate_size=128)
        return transformers.BertForSequenceClassification(config), ids
    if name == "distilbert":
        config = transformers.DistilBertConfig(dim=64, hidden_dim=128, n_layers=3, n_heads=4, vocab_size=90)
        return transformers.DistilBertForSequenceClassification(config), ids
    if name == "gpt2":
        config = transformers.GPT2Config(n_embd=64, n_layer=3, n_head=4, vocab_size=90, bos_token_id=1, eos_token_id=2)
        return transformers.GPT2LMHeadModel(config), ids
    if name == "vit":
        config = transformers.ViTConfig(
            **common | {"vocab_size": 90}, intermediate_size=128, image_size=16, patch_size=8
        )
        return transformers.ViTForImageClassification(config), {"pixel_values": torch.randn(2, 3, 16, 16)}
    common |= {"num_attention_heads": 8, "num_key_value_heads": 4}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**common, intermediate_size=128)), ids


BY_LAYER = [
    {"amount": 0.25, "scope": "layer"},
    {"amount": 0.5, "scope": "layer"},
    {"max_params": 0.7, "scope": "layer"},
]
CALLS = [("bert", one) for one in ({"amount": 0.3}, *BY_LAYER, {"max_macs": 0.5})]
CALLS += [
    (name, one)
    for name in ("distilbert", "gpt2", "vit")
    for one in ({"amount": 0.25}, *BY_LAYER, {"max_macs": 0.5}, {"max_macs": 0.5, "scope": "layer"})
]
CALLS += [("llama", one) for one in ({"amount": 0.3}, *BY_LAYER[:2], {"max_params": 0.7})]


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(("name", "much"), CALLS, ids=[f"{name}-{much}" for name, much in CALLS])
def test_the_commonest_calls_load_again_or_say_that_they_do_not(name, much, tmp_path):
    model, inputs = natural(name)
    report = prune_neurons(model.eval(), inputs, importance="magnitude", progress=False, loadable=True, **much)
    assert report.params_after < report.params_before
    assert LOADS in " ".join(str(report).split())
    loads_again(model, inputs, tmp_path)
    model, inputs = natural(name)
    report = prune_neurons(model.eval(), inputs, importance="magnitude", progress=False, **much)
    text = " ".join(str(report).split())
    if LOADS in text:
        loads_again(model, inputs, tmp_path / "other")
    else:
        assert "configuration: does not load with from_pretrained" in text


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("budget", BUDGETS, ids=str)
@pytest.mark.parametrize("scope", ["global", "layer"])
@pytest.mark.parametrize("name", ["bert", "distilbert", "gpt2", "vit", "llama"])
def test_every_budget_is_kept_and_loads_again(name, budget, scope, tmp_path):
    model, inputs, report = pruned(name, scope=scope, **budget)
    assert report.params_after < report.params_before
    for key, before, after in (
        ("max_params", report.params_before, report.params_after),
        ("max_macs", report.macs_before, report.macs_after),
    ):
        assert after <= budget.get(key, 1) * before
    loads_again(model, inputs, tmp_path)


def test_what_the_configuration_says_is_tied_and_which_neurons_go_is_free():
    model, _, report = pruned("llama", amount={"ffn": 0.5})
    assert model.config.intermediate_size == 40
    first, second = (cut.kept for cut in report.plan.axes)
    assert len(first) == len(second) == 40
    assert not torch.equal(first, second)


@pytest.mark.parametrize("name", ["bert", "distilbert", "gpt2", "vit", "llama"])
def test_without_it_the_report_says_that_nothing_loads(name):
    _, _, report = pruned(name, amount=0.3, loadable=False)
    text = " ".join(str(report).split())
    assert "configuration: does not load with from_pretrained" in text
    assert "loadable=True" in text
    assert "does not load with from_pretrained" in report._repr_html_()


def test_what_cannot_be_loaded_is_refused_before_anything_is_done():
    plain, x = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), torch.randn(2, 4)
    with pytest.raises(InvalidArgumentError, match="needs a model that is built from its configuration"):
        prune_neurons(plain, x, 0.5, loadable=True)
    with pytest.raises(InvalidArgumentError, match="a threshold decides one by one"):
        prune_neurons(plain, x, threshold=0.5, loadable=True)
    with pytest.raises(InvalidArgumentError, match="the configuration of this BloomForCausalLM can say none"):
        pruned("bloom", amount=0.3)
    with pytest.raises(NothingToPruneError, match="the smallest model that its configuration can say"):
        pruned("bert", max_params=0.01)


GROUPS = [[{"a": n, "b": n} for n in (4, 3, 2, 1)], [{"c": n} for n in (6, 4, 2)]]
SCORES = {"a": torch.tensor([9.0, 9, 1, 1]), "b": torch.tensor([9.0, 9, 1, 1]), "c": torch.ones(6)}


def test_the_choice_that_loses_least_is_taken_within_the_budget():
    def cost(counts):
        return sum({"a": 4, "b": 4, "c": 6, **counts}.values())

    for limit in range(4, 15):
        counts = choose_within(SCORES, GROUPS, cost, limit)
        assert cost(counts) <= limit
        assert counts["a"] == counts["b"]
    assert choose_within(SCORES, GROUPS, cost, 10) == {"a": 2, "b": 2, "c": 6}
    with pytest.raises(NothingToPruneError):
        choose_within(SCORES, GROUPS, cost, 3)


@pytest.mark.parametrize("seed", range(20))
def test_of_two_groups_the_best_choices_are_taken(seed):
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.randint(2, 9, (4,), generator=generator).tolist()
    names, scores = "abcd", {}
    for name, size in zip(names, sizes, strict=True):
        scores[name] = torch.rand(size, generator=generator)
    groups = [
        [{"a": n, "b": max(1, sizes[1] - sizes[0] + n)} for n in range(sizes[0], 0, -1)],
        [{"c": n, "d": m} for n in range(sizes[2], 0, -1) for m in range(sizes[3], 0, -1)],
    ]

    def cost(counts):
        now = dict(zip(names, sizes, strict=True)) | dict(counts)
        return now["a"] * (7 + 3 * now["b"]) + now["b"] * now["c"] + now["c"] * now["d"]

    def lost(counts):
        return sum(
            -math.log(scores[name].topk(count).values.sum() / scores[name].sum()) for name, count in counts.items()
        )

    limit = (cost({}) + cost({**groups[0][-1], **groups[1][-1]})) // 2
    found = choose_within(scores, groups, cost, limit)
    every = [one | other for one, other in itertools.product(*groups)]
    least = min(lost(one) for one in every if cost(one) <= limit)
    assert cost(found) <= limit
    assert lost(found) == pytest.approx(least, abs=1e-5)


def test_scores_that_can_be_compared_are_added_up():
    groups = [[{"a": n} for n in (2, 1)], [{"b": n} for n in (2, 1)]]
    scores = {"a": torch.tensor([100.0, 90.0]), "b": torch.tensor([5.0, 1e-3])}

    def cost(counts):
        return sum({"a": 2, "b": 2, **counts}.values())

    assert choose_within(scores, groups, cost, 3, comparable=True) == {"a": 2, "b": 1}
    scores["b"] = torch.tensor([1e3, 95.0])
    assert choose_within(scores, groups, cost, 3, comparable=True) == {"a": 1, "b": 2}
    assert choose_within(scores, groups, cost, 3) == {"a": 2, "b": 1}  # of `b` a smaller share goes


def test_named_axes_are_at_most_their_target():
    assert choose_alike(GROUPS, {"a": 3, "c": 5}) == {"a": 3, "b": 3, "c": 4}
    assert choose_alike(GROUPS, {"c": 6}) == {"c": 6}


def test_a_family_whose_layers_have_configurations_of_their_own_loads_again(tmp_path):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "hidden_size_per_layer_input": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "global_head_dim": 8}
    words = {
        "vocab_size": 50,
        "vocab_size_per_layer_input": 50,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": 2,
    }
    kinds = [*["sliding_attention"] * 3, "full_attention"]
    config = transformers.Gemma4TextConfig(**sizes, **heads, **words, num_kv_shared_layers=0, layer_types=kinds)
    assert config.is_heterogeneous
    model, inputs = transformers.Gemma4ForCausalLM(config).eval(), {"input_ids": torch.arange(3, 11)[None]}
    report = prune_neurons(model, inputs, max_params=0.7, importance="magnitude", loadable=True, progress=False)
    assert report.params_after <= 0.7 * report.params_before
    assert report.notes["configuration"] == LOADS
    loads_again(model, inputs, tmp_path)
