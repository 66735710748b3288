"""find_axes as a user meets it: what it returns, what it refuses, and that the model never notices."""

from __future__ import annotations

import copy
import gc
import re
import types
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from conftest import unchanged
from netopt.axes import Axes, Axis, Member, find_axes, known_operations, rule
from netopt.errors import (
    ArgumentTypeError,
    ForwardError,
    InvalidArgumentError,
    TraceError,
    UnknownNameError,
)
from netopt.model.calls import Call, CallNames
from netopt.plan import Plan


def here() -> str:
    """This file, as reasons name it."""
    return r"test_axes_find\.py:\d+"


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 3))


class Attention(nn.Module):
    """One block of self-attention: axes of several kinds in one place."""

    def __init__(self, width: int = 16, heads: int = 4) -> None:
        super().__init__()
        self.heads, self.size = heads, width // heads
        self.stem = nn.Linear(5, width)
        self.norm = nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        x = self.stem(x)
        q, k, v = (
            part.view(batch, length, self.heads, self.size).transpose(1, 2)
            for part in self.qkv(self.norm(x)).chunk(3, -1)
        )
        y = ((q @ k.transpose(-1, -2) * self.size**-0.5).softmax(-1) @ v).transpose(1, 2)
        return self.head(x + self.out(y.reshape(batch, length, self.heads * self.size)))


class ConvNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 12, 3, padding=1)
        self.head = nn.Linear(12 * 4, 5)
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv1(x)).relu()
        x = F.adaptive_avg_pool2d(self.conv2(x).relu(), 2)
        return self.head(self.drop(x.flatten(1)))


IMAGE = (2, 3, 6, 6)
X = torch.randn(2, 4)


def summary(axes: Axes) -> list[tuple[Any, ...]]:
    return [(axis.name, axis.size, axis.members, axis.frozen, axis.inexact) for axis in axes]


def remove(model: nn.Module, axes: Axes, wanted: dict[str, int]) -> dict[str, int]:
    """Removes the last neurons of the named axes, with whatever goes along."""
    counts = axes.feasible(wanted)
    kept = {axis.name: torch.arange(counts[axis.name]) for axis in axes.free if counts[axis.name] < axis.size}
    attributes = tuple((one.path, one.value) for one in axes.attribute_values(counts))
    Plan(axes.tensor_indices(kept), attributes=attributes, values=axes.values(kept)).apply(model)
    return counts


# A sequence of axes.


def test_axes_are_a_sequence():
    axes = find_axes(ConvNet(), torch.randn(IMAGE))
    assert len(axes) == len(list(axes)) >= 4
    assert isinstance(axes[0], Axis)
    assert axes[-1] is list(axes)[-1]
    assert axes[1:3] == tuple(axes)[1:3]
    assert axes[0] in axes
    assert axes.index(axes[2]) == 2
    assert [axis.name for axis in axes.free] == ["conv1", "conv2"]
    assert {*axes.free, *axes.frozen} == set(axes)
    assert {"is a dimension of the model's input", "is a dimension of the model's output"} <= {
        axis.frozen for axis in axes.frozen
    }
    assert axes == find_axes(ConvNet(), torch.randn(IMAGE))
    assert axes != find_axes(mlp(), torch.randn(1, 4))
    with pytest.raises(IndexError):
        axes[99]


def test_an_axis_says_where_it_is():
    axis = find_axes(ConvNet(), torch.randn(IMAGE))["conv1"]
    assert axis.size == 8
    assert set(axis.members) == {
        Member("conv1.weight", 0),
        Member("conv1.bias", 0),
        Member("norm.weight", 0),
        Member("norm.bias", 0),
        Member("norm.running_mean", 0),
        Member("norm.running_var", 0),
        Member("conv2.weight", 1),
    }
    assert str(axis.members[0]) == "conv1.weight:0"
    assert axis.exact
    assert axis.inexact is None
    assert axis.frozen is None
    assert str(axis) == "conv1 (8)"
    with pytest.raises(AttributeError):
        axis.size = 3


def test_a_layer_finds_the_axis_of_its_outputs():
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.last = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 2)

        def forward(self, x):
            x = self.first(x)
            return self.last(x + self.second(x.relu()))

    axes = find_axes(Residual(), torch.randn(2, 4))
    (free,) = axes.free
    assert axes["first"] is axes["second"] is axes[free.name] is free


def test_a_name_that_is_none_suggests_the_near_ones():
    axes = find_axes(ConvNet(), torch.randn(IMAGE))
    with pytest.raises(UnknownNameError, match=r"no axis is called 'conv3'.* one\. Did you mean .*'conv[12]'"):
        axes["conv3"]
    with pytest.raises(UnknownNameError, match=r"no axis is called 'zzz', and no layer of this name makes one\.$"):
        axes["zzz"]


def test_a_layer_that_makes_several_axes_lists_them():
    axes = find_axes(Attention(), torch.randn(2, 6, 5))
    with pytest.raises(UnknownNameError, match=r"'qkv' makes 3 axes; name one of 'qkv/heads', 'qkv/size', 'qkv/2'"):
        axes["qkv"]
    assert (axes["qkv/heads"].size, axes["qkv/size"].size, axes["qkv/2"].size) == (4, 4, 4)


def test_the_table_has_a_row_an_axis_and_its_state():
    axes = find_axes(Attention(), torch.randn(2, 6, 5))
    table = str(axes)
    assert repr(axes) == table
    lines = table.splitlines()
    assert len(lines) == len(axes) + 1
    assert lines[0].split() == ["axis", "kind", "size", "members", "state"]
    for line, axis in zip(lines[1:], axes, strict=True):
        name, kind, size, members, state = line.split(maxsplit=4)
        assert kind == (axis.kind or "-")
        assert (name, int(size), int(members)) == (axis.name, axis.size, len(axis.members))
        assert state.startswith("frozen: " if axis.frozen else "free")
        assert (axis.frozen or axis.inexact or "") in state


def test_the_table_of_a_notebook_is_escaped():
    axes = find_axes(nn.ModuleDict({"x": nn.Linear(2, 3)})["x"], torch.randn(1, 2))
    html = axes._repr_html_()
    assert html.startswith("<table>")
    assert html.count("<tr>") == len(axes) + 1
    assert "&#x27;s" in html  # "the model's output"
    assert "model's" not in html


def test_a_model_without_parameters_has_no_axes():
    axes = find_axes(nn.ReLU(), torch.randn(1, 2))
    assert len(axes) == 0
    assert str(axes).split() == ["axis", "kind", "size", "members", "state"]
    assert axes.feasible({}) == {}
    assert axes.tensor_indices({}) == {}


# What stays as it was.


@pytest.mark.parametrize("make", [ConvNet, mlp, Attention])
@pytest.mark.parametrize("training", [True, False])
def test_the_model_never_notices(make, training):
    model = make().train(training)
    x = {ConvNet: torch.randn(IMAGE), mlp: torch.randn(2, 4), Attention: torch.randn(2, 6, 5)}[make]
    next(iter(model.children())).requires_grad_(False)
    model.register_forward_hook(lambda *_: None)
    model(x).sum().backward()
    expected = copy.deepcopy(model).eval()(x)
    bits = x.clone()
    with unchanged(model):
        find_axes(model, x)
    assert torch.equal(model.eval()(x), expected)
    assert torch.equal(x, bits)
    assert not x.requires_grad
    assert not [key for tensor in (x, *model.parameters()) for key in vars(tensor) if "netopt" in key]


@pytest.mark.parametrize("enabled", [True, False])
def test_the_garbage_collector_is_left_as_it_was(enabled):
    before = gc.isenabled()
    try:
        (gc.enable if enabled else gc.disable)()
        find_axes(mlp(), X)
        assert gc.isenabled() is enabled
        with pytest.raises(ForwardError):
            find_axes(mlp(), torch.randn(1, 3))
        assert gc.isenabled() is enabled
    finally:
        (gc.enable if before else gc.disable)()


def test_hooks_that_users_put_are_run_and_kept():
    model, seen = mlp(), []
    handles = [
        model[0].register_forward_pre_hook(lambda *_: seen.append("pre")),
        model[0].register_forward_hook(lambda *_: seen.append("post")),
    ]
    with unchanged(model):
        find_axes(model, X)
    assert seen == ["pre", "post"] * (len(seen) // 2) != []
    for handle in handles:
        handle.remove()
    assert not model[0]._forward_hooks


def test_inputs_that_need_gradients_keep_theirs():
    x = torch.randn(2, 4, requires_grad=True)
    x.sum().backward()
    grad = x.grad
    find_axes(mlp(), x)
    assert x.grad is grad
    assert x.is_leaf
    assert x.requires_grad


def test_grad_mode_is_as_it_was():
    with torch.no_grad():
        find_axes(mlp(), torch.randn(2, 4))
        assert not torch.is_grad_enabled()
    assert torch.is_grad_enabled()
    with torch.inference_mode():
        assert find_axes(mlp(), torch.randn(2, 4))["0"].size == 16


def test_what_the_call_switches_off_is_on_again():
    before = torch.backends.mha.get_fastpath_enabled(), torch._C._get_mkldnn_enabled(), F.has_torch_function
    find_axes(nn.LSTM(4, 8, batch_first=True), torch.randn(2, 3, 4))
    with pytest.raises(ForwardError):
        find_axes(mlp(), torch.randn(2, 5))
    after = torch.backends.mha.get_fastpath_enabled(), torch._C._get_mkldnn_enabled(), F.has_torch_function
    assert before == after


class Failing(nn.Module):
    """Fails after having changed what it can."""

    def __init__(self, when: bool | None = None) -> None:
        super().__init__()
        self.when = when
        self.layer, self.norm = nn.Linear(4, 8), nn.BatchNorm1d(8)
        self.sizes = [8, 8]

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.layer(x))
        self.latest, self.sizes[0] = x.shape[-1], 5
        torch.rand(3)
        if self.when is None or self.training is self.when:
            raise RuntimeError("not today")
        return x.sum(-1)


def test_a_failing_forward_is_named_and_leaves_everything():
    model = Failing()
    with unchanged(model), pytest.raises(ForwardError, match=r"(?s)forward of Failing failed.*not today") as caught:
        find_axes(model, X)
    assert isinstance(caught.value.__cause__, RuntimeError)
    assert model.sizes == [8, 8]
    assert not hasattr(model, "latest")


def test_a_forward_that_only_fails_in_training_is_no_matter():
    model = Failing(when=True)
    with unchanged(model):
        axes = find_axes(model, X)
    assert axes["layer"].frozen is None
    assert find_axes(ConvNet(), torch.randn(1, 3, 6, 6))["conv1"].frozen is None


def test_a_batch_norm_on_one_sample_is_traced():
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 2))
    assert find_axes(model, torch.randn(1, 4))["0"].frozen is None


@pytest.mark.parametrize(
    ("model", "inputs", "error", "message"),
    [
        (lambda x: x, torch.randn(1, 4), ArgumentTypeError, "model must be a torch.nn.Module, not function"),
        (mlp(), [torch.randn(1, 4)], ArgumentTypeError, "tuple"),
        (mlp(), None, ArgumentTypeError, "randn"),
        (mlp(), torch.randn(1, 5), ForwardError, r"shape \(1, 5\)"),
        (mlp(), (), ForwardError, "missing"),
    ],
)
def test_wrong_arguments_are_refused(model, inputs, error, message):
    with pytest.raises(error, match=message):
        find_axes(model, inputs)


# Example inputs and outputs in every form.


@dataclass
class Pair:
    scores: Tensor
    states: tuple[Tensor, ...] = ()


class Several(nn.Module):
    """A trunk with three results."""

    def __init__(self, form: str = "dict") -> None:
        super().__init__()
        self.form = form
        self.trunk, self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 3), nn.Linear(8, 5)

    def forward(self, x: Tensor, extra: Tensor | None = None) -> Any:
        h = self.trunk(x).relu()
        scores, other = self.a(h), self.b(h)
        if self.form == "tuple":
            return scores, (other, None)
        if self.form == "dataclass":
            return Pair(scores, (other,))
        if self.form == "opaque":
            return {"scores": scores, "cache": types.SimpleNamespace(h=h)}
        return {"scores": scores, "other": other, "none": None, "hidden": h}


def frozen(axes: Axes) -> set[str]:
    return {axis.name for axis in axes.frozen if "output" in str(axis.frozen)}


@pytest.mark.parametrize("inputs", [X, (X,), (X, None), {"x": X}, {"x": X, "extra": None}])
def test_every_form_of_inputs_gives_the_same_axes(inputs):
    assert summary(find_axes(Several(), inputs)) == summary(find_axes(Several(), X))


@pytest.mark.parametrize(
    ("form", "outputs", "expected"),
    [
        ("dict", None, {"a", "b", "trunk"}),
        ("dict", "scores", {"a"}),
        ("dict", ["scores", "other"], {"a", "b"}),
        ("dict", ("other",), {"b"}),
        ("dict", lambda name, tensor: name != "hidden", {"a", "b"}),
        ("dict", lambda name, tensor: tensor.shape[-1] == 5, {"b"}),
        ("dict", lambda result: result["scores"], {"a"}),
        ("dict", lambda result: [result["scores"], {"h": result["hidden"]}], {"a", "trunk"}),
        ("tuple", None, {"a", "b"}),
        ("tuple", "0", {"a"}),
        ("tuple", "1", {"b"}),
        ("tuple", "1.0", {"b"}),
        ("dataclass", None, {"a", "b"}),
        ("dataclass", "scores", {"a"}),
        ("dataclass", "states", {"b"}),
        ("opaque", None, {"a"}),
    ],
)
def test_outputs_say_which_results_keep_their_shape(form, outputs, expected):
    axes = find_axes(Several(form), X, outputs=outputs)
    assert frozen(axes) == expected


def test_outputs_that_name_no_result_list_those_there_are():
    with pytest.raises(InvalidArgumentError, match=r"'logits' names no result.*'scores', 'other', 'hidden'"):
        find_axes(Several(), X, outputs="logits")


def test_a_result_that_is_not_kept_may_shrink():
    model = Several()
    axes = find_axes(model, X, outputs="scores")
    assert axes["b"].frozen is None
    remove(model, axes, {"trunk": 4, "b": 2})
    result = model(X)
    assert [result[key].shape[-1] for key in ("scores", "other", "hidden")] == [3, 2, 4]


# What a plan asks.


@pytest.fixture(scope="module")
def attention() -> Axes:
    torch.manual_seed(0)
    return find_axes(Attention(), torch.randn(2, 6, 5))


def test_members_say_which_position_stands_at_each_index(attention):
    heads, keys, values = (
        {(name, dim): label for name, dim, label in attention.members(attention[axis])}
        for axis in ("qkv/heads", "qkv/size", "qkv/2")
    )
    assert heads.keys() == values.keys() == {("qkv.weight", 0), ("qkv.bias", 0), ("out.weight", 1)}
    assert keys.keys() == {("qkv.weight", 0), ("qkv.bias", 0)}  # summed over within a head, so never seen outside
    assert heads["out.weight", 1].tolist() == [0] * 4 + [1] * 4 + [2] * 4 + [3] * 4
    assert values["out.weight", 1].tolist() == [0, 1, 2, 3] * 4
    assert torch.equal(heads["qkv.weight", 0], heads["out.weight", 1].repeat(3))
    assert keys["qkv.weight", 0].tolist() == [0, 1, 2, 3] * 8 + [-1] * 16


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_indices_are_those_whose_positions_all_stay(attention, data):
    kept = {}
    for axis in attention.free:
        stay = data.draw(st.sets(st.integers(0, axis.size - 1), min_size=1), label=axis.name)
        kept[axis.name] = torch.tensor(sorted(stay))
    shapes = {name: tensor.shape for name, tensor in Attention().named_parameters()}
    expected: dict[str, dict[int, Tensor]] = {}
    for axis in attention.free:
        alive = torch.zeros(axis.size + 1, dtype=torch.bool)
        alive[kept[axis.name]] = True
        alive[-1] = True  # indices at which the axis does not stand
        for name, dim, label in attention.members(axis):
            flags = expected.setdefault(name, {}).setdefault(dim, torch.ones(shapes[name][dim], dtype=torch.bool))
            flags &= alive[label]
    found = attention.tensor_indices(kept)
    assert {name: set(dims) for name, dims in found.items()} == {name: set(dims) for name, dims in expected.items()}
    for name, dims in expected.items():
        for dim, flags in dims.items():
            assert torch.equal(found[name][dim], flags.nonzero().flatten())


def test_axes_not_named_keep_all(attention):
    found = attention.tensor_indices({"qkv/heads": torch.tensor([1, 3])})
    assert found["qkv.bias"][0].tolist() == [*range(4, 8), *range(12, 16), *range(20, 24), *range(28, 32),
                                             *range(36, 40), *range(44, 48)]  # fmt: skip
    assert set(found) == {"qkv.weight", "qkv.bias", "out.weight"}
    assert attention.tensor_indices({}) == {}


def test_feasible_answers_for_every_free_axis(attention):
    full = {axis.name: axis.size for axis in attention.free}
    assert attention.feasible({}) == full
    found = attention.feasible({name: max(1, size // 2) for name, size in full.items()})
    assert set(found) == set(full)
    assert all(1 <= found[name] <= full[name] for name in full)
    assert attention.feasible({"stem.in": 1}) == full  # frozen: nothing to wish for
    with pytest.raises(UnknownNameError, match="qqq"):
        attention.feasible({"qqq": 1})


def test_integers_follow_what_they_are_the_size_of():
    model, x = Attention(), torch.randn(2, 6, 5)
    axes = find_axes(model, x)
    counts = axes.feasible({"qkv/heads": 3, "qkv/size": 2, "qkv/2": 2, "stem": 10})
    assert counts == {"qkv/heads": 3, "qkv/size": 2, "qkv/2": 2, "stem": 10}
    values = {one.path: one.value for one in axes.attribute_values(counts)}
    assert values[("", "heads")] == 3
    assert values[("", "size")] == 2
    assert values[("norm", "normalized_shape", 0)] == 10
    assert all(type(value) is int for value in values.values())
    assert axes.attribute_values({}) == []
    remove(model, axes, counts)
    assert (model.heads, model.size, model.norm.normalized_shape) == (3, 2, (10,))
    assert model(torch.randn(1, 9, 5)).shape == (1, 9, 3)


def test_taps_are_where_the_neurons_are_read(attention):
    (read,) = attention.taps(attention["qkv/heads"])
    assert (read.call, read.argument, read.dim) == (Call("out", 0, "linear", 0), 0, 2)
    assert read.positions.tolist() == [0] * 4 + [1] * 4 + [2] * 4 + [3] * 4
    keys = {(tap.call.module, tap.call.function, tap.argument) for tap in attention.taps(attention["qkv/size"])}
    assert keys == {("", "matmul", 0), ("", "matmul", 1)}  # queries times keys
    (value,) = attention.taps(attention["qkv/2"])
    assert (value.call.module, value.positions.tolist()) == ("out", [0, 1, 2, 3] * 4)
    assert {tap.call.module for tap in attention.taps(attention["stem"])} == {"qkv", "head"}


def test_a_buffer_of_pointers_is_rewritten():
    class Chosen(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 2)
            self.register_buffer("order", torch.tensor([5, 0, 3, 1, 4, 2]))

        def forward(self, x):
            return self.last(self.first(x)[:, self.order])

    model = Chosen().double()
    x = torch.randn(3, 4).double()
    axes = find_axes(model, x)
    kept = {"first": torch.tensor([0, 1, 3, 5])}
    (values,) = axes.values(kept).values()
    assert values.tolist() == [3, 0, 2, 1]
    masked = copy.deepcopy(model)
    for name, dim, label in axes.members(axes["first"]):
        tensor = masked.get_parameter(name) if name != "order" else None
        if tensor is not None:
            gone = ~torch.isin(label, kept["first"])
            tensor.data.index_fill_(dim, gone.nonzero().flatten(), 0.0)
    Plan(axes.tensor_indices(kept), values=axes.values(kept)).apply(model)
    torch.testing.assert_close(model(x), masked(x), rtol=1e-12, atol=1e-12)


# What freezes says so.


def test_a_literal_in_a_view_names_its_line():
    class Literal(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(4, 12), nn.Linear(12, 2)

        def forward(self, x):
            return self.last(self.first(x).view(-1, 3, 4).transpose(1, 2).reshape(-1, 12))

    axes = find_axes(Literal(), X)
    reasons = [
        axis.frozen
        for axis in axes
        if any(member.tensor == "first.weight" and member.dim == 0 for member in axis.members)
    ]
    assert reasons
    for reason in reasons:
        assert re.search(rf"meets the literal \d+ in \w+ at {here()}", str(reason))


def test_the_same_view_by_attributes_is_free():
    class Remembered(nn.Module):
        def __init__(self):
            super().__init__()
            self.rows, self.columns = 3, 4
            self.first, self.last = nn.Linear(4, 12), nn.Linear(12, 2)

        def forward(self, x):
            x = self.first(x).view(-1, self.rows, self.columns).transpose(1, 2)
            return self.last(x.reshape(-1, self.rows * self.columns))

    axes = find_axes(Remembered(), X)
    assert {axis.name: axis.size for axis in axes.free} == {"first/rows": 3, "first/columns": 4}


LIBRARY = torch.library.Library("netopt_find", "FRAGMENT")
LIBRARY.define("mystery(Tensor x) -> Tensor")
LIBRARY.impl("mystery", lambda x: 2 * x, "CompositeExplicitAutograd")
LIBRARY.define("blend(Tensor x, Tensor y, float share) -> Tensor")
LIBRARY.impl("blend", lambda x, y, share: share * x + (1 - share) * y, "CompositeExplicitAutograd")
LIBRARY.define("halves(Tensor x) -> (Tensor, Tensor)")
LIBRARY.impl("halves", lambda x: (x[..., ::2].clone(), x[..., 1::2].clone()), "CompositeExplicitAutograd")
LIBRARY.define("wrong(Tensor x) -> Tensor")
LIBRARY.impl("wrong", lambda x: x.sum(-1), "CompositeExplicitAutograd")


class Through(nn.Module):
    """A hidden layer that goes through a function."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(4, 8), nn.Linear(4, 8), nn.Linear(8, 2)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.function(self.first(x), self.second(x)))


def test_an_operation_without_a_rule_freezes_what_it_touches():
    model = Through(lambda x, y: torch.ops.netopt_find.mystery(x) + 0 * y[:, :1])
    axes = find_axes(model, X)
    frozen_at = {member.tensor for axis in axes.frozen for member in axis.members}
    assert {"first.weight", "last.weight"} <= frozen_at
    reason = str(axes["first"].frozen)
    assert re.fullmatch(rf"reaches netopt_find::mystery, which has no rule, at {here()}", reason)
    assert "netopt_find::mystery" in axes.unknown


def test_a_rule_teaches_an_operation():
    @rule(torch.ops.netopt_find.blend)
    def blend(op, x, y, share):
        left, right = op.dims(x), op.dims(y)
        for one, other in zip(left, right, strict=True):
            op.same(one, other)
        return left

    model = Through(lambda x, y: torch.ops.netopt_find.blend(x, y, 0.25)).double()
    x = X.double()
    axes = find_axes(model, x)
    assert axes["first"] is axes["second"]
    assert axes["first"].frozen is None
    assert "netopt_find::blend" in known_operations()
    expected = model.last.bias + 0.25 * (model.first(x)[:, :5] @ model.last.weight[:, :5].T)
    expected = expected + 0.75 * (model.second(x)[:, :5] @ model.last.weight[:, :5].T)
    remove(model, axes, {axes["first"].name: 5})
    torch.testing.assert_close(model(x), expected)


def test_a_rule_for_several_results_returns_a_tuple_and_may_freeze():
    @rule("netopt_find::halves")
    def halves(op, x):
        dims = op.dims(x)
        op.freeze(dims[-1], "is taken apart by halves")
        size = dims[-1].size // 2
        return tuple([*dims[:-1], op.frozen(size, "is a half")] for _ in range(2))

    axes = find_axes(Through(lambda x, y: torch.cat(torch.ops.netopt_find.halves(x), -1) + 0 * y.sum()), X)
    assert re.fullmatch(rf"is taken apart by halves, at {here()}", str(axes["first"].frozen))
    assert not axes.unknown


def test_a_rule_that_gives_wrong_sizes_is_named():
    @rule("netopt_find::wrong")
    def wrong(op, x):
        return op.dims(x)

    with pytest.raises(
        TraceError, match=r"rule of netopt_find::wrong gives sizes \(2, 8\) to a result of shape \(2,\)"
    ):
        find_axes(Through(lambda x, y: y * torch.ops.netopt_find.wrong(x)[:, None]), X)


def test_two_rules_for_one_operation_are_refused():
    with pytest.raises(InvalidArgumentError, match="aten::mm has a rule already"):
        rule(torch.ops.aten.mm)(lambda op, *args: None)
    with pytest.raises(InvalidArgumentError, match="3 is no operation"):
        rule(3)(lambda op, *args: None)
    assert torch.ops.aten.mm.default._schema.name in known_operations()


def test_what_is_not_used_says_so():
    class Unused(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.Linear(4, 2), nn.Linear(4, 2)

        def forward(self, x):
            return self.used(x)

    axes = find_axes(Unused(), X)
    reasons = {str(axis.frozen) for axis in axes for member in axis.members if member.tensor == "unused.weight"}
    assert reasons == {"is not used by the forward"}


# The same axes wherever the tensors are.


@pytest.mark.parametrize(("make", "shape"), [(ConvNet, IMAGE), (Attention, (2, 6, 5)), (mlp, (2, 4))])
def test_fake_and_meta_tensors_give_the_same_axes(make, shape):
    real = find_axes(make(), torch.randn(shape))
    with torch.device("meta"):
        meta = find_axes(make(), torch.randn(shape))
    assert summary(meta) == summary(real)
    with FakeTensorMode():
        model, x = make(), torch.randn(shape)
        inside = find_axes(model, x)
    assert summary(inside) == summary(real)
    assert summary(find_axes(model, x)) == summary(real)  # outside the mode it was made in
    counts = {axis.name: max(1, axis.size // 2) for axis in real.free}
    assert inside.feasible(counts) == real.feasible(counts)
    assert inside.attribute_values(counts) == real.attribute_values(counts)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(("make", "shape"), [(ConvNet, IMAGE), (Attention, (2, 6, 5))])
def test_a_gpu_gives_the_same_axes(make, shape):
    real = find_axes(make(), torch.randn(shape))
    assert summary(find_axes(make().cuda(), torch.randn(shape, device="cuda"))) == summary(real)


def test_two_runs_give_the_same_axes():
    model, x = Attention(), torch.randn(2, 6, 5)
    assert summary(find_axes(model, x)) == summary(find_axes(model, x)) == summary(find_axes(copy.deepcopy(model), x))
    assert summary(find_axes(model.train(), x)) == summary(find_axes(model.eval(), x))


def test_a_model_may_itself_look_for_axes():
    class Curious(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.last = mlp(), nn.Linear(3, 2)
            self.found = []

        def forward(self, x):
            other = mlp()
            self.found.append(len(find_axes(other, torch.randn(1, 4)).free))
            assert self.found[-1] == 1
            return self.last(self.inner(x))

    axes = find_axes(Curious(), X)
    assert axes["inner.0"].frozen is None
    assert axes["inner.0"].size == 16


def test_the_cost_is_linear_in_the_number_of_layers():
    def stack(depth: int) -> Axes:
        with torch.device("meta"):
            layer = nn.TransformerEncoderLayer(512, 8, 2048, batch_first=True)
            return find_axes(nn.TransformerEncoder(layer, depth, enable_nested_tensor=False), torch.randn(1, 9, 512))

    found = {depth: stack(depth) for depth in (2, 4, 8)}
    operations = {depth: axes.operations for depth, axes in found.items()}
    free = {depth: len(axes.free) for depth, axes in found.items()}
    for counted in (operations, free):
        assert counted[8] - counted[4] == 2 * (counted[4] - counted[2]) > 0


# Calls have names.


class Recorder(CallNames):
    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.calls: list[Call] = []

    def on_call(self, call, function, args, kwargs, result):
        self.calls.append(call)
        return result


def recorded(model: nn.Module, x: Tensor, grad: bool = True) -> list[Call]:
    with torch.set_grad_enabled(grad), Recorder(model) as recorder:
        model(x)
    return recorder.calls


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.shared = nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.ReLU())
        self.alias = self.shared

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer(self.layer(x))
        return F.linear(self.shared(x), self.layer.weight) @ self.alias(x).T


@pytest.mark.parametrize(("make", "shape"), [(ConvNet, IMAGE), (Attention, (2, 6, 5)), (Twice, (2, 4))])
def test_calls_have_the_same_names_in_every_run(make, shape):
    model, x = make().eval(), torch.randn(shape)
    first = recorded(model, x)
    assert first
    assert len(set(first)) == len(first), "a name is of one call"
    assert recorded(model, x) == first
    assert recorded(model, x, grad=False) == first
    assert recorded(model, x.requires_grad_()) == first
    axes = find_axes(model, x.detach())
    taps = {tap.call for axis in axes for tap in axes.taps(axis)}
    assert taps <= set(first)


def test_a_module_called_twice_is_visited_twice():
    calls = recorded(Twice(), X)
    linear = [(call.module, call.visit, call.number) for call in calls if call.function == "linear"]
    assert linear == [("layer", 0, 0), ("layer", 1, 0), ("shared.0", 0, 0), ("", 0, 0), ("shared.0", 1, 0)]


def test_a_failing_module_is_left_and_its_hooks_are_gone():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(5, 4))
    hooks = dict(torch.nn.modules.module._global_forward_hooks), dict(torch.nn.modules.module._global_forward_pre_hooks)
    with pytest.raises(RuntimeError, match="mat1"), Recorder(model):
        model(X)
    assert hooks == (
        dict(torch.nn.modules.module._global_forward_hooks),
        dict(torch.nn.modules.module._global_forward_pre_hooks),
    )


@pytest.mark.filterwarnings("ignore:LSTM with projections")  # torch says which kernel it takes
def test_a_projection_stays_narrower_than_its_hidden_state():
    class Projected(nn.Module):
        def __init__(self):
            super().__init__()
            self.cell, self.last = nn.LSTM(4, 12, proj_size=6, batch_first=True), nn.Linear(6, 2)

        def forward(self, x):
            return self.last(self.cell(x)[0])

    model, x = Projected(), torch.randn(3, 5, 4)
    axes = find_axes(model, x)
    counts = remove(model, axes, {axis.name: 3 for axis in axes.free})
    assert counts["cell/proj_size"] < counts["cell/hidden_size"] < 12
    assert model(x).shape == (3, 5, 2)


class RelativePositions(nn.Module):
    """Attention among the pixels of a window, with a bias for each distance and head."""

    def __init__(self, side: int):
        super().__init__()
        at = torch.stack(torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")).flatten(1)
        apart = at[:, :, None] - at[:, None] + side - 1
        self.register_buffer("index", apart[0] * (2 * side - 1) + apart[1])
        self.table = nn.Parameter(torch.randn((2 * side - 1) ** 2, 2))
        self.qkv, self.out = nn.Linear(4, 24), nn.Linear(8, 4)

    def forward(self, x):
        b, n, _ = x.shape
        q, k, v = self.qkv(x).view(b, n, 3, 2, 4).permute(2, 0, 3, 1, 4)
        bias = self.table[self.index.view(-1)].view(n, n, -1).permute(2, 0, 1)
        h = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias[None])
        return self.out(h.transpose(1, 2).reshape(b, n, 8))


@pytest.mark.parametrize("side", [3, 9])  # of the longer list, not every entry is followed
def test_a_table_of_relative_positions_stays_and_its_heads_may_go(side):
    axes = find_axes(RelativePositions(side), torch.randn(1, side * side, 4))
    by_member = {(member.tensor, member.dim): axis for axis in axes for member in axis.members}
    assert by_member["table", 0].frozen
    assert by_member["qkv.weight", 1].frozen
    assert by_member["table", 1].size == 2


LEAVING = {
    "numpy": lambda x: torch.from_numpy(x.detach().numpy()),
    "a list": lambda x: torch.tensor(x.tolist()),
}


class Handing(nn.Module):
    """Something is done with a tensor between two layers."""

    def __init__(self, handed):
        super().__init__()
        self.first, self.last, self.handed = nn.Linear(5, 8), nn.Linear(8, 3), handed

    def forward(self, x):
        return self.last(self.handed(self.first(x)))


@pytest.mark.parametrize("how", LEAVING)
def test_what_leaves_torch_stays_as_it_is(how):
    axes = find_axes(Handing(LEAVING[how]), torch.randn(2, 5))
    assert re.search(f"leaves torch at {here()}", axes["first"].frozen)


def test_a_copied_tensor_has_the_same_dimensions():
    axes = find_axes(Handing(lambda x: copy.deepcopy(x.detach())), torch.randn(2, 5))
    assert {str(member) for member in axes["first"].members} == {"first.weight:0", "first.bias:0", "last.weight:1"}
    assert axes["last"].frozen


class Permuted(nn.Module):
    """A list of positions, and something else that is done with it."""

    def __init__(self, more):
        super().__init__()
        self.first, self.last, self.more = nn.Linear(8, 8), nn.Linear(8, 3), more
        self.register_buffer("order", torch.randperm(8))

    def forward(self, x):
        return self.last(self.first(x)[:, self.order]) + self.more(x, self.order).sum(-1, keepdim=True)


USES = {
    "positions of the input": lambda x, order: x[:, order],
    "positions of a selection": lambda x, order: x.index_select(1, order),
    "other positions": lambda x, order: x[:, (order + 1) % 8],
    "values": lambda x, order: x * order,
    "a list": lambda x, order: x * sum(order.tolist()),
    "one of them": lambda x, order: x * order[0].item(),
}


@pytest.mark.parametrize("use", USES)
def test_positions_that_are_something_else_too_are_not_rewritten(use):
    made = find_axes(Permuted(USES[use]), torch.randn(2, 8)).made_by("first")
    assert all(axis.frozen for axis in made)
    otherwise = {"values": "model's input", "a list": "leaves torch"}  # which is said before
    assert any(otherwise.get(use, "used in another way too") in axis.frozen for axis in made)


def test_positions_of_which_nothing_else_is_made_are():
    axes = find_axes(Permuted(lambda x, order: x), torch.randn(2, 8))
    assert axes["first"].frozen is None


def test_a_long_list_is_not_rewritten_for_another_table():
    """It repeats positions of the one, which is not followed, and so it is not followed for the other."""
    model = nn.ModuleDict({"wide": nn.Linear(5, 5000), "narrow": nn.Linear(5, 16), "last": nn.Linear(4200, 3)})
    model.register_buffer("order", torch.randint(0, 16, (4200,)))
    model.forward = lambda x: model["last"](model["wide"](x)[:, model.order] + model["narrow"](x)[:, model.order])
    assert all(axis.frozen for axis in find_axes(model, torch.randn(2, 5)) if axis.name.startswith("wide"))
