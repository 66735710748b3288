"""Plans and checkpoints from anywhere: whatever is in a file, it is carried out as it says or refused by name."""

from __future__ import annotations

import base64
import copy
import json
import random
import zlib

import pytest
import torch
from torch import nn

from conftest import state_of, unchanged
from netopt.errors import CheckpointError, InvalidArgumentError, NetoptError, PlanMismatchError
from netopt.plan import AxisCut, Plan, checkpoint, shapes_of
from netopt.plan.blocks import BlockPlan
from netopt.plan.shards import open_checkpoint
from netopt.prune import plan_blocks, plan_neurons

safetensors = pytest.importorskip("safetensors.torch")

JUNK = (
    *(None, True, False, 0, 1, -1, 3, 99, 1 << 40, 1 << 70, -(1 << 70), 0.5, float("nan"), float("inf"), 1e300),
    *("", "x", "0", "-1", "0-2", "2-0", "0-99999999999", "b:", "b:!!", "b:AAAA", "..", "/", "\0", "__class__"),
    *([], {}, [[]], [None], [-1], [1, 2, 3], ["", "training"], {"a": {}}, {"0": 0}, {"shape": [1 << 40]}),
)


class Config:
    def __init__(self) -> None:
        self.sizes = [4, 6]
        self.inner = {"width": 6}

    def to_dict(self):
        return {"sizes": list(self.sizes), "inner": dict(self.inner)}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 2)
        self.config = Config()
        self.act = torch.relu
        self.register_buffer("order", torch.arange(6))

    def forward(self, x):
        return self.last(self.act(self.first(x)))


KEPT = (0, 2, 3)
PLAN = Plan(
    {"first.weight": {0: KEPT}, "first.bias": {0: KEPT}, "last.weight": {1: KEPT}, "order": {0: KEPT}},
    attributes=((("", "config", "inner", "width"), 3), (("", "config", "sizes", 1), 3)),
    values={"order": torch.arange(3)},
    scales={"last.weight": 2.0, "first.bias": torch.tensor([1.0, 2.0, 3.0])},
    axes=(AxisCut("first", 6, torch.tensor(KEPT)),),
    shapes=shapes_of(Net()),
    predicted={"params_before": 44},
    shifts={"last.bias": torch.tensor([0.5, 0.25])},
)


def places(tree, path=()):
    yield path
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ():
        yield from places(value, (*path, key))


def mutated(tree, chance):
    """The tree with one to three entries replaced, taken out, doubled or renamed."""
    tree = copy.deepcopy(tree)
    for _ in range(chance.choice((1, 1, 1, 2, 3))):
        path = chance.choice([one for one in places(tree) if one] or [()])
        if not path:
            return chance.choice(JUNK)
        holder = tree
        for step in path[:-1]:
            holder = holder[step]
        kind = chance.randrange(5)
        if kind == 0:
            del holder[path[-1]]
        elif kind == 1 and isinstance(holder, dict):
            holder[chance.choice(("", "x", "-1", "7", "__metadata__"))] = holder.pop(path[-1])
        elif kind == 1:
            holder.insert(path[-1], holder[path[-1]])
        else:
            holder[path[-1]] = copy.deepcopy(chance.choice(JUNK))
    return tree


def broken(content, chance):
    """The bytes with some of them changed, taken out or cut off."""
    if chance.random() < 0.3:
        return content[: chance.randrange(len(content))]
    content = bytearray(content)
    for _ in range(chance.choice((1, 2, 8))):
        place = chance.randrange(len(content))
        content[place : place + chance.choice((1, 1, 3))] = bytes(
            chance.randrange(256) for _ in range(chance.choice((0, 1, 1)))
        )
    return bytes(content)


def attempted(call, *arguments):
    """What the call returns, or the error it raises on purpose."""
    try:
        return call(*arguments)
    except NetoptError as error:
        return error


def test_a_broken_plan_is_refused_by_name_or_carried_out(tmp_path):
    chance, path, refused = random.Random(0), tmp_path / "plan.json", 0
    data = PLAN.to_dict()
    for attempt in range(1200):
        content = (
            json.dumps(mutated(data, chance)).encode() if attempt % 4 else broken(json.dumps(data).encode(), chance)
        )
        path.write_bytes(content)
        plan = attempted(Plan.load, path)
        if isinstance(plan, NetoptError):
            refused += 1
            assert str(path) in str(plan)
            continue
        model = Net()
        before = copy.deepcopy(vars(model.config))
        if attempted(plan.apply, model) is not None:
            assert vars(model.config) == before
            assert model.first.weight.shape == (6, 4)
    assert 800 < refused < 1200


def stack():
    return nn.Sequential(*[nn.Linear(4, 4) for _ in range(4)])


def test_a_broken_plan_of_blocks_is_refused_or_carried_out(tmp_path):
    chance, path, refused = random.Random(0), tmp_path / "plan.json", 0
    model, x = stack(), torch.randn(2, 4)
    data = plan_blocks(model, x, 1, importance=lambda name, _: int(name), include=["1", "2"], progress=False).to_dict()
    data["attributes"] = [[["1", "in_features"], 4]]
    for attempt in range(1200):
        text = json.dumps(data).encode()
        path.write_bytes(json.dumps(mutated(data, chance)).encode() if attempt % 4 else broken(text, chance))
        plan = attempted(BlockPlan.load, path)
        if isinstance(plan, NetoptError):
            refused += 1
            assert str(path) in str(plan)
            continue
        model = stack()
        before = state_of(model)
        if attempted(plan.apply, model) is None:
            assert model(x).shape == x.shape
        else:
            assert state_of(model) == before
    assert 600 < refused < 1200


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data.pop("shapes"), "`shapes` is missing"),
        (lambda data: data["tensors"]["first.weight"].update({"5": 0}), r"`tensors.first.weight.5` is no dimension of"),
        (lambda data: data["tensors"].update({"order": [1]}), "`tensors.order` is a list and no mapping"),
        (lambda data: data["axes"][0].update(exact=1), r"`axes\[0\].exact` is 1 and not true or false"),
        (lambda data: data["scales"].update({"last.weight": "2"}), "`scales.last.weight` is '2' and no finite number"),
        (lambda data: data["attributes"].append([["a"], 3]), r"`attributes\[2\]\[0\]` is no path"),
        (lambda data: data["indices"].__setitem__(0, "0-6"), r"`indices\[0\]` has the range '0-6' of 6 entries"),
        (lambda data: data["values"]["order"].update(dtype="object"), "`values.order.dtype` is none of"),
    ],
)
def test_the_field_that_is_broken_is_named(change, message, tmp_path):
    data = PLAN.to_dict()
    change(data)
    (tmp_path / "plan.json").write_text(json.dumps(data))
    with pytest.raises(InvalidArgumentError, match=f"plan.json holds no plan: .*{message}"):
        Plan.load(tmp_path / "plan.json")


@pytest.mark.parametrize("field", ["values", "shifts", "scales"])
def test_what_does_not_fit_a_tensor_is_named_before_anything_changes(field, tmp_path):
    model, plan = Net(), Plan({"first.bias": {0: [0, 1]}}, **{field: {"first.bias": torch.ones(3)}})
    safetensors.save_file(model.state_dict(), tmp_path / "source.safetensors")
    with unchanged(model), pytest.raises(NetoptError, match=r"\(3,\).* it will have \(2,\)"):
        plan.apply(model)
    with pytest.raises(PlanMismatchError, match=r"`first.bias`.*\(3,\)"):
        plan.apply_to_checkpoint(tmp_path / "source.safetensors", tmp_path / "target.safetensors")
    assert not (tmp_path / "target.safetensors").exists()


def large(shape):
    return {"shape": shape, "dtype": "int64", "zlib": base64.b64encode(zlib.compress(bytes(1 << 20))).decode()}


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data["indices"].append("0-199999999") or data["tensors"].update({"new": {"0": 1}}),
        lambda data: data["indices"].__setitem__(0, ",".join(["0-9999999"] * 100)) or data.update(shapes={}, axes=[]),
        lambda data: data["shapes"].update({"order": [1 << 60]}) or data["indices"].__setitem__(0, f"0-{1 << 59}"),
        lambda data: data["values"].update({"order": large([6])}),
        lambda data: data["values"].update({"order": large([1 << 40])}),
        lambda data: data["shifts"].update({"last.bias": large([1 << 31, 1 << 31, 0])}),
    ],
)
def test_a_small_file_makes_no_large_memory(change, tmp_path, monkeypatch):
    made = []
    real = torch.arange
    monkeypatch.setattr(torch, "arange", lambda *ends: made.append(ends) or real(*ends))
    data = PLAN.to_dict()
    change(data)
    (tmp_path / "plan.json").write_text(json.dumps(data))
    with pytest.raises(NetoptError):
        Plan.load(tmp_path / "plan.json").apply(Net())
    assert sum(last - first for first, last in made) < 1 << 24


@pytest.mark.parametrize(
    "path",
    [
        ["", "forward", "__func__", "__globals__", "torch", "x"],
        ["", "act", "__defaults__", 0],
        ["", "__class__", "x"],
        ["", "__dict__", "training"],
        ["", "_modules"],
        ["first", "_parameters"],
        ["", "_forward_hooks"],
        ["", "training"],
        ["", "config", "inner"],
        ["", "forward"],
        ["", "config", "to_dict"],
        ["", "config", "__class__", "x"],
        ["", "first"],
        ["", "first", "weight", "data"],
        ["", "first", "weight"],
        ["first", "forward", "x"],
        ["", "act", "x"],
        ["", "_forward_hooks", "clear"],
        ["", "register_buffer", "x"],
    ],
    ids=str,
)
def test_a_plan_reaches_numbers_of_the_model_and_nothing_else(path):
    model, data = Net(), PLAN.to_dict()
    data["attributes"] = [[path, 1]]
    with unchanged(model), pytest.raises(NetoptError):
        Plan.from_dict(data).apply(model)
    with unchanged(model), pytest.raises(NetoptError):
        Plan({}, attributes=((tuple(path), 1),)).apply(model)


def header_of(tensors, tmp_path):
    safetensors.save_file(tensors, tmp_path / "whole.safetensors")
    content = (tmp_path / "whole.safetensors").read_bytes()
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def test_a_broken_header_is_refused_by_name_or_read(tmp_path):
    tensors = {name: tensor.detach() for name, tensor in Net().state_dict().items()}
    header, values = header_of(tensors, tmp_path)
    header["__metadata__"] = {"format": "pt"}
    chance, path, refused = random.Random(1), tmp_path / "broken.safetensors", 0
    for attempt in range(600):
        text = (
            json.dumps(mutated(header, chance)).encode() if attempt % 4 else broken(json.dumps(header).encode(), chance)
        )
        length = len(text) if attempt % 7 else chance.choice((0, 1, len(text) - 1, 1 << 62, (1 << 64) - 1))
        path.write_bytes(length.to_bytes(8, "little") + text + values)
        found = attempted(open_checkpoint, path)
        if isinstance(found, NetoptError):
            refused += 1
            assert str(path) in str(found)
            continue
        for name, shard in found.places.items():
            value = attempted(shard.read, name)
            assert name in str(value) if isinstance(value, NetoptError) else value.shape == shard.entries[name].shape
    assert 350 < refused < 600


@pytest.mark.parametrize("file", ["../out.safetensors", "/out.safetensors", "a/../../out.safetensors", "..", "", "\0"])
def test_an_index_leads_nowhere_else(file, tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for name in ("out.safetensors", "source/in.safetensors"):
        safetensors.save_file({"weight": torch.ones(4)}, tmp_path / name)
    (source / checkpoint.INDEX).write_text(json.dumps({"weight_map": {"weight": file}}))
    with pytest.raises(CheckpointError, match=r"model.safetensors.index.json lists the file .* no place below"):
        Plan({"weight": {0: [0]}}).apply_to_checkpoint(source, tmp_path / "target")
    assert not (tmp_path / "target").exists()


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}', "{" * 9, "[" * 100_000]
)
def test_a_broken_index_or_configuration_is_named_before_anything_is_written(text, tmp_path):
    safetensors.save_file({"weight": torch.ones(4)}, tmp_path / "model.safetensors")
    plan = Plan({"weight": {0: [0]}}, attributes=((("", "config", "sizes", 1), 3),))
    for name in (checkpoint.INDEX, "config.json"):
        (tmp_path / name).write_text(text)
        if name == "config.json" and text.startswith('{"'):
            continue
        if (name, text) != ("config.json", "{}"):
            with pytest.raises(NetoptError, match=name):
                plan.apply_to_checkpoint(tmp_path, tmp_path / "target")
        (tmp_path / name).unlink()
    assert not (tmp_path / "target").exists()


def test_another_source_of_equal_names_and_sizes_is_written_again(tmp_path):
    plan = Plan({"weight": {0: [0, 2]}})
    for value in (1.0, 2.0):
        safetensors.save_file({"weight": torch.full((4,), value)}, tmp_path / "source.safetensors")
        plan.apply_to_checkpoint(tmp_path / "source.safetensors", tmp_path / "target.safetensors")
        assert safetensors.load_file(tmp_path / "target.safetensors")["weight"].tolist() == [value, value]


def test_files_of_one_name_in_several_folders_stay_apart(tmp_path):
    source, target = tmp_path / "source", tmp_path / "target"
    weight_map = {}
    for folder in ("a", "b"):
        (source / folder).mkdir(parents=True)
        safetensors.save_file({f"{folder}.weight": torch.arange(4.0)}, source / folder / "model.safetensors")
        weight_map[f"{folder}.weight"] = f"{folder}/model.safetensors"
    (source / checkpoint.INDEX).write_text(json.dumps({"weight_map": weight_map}))
    Plan({"a.weight": {0: [1]}, "b.weight": {0: [2]}}).apply_to_checkpoint(source, target)
    assert json.loads((target / checkpoint.INDEX).read_text())["weight_map"] == weight_map
    found = {name: safetensors.load_file(target / file)[name].tolist() for name, file in weight_map.items()}
    assert found == {"a.weight": [1], "b.weight": [2]}


def test_links_in_the_target_lead_to_no_other_file(tmp_path):
    source, target, other = tmp_path / "source", tmp_path / "target", tmp_path / "other"
    for folder in (source, target, other):
        folder.mkdir()
    safetensors.save_file({"weight": torch.arange(4.0)}, source / "model.safetensors")
    (source / "config.json").write_text("{}")
    kept = {}
    for name in ("model.safetensors", "model.safetensors.partial", "config.json", "config.json.partial"):
        kept[name] = other / name
        kept[name].write_text("mine")
        (target / name).symlink_to(kept[name])
    Plan({"weight": {0: [1]}}).apply_to_checkpoint(source, target)
    assert {path.read_text() for path in kept.values()} == {"mine"}
    assert safetensors.load_file(target / "model.safetensors")["weight"].tolist() == [1]
    (other / "plan.json").write_text("mine")
    (target / "plan.json.partial").symlink_to(other / "plan.json")
    PLAN.save(target / "plan.json")
    assert Plan.load(target / "plan.json") == PLAN
    assert (other / "plan.json").read_text() == "mine"
    (source / "a").mkdir()
    safetensors.save_file({"weight": torch.arange(4.0)}, source / "a" / "model.safetensors")
    (source / checkpoint.INDEX).write_text(json.dumps({"weight_map": {"weight": "a/model.safetensors"}}))
    (target / "a").symlink_to(other)
    with pytest.raises(CheckpointError, match="leads out of"):
        Plan({"weight": {0: [1]}}).apply_to_checkpoint(source, target)


class Parallel(nn.Module):
    """A wrapper, as parallel ones are."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, *inputs):
        return self.module(*inputs)


def inner_compiled(net):
    net.first = torch.compile(net.first, backend="eager")
    return net


WRAPPED = {
    "bare": lambda net: net,
    "parallel": Parallel,
    "twice": lambda net: Parallel(Parallel(net)),
    "compiled": lambda net: torch.compile(net, backend="eager"),
    "part compiled": inner_compiled,
    "averaged": torch.optim.swa_utils.AveragedModel,
}


@pytest.mark.parametrize("there", WRAPPED)
@pytest.mark.parametrize("here", WRAPPED)
@pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.*:FutureWarning")
def test_a_plan_made_in_one_wrapper_is_carried_out_in_every_other(here, there, tmp_path):
    plain = Net()
    made_on, applied_to = (WRAPPED[one](copy.deepcopy(plain)) for one in (here, there))
    names = {name: name for name in plain.state_dict()}
    for name in made_on.state_dict():
        names[".".join(part for part in name.split(".") if part not in ("module", "_orig_mod"))] = name
    module = {"bare": "", "part compiled": "", "twice": "module.module", "compiled": "_orig_mod"}.get(here, "module")
    plan = Plan(
        {names[name]: dims for name, dims in PLAN.tensors.items()},
        attributes=tuple(((module, *path[1:]), value) for path, value in PLAN.attributes),
        shapes=shapes_of(made_on),
    )
    plan.check(applied_to)
    plan.apply(applied_to)
    expected = copy.deepcopy(plain)
    Plan(PLAN.tensors, PLAN.attributes).apply(expected)
    for found, want in zip(list(applied_to.parameters()), list(expected.parameters()), strict=True):
        assert torch.equal(found, want)
    inner = next(module for module in applied_to.modules() if isinstance(module, Net))
    assert inner.config.inner == {"width": 3}
    safetensors.save_file(plain.state_dict(), tmp_path / "source.safetensors")
    plan.apply_to_checkpoint(tmp_path / "source.safetensors", tmp_path / "target.safetensors")
    for name, tensor in safetensors.load_file(tmp_path / "target.safetensors").items():
        assert torch.equal(tensor, expected.state_dict()[name])


def test_wrappers_explain_no_other_difference():
    with pytest.raises(PlanMismatchError, match="lacks it"):
        PLAN.apply(Parallel(nn.Linear(4, 6)))
    plan = plan_neurons(Parallel(Net()), torch.ones(1, 4), 0.5, importance="magnitude", progress=False)
    model = Net()
    plan.apply(model)
    assert model.first.out_features == 3
