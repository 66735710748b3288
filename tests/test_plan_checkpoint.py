"""Plans on files: the same as on models, one tensor at a time, whole or not at all."""

from __future__ import annotations

import errno
import json
import os

import pytest
import torch
from torch import nn

from netopt.errors import CheckpointError, InvalidArgumentError, PlanMismatchError
from netopt.plan import Plan, checkpoint, stored
from netopt.plan.checkpoint import open_checkpoint
from netopt.prune import plan_neurons, prune_neurons
from test_prune_neurons import built

safetensors = pytest.importorskip("safetensors.torch")


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        self.hidden = nn.Linear(8, 12)
        self.back = nn.Linear(12, 8)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("scratch", torch.ones(8), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.embedding(x) * self.scratch
        return self.head(hidden + self.back(self.hidden(hidden).relu()))


def saved(model: nn.Module, folder, shards: int = 1):
    """The model's tensors as one file, or as several with an index."""
    names = {id(tensor): name for name, tensor in reversed(model.state_dict(keep_vars=True).items())}
    tensors = {
        name: tensor.detach() for name, tensor in model.state_dict(keep_vars=True).items() if name in names.values()
    }
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text('{"width": 8}')
    if shards == 1:
        safetensors.save_file(tensors, folder / "model.safetensors")
        return folder
    weight_map = {}
    for place, name in enumerate(tensors):
        weight_map[name] = f"model-{place % shards + 1}.safetensors"
    for file in set(weight_map.values()):
        safetensors.save_file({name: tensors[name] for name in tensors if weight_map[name] == file}, folder / file)
    (folder / checkpoint.INDEX).write_text(json.dumps({"weight_map": weight_map}))
    return folder


def loaded(folder) -> dict[str, torch.Tensor]:
    return {k: v for file in sorted(folder.glob("*.safetensors")) for k, v in safetensors.load_file(file).items()}


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_files_become_what_the_model_becomes(shards, dtype, tmp_path):
    torch.manual_seed(0)
    model, x = Tied(), torch.tensor([[1, 2, 3]])
    plan = plan_neurons(model, x, 0.5, importance="magnitude", progress=False)
    model.to(dtype)
    source = saved(model, tmp_path / "source", shards)
    plan.apply_to_checkpoint(source, tmp_path / "target")
    plan.apply(model)
    found = loaded(tmp_path / "target")
    assert "scratch" not in found
    missing, unexpected = model.load_state_dict({k: torch.zeros_like(v) for k, v in found.items()}, strict=False)
    assert not unexpected
    assert set(missing) <= {"head.weight", "embedding.weight"}
    fresh = Tied().to(dtype)
    plan.apply(fresh)
    fresh.load_state_dict(found, strict=False)
    for name, tensor in found.items():
        assert tensor.dtype == dtype
        assert torch.equal(fresh.state_dict()[name], tensor)
    if shards > 1:
        index = json.loads((tmp_path / "target" / checkpoint.INDEX).read_text())
        assert index["weight_map"].keys() == found.keys()
        assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in found.values())


def test_a_single_file_a_strict_load_and_the_configuration(tmp_path):
    model, x = built("cnn")
    source = saved(model, tmp_path / "source")
    report = prune_neurons(model, x, 0.5, progress=False)
    plan = Plan.from_dict({**report.plan.to_dict(), "attributes": [[["", "config", "width"], 4]]})
    plan.apply_to_checkpoint(source / "model.safetensors", tmp_path / "small.safetensors")
    model.load_state_dict(safetensors.load_file(tmp_path / "small.safetensors"))
    plan.apply_to_checkpoint(source, tmp_path / "folder")
    assert json.loads((tmp_path / "folder" / "config.json").read_text()) == {"width": 4}


def test_scales_and_values_are_written(tmp_path):
    model = nn.BatchNorm1d(4)
    source = saved(model, tmp_path / "source")
    plan = Plan({"weight": {0: [1, 2]}}, scales={"weight": 3.0}, values={"num_batches_tracked": torch.tensor(7)})
    plan.apply_to_checkpoint(source, tmp_path / "target")
    found = loaded(tmp_path / "target")
    assert found["weight"].tolist() == [3, 3]
    assert found["num_batches_tracked"] == 7


@pytest.mark.parametrize("shards", [1, 3])
def test_a_full_disk_leaves_no_half_file_and_the_next_call_goes_on(shards, tmp_path, monkeypatch):
    model, x = built("mlp")
    source = saved(model, tmp_path / "source", shards)
    plan = plan_neurons(model, x, 0.5, progress=False)
    whole, calls = os.fsync, []

    def full(descriptor):
        calls.append(descriptor)
        if len(calls) == shards:
            raise OSError(errno.ENOSPC, "No space left on device")
        whole(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match="No space left"):
        plan.apply_to_checkpoint(source, tmp_path / "target")
    assert len(list((tmp_path / "target").glob("*.safetensors"))) == shards - 1
    assert not list((tmp_path / "target").glob("*.partial"))
    before = len(calls)
    monkeypatch.setattr(os, "fsync", calls.append)
    plan.apply_to_checkpoint(source, tmp_path / "target")
    assert len(calls) - before == 1
    plan.apply(model)
    assert {name: tuple(one.shape) for name, one in loaded(tmp_path / "target").items()} == {
        name: tuple(one.shape) for name, one in model.state_dict().items()
    }


def test_another_plan_does_not_go_on_from_files_of_the_first(tmp_path):
    model, _ = built("mlp")
    source = saved(model, tmp_path / "source")
    weight = model[0].weight.detach().clone()
    for kept in ([0, 1], [2, 3]):
        Plan({"0.weight": {0: kept}}).apply_to_checkpoint(source, tmp_path / "target")
        assert torch.equal(loaded(tmp_path / "target")["0.weight"], weight[kept])


def test_what_is_missing_or_broken_is_named_before_anything_is_written(tmp_path):
    model, _ = built("mlp")
    source = saved(model, tmp_path / "source", 2)
    target = tmp_path / "target"
    with pytest.raises(PlanMismatchError, match=r"cuts `absent`"):
        Plan({"absent": {0: [0]}}).apply_to_checkpoint(source, target)
    with pytest.raises(PlanMismatchError, match=r"`0.weight` has shape \(10, 6\) in the checkpoint and \(3, 6\)"):
        Plan({"0.weight": {0: [0]}}, shapes={"0.weight": (3, 6)}).apply_to_checkpoint(source, target)
    with pytest.raises(PlanMismatchError, match="keeps index 99"):
        Plan({"0.weight": {0: [99]}}).apply_to_checkpoint(source, target)
    with pytest.raises(CheckpointError, match="is the source"):
        Plan({"0.weight": {0: [0]}}).apply_to_checkpoint(source, source)
    shard = source / "model-2.safetensors"
    shard.write_bytes(shard.read_bytes()[:-8])
    with pytest.raises(CheckpointError, match="truncated"):
        Plan({"0.weight": {0: [0]}}).apply_to_checkpoint(source, target)
    shard.unlink()
    with pytest.raises(CheckpointError, match=r"lacks model-2.safetensors"):
        Plan({"0.weight": {0: [0]}}).apply_to_checkpoint(source, target)
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="no safetensors file"):
        open_checkpoint(tmp_path / "empty")
    (tmp_path / "text.safetensors").write_text("nothing")
    with pytest.raises(CheckpointError, match="cannot be read"):
        open_checkpoint(tmp_path / "text.safetensors")
    assert not target.exists()


def test_a_model_without_memory_is_planned_from_its_checkpoint(tmp_path):
    model, x = Tied(), torch.tensor([[1, 2, 3]])
    source = saved(model, tmp_path / "source", 3)
    with torch.device("meta"):
        empty = Tied()
    plan = plan_neurons(empty, x.to("meta"), 0.5, importance=stored(source), progress=False)
    expected = plan_neurons(model, x, 0.5, importance="magnitude", progress=False)
    assert plan == expected
    assert empty.hidden.out_features == 12
    with pytest.raises(InvalidArgumentError, match="'fisher' needs data"):
        stored(source, "fisher")
    with pytest.raises(PlanMismatchError, match=r"no tensor `0.weight`"):
        plan_neurons(built("mlp")[0], torch.ones(1, 6), 0.5, importance=stored(source), progress=False)
