"""Plans of all kinds in one: carried out on a fresh model, on files and after JSON, they leave what the calls left."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import nn

import netopt
from netopt import Plan, PlanSequence
from netopt.errors import ArgumentTypeError, CheckpointError, InvalidArgumentError, NetoptError, PlanMismatchError
from netopt.plan.blocks import BlockPlan, StackCut
from netopt.plan.experts import ExpertCut, ExpertPlan

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")
safetensors = pytest.importorskip("safetensors.torch")

SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 4, "num_key_value_heads": 2}
IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
IDS_X = {"input_ids": torch.arange(8)[None]}


def llama():
    config = transformers.LlamaConfig(vocab_size=40, num_hidden_layers=4, tie_word_embeddings=True, **SMALL, **IDS)
    return transformers.LlamaForCausalLM(config)


def mixtral():
    config = transformers.MixtralConfig(vocab_size=40, num_hidden_layers=3, num_local_experts=4, **SMALL, **IDS)
    return transformers.MixtralForCausalLM(config)


def gpt_oss():
    config = transformers.GptOssConfig(
        vocab_size=40, num_hidden_layers=3, num_local_experts=4, num_experts_per_tok=2, head_dim=4, **SMALL, **IDS
    )
    return transformers.GptOssForCausalLM(config)


def gpt2():
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=40, n_embd=16, n_layer=4, n_head=4, **IDS))


def bert():
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 4, "num_hidden_layers": 3}
    return transformers.BertForMaskedLM(transformers.BertConfig(vocab_size=40, **sizes, pad_token_id=0))


def t5():
    config = transformers.T5Config(
        vocab_size=40, d_model=16, d_ff=24, d_kv=4, num_layers=3, num_heads=4, decoder_start_token_id=0, **IDS
    )
    return transformers.T5ForConditionalGeneration(config)


FAMILIES = {one.__name__: one for one in (llama, mixtral, gpt_oss, gpt2, bert, t5)}


def tokenizer():
    words = ["<pad>", "<s>", "</s>", "<unk>", *(f"w{number}" for number in range(36))]
    made = tokenizers.Tokenizer(
        tokenizers.models.WordPiece({word: place for place, word in enumerate(words)}, unk_token="<unk>")
    )
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return made


def inputs(family):
    return IDS_X | ({"decoder_input_ids": IDS_X["input_ids"]} if family == "t5" else {})


def pruned(family):
    """A model before and after calls of all kinds that it takes, and their plans."""
    torch.manual_seed(0)
    large = FAMILIES[family]().eval()
    small, x, plans = copy.deepcopy(large), inputs(family), []
    plans.append(netopt.prune_blocks(small, x, amount=1, progress=False).plan)
    if family in ("mixtral", "gpt_oss"):
        plans.append(netopt.prune_experts(small, x, amount=1, progress=False).plan)
    else:
        plans.append(netopt.prune_neurons(small, x, 0.25, include="ffn", loadable=True, progress=False).plan)
    plans.append(netopt.prune_vocabulary(small, tokenizer(), ["w3 w5 w7 w11 w30"], keep=20, progress=False).plan)
    return large, small, plans


_MADE = {}


@pytest.fixture(params=FAMILIES)
def case(request):
    if request.param not in _MADE:
        _MADE[request.param] = pruned(request.param)
    large, small, plans = _MADE[request.param]
    return request.param, copy.deepcopy(large), small, plans


def same(one, other):
    first, second = one.state_dict(), other.state_dict()
    return first.keys() == second.keys() and all(torch.equal(second[name], value) for name, value in first.items())


def test_on_a_fresh_model_they_leave_what_the_calls_left(case):
    _, large, small, plans = case
    optimizer = torch.optim.AdamW(large.parameters())
    PlanSequence(plans).apply(large, optimizer)
    assert same(large, small)
    assert large.config.to_dict() == small.config.to_dict()
    held = {id(one) for group in optimizer.param_groups for one in group["params"]}
    assert held == {id(one) for one in large.parameters()}


def test_after_json_they_are_the_same(case, tmp_path):
    _, large, small, plans = case
    sequence = PlanSequence(plans[:1]).then(PlanSequence(plans[1:]))
    again = PlanSequence.from_dict(json.loads(json.dumps(sequence.to_dict())))
    assert again == sequence
    sequence.save(tmp_path / "plan.json")
    loaded = PlanSequence.load(tmp_path / "plan.json")
    assert loaded == sequence
    loaded.apply(large)
    assert same(large, small)
    assert str(sequence).startswith("1. ")


def test_on_files_they_leave_a_folder_that_loads(case, tmp_path):
    family, large, small, plans = case
    large.save_pretrained(tmp_path / "large", max_shard_size="8KB")
    if family == "mixtral":  # whose experts are written one by one, and held as one
        with pytest.raises(PlanMismatchError, match="save it"):
            PlanSequence(plans).apply_to_checkpoint(tmp_path / "large", tmp_path / "small")
        return
    PlanSequence(plans).apply_to_checkpoint(tmp_path / "large", tmp_path / "small")
    loaded, told = type(large).from_pretrained(tmp_path / "small", output_loading_info=True)
    assert not told["missing_keys"]
    assert not told["unexpected_keys"]
    assert same(loaded.eval(), small)
    left = small.config.vocab_size
    x = {name: one % left for name, one in inputs(family).items()}
    with torch.no_grad():
        assert torch.equal(loaded(**x).logits, small(**x).logits)
    if family != "bert":
        assert loaded.generation_config.eos_token_id == small.generation_config.eos_token_id


def test_shrink_pretrained_takes_a_plan(case, tmp_path):
    _, large, small, plans = case
    large.save_pretrained(tmp_path / "large")
    before = copy.deepcopy(large.state_dict())
    for place, source in enumerate((tmp_path / "large", large)):
        report = netopt.shrink_pretrained(source, tmp_path / f"small{place}", plan=PlanSequence(plans), progress=False)
        assert same(type(large).from_pretrained(tmp_path / f"small{place}"), small)
        assert report.params_after == sum(one.numel() for one in small.parameters())
        record = json.loads((tmp_path / f"small{place}" / "netopt.json").read_text())
        assert PlanSequence.from_dict(record["plan"]) == PlanSequence(plans)
    assert all(torch.equal(large.state_dict()[name], one) for name, one in before.items())
    for other in ({"amount": 0.5}, {"include": "*ffn*"}, {"round_to": 4}):
        with pytest.raises(InvalidArgumentError, match="plan"):
            netopt.shrink_pretrained(tmp_path / "large", tmp_path / "other", plan=PlanSequence(plans), **other)


def nets():
    return nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.ReLU(), nn.Linear(4, 2))


BLOCKS = BlockPlan((StackCut(("",), 4, (0, 1, 3)),))
NEURONS = Plan({"0.weight": {0: [0, 2]}, "0.bias": {0: [0, 2]}, "2.weight": {1: [0, 2]}})
LATE = Plan({"2.weight": {1: [0, 3]}})
EXPERTS = ExpertPlan((ExpertCut("", 4, (0, 2), (("0.weight", 0), ("0.bias", 0)), ()),))


@pytest.mark.parametrize(
    "wrong",
    [
        (BLOCKS, BLOCKS),
        (BLOCKS, NEURONS, LATE),
        (NEURONS, Plan({"9.weight": {0: [0]}})),
        (BLOCKS, Plan({"3.weight": {0: [0]}})),
        (EXPERTS, EXPERTS),
    ],
    ids=range(5),
)
def test_all_or_nothing(wrong, tmp_path):
    torch.manual_seed(0)
    model = nets()
    state, text = copy.deepcopy(model.state_dict()), repr(model)
    with pytest.raises(NetoptError):
        PlanSequence(wrong).apply(model)
    assert repr(model) == text
    assert all(torch.equal(model.state_dict()[name], one) for name, one in state.items())
    if wrong == (BLOCKS, BLOCKS):
        return  # files do not tell how many entries without tensors a list has
    safetensors.save_file(state, tmp_path / "large.safetensors")
    with pytest.raises((PlanMismatchError, CheckpointError)):
        PlanSequence(wrong).apply_to_checkpoint(tmp_path / "large.safetensors", tmp_path / "small.safetensors")
    assert not (tmp_path / "small.safetensors").exists()


def test_a_file_alone_is_rewritten_too(tmp_path):
    torch.manual_seed(0)
    model = nets()
    safetensors.save_file(model.state_dict(), tmp_path / "large.safetensors")
    for name, steps in {"a": (BLOCKS, NEURONS), "b": (EXPERTS, BLOCKS)}.items():
        target = PlanSequence(steps).apply_to_checkpoint(
            tmp_path / "large.safetensors", tmp_path / f"{name}.safetensors"
        )
        small = copy.deepcopy(model)
        if name == "a":
            PlanSequence(steps).apply(small)
            expected = small.state_dict()
        else:
            kept = torch.tensor([0, 2])
            expected = {"0.weight": model[0].weight[kept], "0.bias": model[0].bias[kept]}
            expected |= {"2.weight": model[3].weight, "2.bias": model[3].bias}
        found = safetensors.load_file(target)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], one) for key, one in expected.items())


@pytest.mark.parametrize(
    "data",
    [
        [],
        {},
        {"format": "netopt.plans"},
        {"format": "netopt.plans", "steps": 3},
        {"format": "netopt.plans", "steps": [3]},
        {"format": "netopt.plans", "steps": [{"kind": "blocks"}]},
        {"format": "netopt.plans", "steps": [{"format": "netopt.plans", "steps": []}]},
        {"format": "netopt.plans", "steps": [{**NEURONS.to_dict(), "tensors": 3}]},
        {"format": "netopt.plans", "steps": [{**EXPERTS.to_dict(), "mixtures": [{}]}]},
    ],
    ids=range(9),
)
def test_broken_files_are_named(data, tmp_path):
    (tmp_path / "plan.json").write_text(json.dumps(data))
    with pytest.raises(InvalidArgumentError, match=r"plan\.json"):
        PlanSequence.load(tmp_path / "plan.json")


def test_what_is_no_plan_is_told():
    with pytest.raises(ArgumentTypeError, match="dict"):
        PlanSequence([NEURONS, {}])


class Layered(nn.Module):
    """Blocks with inner neurons of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            [nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 6)) for _ in range(4)]
        )

    def forward(self, x):
        for block in self.blocks:
            x = x + block(x)
        return x


@pytest.mark.parametrize("calls", ["nb", "bn", "nbn", "nbnb", "bnbn"])
def test_neurons_and_blocks_by_turns(calls, tmp_path):
    """Blocks get new numbers, and with them names that others had before."""
    model, x = Layered(), torch.randn(5, 6)
    large, plans = copy.deepcopy(model), []
    for call in calls:
        if call == "n":
            report = netopt.prune_neurons(model, x, 0.2, importance="magnitude", progress=False)
        else:
            report = netopt.prune_blocks(model, x, 1, include="blocks.[01]", progress=False)
        plans.append(report.plan)
    safetensors.save_file(large.state_dict(), tmp_path / "large.safetensors")
    PlanSequence(plans).apply_to_checkpoint(tmp_path / "large.safetensors", tmp_path / "small.safetensors")
    found, expected = safetensors.load_file(tmp_path / "small.safetensors"), model.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(one, expected[name]) for name, one in found.items())


def test_what_no_configuration_can_say_is_not_written(tmp_path):
    large = llama().eval()
    branches = netopt.plan_blocks(large, IDS_X, 1, kind="branches", progress=False)
    for plan, error in (
        (branches, InvalidArgumentError),
        (PlanSequence([branches]), InvalidArgumentError),
        (PlanSequence([]), InvalidArgumentError),
        (branches.to_dict(), ArgumentTypeError),
    ):
        with pytest.raises(error, match="plan"):
            netopt.shrink_pretrained(large, tmp_path / "small", plan=plan, progress=False)
    plan = netopt.plan_blocks(large, IDS_X, 1, progress=False)
    netopt.prune_weights(large, 0.3, progress=False)
    with pytest.raises(InvalidArgumentError, match=r"netopt\.finish"):
        netopt.shrink_pretrained(large, tmp_path / "small", plan=plan, progress=False)
    assert not (tmp_path / "small").exists()
