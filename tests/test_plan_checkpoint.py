"""Plans on files: the same as on models, one tensor at a time, whole or not at all."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from netopt.errors import CheckpointError, InvalidArgumentError, PlanMismatchError
from netopt.plan import Plan, checkpoint, stored
from netopt.plan.shards import open_checkpoint
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


def test_shifts_are_added_before_scales_in_files_as_in_models(tmp_path):
    model = nn.BatchNorm1d(4)
    source = saved(model, tmp_path / "source")
    shift, scale = torch.tensor([0.5, -1.0]), torch.tensor([2.0, 4.0])
    plan = Plan({"weight": {0: [1, 2]}}, shifts={"weight": shift}, scales={"weight": scale})
    plan = Plan.from_dict(plan.to_dict())
    plan.apply_to_checkpoint(source, tmp_path / "target")
    plan.apply(model)
    assert loaded(tmp_path / "target")["weight"].tolist() == model.weight.tolist() == [3, 0]


SHAPES = [(), (0,), (5,), (300_001,), (7, 3), (2, 40_000), (3, 2, 70_000), (300_000, 2), (64, 3, 7, 7), (2, 3, 300_000)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float8_e4m3fn, torch.complex64, torch.bool])
def test_every_shape_and_type_is_narrowed_in_blocks_as_in_memory(shape, dtype, tmp_path):
    generator = torch.Generator().manual_seed(0)
    tensor = torch.rand(shape, generator=generator).to(dtype)
    safetensors.save_file({"weight": tensor}, tmp_path / "source.safetensors")
    kept = {}
    for dim, size in enumerate(shape):
        stays = torch.nonzero(torch.rand(size, generator=generator) < 0.6).flatten()
        if len(stays) and dim != 1:
            kept[dim] = stays
    Plan({"weight": kept}).apply_to_checkpoint(tmp_path / "source.safetensors", tmp_path / "target.safetensors")
    expected = tensor.view(torch.uint8) if dtype == torch.float8_e4m3fn else tensor
    for dim, stays in kept.items():
        expected = expected.index_select(dim, stays)
    found = safetensors.load_file(tmp_path / "target.safetensors")["weight"]
    assert found.dtype == dtype
    assert torch.equal(found.view(torch.uint8) if dtype == torch.float8_e4m3fn else found, expected)


MEASURE = """
import sys
from pathlib import Path
from netopt.plan import Plan, stored
from netopt.importance import Evidence
import torch

def most():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(sys.argv[3]))

source, target = sys.argv[1:3]
plan = Plan.load(source + ".json")
Path("/proc/self/clear_refs").write_text("5")
sys.argv[3] = "VmRSS:"
before = most()
plan.apply_to_checkpoint(source, target)
for part in stored(source).parts(Evidence("weight", torch.empty(0), {})):
    pass
sys.argv[3] = "VmHWM:"
print(most() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs to know what was resident at most")
def test_a_tensor_is_never_in_memory_whole(tmp_path):
    size = 4096
    source = tmp_path / "large.safetensors"
    safetensors.save_file({"weight": torch.zeros(size, size)}, source)
    kept = torch.arange(size - 1)
    plan = Plan({"weight": {0: kept, 1: kept}}, scales={"weight": torch.ones(size - 1, 1)})
    plan.save(f"{source}.json")
    command = [sys.executable, "-c", MEASURE, str(source), str(tmp_path / "small.safetensors"), "VmRSS:"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    # The promise is twice the largest tensor; a few blocks are a fraction of it.
    assert int(done.stdout) < 4 * size * size / 2


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
    # One shard; the configuration and the index are written again.
    assert len(calls) - before == (2 if shards == 1 else 3)
    plan.apply(model)
    assert {name: tuple(one.shape) for name, one in loaded(tmp_path / "target").items()} == {
        name: tuple(one.shape) for name, one in model.state_dict().items()
    }


@pytest.mark.parametrize("what", ["mkdir", "open", "replace"])
def test_a_disk_that_fails_anywhere_is_named(what, tmp_path, monkeypatch):
    model, x = built("mlp")
    source = saved(model, tmp_path / "source", 2)
    plan = plan_neurons(model, x, 0.5, progress=False)
    real = getattr(Path, what)

    def fail(self, *args, **kwargs):
        if "target" in str(self):
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(self, *args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(Path, what, fail)
        with pytest.raises(CheckpointError, match=r"target could not be written.*the same call goes on from there"):
            plan.apply_to_checkpoint(source, tmp_path / "target")
    assert not list(tmp_path.glob("target/*.partial"))
    plan.apply_to_checkpoint(source, tmp_path / "target")
    plan.apply(model)
    assert {name: one.shape for name, one in loaded(tmp_path / "target").items()} == {
        name: one.shape for name, one in model.state_dict().items()
    }


def test_a_source_that_shrinks_meanwhile_is_named(tmp_path):
    safetensors.save_file({"weight": torch.zeros(300_000)}, tmp_path / "source.safetensors")
    shard = open_checkpoint(tmp_path / "source.safetensors").shards[0]
    (tmp_path / "source.safetensors").write_bytes((tmp_path / "source.safetensors").read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="is truncated: `weight` ends too early"):
        shard.read("weight")
    (tmp_path / "source.safetensors").unlink()
    with pytest.raises(CheckpointError, match="cannot be read: "):
        shard.read("weight")


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
    source = saved(model, tmp_path / "listed", 2)
    index = json.loads((source / checkpoint.INDEX).read_text())
    index["weight_map"]["9.weight"] = "model-1.safetensors"
    (source / checkpoint.INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"model-1.safetensors lacks `9.weight`, which the index lists there"):
        Plan({"0.weight": {0: [0]}}).apply_to_checkpoint(source, target)
    header = json.dumps({"weight": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}).encode()
    (tmp_path / "broken.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    with pytest.raises(CheckpointError, match=r"broken: `weight` \(3,\) of F32 has 8 bytes"):
        open_checkpoint(tmp_path / "broken.safetensors")
    header = json.dumps({"weight": {"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}}).encode()
    (tmp_path / "odd.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(1))
    with pytest.raises(CheckpointError, match="has the type F4, which is not known"):
        Plan({"weight": {0: [0]}}).apply_to_checkpoint(tmp_path / "odd.safetensors", target)
    (tmp_path / "long.safetensors").write_bytes((1 << 40).to_bytes(8, "little"))
    with pytest.raises(CheckpointError, match="a header of 1099511627776 bytes in a file of 8"):
        open_checkpoint(tmp_path / "long.safetensors")
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
    assert "not compared" in str(plan)
    axes = tuple(dataclasses.replace(row, reason=None) for row in plan.axes)
    assert dataclasses.replace(plan, axes=axes) == expected
    assert empty.hidden.out_features == 12
    with pytest.raises(InvalidArgumentError, match="'fisher' needs data"):
        stored(source, "fisher")
    with pytest.raises(PlanMismatchError, match=r"no tensor `0.weight`"):
        plan_neurons(built("mlp")[0], torch.ones(1, 6), 0.5, importance=stored(source), progress=False)
