"""Pruning that keeps to what a configuration can say: what is saved loads again, and computes the same."""

from __future__ import annotations

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
    for one, other in zip(shown(loaded, inputs), shown(model, inputs), strict=True):
        torch.testing.assert_close(one, other)
    if loaded.can_generate() and set(inputs) == {"input_ids"}:
        made = [one.generate(**inputs, max_new_tokens=3, do_sample=False) for one in (loaded, model)]
        assert torch.equal(*made)


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_pruned_loads_again(name, tmp_path):
    model, inputs, report = pruned(name, max_params=0.7)
    assert report.params_after <= 0.7 * report.params_before
    assert report.notes["configuration"] == LOADS
    loads_again(model, inputs, tmp_path)


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


def test_named_axes_are_at_most_their_target():
    assert choose_alike(GROUPS, {"a": 3, "c": 5}) == {"a": 3, "b": 3, "c": 4}
    assert choose_alike(GROUPS, {"c": 6}) == {"c": 6}
