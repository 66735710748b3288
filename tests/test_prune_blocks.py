"""Removing blocks is the same, bit for bit, as identities in their place, in every family, with and without a cache."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

import netopt
from conftest import unchanged
from netopt import batches
from netopt.errors import (
    ArgumentTypeError,
    InvalidArgumentError,
    NetoptError,
    NonFiniteError,
    NothingToPruneError,
    OptimizerStateError,
    PlanMismatchError,
    UnknownNameError,
    VerificationError,
)

IDS = torch.arange(12).view(2, 6) + 3
TEXT = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
IMAGES = torch.linspace(-1, 1, 2 * 3 * 32 * 32).view(2, 3, 32, 32).sin()
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
WIDTHS = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, **TOKENS}
GROUPED = {**WIDTHS, "num_key_value_heads": 2, "max_position_embeddings": 64}


class Residual(nn.Module):
    """A feed-forward block with a skip connection."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(x).relu())


class Looped(nn.Module):
    """Goes through a list of blocks in a way that is given."""

    def __init__(self, way: Callable[[Any, Tensor], Any], count: int = 5, **held: Any) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Residual() for _ in range(count)])
        self.way = way
        for name, value in held.items():
            setattr(self, name, value)

    def forward(self, x: Tensor) -> Any:
        return self.way(self, x)


def _t5() -> nn.Module:
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 4, "num_decoder_layers": 4, "num_heads": 4}
    return hf.T5ForConditionalGeneration(hf.T5Config(vocab_size=64, **sizes, decoder_start_token_id=0))


def _whisper() -> nn.Module:
    layers = {"encoder_layers": 4, "decoder_layers": 4, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
    sizes = {"d_model": 32, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "num_mel_bins": 8, "vocab_size": 64}
    most = {"max_source_positions": 16, "max_target_positions": 32}
    return hf.WhisperForConditionalGeneration(
        hf.WhisperConfig(**layers, **sizes, **most, **TOKENS, decoder_start_token_id=1)
    )


def _resnet(kind: str) -> nn.Module:
    config = hf.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[3, 3], layer_type=kind)
    return hf.ResNetForImageClassification(config)


MAKE: dict[str, tuple[Callable[[], nn.Module], Any]] = {
    "llama": (lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**GROUPED, num_hidden_layers=5)), TEXT),
    "mistral": (lambda: hf.MistralForCausalLM(hf.MistralConfig(**GROUPED, num_hidden_layers=5)), TEXT),
    "qwen3": (lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**GROUPED, num_hidden_layers=5, head_dim=8)), TEXT),
    "qwen3-windows": (
        lambda: hf.Qwen3ForCausalLM(
            hf.Qwen3Config(
                **GROUPED, num_hidden_layers=5, head_dim=8, sliding_window=3, use_sliding_window=True,
                layer_types=["full_attention", *["sliding_attention"] * 2, "full_attention", "sliding_attention"],
            )
        ),
        TEXT,
    ),
    "gemma3": (
        lambda: hf.Gemma3ForCausalLM(
            hf.Gemma3TextConfig(**GROUPED, num_hidden_layers=7, head_dim=8, sliding_window=3)
        ),
        TEXT,
    ),
    "gemma2": (
        lambda: hf.Gemma2ForCausalLM(hf.Gemma2Config(**GROUPED, num_hidden_layers=4, head_dim=8, sliding_window=3)),
        TEXT,
    ),
    "gpt2": (
        lambda: hf.GPT2LMHeadModel(
            hf.GPT2Config(vocab_size=64, n_embd=32, n_layer=4, n_head=4, n_positions=64, **TOKENS)
        ),
        TEXT,
    ),
    "gpt_neox": (lambda: hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**WIDTHS, num_hidden_layers=4)), TEXT),
    "opt": (
        lambda: hf.OPTForCausalLM(
            hf.OPTConfig(vocab_size=64, hidden_size=32, ffn_dim=48, num_hidden_layers=4, num_attention_heads=4,
                         word_embed_proj_dim=32, **TOKENS)
        ),
        TEXT,
    ),
    "mamba": (
        lambda: hf.MambaForCausalLM(
            hf.MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=4, state_size=4, **TOKENS)
        ),
        {"input_ids": IDS},
    ),
    "bert": (lambda: hf.BertForSequenceClassification(hf.BertConfig(**WIDTHS, num_hidden_layers=4)), TEXT),
    "roberta": (lambda: hf.RobertaModel(hf.RobertaConfig(**WIDTHS, num_hidden_layers=4)), TEXT),
    "distilbert": (
        lambda: hf.DistilBertModel(
            hf.DistilBertConfig(vocab_size=64, dim=32, hidden_dim=48, n_layers=4, n_heads=4, pad_token_id=0)
        ),
        TEXT,
    ),
    "vit": (
        lambda: hf.ViTForImageClassification(
            hf.ViTConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
                         image_size=32, patch_size=8)
        ),
        IMAGES,
    ),
    "swin": (
        lambda: hf.SwinForImageClassification(
            hf.SwinConfig(image_size=32, patch_size=2, embed_dim=8, depths=[2, 4], num_heads=[2, 2], window_size=4)
        ),
        IMAGES,
    ),
    "convnext": (
        lambda: hf.ConvNextForImageClassification(
            hf.ConvNextConfig(hidden_sizes=[8, 12], depths=[3, 3], num_stages=2, layer_scale_init_value=0.5)
        ),
        IMAGES,
    ),
    "resnet-basic": (lambda: _resnet("basic"), IMAGES),
    "resnet-bottleneck": (lambda: _resnet("bottleneck"), IMAGES),
    "t5": (_t5, {**TEXT, "decoder_input_ids": IDS}),
    "whisper": (
        _whisper,
        {"input_features": torch.linspace(-1, 1, 2 * 8 * 32).view(2, 8, 32).sin(), "decoder_input_ids": IDS},
    ),
    "torch-encoder": (
        lambda: nn.TransformerEncoder(
            nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 4, enable_nested_tensor=False
        ),
        torch.linspace(-1, 1, 2 * 5 * 8).view(2, 5, 8).sin(),
    ),
    "sequential": (
        lambda: nn.Sequential(nn.Linear(4, 8), *[Residual() for _ in range(5)], nn.Linear(8, 3)),
        torch.linspace(-1, 1, 12).view(3, 4),
    ),
    "plain-sequential": (
        lambda: nn.Sequential(*[nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(5)]),
        torch.linspace(-1, 1, 24).view(3, 8),
    ),
}  # fmt: skip
WRITERS = ["llama", "mistral", "qwen3", "qwen3-windows", "gemma3", "gemma2", "gpt2", "gpt_neox", "opt", "mamba", "t5"]


def made(name: str, seed: int = 0) -> tuple[nn.Module, Any]:
    """A model with weights that matter, and inputs."""
    torch.manual_seed(seed)
    make, inputs = MAKE[name]
    model = make().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model, inputs


def run(model: nn.Module, inputs: Any) -> list[Tensor]:
    with torch.no_grad():
        result = model(**inputs) if isinstance(inputs, dict) else model(inputs)
    return [tensor for _, tensor in batches.tensors(result)]


def skipping(model: nn.Module, plan: netopt.BlockPlan) -> nn.Module:
    """A copy that hands on what enters the blocks a plan removes, and anything else these return."""
    model = copy.deepcopy(model)
    for cut in plan.stacks:
        for name in cut.lists:
            for place in cut.removed:
                block = list(model.get_submodule(name).children())[place]
                block.forward = _handing_on(block.forward)
    return model


def _handing_on(own: Callable[..., Any]) -> Callable[..., Any]:
    def forward(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        result = own(x.clone(), *args, **kwargs)
        return (x, *result[1:]) if isinstance(result, tuple) else x

    return forward


def without_branches(model: nn.Module, plan: netopt.BlockPlan) -> nn.Module:
    """A copy in which what the branches of a plan add is zero."""
    model = copy.deepcopy(model)
    for branch in plan.branches:
        last = model.get_submodule(next(part.name for part in branch.parts if part.zero))
        last.register_forward_hook(lambda _m, _a, made: (0 * made[0], *made[1:]) if type(made) is tuple else 0 * made)
    return model


def equal(found: list[Tensor], expected: list[Tensor]) -> bool:
    return len(found) == len(expected) and all(map(torch.equal, found, expected))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", MAKE)
def test_removed_equals_identities(name: str, seed: int) -> None:
    model, inputs = made(name, seed)
    dense = copy.deepcopy(model)
    report = netopt.prune_blocks(
        model, inputs, 0.4, importance=lambda one, _: float(sum(map(ord, one)) * (seed + 3) % 11), progress=False
    )
    reference = skipping(dense, report.plan)
    assert equal(run(model, inputs), run(reference, inputs))
    assert not equal(run(model, inputs), run(dense, inputs))
    assert sum(row.before - row.after for row in report.rows) > 0
    longer = {key: torch.cat([value, value], 1) for key, value in inputs.items()} if name in WRITERS else inputs
    assert equal(run(model, longer), run(reference, longer))


@pytest.mark.parametrize("name", WRITERS)
def test_generates_with_a_cache_afterwards(name: str) -> None:
    model, inputs = made(name)
    dense = copy.deepcopy(model)
    # A T5 with fewer blocks in its encoder than in its decoder fails by itself, its cache has the encoder's length.
    report = netopt.prune_blocks(model, inputs, 0.4, exclude="encoder" if name == "t5" else None, progress=False)
    reference = skipping(dense, report.plan)
    asked = {key: value for key, value in inputs.items() if not key.startswith("decoder")}
    settings = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    assert torch.equal(model.generate(**asked, **settings), reference.generate(**asked, **settings, use_cache=False))


BUILT = [
    name for name, (make, _) in MAKE.items() if name != "swin" and "sequential" not in name and "torch" not in name
]


@pytest.mark.parametrize("name", BUILT)
def test_the_configuration_builds_the_smaller_model(name: str) -> None:
    model, inputs = made(name)
    report = netopt.prune_blocks(model, inputs, 0.4, progress=False)
    fresh = type(model)(copy.deepcopy(model.config)).eval()
    fresh.load_state_dict(model.state_dict())
    assert report.notes["configuration"] == "loads with from_pretrained"
    assert equal(run(fresh, inputs), run(model, inputs))


def test_says_what_a_configuration_cannot_express() -> None:
    model, inputs = made("swin")
    scores = {f"swin.encoder.layers.{a}.blocks.{b}": float((a, b) != (1, 0)) for a in (0, 1) for b in range(2 + 2 * a)}
    report = netopt.prune_blocks(model, inputs, 1, importance=scores, progress=False)
    assert "shift_size" in report.notes["configuration"]


@pytest.mark.parametrize("name", ["gemma3", "t5", "sequential"])
def test_a_plan_is_saved_and_replayed(name: str, tmp_path: Any) -> None:
    model, inputs = made(name)
    fresh = copy.deepcopy(model)
    report = netopt.prune_blocks(model, inputs, 0.4, progress=False)
    report.plan.save(tmp_path / "plan.json")
    plan = netopt.BlockPlan.load(tmp_path / "plan.json")
    assert plan == report.plan
    plan.apply(fresh)
    assert equal(run(fresh, inputs), run(model, inputs))
    with pytest.raises(PlanMismatchError, match="other tensors or shapes"):
        plan.apply(fresh)


def test_planning_changes_nothing_and_predicts() -> None:
    model, inputs = made("llama")
    before = copy.deepcopy(model.config.to_dict())
    with unchanged(model):
        plan = netopt.plan_blocks(model, inputs, 2, progress=False)
    assert model.config.to_dict() == before
    report = netopt.prune_blocks(model, inputs, 2, progress=False)
    assert report.plan == plan
    assert plan.predicted["params_after"] == report.params_after == sum(p.numel() for p in model.parameters())


def _indexed(self: Any, x: Tensor) -> Tensor:
    for block in self.blocks:
        x = block(x)
    return x + self.blocks[4](x)


def _collected(self: Any, x: Tensor) -> list[Tensor]:
    seen = []
    for block in self.blocks:
        x = block(x)
        seen.append(x)
    return seen


def _skips(self: Any, x: Tensor) -> Tensor:
    down = []
    for block in self.blocks[:2]:
        x = block(x)
        down.append(x)
    x = self.blocks[2](x)
    for block in self.blocks[3:]:
        x = block(x + down.pop())
    return x


def _numbered(self: Any, x: Tensor) -> Tensor:
    for number, block in enumerate(self.blocks):
        x = block(x) * (number + 1)
    return x


@pytest.mark.parametrize("way", [_collected, _skips, _numbered])
def test_what_is_not_the_same_is_frozen(way: Callable[..., Any]) -> None:
    torch.manual_seed(0)
    model, x = Looped(way), torch.randn(2, 8)
    with unchanged(model), pytest.raises(NothingToPruneError, match=r"blocks"):
        netopt.prune_blocks(model, x, 1, progress=False)


def test_of_stacks_inside_one_another_the_inner_counts() -> None:
    stages = nn.Sequential(*[nn.Sequential(Residual(), Residual(), Residual()) for _ in range(3)])
    report = netopt.prune_blocks(stages, torch.randn(2, 8), 6, progress=False)
    assert [cut.name for cut in report.plan.stacks] == ["0", "1", "2"]
    assert [len(stage) for stage in stages] == [1, 1, 1]
    assert report.frozen["the model"] == "each block holds blocks of its own"


def test_a_block_with_an_output_of_its_own_stays() -> None:
    model = hf.LlamaModel(hf.LlamaConfig(**GROUPED, num_hidden_layers=3)).eval()
    with pytest.raises(NothingToPruneError, match="returns 4, not 5"):
        netopt.prune_blocks(model, {**TEXT, "output_hidden_states": True}, 1, progress=False)


def test_a_block_that_is_picked_by_its_index_freezes_those_before() -> None:
    model = Looped(_indexed)
    with pytest.raises(NothingToPruneError, match=r"index 4 is out of range \(test_prune_blocks.py:\d+\)"):
        netopt.prune_blocks(model, torch.randn(2, 8), 1, progress=False)


def _counted(self: Any, x: Tensor) -> Tensor:
    for place in range(self.depth):
        x = self.blocks[place](x)
    return x / self.depth if self.divides else x


def test_a_count_that_the_forward_needs_follows() -> None:
    model = Looped(_counted, depth=5, heads=5, divides=False)
    netopt.prune_blocks(model, torch.randn(2, 8), 2, progress=False)
    assert (len(model.blocks), model.depth, model.heads) == (3, 3, 5)


def test_a_count_that_is_computed_with_freezes() -> None:
    with pytest.raises(NothingToPruneError):
        netopt.prune_blocks(Looped(_counted, depth=5, divides=True), torch.randn(2, 8), 2, progress=False)


def _kinds(self: Any, x: Tensor) -> Tensor:
    for kind, block in zip(self.kinds, self.blocks, strict=True):
        x = block(-x if kind == "b" else x)
    return x


def test_a_list_with_an_item_for_each_block_follows() -> None:
    model = Looped(_kinds, kinds=["a", "a", "b", "a", "a"])
    scores = {f"blocks.{place}": abs(place - 1) for place in range(5)}
    report = netopt.prune_blocks(model, torch.randn(2, 8), 1, importance=scores, progress=False)
    assert model.kinds == ["a", "b", "a", "a"]
    assert "blocks.2" in report.frozen  # the sign is the forward's, not the block's


def _zipped(self: Any, x: Tensor) -> Tensor:
    for block, adapter in zip(self.blocks, self.adapters, strict=True):
        x = adapter(block(x))
    return x


def _branches(self: Any, x: Tensor) -> Tensor:
    for attend, feed in self.pairs:
        x = attend(x) + x
        x = feed(x) + x
    return x


def test_lists_gone_through_together_lose_the_same_places() -> None:
    model = Looped(_zipped, adapters=nn.ModuleList([Residual() for _ in range(5)]))
    report = netopt.prune_blocks(model, torch.randn(2, 8), 2, progress=False)
    assert report.plan.stacks[0].lists == ("blocks", "adapters")
    assert len(model.blocks) == len(model.adapters) == 3


def test_entries_of_a_list_of_lists_are_one_block() -> None:
    torch.manual_seed(0)
    pairs = nn.ModuleList([nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)]) for _ in range(4)])
    model, x = Looped(_branches, pairs=pairs, count=0), torch.randn(2, 8)
    dense = copy.deepcopy(model)
    report = netopt.prune_blocks(model, x, 1, progress=False)
    (gone,) = report.plan.stacks[0].removed
    for layer in dense.pairs[gone]:
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    assert len(model.pairs) == 3
    assert torch.equal(model(x), dense(x))


def test_a_number_that_is_computed_with_freezes() -> None:
    class Numbered(Residual):
        def __init__(self, number: int) -> None:
            super().__init__()
            self.number = number

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) / (self.number + 1)

    report = netopt.prune_blocks(nn.Sequential(*map(Numbered, range(4))), torch.randn(2, 8), 1, progress=False)
    assert report.plan.stacks[0].removed == (3,)
    assert set(report.frozen) == {"0", "1", "2"}


def test_the_first_block_of_t5_holds_what_the_others_need() -> None:
    model, inputs = made("t5")
    report = netopt.prune_blocks(model, inputs, 1, progress=False)
    assert "more than one tensor" in report.frozen["encoder.block.0"]


@pytest.mark.parametrize("importance", ["influence", "loss"])
def test_a_block_that_does_little_goes_first(importance: str) -> None:
    model, inputs = made("llama")
    with torch.no_grad():
        for weight in model.model.layers[2].parameters():
            weight.mul_(1e-3)
    report = netopt.prune_blocks(model, inputs, 1, importance=importance, progress=False)
    assert report.plan.stacks[0].removed == (2,)


def test_loss_is_found_anew_after_each_removal() -> None:
    class Shift(nn.Module):
        def __init__(self, by: float) -> None:
            super().__init__()
            self.inner = nn.ParameterDict({"by": nn.Parameter(torch.tensor([by, 0.0]))})

        def forward(self, x: Tensor) -> Tensor:
            return x + self.inner["by"]

    # Alone the third hurts least; after it, the first makes the best pair, though the fourth is smaller.
    model, x = nn.Sequential(*map(Shift, (-1.2, 3.0, 1.0, -1.5))), torch.ones(4, 2)
    plan = netopt.plan_blocks(model, x, 2, importance="loss", progress=False)
    assert plan.stacks[0].removed == (0, 2)


def test_budgets_are_met() -> None:
    for budget in ({"max_params": 0.7}, {"max_macs": 0.7}):
        model, inputs = made("llama")
        report = netopt.prune_blocks(model, inputs, **budget, progress=False)
        ratio = report.params_after / report.params_before
        assert (ratio if "max_params" in budget else report.macs_after / report.macs_before) <= 0.7
    with pytest.raises(NothingToPruneError, match="cannot be met"):
        netopt.prune_blocks(model, inputs, max_params=0.01, progress=False)


def test_selectors_and_what_is_named() -> None:
    model, inputs = made("llama")
    report = netopt.prune_blocks(model, inputs, 0.9, exclude="model.layers.[0-2]", progress=False)
    assert report.plan.stacks[0].removed == (3, 4)
    assert report.frozen["model.layers.0"] == "is excluded"
    layers = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 8), Residual(), Residual())
    x = torch.randn(2, 4)
    assert "skip connection" in netopt.prune_blocks(copy.deepcopy(layers), x, 1, progress=False).frozen["1"]
    report = netopt.prune_blocks(layers, x, 1, include="1", progress=False)
    assert report.plan.stacks[0].removed == (1,)


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD])
def test_optimizers_forget_what_is_removed(kind: Any) -> None:
    model, inputs = made("llama")
    optimizer = kind(model.parameters(), lr=0.1)
    model(**inputs).logits.sum().backward()
    optimizer.step()
    netopt.prune_blocks(model, inputs, 2, optimizer=optimizer, progress=False)
    held = {id(parameter) for parameter in model.parameters()}
    assert {id(one) for group in optimizer.param_groups for one in group["params"]} == held
    assert {id(one) for one in optimizer.state} <= held
    optimizer.step()


def test_everything_is_put_back_on_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = made("gemma3")
    optimizer = torch.optim.AdamW(model.parameters())
    config, groups = copy.deepcopy(model.config.to_dict()), [list(g["params"]) for g in optimizer.param_groups]
    monkeypatch.setattr("netopt.prune.blocks.trial.Trials.check", _fail)
    with unchanged(model), pytest.raises(VerificationError):
        netopt.prune_blocks(model, inputs, 2, optimizer=optimizer, progress=False)
    assert model.config.to_dict() == config
    assert all(map(_same_objects, groups, [group["params"] for group in optimizer.param_groups]))


def _fail(*_args: Any) -> None:
    raise VerificationError("on purpose")


def _same_objects(first: list[Any], second: list[Any]) -> bool:
    return list(map(id, first)) == list(map(id, second))


def test_report() -> None:
    model, inputs = made("llama")
    report = netopt.prune_blocks(model, inputs, 2, progress=False)
    assert "40.0 % of 5 blocks removed" in str(report)
    assert json.loads(json.dumps(report.to_dict()))["plan"]["stacks"][0]["size"] == 5
    assert str(report.plan).startswith("model.layers 5 -> 3 (without ")


BAD: list[tuple[dict[str, Any], type[NetoptError], str]] = [
    ({}, InvalidArgumentError, "exactly one"),
    ({"amount": 0.2, "max_params": 0.5}, InvalidArgumentError, "exactly one"),
    ({"amount": 1.0}, InvalidArgumentError, "amount must be"),
    ({"amount": -1}, InvalidArgumentError, "amount must be"),
    ({"amount": 9}, InvalidArgumentError, "only 5 may"),
    ({"amount": True}, ArgumentTypeError, "must be a number"),
    ({"max_macs": 2.0}, InvalidArgumentError, "fraction"),
    ({"amount": 1, "importance": "influense"}, UnknownNameError, "influence"),
    ({"amount": 1, "importance": 3}, ArgumentTypeError, "importance must be"),
    ({"amount": 1, "importance": {"1": 0.0}}, UnknownNameError, "score of the block"),
    ({"amount": 1, "importance": lambda *_: float("nan")}, NonFiniteError, "not a number"),
    ({"amount": 1, "include": "nowhere"}, InvalidArgumentError, "names nothing"),
    ({"amount": 1, "optimizer": 3}, ArgumentTypeError, "optimizer must be"),
    ({"amount": 1, "optimizer": torch.optim.SGD([torch.zeros(1)])}, InvalidArgumentError, "trains none"),
]


@pytest.mark.parametrize(("settings", "error", "message"), BAD, ids=["-".join([*one[0], one[2]]) for one in BAD])
def test_bad_input_is_told(settings: dict[str, Any], error: type[NetoptError], message: str) -> None:
    model, x = made("sequential")
    with unchanged(model), pytest.raises(error, match=message):
        netopt.prune_blocks(model, x, **settings, progress=False)


def test_models_without_blocks_and_what_cannot_be_compared() -> None:
    with pytest.raises(NothingToPruneError, match="no ModuleList or Sequential"):
        netopt.prune_blocks(nn.Linear(3, 3), torch.randn(1, 3), 1, progress=False)
    with torch.device("meta"):
        model = nn.Sequential(Residual(), Residual())
    with pytest.raises(InvalidArgumentError, match="meta"):
        netopt.prune_blocks(model, torch.randn(1, 8), 1, progress=False)
    model, x = made("sequential")
    optimizer = torch.optim.LBFGS(model.parameters())
    with pytest.raises(OptimizerStateError, match="one vector"):
        netopt.prune_blocks(model, x, 1, optimizer=optimizer, progress=False)


def test_a_configuration_of_ones_own_follows() -> None:
    class Model(nn.Module):
        def __init__(self, config: Any) -> None:
            super().__init__()
            self.config = config
            self.layers = nn.ModuleList([Residual() for _ in range(config.depth)])

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = layer(x)
            return x

    model = Model(SimpleNamespace(depth=4, heads=4))
    netopt.prune_blocks(model, torch.randn(2, 8), 1, progress=False)
    assert vars(model.config) == {"depth": 3, "heads": 4}


def test_amounts_by_name_or_pattern_of_stacks() -> None:
    model, inputs = made("whisper")
    amount = {"model.encoder.*": 1, "*.decoder.layers": 0.5}
    plan = netopt.plan_blocks(model, inputs, amount, progress=False)
    assert {cut.name: len(cut.removed) for cut in plan.stacks} == {"model.encoder.layers": 1, "model.decoder.layers": 2}
    alone = netopt.plan_blocks(model, inputs, {"model.decoder.layers": 3}, importance="loss", progress=False)
    assert [(cut.name, len(cut.removed)) for cut in alone.stacks] == [("model.decoder.layers", 3)]
    for wrong, message in (({"nowhere": 1}, "the stacks are model"), ({"*": 4}, "only 3 may"), ({}, "needs a number")):
        with pytest.raises(InvalidArgumentError, match=message):
            netopt.plan_blocks(model, inputs, wrong, progress=False)
    with pytest.raises(ArgumentTypeError, match="must be a number"):
        netopt.plan_blocks(model, inputs, {"*": "2"}, progress=False)  # pyright: ignore[reportArgumentType]


def test_stages_lose_blocks_one_by_one() -> None:
    model, inputs = made("convnext")
    report = netopt.prune_blocks(model, inputs, {"*.stages.*.layers": 1}, progress=False)
    assert [(row.before, row.after) for row in report.rows] == [(3, 2), (3, 2)]


@pytest.mark.parametrize("text", ["{}", "[]", '{"kind": "blocks", "format": 9}', "no"])
def test_files_without_a_plan_are_refused(text: str, tmp_path: Any) -> None:
    (tmp_path / "plan.json").write_text(text)
    with pytest.raises(InvalidArgumentError, match="no plan"):
        netopt.BlockPlan.load(tmp_path / "plan.json")
