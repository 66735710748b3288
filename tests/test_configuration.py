"""Configurations: kept in step where they can say what the model has become, and named where they cannot."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from netopt.axes import find_axes
from netopt.errors import InvalidArgumentError
from netopt.integrations.huggingface.config import LOADS
from netopt.integrations.huggingface.meta_build import build, entries, with_changes
from netopt.integrations.huggingface.symbolic_build import Target, derive_formulas
from netopt.plan import shapes_of
from netopt.plan.hooks import complete, register_hook
from netopt.prune import plan_neurons, prune_neurons
from netopt.report import PruningReport

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
    assert report.notes["configuration"] == LOADS
    assert {key: getattr(model.config, key) for key in sizes} == sizes
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    torch.testing.assert_close(loaded(**IDS)[0], model(**IDS)[0])


def test_what_it_cannot_say_is_named():
    model = bert()
    kept = {"encoder.layer.0.intermediate.dense": 0.5}
    report = prune_neurons(model, IDS, kept, importance="magnitude", progress=False)
    assert "`encoder.layer.0.intermediate.dense.weight` has shape (12, 16)" in report.notes["configuration"]
    assert model.config.intermediate_size == 24


def test_what_the_constructor_would_compute_anew_is_named():
    model = llama()
    report = prune_neurons(model, IDS, 0.5, importance="magnitude", scope="layer", progress=False)
    assert "inv_freq` is computed from it" in report.notes["configuration"]


def test_a_config_that_builds_nothing_is_left_alone():
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    model.config = {"hidden": 8}
    report = prune_neurons(model, torch.randn(2, 4), 0.5, progress=False)
    assert model.config == {"hidden": 8}
    assert not report.notes


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
        ("kv_heads", {"num_attention_heads": 2, "num_key_value_heads": 1}),
    ],
    "mistral": [
        ("model.embed_tokens", {"hidden_size": 24}),
        ("kv_heads", {"num_attention_heads": 2, "num_key_value_heads": 1}),
    ],
    "qwen2": [
        ("model.embed_tokens", {"hidden_size": 24, "head_dim": 12}),
        ("kv_heads", {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 12}),
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
        ("kv_heads", {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 12}),
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


def refusal(report: PruningReport) -> str | None:
    """Why the configuration cannot say what was done."""
    note = report.notes["configuration"]
    return None if note == LOADS else note


def halved(model: nn.Module, inputs: object, include: object = None) -> str | None:
    """Halves the axes, and says why the configuration cannot say it."""
    report = prune_neurons(
        model, inputs, 0.5, importance="magnitude", scope="layer", include=include, verify=False, progress=False
    )
    assert report.params_after < report.params_before
    return refusal(report)


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
    assert "cannot express this: `" in why
    assert set(model.config.to_dict()) == set(before)


# How formulas of sizes are derived, and what is believed of them.


@pytest.mark.parametrize("name", families())
def test_what_formulas_predict_is_built(name):
    """Each number of the configuration doubled by itself gives the shapes that its formulas predict."""
    model, _ = family(name)
    shapes, checked = shapes_of(model), 0
    # What is smaller is written in the code: kernels, one token, the corners of a box.
    wanted = {name: tuple(size + (size > 7) for size in shape) for name, shape in shapes.items()}
    counts = {len(part._modules) for part in model.modules()}
    formulas = derive_formulas(type(model), model.config, {}, Target(shapes, wanted, counts, least=2))
    assert formulas.at({}, shapes) == shapes
    known = dict(entries(model.config))
    for path in sorted(formulas.leaves):
        fresh = build(type(model), with_changes(model.config, {path: 2 * known[path]}))
        if fresh is not None and shapes_of(fresh).keys() == shapes.keys():
            assert formulas.at({path: 2 * known[path]}, shapes) == shapes_of(fresh), path
            checked += 1
    assert checked >= 2


class Counted(transformers.BertModel):
    """Counts how often it is built."""

    count = 0

    def __init__(self, config):
        type(self).count += 1
        super().__init__(config)


@pytest.mark.parametrize(("include", "count"), [(None, 1), ("*intermediate*", 2)])
def test_one_building_refuses_and_two_find(include, count):
    model = Counted(transformers.BertConfig(**SMALL)).eval()
    Counted.count = 0
    report = prune_neurons(model, IDS, 0.5, importance="magnitude", scope="layer", include=include, progress=False)
    assert (refusal(report) is not None) is (include is None)
    assert Counted.count == count


def test_building_gives_back_the_default_device():
    model, inputs = family("bert")
    with torch.device("cpu"):
        assert halved(model, inputs, "*intermediate.dense") is None
        assert torch.empty(1).device.type == torch.get_default_device().type == "cpu"
    assert next(model.parameters()).device.type == "cpu"


class Config(SimpleNamespace):
    """What makes a namespace a configuration."""

    def to_dict(self):
        return vars(self)


class Adapted(nn.Module):
    """Has another part if a size is given."""

    count = 0

    def __init__(self, config):
        super().__init__()
        Adapted.count += 1
        self.config = config
        self.up, self.down = nn.Linear(3, config.width), nn.Linear(config.width, 3)
        self.adapter = nn.Linear(config.width, config.adapter_dim) if config.adapter_dim else None

    def forward(self, x):
        return self.down(self.up(x).relu())


def test_a_default_that_stands_for_parts_that_are_not_there_is_left_alone():
    model = Adapted(Config(width=8, adapter_dim=None))
    Adapted.count = 0
    report = prune_neurons(model, torch.randn(2, 3), 0.5, importance="magnitude", progress=False)
    assert report.notes["configuration"] == LOADS
    assert (model.config.width, model.config.adapter_dim) == (4, None)
    assert Adapted.count == 3


class Fused(nn.Module):
    """Heads of four, however wide it is."""

    def __init__(self, config):
        super().__init__()
        self.config, self.heads = config, config.width // 4
        self.query, self.out = nn.Linear(6, config.width), nn.Linear(config.width, 3)

    def forward(self, x):
        x = self.query(x).unflatten(-1, (self.heads, -1))
        return self.out((x * x.sum(-2, keepdim=True)).flatten(-2))


def test_a_number_of_a_module_that_would_be_another_is_named():
    model = Fused(Config(width=16))
    report = prune_neurons(model, torch.randn(2, 6), 0.5, importance="magnitude", scope="layer", progress=False)
    assert (model.heads, model.query.out_features, model.config.width) == (2, 4, 16)
    assert "`heads` is computed from it, and is to be 2" in report.notes["configuration"]


class TwoLayers(nn.Module):
    """Two widths, computed by subclasses."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        first, second = self.widths(config)
        self.first, self.second, self.last = nn.Linear(5, first), nn.Linear(first, second), nn.Linear(second, 3)

    def widths(self, config):
        return config.width, config.inner

    def forward(self, x):
        return self.last(self.second(self.first(x).relu()).relu())


class AtLeast(TwoLayers):
    def widths(self, config):
        return config.width, max(config.width // 2, config.inner)


class Shifted(TwoLayers):
    def widths(self, config):
        return config.width, config.width >> 1


class Powers(TwoLayers):
    def widths(self, config):
        return 2**config.width, 2**config.width


def pruned(model, include=None):
    report = prune_neurons(
        model, torch.randn(4, 5), 0.5, importance="magnitude", scope="layer", include=include, progress=False
    )
    return refusal(report)


@pytest.mark.parametrize(
    ("kind", "width", "after"), [(Shifted, 16, 8), (Powers, 4, 3)], ids=lambda one: getattr(one, "__name__", one)
)
def test_what_a_shift_or_a_power_makes_is_solved(kind, width, after):
    model = kind(Config(width=width))
    assert pruned(model) is None
    assert vars(model.config) == {"width": after}
    assert shapes_of(kind(model.config)) == shapes_of(model)


def test_what_a_comparison_of_sizes_decides_is_refused():
    model = AtLeast(Config(width=16, inner=8))
    assert "keeps dimension 0 of the one and dimension 0 of the other in proportion" in pruned(model, "first")
    assert vars(model.config) == {"width": 16, "inner": 8}


class Stubborn(Config):
    """Takes multiples of four and nothing else."""

    def __setattr__(self, name, value):
        if value % 4:
            raise ValueError(f"{name} must be a multiple of 4")
        super().__setattr__(name, value)


def test_a_configuration_may_refuse_a_value():
    model = TwoLayers(Stubborn(width=16, inner=12))
    assert "refused by its own validation, 'inner must be a multiple of 4'" in pruned(model)
    assert vars(model.config) == {"width": 16, "inner": 12}


class Strict(Config):
    """Has a validation that is run when it is saved, as those of transformers have."""

    def validate(self):
        if self.width % 3 == 0:
            raise ValueError("Class validation error\n  width must be no multiple of 3")


@pytest.mark.parametrize(("width", "after"), [(16, 8), (24, None)])
@pytest.mark.parametrize("inside", [False, True], ids=["alone", "inside another"])
def test_a_solution_must_pass_the_validation_of_the_configuration(width, after, inside):
    config = Config(width=width, part=Strict(width=width)) if inside else Strict(width=width)
    model = Nested(config) if inside else Shifted(config)
    why = pruned(model)
    if after is None:
        assert "refused by its own validation, 'width must be no multiple of 3'" in why
    else:
        assert why is None


class Nested(TwoLayers):
    def widths(self, config):
        return config.part.width, config.part.width // 2


def test_a_llama_that_its_configuration_would_refuse_to_save_is_named():
    sizes = {**SMALL, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 8}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)).eval()
    report = prune_neurons(
        model, IDS, 20, importance="magnitude", include="model.embed_tokens", verify=False, progress=False
    )
    assert (
        "The hidden size (44) is not a multiple of the number of attention heads (8)" in report.notes["configuration"]
    )
    assert model.config.hidden_size == 64


# The hook.


def test_a_name_of_a_plan_hook_is_taken_once():
    with pytest.raises(InvalidArgumentError, match="'configuration' exists already"):
        register_hook("configuration", lambda model, plan, axes: (plan, None))


def test_hooks_leave_the_plan_of_another_model_alone():
    model = nn.Linear(3, 4)
    other = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    plan = plan_neurons(other, torch.ones(1, 3), 0.5, progress=False)
    assert complete(model, plan, find_axes(other, torch.ones(1, 3))) == (plan, {})


class Choosing(TwoLayers):
    """What it is, and what it holds, depend on its width."""

    def __init__(self, config):
        super().__init__(config)
        self.wide = config.width > 12 if config.by == "flag" else None
        self.between = nn.Tanh() if config.by == "part" and config.width <= 12 else nn.ReLU()
        self.mode = "plain"

    def forward(self, x):
        x = self.between(self.first(x))
        return self.last(self.second(x if self.wide is None or self.wide else -x).relu())


@pytest.mark.parametrize(("by", "name"), [("flag", "wide"), ("part", "between")])
def test_what_would_be_chosen_otherwise_is_named(by, name):
    model = Choosing(Config(width=16, inner=16, by=by))
    assert f"`{name}` is chosen by it, and stays" in pruned(model)
    assert model.config.width == 16


def test_what_someone_has_set_since_is_no_choice():
    model = Choosing(Config(width=16, inner=16, by="none"))
    model.mode = "another"
    assert pruned(model) is None
    assert (model.config.width, model.mode) == (8, "another")


class OfDoubles(TwoLayers):
    """Changes the default type, and leaves it so where it fails."""

    def __init__(self, config):
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        if config.width not in (4, 8):
            raise ValueError("4 or 8")
        torch.set_default_dtype(before)
        super().__init__(config)


def test_building_gives_back_the_default_type():
    model = OfDoubles(Config(width=8, inner=8))
    pruned(model)
    assert torch.get_default_dtype() is torch.float32
