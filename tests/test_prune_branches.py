"""Cutting a branch out of a block is the same, bit for bit, as having it return zeros."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import netopt
from conftest import unchanged
from netopt.errors import InvalidArgumentError, NothingToPruneError, PlanMismatchError, UnknownNameError
from test_prune_blocks import WRITERS, equal, made, run, without_branches

FAMILIES = [
    *("llama", "qwen3-windows", "gemma2", "gemma3", "gpt2", "gpt_neox", "opt", "vit", "swin", "t5", "whisper"),
]


def scores_of(seed: int) -> Any:
    return lambda name, _: float(sum(map(ord, name)) * (seed + 3) % 11)


class Layer(nn.Module):
    """A pre-norm layer with two branches that share their dropout."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.norm1, self.norm2, self.drop = nn.LayerNorm(width), nn.LayerNorm(width), nn.Dropout(0.5)
        self.mixer, self.up, self.down = nn.Linear(width, width), nn.Linear(width, 16), nn.Linear(16, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop(self.mixer(self.norm1(x)))
        return x + 0.5 * self.drop(self.down(self.up(self.norm2(x)).relu()))


def stacked(layer: type[nn.Module], count: int = 3) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*[layer() for _ in range(count)]).eval()


@pytest.mark.parametrize("name", FAMILIES)
def test_removed_equals_zeros(name: str) -> None:
    seed = len(name) % 3
    model, inputs = made(name, seed)
    dense = copy.deepcopy(model)
    report = netopt.prune_blocks(model, inputs, 2, kind="branches", importance=scores_of(seed), progress=False)
    assert equal(run(model, inputs), run(without_branches(dense, report.plan), inputs))
    assert not equal(run(model, inputs), run(dense, inputs))
    assert report.params_after < report.params_before
    assert sum(row.before - row.after for row in report.rows) == 2


@pytest.mark.parametrize("name", [name for name in WRITERS if name in FAMILIES])
def test_generates_with_a_cache_afterwards(name: str) -> None:
    model, inputs = made(name)
    dense = copy.deepcopy(model)
    report = netopt.prune_blocks(model, inputs, 2, kind="branches", include="*.[12].*", progress=False)
    reference = without_branches(dense, report.plan)
    asked = {key: value for key, value in inputs.items() if not key.startswith("decoder")}
    settings = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    assert torch.equal(model.generate(**asked, **settings), reference.generate(**asked, **settings, use_cache=False))


def test_the_attention_that_caches_are_measured_by_stays() -> None:
    model, inputs = made("llama")
    with unchanged(model), pytest.raises(NothingToPruneError, match="computes something else"):
        netopt.prune_blocks(model, inputs, 1, kind="branches", include="model.layers.0.self_attn", progress=False)
    report = netopt.prune_blocks(model, inputs, 4, kind="branches", include="*.self_attn", progress=False)
    assert "model.layers.0.self_attn" in report.frozen
    assert report.rows[0].after == 6


def test_all_that_fed_the_branch_alone_goes_with_it() -> None:
    model = stacked(Layer)
    dense, x = copy.deepcopy(model), torch.randn(4, 8)
    report = netopt.prune_blocks(model, x, 1, kind="branches", include="1.up", progress=False)
    assert [part.name for part in report.plan.branches[0].parts] == ["1.norm2", "1.up", "1.down"]
    assert not list(model[1].norm2.parameters())
    assert equal(run(model, x), run(without_branches(dense, report.plan), x))
    assert model.train()(x).isfinite().all()


def test_what_feeds_two_branches_stays() -> None:
    class Parallel(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.first, self.second = nn.LayerNorm(8), nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            normed = self.norm(x)
            return x + self.first(normed) + self.second(normed)

    model, x = stacked(Parallel), torch.randn(4, 8)
    dense = copy.deepcopy(model)
    report = netopt.prune_blocks(model, x, 2, kind="branches", include="*.first", progress=False)
    assert [len(branch.parts) for branch in report.plan.branches] == [1, 1]
    assert equal(run(model, x), run(without_branches(dense, report.plan), x))


def test_a_plan_is_saved_and_replayed_and_optimizers_forget(tmp_path: Any) -> None:
    model, inputs = made("llama")
    fresh = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(model.parameters())
    with unchanged(model):
        planned = netopt.plan_blocks(model, inputs, 3, kind="branches", progress=False)
    report = netopt.prune_blocks(model, inputs, 3, kind="branches", optimizer=optimizer, progress=False)
    report.plan.save(tmp_path / "plan.json")
    plan = netopt.BlockPlan.load(tmp_path / "plan.json")
    assert plan == report.plan == planned
    assert planned.predicted["params_after"] == sum(one.numel() for one in model.parameters())
    assert "without model.layers." in str(plan)
    plan.apply(fresh)
    assert equal(run(fresh, inputs), run(model, inputs))
    assert {id(one) for one in optimizer.param_groups[0]["params"]} == {id(one) for one in model.parameters()}
    with pytest.raises(PlanMismatchError, match="other tensors or shapes"):
        plan.apply(fresh)


@pytest.mark.parametrize("importance", ["influence", "loss"])
def test_a_branch_that_does_little_goes_first(importance: str) -> None:
    model = stacked(Layer)
    with torch.no_grad():
        model[2].down.weight.mul_(1e-3)
        model[2].down.bias.zero_()
    report = netopt.prune_blocks(model, torch.randn(16, 8), 1, kind="branches", importance=importance, progress=False)
    assert [branch.name for branch in report.plan.branches] == ["2.up"]


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("bert", "norm comes after the sum"),
        ("torch-encoder", "norm comes after the sum"),
        ("mamba", "single branch"),
        ("resnet-basic", "no branch"),
        ("sequential", "single branch"),
    ],
)
def test_what_has_no_branch_of_its_own_is_refused(name: str, reason: str) -> None:
    model, inputs = made(name)
    with unchanged(model), pytest.raises(NothingToPruneError, match=reason):
        netopt.prune_blocks(model, inputs, 1, kind="branches", progress=False)


def test_a_module_whose_parts_are_read_stays() -> None:
    class Reading(Layer):
        def forward(self, x: Tensor) -> Tensor:
            x = x + self.mixer(self.norm1(x)) * self.mixer.out_features
            return x + self.down(self.up(self.norm2(x)).relu())

    model, x = stacked(Reading), torch.randn(4, 8)
    with unchanged(model):
        plan = netopt.plan_blocks(model, x, 0.9, kind="branches", progress=False)
    assert {branch.name.rpartition(".")[2] for branch in plan.branches} == {"up"}


def test_bad_input_is_told(tmp_path: Any) -> None:
    model = stacked(Layer)
    with pytest.raises(UnknownNameError, match="kind of blocks"):
        netopt.prune_blocks(model, torch.randn(4, 8), 1, kind="parts", progress=False)  # pyright: ignore[reportArgumentType]
    plan = netopt.plan_blocks(model, torch.randn(4, 8), 1, kind="branches", progress=False)
    for change in ({"name": 3}, {"parts": []}, {"parts": [["a", None, None, True]]}, {"parts": [[1]]}):
        broken = plan.to_dict()
        broken["branches"][0] |= change
        with pytest.raises(InvalidArgumentError):
            netopt.BlockPlan.from_dict(broken)
