"""A folder of Hugging Face in, a smaller one out that loads; and nothing at all where something is wrong."""

from __future__ import annotations

import copy
import errno
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from conftest import unchanged
from netopt import load_pruned, prune_neurons, save_pruned, shrink_pretrained
from netopt.__main__ import main
from netopt.errors import (
    ArgumentTypeError,
    CheckpointError,
    InvalidArgumentError,
    NetoptError,
    NothingToPruneError,
    PlanMismatchError,
)
from netopt.integrations.huggingface import target as target_module
from netopt.integrations.huggingface.inputs import inputs_of
from netopt.plan import Plan

transformers = pytest.importorskip("transformers")
safetensors = pytest.importorskip("safetensors.torch")

SIZES = {
    "vocab_size": 60,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "max_position_embeddings": 32,
    "bos_token_id": None,
    "eos_token_id": None,
}
IMAGES = {**SIZES, "image_size": 16, "patch_size": 8}
GPT2 = {"vocab_size": 60, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32}
GPT2 |= {"bos_token_id": None, "eos_token_id": None}


def llama(**more) -> nn.Module:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, num_key_value_heads=2, **more))


MODELS = {
    "bert": (lambda: transformers.BertForSequenceClassification(transformers.BertConfig(**SIZES)), "*intermediate*"),
    "bert without head": (lambda: transformers.BertModel(transformers.BertConfig(**SIZES)), "*intermediate*"),
    "gpt2": (lambda: transformers.GPT2LMHeadModel(transformers.GPT2Config(**GPT2)), "*c_fc"),
    "llama": (llama, "*gate_proj"),
    "llama tied": (lambda: llama(tie_word_embeddings=True), "*gate_proj"),
    "vit": (lambda: transformers.ViTForImageClassification(transformers.ViTConfig(**IMAGES)), "*fc1"),
}


def saved(name: str, folder: Path, *, shard: str = "20KB", dtype: torch.dtype = torch.float32) -> nn.Module:
    model = MODELS[name][0]().eval().to(dtype)
    model.save_pretrained(folder, max_shard_size=shard)
    return model


def reloaded(model: nn.Module, folder: Path) -> nn.Module:
    found, info = type(model).from_pretrained(folder, dtype="auto", output_loading_info=True)
    assert not any(info.values())
    # In memory that is aligned like that of any model, since kernels may round otherwise where it is not.
    return copy.deepcopy(found.eval())


def result(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs_of(model))[0]


def left_beside(path: Path) -> list[str]:
    return sorted(one.name for one in path.iterdir())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MODELS)
def test_the_smaller_folder_loads_as_what_pruning_in_memory_gives(name, dtype, tmp_path):
    model = saved(name, tmp_path / "large", dtype=dtype)
    before = {one.name: one.read_bytes() for one in (tmp_path / "large").iterdir()}
    small = tmp_path / "small"
    report = shrink_pretrained(tmp_path / "large", small, max_params=0.8, include=MODELS[name][1], progress=False)
    assert {one.name: one.read_bytes() for one in (tmp_path / "large").iterdir()} == before
    assert report.params_after <= 0.8 * report.params_before
    report.plan.apply(model)
    found = reloaded(model, small)
    assert next(found.parameters()).dtype == dtype
    assert sum(one.numel() for one in found.parameters()) == report.params_after
    assert torch.equal(result(found), result(model))
    assert left_beside(tmp_path) == ["large", "small"]
    if found.can_generate():
        ids = inputs_of(found)["input_ids"]
        assert found.generate(ids, max_new_tokens=3, do_sample=False).shape == (1, ids.shape[1] + 3)


@pytest.mark.parametrize("name", ["bert", "llama", "vit"])
def test_what_is_loaded_and_what_is_streamed_are_the_same(name, tmp_path):
    model = saved(name, tmp_path / "large")
    include = MODELS[name][1]
    first = shrink_pretrained(tmp_path / "large", tmp_path / "1", amount=0.3, include=include, progress=False)
    with unchanged(model):
        second = shrink_pretrained(
            model, tmp_path / "2", amount=0.3, include=include, importance="magnitude", progress=False
        )
    assert {**first.plan.to_dict(), "axes": ()} == {**second.plan.to_dict(), "axes": ()}
    one, other = (reloaded(model, tmp_path / folder) for folder in "12")
    assert torch.equal(result(one), result(other))
    assert one.config.to_diff_dict() == other.config.to_diff_dict()


@pytest.mark.parametrize("name", ["bert", "llama", "vit"])
def test_with_data_the_model_is_loaded(name, tmp_path):
    model = saved(name, tmp_path / "large")
    data = [inputs_of(model)]
    include = MODELS[name][1]
    report = shrink_pretrained(
        tmp_path / "large", tmp_path / "small", amount=0.3, include=include, data=data, progress=False
    )
    expected = prune_neurons(model, data[0], 0.3, include=include, scope="layer", data=data, progress=False)
    assert report.settings["importance"] == "saliency"
    assert report.plan == expected.plan
    assert torch.equal(result(reloaded(model, tmp_path / "small")), result(model))


def test_a_width_that_only_another_result_shows_may_go(tmp_path):
    sizes = {"d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "vocab_size": 40}
    sizes |= {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
    config = transformers.BartConfig(**sizes, encoder_ffn_dim=32, decoder_ffn_dim=32, max_position_embeddings=20)
    transformers.BartForConditionalGeneration(config).save_pretrained(tmp_path / "large")
    given = {"max_params": 0.5, "progress": False}
    with pytest.raises(NothingToPruneError, match="outputs="):
        shrink_pretrained(tmp_path / "large", tmp_path / "small", **given)
    shrink_pretrained(tmp_path / "large", tmp_path / "small", **given, outputs="logits")
    loaded = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "small")
    assert loaded.config.d_model < 16


def test_experts_that_files_hold_one_by_one_are_loaded(tmp_path):
    config = transformers.MixtralConfig(**SIZES, num_key_value_heads=2, num_local_experts=3)
    model = transformers.MixtralForCausalLM(config).eval()
    model.save_pretrained(tmp_path / "large")
    report = shrink_pretrained(
        tmp_path / "large", tmp_path / "small", max_params=0.8, include="*gate_up_proj", round_to=8, progress=False
    )
    report.plan.apply(model)
    assert torch.equal(result(reloaded(model, tmp_path / "small")), result(model))


def test_everything_beside_the_weights_is_kept_and_the_card_says_what_was_done(tmp_path):
    large, small = tmp_path / "large", tmp_path / "small"
    saved("llama", large, shard="1GB")
    (large / "README.md").write_text("---\nlicense: mit\n---\n# Mine\n")
    (large / "tokenizer.json").write_text("{}")
    (large / "1_Pooling").mkdir()
    (large / "1_Pooling" / "config.json").write_text('{"mean": true}')
    for dense in ("pytorch_model.bin", "consolidated.safetensors", "onnx/model.onnx"):
        (large / dense).parent.mkdir(exist_ok=True)
        (large / dense).write_bytes(b"dense")
    report = shrink_pretrained(large, small, amount=0.5, include="*gate_proj", progress=False)
    names = {str(one.relative_to(small)) for one in small.rglob("*") if one.is_file()}
    kept = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "1_Pooling/config.json"}
    assert names == {*kept, "README.md", "netopt.json"}
    assert (small / "generation_config.json").read_bytes() == (large / "generation_config.json").read_bytes()
    card = (small / "README.md").read_text()
    assert card.startswith("---\nlicense: mit\n---\n# Mine\n")
    assert f"{report.params_after:,} of its {report.params_before:,} parameters" in card
    record = json.loads((small / "netopt.json").read_text())
    assert Plan.from_dict(record["plan"]) == report.plan
    assert record["left_out"] == ["consolidated.safetensors", "onnx/model.onnx", "pytorch_model.bin"]
    assert record["source"] == "large"
    assert record["versions"].keys() == {"netopt", "torch", "transformers"}


def test_shards_keep_their_index(tmp_path):
    saved("llama", tmp_path / "large")
    shrink_pretrained(tmp_path / "large", tmp_path / "small", amount=0.5, include="*gate_proj", progress=False)
    files = {one.name for one in (tmp_path / "small").glob("*.safetensors")}
    index = json.loads((tmp_path / "small" / "model.safetensors.index.json").read_text())
    assert len(files) > 2
    assert set(index["weight_map"].values()) == files


def test_another_type_may_be_asked_for(tmp_path):
    model = saved("llama", tmp_path / "large")
    shrink_pretrained(
        tmp_path / "large",
        tmp_path / "small",
        amount=0.5,
        include="*gate_proj",
        dtype=torch.bfloat16,
        example_inputs={"input_ids": torch.tensor([[1, 2, 3]])},
        progress=False,
    )
    assert json.loads((tmp_path / "small" / "netopt.json").read_text())["left_out"] == []
    found = reloaded(model, tmp_path / "small")
    assert next(found.parameters()).dtype == torch.bfloat16


# Damaged sources, and places that cannot be written: what is done, and the sentence that results.


def edit_config(folder: Path, **changes) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def edit_weights(folder: Path, change) -> None:
    path = folder / "model.safetensors"
    tensors = safetensors.load_file(path)
    change(tensors)
    safetensors.save_file(tensors, path, metadata={"format": "pt"})


def cut_short(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


NAME = "model.layers.1.mlp.up_proj.weight"
DAMAGES = {
    "truncated": (cut_short, r"model.safetensors is truncated: it has \d+ bytes"),
    "no header": (lambda folder: (folder / "model.safetensors").write_bytes(b"x"), "cannot be read as a safetensors"),
    "no tensor": (lambda folder: edit_weights(folder, lambda held: held.pop(NAME)), f"lacks `{NAME}`, which a Llama"),
    "wrong shape": (
        lambda folder: edit_weights(folder, lambda held: held.update({NAME: torch.zeros(3, 16)})),
        rf"`{NAME}` has shape \(3, 16\) in .*, and its config.json says \(96, 16\)",
    ),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "no safetensors file"),
    "no config": (lambda folder: (folder / "config.json").unlink(), "has no config.json"),
    "broken config": (lambda folder: (folder / "config.json").write_text("{"), "cannot be read as JSON"),
    "config is a list": (lambda folder: (folder / "config.json").write_text("[]"), "holds no mapping"),
    "no sizes": (lambda folder: edit_config(folder, hidden_size="wide"), "is no configuration of the type 'llama'"),
    "no class": (lambda folder: edit_config(folder, architectures=None), "names no class in `architectures`"),
    "new class": (lambda folder: edit_config(folder, architectures=["Llama9"]), "is a Llama9, which this transformers"),
    "quantised": (lambda folder: edit_config(folder, quantization_config={"bits": 4}), "is quantised"),
    "own code": (
        lambda folder: edit_config(folder, model_type="mine", auto_map={"AutoModel": "mine.Model"}),
        "needs code of its own",
    ),
    "new type": (lambda folder: edit_config(folder, model_type="mine"), "'mine', which is unknown here"),
}


@pytest.mark.parametrize("what", DAMAGES)
def test_a_damaged_source_is_one_sentence_and_nothing_is_written(what, tmp_path):
    damage, message = DAMAGES[what]
    saved("llama", tmp_path / "large", shard="1GB")
    damage(tmp_path / "large")
    with pytest.raises(NetoptError, match=message) as caught:
        shrink_pretrained(tmp_path / "large", tmp_path / "small", amount=0.5, include="*gate_proj", progress=False)
    assert "\n" not in str(caught.value)
    assert left_beside(tmp_path) == ["large"]


@pytest.mark.parametrize("missing", ["shard", "folder"])
def test_missing_files_are_named(missing, tmp_path):
    saved("llama", tmp_path / "large")
    gone = next((tmp_path / "large").glob("model-00002*"))
    gone.unlink() if missing == "shard" else shutil.rmtree(tmp_path / "large")
    with pytest.raises(CheckpointError, match=gone.name if missing == "shard" else "has no config.json"):
        shrink_pretrained(tmp_path / "large", tmp_path / "small", amount=0.5, include="*gate_proj", progress=False)
    assert "small" not in left_beside(tmp_path)


@pytest.mark.parametrize("where", ["mkdir", "fsync", "copyfile", "rename"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS])
def test_a_place_that_cannot_be_written_is_named_and_left_empty(where, code, tmp_path, monkeypatch):
    saved("llama", tmp_path / "large", shard="1GB")
    (tmp_path / "large" / "tokenizer.json").write_text("{}")
    (tmp_path / "large" / "more").mkdir()
    (tmp_path / "large" / "more" / "file").write_text("{}")

    def fail(*args, **kwargs):
        raise OSError(code, "no")

    owner = {"mkdir": Path, "rename": Path, "copyfile": shutil, "fsync": target_module.os}[where]
    monkeypatch.setattr(owner, where, fail)
    with pytest.raises(CheckpointError, match=r"small could not be written: .*no; nothing was left there"):
        shrink_pretrained(tmp_path / "large", tmp_path / "small", amount=0.5, include="*gate_proj", progress=False)
    assert left_beside(tmp_path) == ["large"]


def test_a_target_that_exists_is_left_alone(tmp_path):
    saved("llama", tmp_path / "large")
    (tmp_path / "small").mkdir()
    (tmp_path / "small" / "mine").write_text("mine")
    wrong = {
        "small": "exists, and nothing is overwritten",
        "large/small": "lies in the source",
        "no/small": "no folder",
    }
    for target, message in wrong.items():
        with pytest.raises(CheckpointError, match=message):
            shrink_pretrained(tmp_path / "large", tmp_path / target, amount=0.5, progress=False)
    with pytest.raises(ArgumentTypeError, match="not int"):
        shrink_pretrained(3, tmp_path / "other", amount=0.5, progress=False)
    assert left_beside(tmp_path) == ["large", "small"]
    assert left_beside(tmp_path / "small") == ["mine"]


def test_what_the_configuration_cannot_say_is_refused_before_anything_is_written(tmp_path):
    saved("bert", tmp_path / "large")
    include = "bert.encoder.layer.0.intermediate.dense"
    with pytest.raises(InvalidArgumentError, match=r"can say none of the counts of bert.encoder.layer.0.intermediate"):
        shrink_pretrained(tmp_path / "large", tmp_path / "small", amount=0.5, include=include, progress=False)
    assert left_beside(tmp_path) == ["large"]


def test_a_class_that_transformers_lacks_is_refused(tmp_path):
    class Mine(transformers.LlamaForCausalLM):
        pass

    with pytest.raises(InvalidArgumentError, match="is a Mine, which this transformers does not have"):
        shrink_pretrained(Mine(transformers.LlamaConfig(**SIZES)), tmp_path / "small", amount=0.5, progress=False)
    assert left_beside(tmp_path) == []


# The command.


def test_the_command_writes_and_reports(tmp_path, capsys):
    model = saved("llama", tmp_path / "large")
    given = ["shrink", str(tmp_path / "large"), str(tmp_path / "small"), "--max-params", "0.8", "--quiet"]
    assert main([*given, "--include", "*gate_proj"]) == 0
    printed = capsys.readouterr()
    assert "prune_neurons:" in printed.out
    assert printed.out.endswith(f"written to {tmp_path / 'small'}\n")
    assert reloaded(model, tmp_path / "small").config.intermediate_size < 96


def tokenizer(folder: Path) -> None:
    words = {word: index for index, word in enumerate(["[UNK]", "[PAD]", "a", "cat", "sat", "on", "mat"])}
    from tokenizers import Tokenizer, models, pre_tokenizers

    made = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=made, unk_token="[UNK]", model_max_length=16).save_pretrained(
        folder
    )


def test_the_command_takes_texts_and_keeps_the_tokenizer(tmp_path):
    saved("llama", tmp_path / "large")
    tokenizer(tmp_path / "large")
    (tmp_path / "texts.txt").write_text("a cat sat on a mat\n" * 40)
    given = ["shrink", str(tmp_path / "large"), str(tmp_path / "small"), "--amount", "0.5", "--quiet"]
    assert main([*given, "--include", "*gate_proj", "--data", str(tmp_path / "texts.txt")]) == 0
    record = json.loads((tmp_path / "small" / "netopt.json").read_text())
    assert record["report"]["settings"]["importance"] == "saliency"
    found = transformers.AutoTokenizer.from_pretrained(tmp_path / "small")
    assert found("a mat")["input_ids"] == [2, 6]


WRONG = {
    "no source": (["nowhere", "small", "--amount", "0.5"], 1, "nowhere has no config.json"),
    "no texts": (["large", "small", "--amount", "0.5", "--data", "nowhere.txt"], 1, "has no tokenizer"),
    "unknown name": (["large", "small", "--amount", "0.5", "--importance", "magnitud"], 1, "Did you mean 'magnitude'"),
    "out of range": (["large", "small", "--max-params", "7"], 1, "max_params"),
    "no amount": (["large", "small"], 2, "one of the arguments --max-params --max-macs --amount is required"),
    "two amounts": (["large", "small", "--amount", "0.5", "--max-params", "0.5"], 2, "not allowed with"),
    "no number": (["large", "small", "--amount", "half"], 2, "invalid float value"),
}


@pytest.mark.parametrize("what", WRONG)
def test_the_command_fails_with_a_status_and_a_sentence(what, tmp_path, monkeypatch, capsys):
    given, status, message = WRONG[what]
    saved("llama", tmp_path / "large")
    monkeypatch.chdir(tmp_path)
    try:
        found = main(["shrink", "--quiet", *given])
    except SystemExit as stopped:
        found = stopped.code
    printed = capsys.readouterr().err
    assert found == status
    assert message in printed
    assert "Traceback" not in printed
    assert left_beside(tmp_path) == ["large"]


def test_the_module_is_a_command():
    command = [sys.executable, "-m", "netopt", "shrink", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert "--max-params" in done.stdout


MEASURE = """
import sys
sys.path.insert(0, sys.argv[3])
import conftest
from pathlib import Path
import transformers
from netopt import shrink_pretrained
transformers.LlamaForCausalLM
from transformers import AutoTokenizer, AutoConfig
shrink_pretrained(sys.argv[1] + "/tiny", sys.argv[2] + "/tiny", amount=0.5, include="*gate_proj", progress=False)
def resident(what):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(what))
Path("/proc/self/clear_refs").write_text("5")
before = resident("VmRSS:")
shrink_pretrained(sys.argv[1] + "/big", sys.argv[2] + "/big", amount=0.5, include="*gate_proj", progress=False)
print(resident("VmHWM:") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs to know what was resident at most")
def test_a_sharded_checkpoint_is_shrunk_in_a_fraction_of_its_size(tmp_path):
    wide = {**SIZES, "hidden_size": 512, "intermediate_size": 8192, "vocab_size": 4096, "num_hidden_layers": 4}
    saved("llama", tmp_path / "large" / "tiny")
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**wide)).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "large" / "big", max_shard_size="20MB")
    size = sum(one.stat().st_size for one in (tmp_path / "large" / "big").iterdir())
    command = [sys.executable, "-c", MEASURE, str(tmp_path / "large"), str(tmp_path), str(Path(__file__).parent)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert size > 100e6
    assert int(done.stdout.split()[-1]) < size / 4


# Models without a configuration.


def small_net() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 5))


def resnet() -> nn.Module:
    return pytest.importorskip("torchvision").models.resnet18(num_classes=7)


def timm_net() -> nn.Module:
    return pytest.importorskip("timm").create_model("resnet10t", num_classes=7)


@pytest.mark.parametrize("constructor", [small_net, resnet, timm_net])
def test_any_constructor_with_a_plan_gives_the_model_back(constructor, tmp_path):
    model, images = constructor().eval(), torch.randn(2, 3, 8, 8) if constructor is small_net else None
    images = torch.randn(2, 3, 64, 64) if images is None else images
    report = prune_neurons(model, images, 0.4, importance="magnitude", progress=False)
    assert save_pruned(model, report.plan, tmp_path / "small") == tmp_path / "small"
    found = load_pruned(constructor, tmp_path / "small").eval()
    assert torch.equal(found(images), model(images))
    assert {name: one.shape for name, one in found.state_dict().items()} == {
        name: one.shape for name, one in model.state_dict().items()
    }


def pruned(folder: Path) -> nn.Module:
    model = small_net().eval()
    report = prune_neurons(model, torch.randn(2, 3, 8, 8), 0.4, progress=False)
    save_pruned(model, report.plan, folder)
    return model


BROKEN = {
    "no plan": (lambda folder: (folder / "plan.json").unlink(), "plan.json cannot be read"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "no safetensors file"),
    "plan is text": (lambda folder: (folder / "plan.json").write_text("x"), "holds no plan"),
    "truncated": (cut_short, "is truncated"),
    "no tensor": (lambda folder: edit_weights(folder, lambda held: held.pop("4.bias")), "does not fit Sequential"),
    "one more": (
        lambda folder: edit_weights(folder, lambda held: held.update(more=torch.zeros(1))),
        "does not fit Sequential",
    ),
    "wrong shape": (
        lambda folder: edit_weights(folder, lambda held: held.update({"4.bias": torch.zeros(2)})),
        "does not fit Sequential",
    ),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_damaged_folder_is_one_sentence(what, tmp_path):
    damage, message = BROKEN[what]
    pruned(tmp_path / "small")
    damage(tmp_path / "small")
    with pytest.raises(NetoptError, match=message) as caught:
        load_pruned(small_net, tmp_path / "small")
    assert "\n" not in str(caught.value)


def test_a_plan_of_another_model_is_refused(tmp_path):
    model = pruned(tmp_path / "small")
    with pytest.raises(PlanMismatchError):
        load_pruned(lambda: nn.Linear(2, 2), tmp_path / "small")
    plan = Plan.load(tmp_path / "small" / "plan.json")
    with pytest.raises(PlanMismatchError, match="the plan leaves"):
        save_pruned(small_net(), plan, tmp_path / "other")
    with pytest.raises(CheckpointError, match="exists"):
        save_pruned(copy.deepcopy(model), plan, tmp_path / "small")
    assert left_beside(tmp_path) == ["small"]
