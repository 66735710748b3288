"""Kinds of axes: what neurons are, told by operations; and what names, patterns and kinds select."""

from __future__ import annotations

import pytest
import torch
from tests.zoo.language import CASES as LANGUAGE
from tests.zoo.vision import CASES as VISION
from torch import nn

from netopt.axes import KINDS, Axes, find_axes
from netopt.errors import InvalidArgumentError, NothingToPruneError, SelectorError, UnknownNameError
from netopt.prune import plan_neurons, prune_neurons

GROUPED = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "phi3", "mixtral", "qwen2_moe")
EXPERTS = ("deepseek_v3", "mixtral", "qwen2_moe")
WITHOUT_HEADS = ("mamba",)


def axes_of(case) -> Axes:
    torch.manual_seed(0)
    return find_axes(case.make().eval(), case.make_inputs())


def kinds(axes: Axes) -> set[str | None]:
    return {axis.kind for axis in axes}


@pytest.mark.parametrize("name", LANGUAGE)
def test_transformers_have_a_width_heads_and_inner_neurons(name):
    axes = axes_of(LANGUAGE[name])
    family = name.removeprefix("transformers.").removesuffix(".loop")
    assert {"width", "ffn"} <= kinds(axes) <= {*KINDS, None}
    assert ({"heads", "head_dim"} <= kinds(axes)) is (family not in WITHOUT_HEADS)
    assert ("kv_heads" in kinds(axes)) is (family in GROUPED)
    assert "experts" in kinds(axes) or family not in EXPERTS


@pytest.mark.parametrize("name", [name for name in VISION if "resnet" in name or "vgg" in name or "mobilenet" in name])
def test_convolutional_networks_have_channels(name):
    assert "channels" in kinds(axes_of(VISION[name]))


class Block(nn.Module):
    """One of everything, under names that say nothing."""

    def __init__(self):
        super().__init__()
        self.m, self.n = 3, 4
        self.a, self.b = nn.Linear(5, 12), nn.Linear(12, 36)
        self.c, self.d, self.e, self.f = nn.Linear(12, 12), nn.Linear(12, 20), nn.Linear(20, 12), nn.Linear(12, 3)

    def forward(self, x):
        x = self.a(x)
        q, k, v = (one.unflatten(-1, (self.m, self.n)).transpose(1, 2) for one in self.b(x).chunk(3, -1))
        y = (q @ k.transpose(-1, -2)).softmax(-1) @ v
        x = x + self.c(y.transpose(1, 2).flatten(2))
        return self.f(x + self.e(self.d(x).relu()))


def test_kinds_come_from_operations_and_not_from_names():
    axes = find_axes(Block(), torch.randn(2, 6, 5))
    assert {axis.name: axis.kind for axis in axes.free} == {
        "a": "width",
        "b/m": "heads",
        "b/n": "head_dim",
        "b/2": "head_dim",
        "d": "ffn",
    }


def test_gates_and_tables_are_told_apart():
    lstm = find_axes(nn.LSTMCell(4, 6), torch.randn(2, 4))
    assert "gates" in kinds(lstm)
    model = nn.Sequential(nn.Embedding(9, 5), nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 2))
    axes = find_axes(model, torch.tensor([[1, 2]]))
    assert (axes["0"].kind, axes["1"].kind) == ("embedding", "ffn")


def names_removed(amount=0.25, **choice) -> set[str]:
    report = prune_neurons(
        Block(), torch.randn(2, 6, 5), amount, importance="magnitude", scope="layer", progress=False, **choice
    )
    return {row.name for row in report.rows if row.after < row.before}


def test_a_kind_selects_its_axes():
    assert names_removed(include="ffn") == {"d"}
    assert names_removed(include="*/heads") == {"b/m"}
    assert names_removed(exclude=["head_dim", "heads"]) == {"a", "d"}
    assert names_removed({"ffn": 0.5, "width": 3}) == {"a", "d"}


def test_a_pattern_selects_what_is_made_there():
    """The width, to which every block adds, is made before the blocks."""
    model = nn.Sequential(nn.Linear(4, 8), Residual(8, 16), Residual(8, 16), nn.Linear(8, 3))
    report = prune_neurons(model, torch.randn(2, 4), 0.5, include="*.mlp*", importance="magnitude", progress=False)
    assert {row.name for row in report.rows} == {"1.mlp.0", "2.mlp.0"}
    report = prune_neurons(model, torch.randn(2, 4), 0.5, include="1.mlp", importance="magnitude", progress=False)
    assert {row.name for row in report.rows} == {"1.mlp.0"}


class Residual(nn.Module):
    def __init__(self, width, inner):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(width, inner), nn.ReLU(), nn.Linear(inner, width))

    def forward(self, x):
        return x + self.mlp(x)


def test_an_error_lists_axes_and_kinds():
    for choice in ({"include": "channels"}, {"amount": {"channels": 0.5}}):
        with pytest.raises(SelectorError, match="a, b/m, b/n, b/2, d; kinds: width, ffn, heads, head_dim"):
            names_removed(**choice)


def test_the_report_has_a_line_of_kinds():
    report = prune_neurons(Block(), torch.randn(2, 6, 5), 0.5, importance="magnitude", scope="layer", progress=False)
    assert report.by_kind() == "width 12 -> 6, ffn 20 -> 10, heads 3 -> 1, head_dim 4 -> 2 in 2 layers"
    assert report.by_kind() in str(report)
    assert "ffn 20 -&gt; 10" in report._repr_html_()


def test_given_positions_are_removed():
    model, x = Block(), torch.randn(2, 6, 5)
    plan = plan_neurons(model, x, remove={"d": [2, 6, 9], "a": [0]}, progress=False)
    assert {cut.name: cut.kept.tolist() for cut in plan.axes} == {
        "a": list(range(1, 12)),
        "d": [one for one in range(20) if one not in (2, 6, 9)],
    }
    weight = model.d.weight.detach().clone()
    plan.apply(model)
    rows = [one for one in range(20) if one not in (2, 6, 9)]
    torch.testing.assert_close(model.d.weight, weight[rows][:, 1:])


@pytest.mark.parametrize(
    ("remove", "error", "why"),
    [
        ({"d": [20]}, InvalidArgumentError, "20 is no position of its 20"),
        ({"d": range(20)}, InvalidArgumentError, "none would stay"),
        ({"f": [0]}, InvalidArgumentError, "it is a dimension of the model's output"),
        ({"z": [0]}, UnknownNameError, "no axis is called 'z'"),
    ],
)
def test_positions_that_cannot_go_are_named(remove, error, why):
    with pytest.raises(error, match=why):
        plan_neurons(Block(), torch.randn(2, 6, 5), remove=remove, progress=False)
    with pytest.raises(InvalidArgumentError, match="leave out amounts"):
        plan_neurons(Block(), torch.randn(2, 6, 5), 0.5, remove={"d": [0]})


def test_nothing_is_left_to_prune_where_everything_is_excluded():
    with pytest.raises(NothingToPruneError, match="is excluded"):
        names_removed(exclude=["width", "heads", "head_dim", "ffn"])


@pytest.mark.parametrize("much", [{"amount": 0.5}, {"max_params": 0.6}], ids=["amount", "budget"])
def test_every_kind_loses_the_same_share(much):
    report = prune_neurons(Block(), torch.randn(2, 6, 5), **much, importance="l2", scope="kind", progress=False)
    kinds_found = {row.kind for row in report.rows}
    before = {kind: sum(row.before for row in report.rows if row.kind == kind) for kind in kinds_found}
    after = {kind: sum(row.after for row in report.rows if row.kind == kind) for kind in kinds_found}
    gone = {kind: 1 - after[kind] / size for kind, size in before.items()}
    assert len(gone) == 4
    assert min(gone.values()) > 0
    assert all(abs(one - gone["ffn"]) <= 1 / size for one, size in zip(gone.values(), before.values(), strict=True))
    assert report.settings["scope"] == "kind"


@pytest.mark.parametrize("more", [{"loadable": True}, {"of": "original"}], ids=["loadable", "original"])
def test_what_shares_of_kinds_do_not_go_with_is_refused(more):
    with pytest.raises(InvalidArgumentError, match="kind"):
        prune_neurons(Block(), torch.randn(2, 6, 5), 0.5, importance="l2", scope="kind", progress=False, **more)
