"""Plans: values that survive a file, fit what they were made for and say what they do not fit."""

from __future__ import annotations

import copy
import json
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from conftest import unchanged
from netopt.errors import InvalidArgumentError, PlanMismatchError, ShapeMismatchError
from netopt.plan import AxisCut, Plan, shapes_of
from netopt.plan.codec import decode, encode, pack, unpack


def mlp(width: int = 6) -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, 2))


def mlp_plan(kept=(0, 2, 3), width: int = 6, **more) -> Plan:
    cut = {0: list(kept)}
    return Plan(
        {"0.weight": cut, "0.bias": cut, "2.weight": {1: list(kept)}},
        axes=(AxisCut("0", width, torch.tensor(kept)),),
        shapes=shapes_of(mlp(width)),
        **more,
    )


FULL = mlp_plan(
    attributes=((("0", "sizes", 1), 3),),
    values={"order": torch.tensor([[1, 0]])},
    scales={"0.weight": 1.5},
    predicted={"params_before": 44, "params_after": 23},
    shifts={"2.bias": torch.tensor([0.5, 0.25])},
)


@given(st.sets(st.integers(0, 300), min_size=1), st.booleans())
@settings(deadline=None, max_examples=60)
def test_codes_give_back_what_they_took(kept, whole):
    indices = torch.arange(max(kept) + 1) if whole else torch.tensor(sorted(kept))
    assert torch.equal(decode(encode(indices)), indices)
    assert torch.equal(unpack(pack(indices.view(1, -1))), indices.view(1, -1))


def test_half_of_a_wide_axis_takes_a_bitmap_and_not_a_list():
    torch.manual_seed(0)
    kept = torch.randperm(16384)[:8192].sort().values
    names = {f"layer{place}.weight": {0: kept} for place in range(50)}
    assert len(json.dumps(Plan(names).to_dict())) < 8000


def test_a_file_gives_back_an_equal_plan(tmp_path):
    FULL.save(tmp_path / "plan.json")
    loaded = Plan.load(tmp_path / "plan.json")
    assert loaded == FULL
    assert hash(loaded) == hash(FULL)
    assert loaded.attributes == FULL.attributes
    assert loaded != mlp_plan()
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]


def test_copies_and_pickles_are_equal():
    assert copy.deepcopy(FULL) == FULL
    assert pickle.loads(pickle.dumps(FULL)) == FULL


def test_a_plan_is_frozen():
    with pytest.raises(AttributeError):
        FULL.tensors = {}
    with pytest.raises(TypeError):
        FULL.tensors["0.weight"] = {}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("no", "not JSON"),
        ("[1]", "holds no plan"),
        ('{"format": "other"}', "'format' is not"),
        ('{"format": "netopt.plan", "version": 99}', "version 99"),
    ],
)
def test_files_that_hold_no_plan_are_named(tmp_path, text, message):
    path = tmp_path / "plan.json"
    path.write_text(text)
    with pytest.raises(InvalidArgumentError, match=message):
        Plan.load(path)


@pytest.mark.parametrize(
    ("kept", "message"), [([], "one or more"), ([2, 1], "ascend"), ([1, 1], "ascend"), ([-1], "asc")]
)
def test_indices_that_keep_nothing_or_no_order_are_refused(kept, message):
    with pytest.raises(InvalidArgumentError, match=message):
        Plan({"weight": {0: kept}})


def test_replayed_on_a_fresh_model_it_loads_the_pruned_weights_strictly():
    model = mlp()
    plan = pickle.loads(pickle.dumps(mlp_plan()))
    plan.apply(model)
    fresh = mlp()
    plan.apply(fresh)
    fresh.load_state_dict(model.state_dict())
    x = torch.randn(3, 4)
    torch.testing.assert_close(fresh(x), model(x))


@pytest.mark.filterwarnings("default")
def test_averages_of_weights_follow():
    model = mlp()
    average = torch.optim.swa_utils.AveragedModel(model)
    plan = mlp_plan()
    plan.apply(average)
    plan.apply(model)
    average.update_parameters(model)
    torch.testing.assert_close(average(torch.ones(1, 4)), model(torch.ones(1, 4)))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: mlp(7), r"`0.weight` has shape \(7, 4\) here and \(6, 4\)"),
        (lambda: nn.Sequential(nn.Linear(4, 6)), "with `2.weight`.*lacks it"),
        (lambda: nn.Sequential(*mlp(), nn.Linear(2, 2)), "has `3.weight`"),
        (lambda: nn.Conv2d(1, 1, 1), "with `0.weight`"),
    ],
)
def test_another_architecture_is_told_its_first_mismatch(build, message):
    with pytest.raises(PlanMismatchError, match=message):
        mlp_plan().apply(build())


def test_a_plan_is_carried_out_once():
    model = mlp()
    mlp_plan().apply(model)
    with pytest.raises(PlanMismatchError, match="carried out"):
        mlp_plan().apply(model)


def deep() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 5), nn.Linear(5, 2))


def test_merging_is_doing_both():
    first = Plan({"0.weight": {0: [0, 2]}, "0.bias": {0: [0, 2]}, "1.weight": {1: [0, 2]}}, shapes=shapes_of(deep()))
    second = Plan({"1.weight": {0: [1]}, "1.bias": {0: [1]}, "2.weight": {1: [1]}}, shapes=shapes_of(deep()))
    one, other = deep(), deep()
    other.load_state_dict(one.state_dict())
    first.merge(second).apply(one)
    replace_shapes = Plan(second.tensors)
    first.apply(other)
    replace_shapes.apply(other)
    torch.testing.assert_close(one.state_dict(), other.state_dict())
    assert first.merge(second) == second.merge(first).merge(first)
    with pytest.raises(PlanMismatchError, match="different models"):
        first.merge(mlp_plan())
    with pytest.raises(PlanMismatchError, match=r"differ in `0.weight`, dimension 0"):
        first.merge(Plan({"0.weight": {0: [1]}}, shapes=shapes_of(deep())))


def test_one_after_the_other_is_one_plan():
    model = mlp()
    whole = copy.deepcopy(model)
    first, second = mlp_plan((0, 2, 3, 5)), mlp_plan((1, 3), width=4)
    first.apply(model)
    second.apply(model)
    both = first.then(second)
    both.apply(whole)
    torch.testing.assert_close(whole.state_dict(), model.state_dict())
    assert both.axes[0].kept.tolist() == [2, 5]
    with pytest.raises(PlanMismatchError, match=r"`0.bias` has shape \(4,\) after the first"):
        first.then(first)


def test_shifts_and_scales_follow_one_another():
    model = mlp().double()
    whole = copy.deepcopy(model)

    def rescaled(kept, width):
        shift, scale = torch.rand(len(kept)).double(), 1 + torch.rand(len(kept)).double()
        plan = mlp_plan(kept, width, shifts={"0.bias": shift}, scales={"0.bias": scale, "0.weight": 2.0})
        return Plan.from_dict(plan.to_dict())

    first, second = rescaled((0, 2, 3, 5), 6), rescaled((1, 3), 4)
    first.apply(model)
    second.apply(model)
    first.then(second).apply(whole)
    torch.testing.assert_close(whole.state_dict(), model.state_dict())
    with pytest.raises(PlanMismatchError, match=r"differ in shifts, tensor 0.bias"):
        first.merge(rescaled((0, 2, 3, 5), 6))


def test_a_shift_of_another_shape_is_named_before_anything_changes():
    model, plan = mlp(), mlp_plan(shifts={"0.bias": torch.zeros(2)})
    with unchanged(model), pytest.raises(ShapeMismatchError, match=r"shift of shape \(2,\) to `0.bias`.*\(3,\)"):
        plan.apply(model)


def test_shown_as_text_and_as_html():
    text = str(FULL)
    assert "0  6 -> 3" in text
    assert "0.sizes[1] = 3" in text
    assert FULL.fingerprint in text
    assert "<td>6 -&gt; 3</td>" in FULL._repr_html_()
    assert "1 axes" in repr(FULL)
    assert "inexact: why" in str(Plan({}, axes=(AxisCut("a", 2, torch.tensor([0]), False, "why"),)))


def test_exact_when_every_axis_is():
    rows = [AxisCut("a", 2, torch.tensor([0])), AxisCut("b", 2, torch.tensor([0]), False, "a mean over it")]
    assert Plan({}, axes=rows[:1]).exact
    assert not Plan({}, axes=rows).exact
