"""Removing experts is the same as router scores of minus infinity, in every family and way to compute experts."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

import netopt
from conftest import unchanged
from netopt.errors import (
    ArgumentTypeError,
    InvalidArgumentError,
    NothingToPruneError,
    PlanMismatchError,
    UnknownNameError,
)

IDS = torch.arange(14).view(2, 7) + 3
OTHERS = torch.arange(15).view(3, 5) * 3 + 4
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
BASE: Any = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "max_position_embeddings": 64,
    **TOKENS,
}
LOCAL: Any = {**BASE, "intermediate_size": 24, "num_local_experts": 6, "num_experts_per_tok": 2}
NAMED: Any = {**BASE, "intermediate_size": 48, "num_experts": 6, "num_experts_per_tok": 2}
LATENT: Any = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 4}

FAMILIES: dict[str, tuple[Any, Any]] = {
    "qwen2": (
        hf.Qwen2MoeForCausalLM,
        lambda: hf.Qwen2MoeConfig(**NAMED, moe_intermediate_size=20, shared_expert_intermediate_size=28),
    ),
    "qwen3": (hf.Qwen3MoeForCausalLM, lambda: hf.Qwen3MoeConfig(**NAMED, head_dim=8, moe_intermediate_size=20)),
    "mixtral": (hf.MixtralForCausalLM, lambda: hf.MixtralConfig(**LOCAL)),
    "deepseek": (
        hf.DeepseekV3ForCausalLM,
        lambda: hf.DeepseekV3Config(
            **{**BASE, "num_key_value_heads": 4, **LATENT}, intermediate_size=48, moe_intermediate_size=20,
            n_routed_experts=8, num_experts_per_tok=2, n_group=2, topk_group=1, first_k_dense_replace=1,
        ),
    ),
    "gpt_oss": (hf.GptOssForCausalLM, lambda: hf.GptOssConfig(**LOCAL, head_dim=8, rope_parameters=None)),
    "olmoe": (hf.OlmoeForCausalLM, lambda: hf.OlmoeConfig(**NAMED)),
    "granite": (hf.GraniteMoeForCausalLM, lambda: hf.GraniteMoeConfig(**LOCAL)),
    "llama4": (
        hf.Llama4ForCausalLM,
        lambda: hf.Llama4TextConfig(**LOCAL, head_dim=8, intermediate_size_mlp=48, interleave_moe_layer_step=1),
    ),
    "phimoe": (hf.PhimoeForCausalLM, lambda: hf.PhimoeConfig(**LOCAL)),
}  # fmt: skip
WAYS = ("eager", "batched_mm", "grouped_mm")
CASES = [(family, way) for family in FAMILIES for way in WAYS if family != "llama4" or way == "eager"]


def make(family: str, way: str = "eager") -> nn.Module:
    """A tiny model of a family with large weights; the kernel of grouped rows knows no float64 on a CPU."""
    torch.manual_seed(0)
    kind, config = FAMILIES[family]
    made = config()
    if family != "llama4":
        made._experts_implementation = way
    model = kind(made).to(torch.float32 if way == "grouped_mm" else torch.float64).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.2)
        for name, buffer in model.named_buffers():
            if "bias" in name:
                buffer.normal_(0, 0.3)
    return model


class Lowered(TorchFunctionMode):
    """Sets scores to minus infinity where a router's weight makes them, and where is chosen among as many."""

    def __init__(self, model: nn.Module, plan: netopt.ExpertPlan) -> None:
        super().__init__()
        self.routers: dict[int, Any] = {}
        for cut in plan.mixtures:
            router = next(name for name, _ in cut.tensors if name.endswith("weight") and "expert" not in name)
            self.routers[id(model.get_parameter(router))] = cut
        self.cut: Any = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (torch.Tensor.topk, torch.topk, torch.max) and self.cut is not None:
            first = args[0]
            if first.shape[-1] == self.cut.size or (first.shape[-2:].numel() == self.cut.size and first.dim() == 3):
                flat = first.reshape(first.shape[0], self.cut.size).index_fill(1, self.gone(), -torch.inf)
                args = (flat.view(first.shape), *args[1:])
        if func in (torch.Tensor.type, torch.Tensor.to, torch.Tensor.float) and id(args[0]) in self.routers:
            self.cast = func(*args, **kwargs)
            self.routers[id(self.cast)] = self.routers[id(args[0])]
            return self.cast
        result = func(*args, **kwargs)
        if func is functional.linear and id(args[1]) in self.routers:
            self.cut = self.routers[id(args[1])]
            return result.index_fill(-1, self.gone(), -torch.inf)
        return result

    def gone(self) -> Tensor:
        return torch.tensor(self.cut.removed)


def run(model: nn.Module, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


def close(found: Tensor, expected: Tensor) -> bool:
    return torch.allclose(found, expected, rtol=0, atol=(1e-10 if found.dtype is torch.float64 else 1e-4))


@pytest.mark.parametrize(("family", "way"), CASES)
def test_family_equals_scores_of_minus_infinity(family: str, way: str) -> None:
    model = make(family, way)
    dense = copy.deepcopy(model)
    inputs, last = {"input_ids": IDS}, lambda _, place: -place
    report = netopt.prune_experts(model, inputs, amount=2, importance=last, progress=False)
    plan: Any = report.plan
    assert not report.frozen
    assert all(row.before - row.after == 2 for row in report.rows)
    for ids in (IDS, OTHERS):
        with Lowered(dense, plan):
            expected = run(dense, ids)
        assert close(run(model, ids), expected)
        assert not close(run(dense, ids), expected)
    assert report.notes["configuration"] == "loads with from_pretrained"
    again = type(model)(model.config).to(model.dtype).eval()
    again.load_state_dict(model.state_dict())
    assert torch.equal(run(again, OTHERS), run(model, OTHERS))
    made = model.generate(IDS[:1], max_new_tokens=3, do_sample=False)
    assert torch.equal(made, again.generate(IDS[:1], max_new_tokens=3, do_sample=False))


class Lowering(nn.Module):
    """A mixture some of whose scores may be minus infinity."""

    gone: tuple[int, ...] = ()

    def lower(self, scores: Tensor) -> Tensor:
        return scores.index_fill(-1, torch.tensor(self.gone, dtype=torch.int64), -torch.inf) if self.gone else scores


class Loop(Lowering):
    """A list of experts, gone through one by one."""

    def __init__(self, size: int = 6, width: int = 8, count: int = 2) -> None:
        super().__init__()
        self.size, self.count = size, count
        self.router = nn.Linear(width, size)
        self.experts = nn.ModuleList(
            [nn.Sequential(nn.Linear(width, 12), nn.GELU(), nn.Linear(12, width)) for _ in range(size)]
        )

    def forward(self, x: Tensor) -> Tensor:
        gates, chosen = self.lower(self.router(x)).softmax(-1).topk(self.count)
        made = torch.zeros_like(x)
        for place in range(self.size):
            row, column = (chosen == place).nonzero(as_tuple=True)
            if len(row):
                made = made.index_add(0, row, gates[row, column, None] * self.experts[place](x[row]))
        return made


class Einsum(Lowering):
    """Stacked experts that all run, in one sum of products each."""

    def __init__(self, size: int = 6, width: int = 8) -> None:
        super().__init__()
        self.router = nn.Parameter(torch.randn(width, size))
        self.up, self.bias = nn.Parameter(torch.randn(size, width, 12)), nn.Parameter(torch.randn(size, 12))
        self.down = nn.Parameter(torch.randn(size, 12, width))

    def forward(self, x: Tensor) -> Tensor:
        scores = self.lower(torch.einsum("th,he->te", x, self.router))
        gates, chosen = scores.topk(2)
        full = torch.full_like(scores, -torch.inf).scatter(-1, chosen, gates).softmax(-1)
        inner = (torch.einsum("th,ehi->tei", x, self.up) + self.bias).relu()
        return torch.einsum("te,tei,eih->th", full, inner, self.down)


class Flat(Lowering):
    """Experts one below the other in a matrix, picked by index."""

    def __init__(self, size: int = 6, width: int = 8) -> None:
        super().__init__()
        self.size = size
        self.router = nn.Linear(width, size, bias=False)
        self.up, self.down = nn.Parameter(torch.randn(size * 12, width)), nn.Parameter(torch.randn(size * 12, width))

    def forward(self, x: Tensor) -> Tensor:
        gate, chosen = self.lower(self.router(x)).sigmoid().max(-1)
        up, down = self.up.view(self.size, 12, -1)[chosen], self.down.view(self.size, 12, -1)[chosen]
        return gate[:, None] * torch.einsum("tih,ti->th", down, torch.einsum("tih,th->ti", up, x).relu())


class Deep(nn.Module):
    """As many blocks as each has experts, and as wide."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Loop(4, 4) for _ in range(4)])
        self.norms = nn.ModuleList([nn.LayerNorm(4) for _ in range(4)])

    def forward(self, x: Tensor) -> Tensor:
        for block, norm in zip(self.blocks, self.norms, strict=True):
            x = x + block(norm(x))
        return x


class Balanced(Lowering):
    """A bias for balance, scales and loads for each expert, gates that add up to one."""

    def __init__(self, size: int = 6, width: int = 8) -> None:
        super().__init__()
        self.size = size
        self.router = nn.Linear(width, size)
        self.weight, self.scale = nn.Parameter(torch.randn(size, width, width)), nn.Parameter(torch.rand(size))
        self.register_buffer("bias", torch.randn(size) / 9)
        self.register_buffer("load", torch.zeros(size))

    def forward(self, x: Tensor) -> Tensor:
        scores = self.router(x).sigmoid()
        chosen = self.lower(scores + self.bias).topk(2).indices
        self.load += torch.bincount(chosen.flatten(), minlength=self.size)
        gates = scores.gather(1, chosen)
        gates = gates / gates.sum(-1, keepdim=True) * self.scale[chosen]
        return torch.einsum("tk,tkhg,th->tg", gates, self.weight[chosen], x)


class Square(Lowering):
    """All widths are the number of experts."""

    def __init__(self, size: int = 8) -> None:
        super().__init__()
        self.norm, self.router, self.out = nn.LayerNorm(size), nn.Linear(size, size), nn.Linear(size, size)
        self.count = self.width = size
        self.up, self.down = nn.Parameter(torch.randn(size, size, size)), nn.Parameter(torch.randn(size, size, size))

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x.view(-1, self.width))
        gates, chosen = self.lower(self.router(x)).topk(2)
        weights = (functional.one_hot(chosen, self.count) * gates.softmax(-1)[..., None]).sum(1)
        made = torch.stack([(x @ self.up[place]).relu() @ self.down[place] for place in range(self.count)], 1)
        return self.out((weights[..., None] * made).sum(1) + x)


class Zipped(Lowering):
    """A list and a dictionary of modules gone through together."""

    def __init__(self, size: int = 6, width: int = 8) -> None:
        super().__init__()
        self.router = nn.Linear(width, size)
        self.up = nn.ModuleList([nn.Linear(width, 12) for _ in range(size)])
        self.down = nn.ModuleDict({f"down{place}": nn.Linear(12, width) for place in range(size)})

    def forward(self, x: Tensor) -> Tensor:
        gates, chosen = self.lower(self.router(x)).softmax(-1).topk(2)
        made = torch.zeros_like(x)
        for place, (up, down) in enumerate(zip(self.up, self.down.values(), strict=True)):
            row, column = torch.where(chosen == place)
            if row.numel():
                made[row] += gates[row, column, None] * down(up(x[row]).relu())
        return made


OWN: list[Callable[[], nn.Module]] = [Loop, Einsum, Flat, Deep, Balanced, Square, Zipped]


def inputs_of(model: nn.Module, rows: int = 40) -> Tensor:
    width = 4 if isinstance(model, Deep) else 8
    return torch.randn(rows, width, dtype=torch.float64)


def own(kind: Callable[[], nn.Module] = Loop) -> nn.Module:
    return kind().double().eval()


@pytest.mark.parametrize("kind", OWN)
@pytest.mark.parametrize("importance", ["reap", "frequency", "magnitude"])
def test_own_mixture_equals_scores_of_minus_infinity(kind: Callable[[], nn.Module], importance: str) -> None:
    model = own(kind)
    dense, x = copy.deepcopy(model), inputs_of(model)
    report = netopt.prune_experts(model, x, amount=0.34, importance=importance, progress=False)
    plan: Any = report.plan
    for cut in plan.mixtures:
        dense.get_submodule(cut.name).gone = cut.removed  # pyright: ignore[reportAttributeAccessIssue]
    more = inputs_of(model, 57)
    assert not report.frozen
    assert sum(row.removed for row in report.rows) > 0
    assert close(model(more), dense(more))
    assert netopt.measure.count_parameters(model) < netopt.measure.count_parameters(dense)


@pytest.mark.parametrize("kind", OWN)
def test_plan_decides_without_doing_and_is_replayed_from_json(kind: Callable[[], nn.Module], tmp_path: Any) -> None:
    model = own(kind)
    fresh, x = copy.deepcopy(model), inputs_of(model)
    with unchanged(model):
        plan = netopt.plan_experts(model, x, amount=1, progress=False)
    plan.save(tmp_path / "experts.json")
    loaded = netopt.ExpertPlan.load(tmp_path / "experts.json")
    assert loaded == plan
    assert loaded.predicted == plan.predicted
    assert "without" in str(loaded)
    loaded.apply(fresh)
    netopt.prune_experts(model, x, amount=1, progress=False)
    assert torch.equal(model(x), fresh(x))
    assert netopt.measure.count_parameters(fresh) == plan.predicted["params_after"]
    with pytest.raises(PlanMismatchError):
        loaded.apply(fresh)


@pytest.mark.parametrize("kind", OWN)
def test_optimizer_follows(kind: Callable[[], nn.Module]) -> None:
    model = own(kind)
    x = inputs_of(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    model(x).square().sum().backward()
    optimizer.step()
    netopt.prune_experts(model, x, amount=1, optimizer=optimizer, progress=False)
    held = {id(one) for group in optimizer.param_groups for one in group["params"]}
    assert held == {id(one) for one in model.parameters()}
    assert all(state["exp_avg"].shape == one.shape for one, state in optimizer.state.items())
    optimizer.zero_grad()
    model(x).square().sum().backward()
    optimizer.step()
    assert model(x).isfinite().all()


def test_reap_is_the_mean_of_gate_times_norm() -> None:
    model = own()
    x = inputs_of(model)
    gates, chosen = model.router(x).softmax(-1).topk(2)
    norms = torch.stack([expert(x).norm(dim=-1) for expert in model.experts], dim=-1)
    expected = []
    for place in range(6):
        row, column = (chosen == place).nonzero(as_tuple=True)
        expected.append(float((gates[row, column] * norms[row, place]).detach().sum() / max(len(row), 1)))
    plan = netopt.plan_experts(model, x, amount=3, progress=False)
    least = sorted(range(6), key=expected.__getitem__)[:3]
    assert plan.mixtures[0].removed == tuple(sorted(least))


def test_experts_that_met_no_token_are_named_and_go_first() -> None:
    model = own()
    with torch.no_grad():
        model.router.bias[[1, 4]] = -100
    report = netopt.prune_experts(model, inputs_of(model), amount=2, progress=False)
    assert report.settings["unused"] == {"": [1, 4]}
    assert "no token met 1, 4" in str(report)
    assert model.size == 4


def test_amount_by_name_and_selectors() -> None:
    model = own(Deep)
    x = inputs_of(model)
    netopt.prune_experts(model, x, amount={"blocks.1": 1, "blocks.[23]": 0.5}, progress=False)
    assert [len(block.experts) for block in model.blocks] == [4, 3, 2, 2]
    netopt.prune_experts(model, x, amount=1, include="blocks.0", progress=False)
    report = netopt.prune_experts(model, x, amount=1, exclude=["blocks.0", "blocks.2", "blocks.3"], progress=False)
    assert [len(block.experts) for block in model.blocks] == [3, 2, 2, 2]
    assert report.frozen["blocks.0"] == "is excluded"


class Capped(Loop):
    """Removing an expert is no score of minus infinity where scores are normalised over the experts."""

    def lower(self, scores: Tensor) -> Tensor:
        return functional.layer_norm(scores, scores.shape[-1:])


class Offered(Loop):
    """Experts choose tokens, not tokens experts."""

    def forward(self, x: Tensor) -> Tensor:
        gates, chosen = self.router(x).softmax(-1).topk(2, dim=0)
        made = torch.zeros_like(x)
        for place, expert in enumerate(self.experts):
            made = made.index_add(0, chosen[:, place], gates[:, place, None] * expert(x[chosen[:, place]]))
        return made


class Told(Loop):
    """Returns the scores besides."""

    def forward(self, x: Tensor) -> Any:
        return super().forward(x), self.router(x)


@pytest.mark.parametrize("kind", [Capped, Offered, Told, lambda: Loop(2), lambda: nn.Linear(8, 8)])
def test_refused_with_a_reason(kind: Callable[[], nn.Module]) -> None:
    model = own(kind)
    x = inputs_of(model)
    with unchanged(model), pytest.raises(NothingToPruneError, match="expert"):
        netopt.prune_experts(model, x, amount=1, progress=False)


@pytest.mark.parametrize(
    ("given", "error"),
    [
        ({"amount": 5}, InvalidArgumentError),
        ({"amount": -1}, InvalidArgumentError),
        ({"amount": 1.5}, InvalidArgumentError),
        ({"amount": "half"}, ArgumentTypeError),
        ({"amount": {}}, InvalidArgumentError),
        ({"amount": {"nowhere": 1}}, InvalidArgumentError),
        ({"amount": 1, "importance": "reep"}, UnknownNameError),
        ({"amount": 1, "importance": 3}, ArgumentTypeError),
        ({"amount": 1, "importance": {"": [1, 2]}}, InvalidArgumentError),
        ({"amount": 1, "optimizer": torch.optim.SGD([torch.zeros(1, requires_grad=True)])}, InvalidArgumentError),
    ],
)
def test_bad_input_is_told_and_nothing_changes(given: Any, error: type[Exception]) -> None:
    model = own()
    x = inputs_of(model)
    with unchanged(model), pytest.raises(error):
        netopt.prune_experts(model, x, progress=False, **given)


@pytest.mark.parametrize(
    "change",
    [
        {"kind": "blocks"},
        {"format": 9},
        {"mixtures": [{"name": "", "size": 2, "kept": [2]}]},
        {"attributes": [[["a"], 1]]},
    ],
)
def test_broken_plans_are_refused(change: Any) -> None:
    plan = netopt.ExpertPlan((netopt.plan.experts.ExpertCut("moe", 4, (0, 1)),))
    data = json.loads(json.dumps(plan.to_dict()))
    with pytest.raises(InvalidArgumentError):
        netopt.ExpertPlan.from_dict({**data, **change})


def test_plan_on_the_meta_device_and_in_inference_mode() -> None:
    model = own(Einsum)
    x, empty = inputs_of(model), copy.deepcopy(model).to("meta")
    with torch.inference_mode():
        plan = netopt.plan_experts(model, x, amount=2, progress=False)
    assert plan == netopt.plan_experts(model, x, amount=2, progress=False)
    plan.apply(empty)
    assert empty.get_parameter("up").shape == (4, 8, 12)
    with pytest.raises(InvalidArgumentError, match="meta"):
        netopt.prune_experts(empty, x, amount=1, progress=False)


def test_a_table_of_experts_freezes_its_mixture() -> None:
    class Tabled(Loop):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("table", torch.arange(6).flip(0))

        def forward(self, x: Tensor) -> Tensor:
            gates, chosen = self.router(x).softmax(-1).topk(2)
            made = torch.zeros_like(x)
            for place, expert in enumerate(self.experts):
                made = made + (gates * (self.table[chosen] == place)).sum(-1, keepdim=True) * expert(x)
            return made

    model = own(Tabled)
    x = inputs_of(model)
    with unchanged(model), pytest.raises(NothingToPruneError, match="something else"):
        netopt.prune_experts(model, x, amount=1, progress=False)


def test_groups_of_experts_stay_equal_in_size() -> None:
    model = make("deepseek")
    with unchanged(model), pytest.raises(InvalidArgumentError, match="2 at a time"):
        netopt.prune_experts(model, {"input_ids": IDS}, amount=3, progress=False)
    report: Any = netopt.prune_experts(model, {"input_ids": IDS}, amount=0.5, importance="magnitude", progress=False)
    (cut,) = report.plan.mixtures
    assert sum(place < 4 for place in cut.kept) == sum(place >= 4 for place in cut.kept) == 2


def test_unequal_numbers_are_said_not_to_load() -> None:
    model = make("mixtral")
    report = netopt.prune_experts(model, {"input_ids": IDS}, amount={"model.layers.0.mlp": 1}, progress=False)
    assert "cannot express" in str(report.notes["configuration"])
    assert model.config.num_local_experts == 6
    assert run(model, OTHERS).isfinite().all()


class Uneven:
    """Clusters of inputs, some more frequent, each with a linear map of its own, some of these larger."""

    def __init__(self, count: int, seed: int) -> None:
        self.draw = torch.Generator().manual_seed(seed)
        self.centers = 2 * torch.randn(count, 8, generator=self.draw)
        sizes = torch.linspace(0.2, 1.5, count)[torch.randperm(count, generator=self.draw)]
        self.maps = torch.randn(count, 8, 8, generator=self.draw) * sizes[:, None, None] / 3
        self.shares = torch.linspace(1, 4, count)[torch.randperm(count, generator=self.draw)]

    def batch(self, rows: int) -> tuple[Tensor, Tensor]:
        cluster = torch.multinomial(self.shares, rows, replacement=True, generator=self.draw)
        x = self.centers[cluster] + torch.randn(rows, 8, generator=self.draw) / 2
        return x, torch.einsum("nij,nj->ni", self.maps[cluster], x)


def losses_at_half(seed: int) -> Tensor:
    """The held-out error of a mixture trained on the spot, with half its experts: by reap, frequency, and at random."""
    torch.manual_seed(seed)
    task, model = Uneven(12, seed), Loop(16)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for _ in range(250):
        x, y = task.batch(128)
        optimizer.zero_grad()
        (model(x) - y).square().mean().backward()
        optimizer.step()
    (seen, _), (x, y) = task.batch(256), task.batch(2048)

    def loss(importance: Any) -> Tensor:
        smaller = copy.deepcopy(model)
        netopt.prune_experts(smaller, seen, amount=0.5, importance=importance, progress=False)
        return (smaller(x) - y).square().mean().detach()

    chance = torch.stack([loss({"": torch.rand(16).tolist()}) for _ in range(3)]).mean()
    return torch.stack([loss("reap"), loss("frequency"), chance])


def test_reap_beats_frequency_and_random_at_half_the_experts() -> None:
    reap, frequency, chance = torch.stack([losses_at_half(seed) for seed in range(4)]).mean(0).tolist()
    assert reap < frequency < chance, (reap, frequency, chance)
