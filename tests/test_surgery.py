"""Surgery: what is removed is gone everywhere, what stays is the same object, and a failure leaves nothing behind."""

from __future__ import annotations

import copy
import dis
import random
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

import netopt
from netopt import surgery
from netopt.errors import ArgumentTypeError, InvalidArgumentError, OptimizerStateError, PlanMismatchError
from netopt.model import restore
from netopt.plan import Plan

KEPT = torch.tensor([0, 2, 3])
ROOT = str(Path(netopt.__file__).parent)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 6)
        self.norm = nn.BatchNorm1d(6)
        self.out = nn.Linear(6, 2)
        self.sizes = (6, [6, {"width": 6}])
        self.register_buffer("order", torch.arange(6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.norm(self.inner(x)).relu())


def net_plan() -> Plan:
    return Plan(
        tensors={
            "inner.weight": {0: KEPT},
            "inner.bias": {0: KEPT},
            "norm.weight": {0: KEPT},
            "norm.bias": {0: KEPT},
            "norm.running_mean": {0: KEPT},
            "norm.running_var": {0: KEPT},
            "out.weight": {1: KEPT},
            "order": {0: KEPT},
        },
        attributes=((("", "sizes", 0), 3), (("", "sizes", 1, 0), 3), (("", "sizes", 1, 1, "width"), 3)),
        values={"order": torch.arange(3)},
    )


def trained(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 2) -> None:
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        x = torch.randn(8, 4, generator=generator)

        def closure(x=x):
            optimizer.zero_grad()
            loss = model(x).square().sum()
            loss.backward()
            return loss

        optimizer.step(closure)


def snapshot(model: nn.Module, *optimizers: torch.optim.Optimizer) -> dict:
    """Everything a failing call must leave as it was, bit for bit."""
    state = {
        "attributes": [(name, repr(vars(module).get("sizes")), repr(module)) for name, module in model.named_modules()]
    }
    for name, tensor in surgery.named_tensors(model).items():
        grad = None if tensor.grad is None else tensor.grad.numpy().tobytes()
        state[name] = (id(tensor), tuple(tensor.shape), tensor.requires_grad, tensor.detach().numpy().tobytes(), grad)
    for place, optimizer in enumerate(optimizers):
        state[f"optimizer {place}"] = repr(optimizer.param_groups), repr(optimizer.state_dict())
        tensors = {id(one): [] for group in optimizer.param_groups for one in group["params"]}
        for parameter, own in optimizer.state.items():
            tensors[id(parameter)] = [
                (key, value.numpy().tobytes() if isinstance(value, torch.Tensor) else repr(value))
                for key, value in own.items()
            ]
        state[f"state {place}"] = tensors
    state["random"] = torch.get_rng_state().tolist(), random.getstate(), repr(np.random.get_state())
    return state


def test_everything_that_depends_on_the_size_follows():
    model = Net()
    plan = net_plan()
    before = copy.deepcopy(model)
    parameters = dict(model.named_parameters())
    plan.apply(model)
    for name, tensor in surgery.named_tensors(model).items():
        expected = surgery.named_tensors(before)[name]
        for dim, kept in plan.tensors.get(name, {}).items():
            expected = expected.index_select(dim, kept)
        torch.testing.assert_close(tensor, plan.values.get(name, expected))
    assert (model.inner.out_features, model.norm.num_features, model.out.in_features) == (3, 3, 3)
    assert model.sizes == (3, [3, {"width": 3}])
    assert all(parameters[name] is parameter for name, parameter in model.named_parameters())
    assert model(torch.randn(5, 4)).shape == (5, 2)


def test_removed_equals_masked():
    model, x = Net().double().eval(), torch.randn(5, 4, dtype=torch.float64)
    masked = copy.deepcopy(model)
    gone = [1, 4, 5]
    with torch.no_grad():
        masked.out.weight[:, gone] = 0
    net_plan().apply(model)
    torch.testing.assert_close(model(x), masked(x), rtol=1e-12, atol=1e-13)


def test_gradients_flags_hooks_and_memory_format_survive():
    conv = nn.Conv2d(4, 6, 3).to(memory_format=torch.channels_last)
    conv.bias.requires_grad_(False)
    seen = []
    conv.weight.register_hook(lambda grad: seen.append(tuple(grad.shape)))
    conv.weight.register_post_accumulate_grad_hook(lambda p: seen.append(tuple(p.grad.shape)))
    conv.weight.mark = "mine"
    conv(torch.randn(1, 4, 5, 5)).sum().backward()
    grad = conv.weight.grad.clone()
    reference = weakref.ref(conv.weight)
    seen.clear()
    Plan({"weight": {0: KEPT}, "bias": {0: KEPT}}).apply(conv)
    torch.testing.assert_close(conv.weight.grad, grad[KEPT])
    assert conv.weight.is_contiguous(memory_format=torch.channels_last)
    assert not conv.bias.requires_grad
    assert conv.weight.requires_grad
    assert reference() is conv.weight
    assert conv.weight.mark == "mine"
    conv(torch.randn(1, 4, 5, 5)).sum().backward()
    assert seen == [(3, 4, 3, 3), (3, 4, 3, 3)]
    assert (conv.out_channels, conv.in_channels) == (3, 4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.complex64, torch.float64])
def test_dtype_survives(dtype):
    linear = nn.Linear(4, 6, dtype=dtype)
    Plan({"weight": {0: KEPT}, "bias": {0: KEPT}}).apply(linear)
    assert linear.weight.dtype == dtype
    assert linear(torch.randn(2, 4).to(dtype)).shape == (2, 3)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_a_large_tensor_is_cut_some_rows_at_a_time(monkeypatch, memory_format):
    tensor = torch.randn(7, 5, 3, 2).to(memory_format=memory_format)
    cuts = {0: torch.tensor([0, 2, 3, 6]), 1: torch.tensor([1, 4]), 3: torch.tensor([1])}
    expected = tensor[cuts[0]][:, cuts[1]][..., cuts[3]]
    for entries in (0, 60, 10_000):
        monkeypatch.setattr(surgery.tensors, "_LARGE", entries - 1)
        monkeypatch.setattr(surgery.tensors, "_BLOCK", entries)
        narrowed = surgery.narrow(tensor, cuts)
        assert torch.equal(narrowed, expected)
        assert narrowed.is_contiguous(memory_format=memory_format)


def test_a_class_that_sets_its_attributes_itself_is_asked():
    class Told(nn.Linear):
        told: tuple[int, ...] = ()

        def __setattr__(self, name, value):
            super().__setattr__(name, value)
            if name == "out_features":
                super().__setattr__("told", (*self.told, value))

    class Derived(nn.Linear):
        @property
        def in_features(self):
            return self.width

        @in_features.setter
        def in_features(self, value):
            self.width = value

    model = nn.Sequential(Told(4, 6), Derived(6, 2))
    plan = Plan({"0.weight": {0: KEPT}, "0.bias": {0: KEPT}, "1.weight": {1: KEPT}}, ((("1", "in_features"), 3),))
    plan.prepare(model).dry_run(lambda: None)
    assert (model[0].told, model[1].width) == ((6, 3, 6), 6)
    plan.apply(model)
    assert (model[0].told, model[1].width) == ((6, 3, 6, 3), 3)
    assert model(torch.zeros(1, 4)).shape == (1, 2)


def test_ties_stay_ties():
    embedding, head = nn.Embedding(7, 6), nn.Linear(6, 7, bias=False)
    head.weight = embedding.weight
    model = nn.Sequential(embedding, head)
    Plan({"0.weight": {1: KEPT}, "1.weight": {1: KEPT}}).apply(model)
    assert model[0].weight is model[1].weight
    assert (model[0].embedding_dim, model[1].in_features) == (3, 3)
    assert model(torch.tensor([1])).shape == (1, 7)
    with pytest.raises(PlanMismatchError, match="one tensor, and the plan cuts it differently"):
        Plan({"0.weight": {1: [0]}, "1.weight": {1: [1]}}).apply(model)


def test_tensors_that_share_memory_still_share_it():
    model = nn.Sequential(nn.Linear(4, 6, bias=False), nn.Linear(4, 6, bias=False))
    model[1].weight.data = model[0].weight.data
    Plan({"0.weight": {0: KEPT}, "1.weight": {0: KEPT}}).apply(model)
    with torch.no_grad():
        model[0].weight.fill_(7)
    assert bool((model[1].weight == 7).all())


def test_masks_are_narrowed_with_their_weights():
    model = Net()
    prune.random_unstructured(model.inner, "weight", 0.5)
    mask, weight = model.inner.weight_mask.clone(), model.inner.weight.detach().clone()
    net_plan().apply(model)
    torch.testing.assert_close(model.inner.weight_mask, mask[KEPT])
    torch.testing.assert_close(model.inner.weight.detach(), weight[KEPT])
    model(torch.randn(5, 4)).sum().backward()
    assert model.inner.weight_orig.grad.shape == (3, 4)
    assert prune.is_pruned(model.inner)
    prune.remove(model.inner, "weight")
    torch.testing.assert_close(model.inner.weight.detach(), weight[KEPT])


def test_a_plan_of_a_masked_model_fits_the_bare_one():
    model = Net()
    plan = Plan({"inner.weight_orig": {0: KEPT}, "inner.weight_mask": {0: KEPT}, "inner.bias": {0: KEPT}})
    plan.apply(model)
    assert model.inner.weight.shape == (3, 4)


def test_parametrizations_survive():
    linear = parametrizations.weight_norm(nn.Linear(4, 6))
    weight = linear.weight.detach().clone()
    cut = {0: KEPT}
    names = ("parametrizations.weight.original0", "parametrizations.weight.original1", "bias")
    Plan(dict.fromkeys(names, cut)).apply(linear)
    torch.testing.assert_close(linear.weight.detach(), weight[KEPT])
    assert linear.out_features == 3


def test_recurrent_modules_keep_their_weights_in_step():
    lstm = nn.LSTM(4, 6, batch_first=True)
    gates = torch.cat([KEPT + 6 * gate for gate in range(4)])
    plan = Plan(
        {
            "weight_ih_l0": {0: gates},
            "weight_hh_l0": {0: gates, 1: KEPT},
            "bias_ih_l0": {0: gates},
            "bias_hh_l0": {0: gates},
        },
        attributes=((("", "hidden_size"), 3),),
    )
    plan.apply(lstm)
    assert lstm(torch.randn(2, 5, 4))[0].shape == (2, 5, 3)


def test_plain_tensors_are_reached_by_path():
    model = nn.Linear(4, 6)
    model.cache = {"bias": [torch.arange(6.0)]}
    Plan({"cache['bias'][0]": {0: KEPT}}).apply(model)
    torch.testing.assert_close(model.cache["bias"][0], KEPT.float())


def test_scales_multiply_what_stays():
    model = nn.Linear(4, 6)
    weight = model.weight.detach().clone()
    Plan({"weight": {0: KEPT}, "bias": {0: KEPT}}, scales={"weight": 2.0}).apply(model)
    torch.testing.assert_close(model.weight.detach(), 2 * weight[KEPT])


def test_a_graph_older_than_the_surgery_fails_and_the_next_works():
    model = Net()
    loss = model(torch.randn(5, 4)).sum()
    net_plan().apply(model)
    with pytest.raises(RuntimeError, match="recorded before neurons were removed"):
        loss.backward()
    model(torch.randn(5, 4)).sum().backward()
    assert model.inner.weight.grad.shape == (3, 4)


def test_inference_mode_outside_makes_no_untrainable_parameters():
    model = Net()
    with torch.inference_mode():
        net_plan().apply(model)
    model(torch.randn(5, 4)).sum().backward()
    assert model.inner.weight.grad is not None


class Heads(nn.Module):
    """Says how wide it is and never asks: the width of what it makes is ``num_heads`` times ``head_dim``."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_dim, self.num_heads, self.head_dim = 12, 4, 3
        self.qkv = nn.Linear(5, 12)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.qkv(x).view(len(x), self.num_heads, self.head_dim).sum(1)


def test_a_quotient_follows_its_dividend_and_nothing_else():
    heads = Heads()
    Plan({"qkv.weight": {0: torch.arange(6)}, "qkv.bias": {0: torch.arange(6)}}, ((("", "num_heads"), 2),)).apply(heads)
    assert (heads.num_heads, heads.head_dim) == (2, 3)
    assert heads(torch.ones(1, 5)).shape == (1, 3)
    attention = nn.MultiheadAttention(12, 4)
    rows = torch.cat([torch.arange(part * 12, part * 12 + 6) for part in range(3)])
    six = torch.arange(6)
    Plan(
        {
            "in_proj_weight": {0: rows, 1: six},
            "in_proj_bias": {0: rows},
            "out_proj.weight": {0: six, 1: six},
            "out_proj.bias": {0: six},
        },
        ((("", "embed_dim"), 6), (("", "kdim"), 6), (("", "vdim"), 6), (("", "num_heads"), 3)),
    ).apply(attention)
    assert attention.head_dim == 2
    x = torch.ones(1, 1, 6)
    assert attention(x, x, x)[0].shape == (1, 1, 6)


def test_class_defaults_are_shadowed_and_uncovered():
    class Sized(nn.Linear):
        width = 6

    model = Sized(4, 6)
    plan = Plan({"weight": {0: KEPT}, "bias": {0: KEPT}}, attributes=((("", "width"), 3),))
    operation = plan.prepare(model)
    with pytest.raises(ZeroDivisionError):
        operation.run(lambda: 1 / 0)
    assert "width" not in vars(model)
    plan.apply(model)
    assert (model.width, Sized.width) == (3, 6)


@pytest.mark.parametrize(
    ("tensors", "attributes", "message"),
    [
        ({"absent.weight": {0: KEPT}}, (), "cuts `absent.weight`"),
        ({"inner.weight": {0: [9]}}, (), r"keeps index 9 of dimension 0 of `inner.weight`"),
        ({"inner.weight": {2: [0]}}, (), r"dimension 2 of `inner.weight`"),
        ({}, ((("inner", "absent"), 3),), r"sets `inner.absent`"),
        ({}, ((("absent", "width"), 3),), r"sets `absent.width`"),
    ],
)
def test_what_does_not_fit_is_named_before_anything_changes(tensors, attributes, message):
    model = Net()
    before = snapshot(model)
    with pytest.raises(PlanMismatchError, match=message):
        Plan(tensors, attributes).apply(model)
    assert snapshot(model) == before


OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, nesterov=True),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.01),
    "Adamax": lambda p: torch.optim.Adamax(p, lr=0.01),
    "NAdam": lambda p: torch.optim.NAdam(p, lr=0.01),
    "RAdam": lambda p: torch.optim.RAdam(p, lr=0.01),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.01),
    "Adadelta": lambda p: torch.optim.Adadelta(p, lr=0.01),
    "Adafactor": lambda p: torch.optim.Adafactor(p, lr=0.01),
    "ASGD": lambda p: torch.optim.ASGD(p, lr=0.01),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.9, centered=True),
    "Rprop": lambda p: torch.optim.Rprop(p, lr=0.01),
    "LBFGS": lambda p: torch.optim.LBFGS(p, lr=0.01, max_iter=3),
    "Muon": lambda p: torch.optim.Muon(p, lr=0.01),
    "SparseAdam": lambda p: torch.optim.SparseAdam(p, lr=0.01),
    "AdamW, fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    "Adam, one by one": lambda p: torch.optim.Adam(p, lr=0.01, foreach=False, weight_decay=0.1, maximize=True),
    "SGD, plain": lambda p: torch.optim.SGD(p, lr=0.01, weight_decay=0.1),
    "Adagrad, rate as a tensor": lambda p: torch.optim.Adagrad(p, lr=torch.tensor(0.01)),
}


def test_every_optimizer_of_torch_is_tried():
    known = {
        name
        for name, one in vars(torch.optim).items()
        if isinstance(one, type) and issubclass(one, torch.optim.Optimizer) and one is not torch.optim.Optimizer
    }
    assert {name.partition(",")[0] for name in OPTIMIZERS} == known


class Bags(nn.Module):
    """Gradients of its one parameter are sparse, as ``SparseAdam`` wants them."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.words = nn.Embedding(9, width, sparse=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.words(x[:, :2].abs().mul(3).long() % 9)


def matrices() -> nn.Module:
    """Parameters of two dimensions alone, as ``Muon`` wants them."""
    return nn.Sequential(nn.Linear(4, 6, bias=False), nn.ReLU(), nn.Linear(6, 2, bias=False))


SUBJECTS = {
    "Muon": (matrices, lambda: Plan({"0.weight": {0: KEPT}, "2.weight": {1: KEPT}})),
    "SparseAdam": (Bags, lambda: Plan({"words.weight": {1: KEPT}})),
}


def narrowed_by_hand(state, shape, cuts, flat):
    """The state a small parameter would have, cut independently of the library's rules for shapes."""
    if isinstance(state, list):
        return [narrowed_by_hand(one, shape, cuts, flat) for one in state]
    if not isinstance(state, torch.Tensor) or state.numel() <= 1:
        return copy.deepcopy(state)
    if state.shape == flat.shape:
        return state[flat]
    for dim, kept in cuts.items():
        state = state if state.shape[dim] == 1 else state[(slice(None),) * dim + (kept,)]
    return state.clone()


def stepped(model: nn.Module, optimizer: torch.optim.Optimizer, x: torch.Tensor) -> None:
    def closure():
        optimizer.zero_grad()
        loss = model(x).square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_one_step_after_pruning_is_one_step_of_the_small_model(name):
    torch.manual_seed(0)
    build, planned = SUBJECTS.get(name, (Net, net_plan))
    model, plan = build().double(), planned()
    optimizer = OPTIMIZERS[name](model.parameters())
    x = torch.randn(8, 4, dtype=torch.float64)
    for _ in range(3):
        stepped(model, optimizer, x)
    small = build().double()
    plan.apply(small)
    fresh = OPTIMIZERS[name](small.parameters())
    stays = []
    for label, parameter in model.named_parameters():
        here = torch.ones(parameter.shape, dtype=torch.bool)
        for dim, kept in plan.tensors.get(label, {}).items():
            here &= torch.zeros_like(here).index_fill_(dim, kept, True)
        stays.append(here.flatten())
    for (label, old), new in zip(model.named_parameters(), small.parameters(), strict=True):
        cuts = plan.tensors.get(label, {})
        state = {
            key: narrowed_by_hand(value, old.shape, cuts, torch.cat(stays))
            for key, value in optimizer.state.get(old, {}).items()
        }
        if state:
            fresh.state[new] = state
    plan.apply(model, optimizer)
    small.load_state_dict(model.state_dict())
    for one, its in ((model, optimizer), (small, fresh)):
        stepped(one, its, x)
    for (label, mine), theirs in zip(model.named_parameters(), small.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, msg=label)


SCHEDULERS = {
    "steps": lambda o: torch.optim.lr_scheduler.StepLR(o, 2),
    "cosine": lambda o: torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
    "one cycle": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.1, total_steps=9),
    "cyclic": lambda o: torch.optim.lr_scheduler.CyclicLR(o, 0.01, 0.1, 2),
    "in sequence": lambda o: torch.optim.lr_scheduler.SequentialLR(
        o, [torch.optim.lr_scheduler.LinearLR(o), torch.optim.lr_scheduler.ExponentialLR(o, 0.9)], [3]
    ),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedules_go_on(name):
    models = [Net(), Net()]
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9) for model in models]
    schedules = [SCHEDULERS[name](optimizer) for optimizer in optimizers]
    rates: list[list[tuple[float, float]]] = [[], []]
    for step in range(7):
        if step == 3:
            net_plan().apply(models[0], optimizers[0])
        for model, optimizer, schedule, seen in zip(models, optimizers, schedules, rates, strict=True):
            trained(model, optimizer, 1)
            schedule.step()
            group = optimizer.param_groups[0]
            seen.append((group["lr"], group["momentum"]))
    assert rates[0] == rates[1]
    assert optimizers[0].state[models[0].inner.weight]["momentum_buffer"].shape == (3, 4)


def test_lbfgs_history_is_cut_where_its_flat_vectors_are():
    model = Net()
    optimizer = OPTIMIZERS["LBFGS"](model.parameters())
    trained(model, optimizer)
    plan = net_plan()
    state = optimizer.state[model.inner.weight]
    mark = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
    state["d"] = mark.clone()
    plan.apply(model, optimizer)
    torch.testing.assert_close(state["d"], torch.cat([p.detach().flatten() for p in model.parameters()]))
    trained(model, optimizer)
    assert all(bool(p.isfinite().all()) for p in model.parameters())


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (torch.ones(6), r"state 'memory' of SGD has shape \(6,\) for a parameter of shape \(6, 4\)"),
        ({"row": [torch.ones(4)]}, "factored"),
        (object(), "state 'memory' of SGD is a object, which cannot be narrowed"),
    ],
)
def test_foreign_state_is_refused_before_anything_changes(state, message):
    model = Net()
    optimizer = OPTIMIZERS["SGD"](model.parameters())
    trained(model, optimizer)
    optimizer.state[model.inner.weight]["memory"] = state
    before = snapshot(model, optimizer)
    with pytest.raises(OptimizerStateError, match=message):
        net_plan().apply(model, optimizer)
    assert snapshot(model, optimizer) == before


def test_a_stranger_of_an_optimizer_is_refused():
    model = Net()
    with pytest.raises(InvalidArgumentError, match="trains none of the parameters"):
        net_plan().apply(model, torch.optim.SGD(Net().parameters(), lr=0.1))
    with pytest.raises(ArgumentTypeError, match=r"must be a torch.optim.Optimizer, not str"):
        net_plan().apply(model, ["adam"])


@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name != "SGD, plain"])
def test_a_forgotten_optimizer_fails_loudly(name):
    build, planned = SUBJECTS.get(name, (Net, net_plan))
    model = build()
    optimizer = OPTIMIZERS[name](model.parameters())
    trained(model, optimizer)
    planned().apply(model)
    # The flat vectors of LBFGS have no parameter's shape, and it fails by itself.
    error = RuntimeError if name == "LBFGS" else OptimizerStateError
    with pytest.raises(error, match=r"must match|since neurons were removed without it; pass optimizer="):
        trained(model, optimizer)
    optimizer.state.clear()
    trained(model, OPTIMIZERS[name](model.parameters()))


def test_a_forgotten_optimizer_without_memory_goes_on():
    model = Net()
    optimizer = OPTIMIZERS["SGD, plain"](model.parameters())
    net_plan().apply(model)
    before = model.inner.weight.detach().clone()
    trained(model, optimizer)
    assert not torch.equal(model.inner.weight, before)


def subject() -> tuple[nn.Module, torch.optim.Optimizer]:
    """A model with a mask, gradients and attributes, and an optimizer that remembers it."""
    torch.manual_seed(0)
    model = Net()
    optimizer = OPTIMIZERS["Adam"](model.parameters())
    trained(model, optimizer, 1)
    prune.random_unstructured(model.inner, "weight", 0.5)
    return model, optimizer


def test_a_fault_at_any_step_leaves_everything_as_it_was():
    model, optimizer = subject()
    before = snapshot(model, optimizer)
    kinds = set()
    for place, change in enumerate(net_plan().prepare(model, optimizer).changes):
        for late in (False, True):
            operation = net_plan().prepare(model, optimizer)
            kinds.add(type(change).__name__)
            real = operation.changes[place].do

            def faulty(real=real, late=late):
                if late:
                    real()
                torch.rand(1)
                raise ZeroDivisionError

            operation.changes[place].do = faulty
            with pytest.raises(ZeroDivisionError), restore.preserve_random_state():
                operation.run(lambda: None)
            assert snapshot(model, optimizer) == before, f"step {place}, {type(change).__name__}"
    assert kinds == {"Swap", "Assignment", "Entry"}


# Python delivers no interruption at a return, and one there would come when all is done.
RETURNS = {code for name, code in dis.opmap.items() if name.startswith("RETURN_")}


class Interrupter:
    """Raises KeyboardInterrupt before the n-th line, or instruction, executed in the library."""

    def __init__(self, line: int, event: str = "line") -> None:
        self.left = line
        self.event = event
        self.fired = False

    def __call__(self, frame, event, arg):
        if not frame.f_code.co_filename.startswith(ROOT):
            return None
        frame.f_trace_opcodes = self.event == "opcode"
        returns = event == "opcode" and frame.f_code.co_code[frame.f_lasti] in RETURNS
        if event == self.event and not self.fired and not returns:
            if self.left == 0:
                self.fired = True
                raise KeyboardInterrupt
            self.left -= 1
        return self


def interrupted_everywhere(call, check, stride: int = 1, event: str = "line") -> int:
    """Interrupts ``call`` before its first line, its second, ... until it finishes; ``check`` runs after each."""
    previous, line = sys.gettrace(), 0
    while True:
        sys.settrace(Interrupter(line, event))
        try:
            call()
        except KeyboardInterrupt:
            pass
        else:
            return line
        finally:
            sys.settrace(previous)
        check(line)
        line += stride


@pytest.mark.parametrize(("event", "stride"), [("line", 1), pytest.param("opcode", 3, marks=pytest.mark.slow)])
def test_an_interruption_anywhere_leaves_everything_as_it_was(event, stride):
    model, optimizer = subject()
    before = snapshot(model, optimizer)

    def check(line):
        assert snapshot(model, optimizer) == before, f"changed by an interruption at {event} {line}"

    def checked_and_undone():
        operation = net_plan().prepare(model, optimizer)
        with pytest.raises(ZeroDivisionError):
            operation.run(lambda: 1 / 0)

    interrupted_everywhere(checked_and_undone, check, stride=41 * stride, event=event)
    operation = net_plan().prepare(model, optimizer)
    steps = interrupted_everywhere(lambda: operation.run(lambda: None), check, stride=stride, event=event)
    assert steps > 100 * stride
    assert model.inner.weight.shape == (3, 4)


def test_interruptions_of_the_undo_do_not_stop_it():
    model = Net()
    before = snapshot(model)
    operation = net_plan().prepare(model)
    fired = []
    real = operation.changes[3].undo

    def stubborn():
        if len(fired) < 3:
            fired.append(1)
            raise KeyboardInterrupt
        real()

    operation.changes[3].undo = stubborn
    with pytest.raises(ZeroDivisionError):
        operation.run(lambda: 1 / 0)
    assert snapshot(model) == before
    assert len(fired) == 3


def test_a_failing_check_gives_back_gradients_graphs_and_state():
    model = Net()
    optimizer = OPTIMIZERS["Adam"](model.parameters())
    trained(model, optimizer)
    loss = model(torch.randn(5, 4)).sum()
    before = snapshot(model, optimizer)
    with pytest.raises(ZeroDivisionError):
        net_plan().prepare(model, optimizer).run(lambda: 1 / 0)
    assert snapshot(model, optimizer) == before
    loss.backward()
    trained(model, optimizer)
    assert model.inner.weight.grad.shape == (6, 4)
