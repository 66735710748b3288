"""The laws every model of the zoo keeps, as functions of a case.

Removal here is any removal: counts are halved, the neurons that stay are random. What a criterion would choose is
another subject.
"""

from __future__ import annotations

import contextlib
import dataclasses
import random
import re
import types
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from tests.zoo.case import Case, Expected, call
from tests.zoo.share import check_share
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from netopt.axes import Axes, Axis, find_axes
from netopt.plan import Plan

# Zero, where a zero would be divided by itself: the norm of a row of zeros.
ALMOST_NOTHING = 1e-140


# Reading results.


def tensors(result: Any) -> list[Tensor]:
    """Every tensor of a result, through tuples, lists, dicts, dataclasses and plain objects."""
    if isinstance(result, Tensor):
        return [result]
    if isinstance(result, Mapping):
        return [tensor for value in result.values() for tensor in tensors(value)]
    if isinstance(result, (tuple, list)):
        return [tensor for value in result for tensor in tensors(value)]
    if dataclasses.is_dataclass(result) and not isinstance(result, type):
        return [tensor for value in vars(result).values() for tensor in tensors(value)]
    return []


def shapes(result: Any) -> list[tuple[int, ...]]:
    """The shapes of a result's tensors."""
    return [tuple(tensor.shape) for tensor in tensors(result)]


def to_double(value: Any) -> Any:
    """Inputs in float64."""
    if isinstance(value, Tensor):
        return value.double() if value.is_floating_point() else value
    if isinstance(value, Mapping):
        return {key: to_double(one) for key, one in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(to_double(one) for one in value)
    return value


# Law (a): reading leaves no trace.


def fingerprint(model: nn.Module) -> dict[str, Any]:
    """All that can be seen of a model: tensors bit for bit, flags, and what every module holds."""
    seen: dict[str, Any] = {}
    for name, tensor in [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]:
        seen[f"tensor {name}"] = (
            id(tensor), tensor.requires_grad, tensor.is_leaf, tuple(tensor.shape), tensor.stride(), tensor.dtype,
            tensor.detach().clone().contiguous().flatten().view(torch.uint8).numpy().tobytes(),
            None if tensor.grad is None else id(tensor.grad),
        )  # fmt: skip
    for name, module in model.named_modules(remove_duplicate=False):
        seen[f"module {name}"] = described(vars(module), {})
    return seen


def described(value: Any, known: dict[int, None], depth: int = 0) -> Any:
    """A value that can be compared: what containers hold, numbers by type and value, everything else by identity."""
    if value is None or isinstance(value, (bool, int, float, complex, str, bytes)):
        return (type(value), value)
    if id(value) in known or depth > 6:
        return id(value)
    known[id(value)] = None
    if isinstance(value, (nn.Module, Tensor, type, types.FunctionType, types.ModuleType)):
        return id(value)
    if isinstance(value, Mapping):
        return (type(value), id(value), [(repr(key), described(one, known, depth + 1)) for key, one in value.items()])
    if isinstance(value, (list, tuple, set)):
        return (
            type(value),
            None if isinstance(value, tuple) else id(value),
            [described(one, known, depth + 1) for one in value],
        )
    if hasattr(value, "__dict__"):
        return (type(value), id(value), described(vars(value), known, depth + 1))
    return id(value)


def random_states() -> tuple[Any, ...]:
    """The states of every random generator a model may draw from."""
    return torch.get_rng_state().tolist(), random.getstate(), repr(np.random.get_state())


def check_reading_leaves_no_trace(case: Case) -> None:
    """Finding the axes succeeds, and leaves the model and the random states as they were."""
    model, inputs = case.build(), case.inputs()
    before, randomness = fingerprint(model), random_states()
    axes = find_axes(model, inputs)
    after = fingerprint(model)
    assert len(axes) > 0
    changed = [key for key in {**before, **after} if before.get(key) != after.get(key)]
    assert not changed, f"changed by reading: {changed}"
    assert random_states() == randomness, "the random state moved"


# Removal.


def choose(axes: Axes, counts: Mapping[str, int], seed: int) -> dict[str, Tensor]:
    """Random neurons to keep, ascending, of each axis that shrinks."""
    generator = torch.Generator().manual_seed(seed)
    kept = {}
    for axis in axes.free:
        count = counts.get(axis.name, axis.size)
        if count < axis.size:
            kept[axis.name] = torch.randperm(axis.size, generator=generator)[:count].sort().values
    return kept


def halves(axes: Axes) -> dict[str, int]:
    """Half of every free axis, as near as the model's integers allow."""
    return axes.feasible({axis.name: max(1, axis.size // 2) for axis in axes.free})


def plan_for(axes: Axes, counts: Mapping[str, int], kept: Mapping[str, Tensor]) -> Plan:
    """The plan that keeps these neurons."""
    return Plan(
        axes.tensor_indices(kept),
        attributes=tuple((place.path, place.value) for place in axes.attribute_values(counts)),
        values=axes.values(kept),
    )


def remove_half(case: Case, seed: int = 0) -> tuple[nn.Module, Axes, dict[str, int]]:
    """The case's model with half of every free axis removed, its axes before, and the counts now."""
    model = case.build()
    axes = find_axes(model, case.inputs())
    counts = halves(axes)
    plan_for(axes, counts, choose(axes, counts, seed)).apply(model)
    return model, axes, counts


def train_once(model: nn.Module, inputs: Any) -> None:
    """One step of gradient descent on the sum of squares of all outputs."""
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=1e-3)
    out = [tensor for tensor in tensors(call(model, inputs)) if tensor.requires_grad]
    loss = sum(tensor.abs().square().sum() for tensor in out)
    assert isinstance(loss, Tensor), "no output depends on a parameter"
    loss.backward()
    grads = [parameter.grad for parameter in trained if parameter.grad is not None]
    assert grads, "no gradient"
    for parameter in trained:
        assert parameter.grad is None or parameter.grad.shape == parameter.shape
    optimizer.step()


def check_half_removed_works(case: Case) -> None:
    """With half of every free axis removed the model runs and trains, in both modes, its outputs of the same shapes."""
    original = case.build()
    model, axes, counts = remove_half(case)
    narrowed = [axis for axis in axes.free if counts[axis.name] < axis.size]
    assert narrowed or not axes.free, "nothing can be removed"
    for training in (False, True):
        expected = shapes(call(original.train(training), case.inputs()))
        assert shapes(call(model.train(training), case.inputs())) == expected
    if not case.train_step:
        train_once(model, case.inputs())
        finite = [bool(torch.isfinite(tensor).all()) for tensor in tensors(call(model.eval(), case.inputs()))]
        assert all(finite)


# Law (c): removing equals masking, where the axes say so.


def exact_counts(axes: Axes) -> dict[str, int]:
    """Half of the exact axes, leaving out those whose counts are tied to an inexact one."""
    full = {axis.name: axis.size for axis in axes.free}
    exact = {axis.name for axis in axes.free if axis.exact}
    wanted = {name: max(1, size // 2) if name in exact else size for name, size in full.items()}
    if _only(axes.feasible(wanted), full, exact):
        return axes.feasible(wanted)
    wanted = dict(full)
    for name in sorted(exact):
        trial = {**wanted, name: max(1, full[name] // 2)}
        if _only(axes.feasible(trial), full, exact):
            wanted = trial
    found = axes.feasible(wanted)
    return found if _only(found, full, exact) else full


def _only(counts: Mapping[str, int], full: Mapping[str, int], exact: Iterable[str]) -> bool:
    return all(counts[name] == size or name in exact for name, size in full.items())


@torch.no_grad()
def mask(model: nn.Module, axes: Axes, kept: Mapping[str, Tensor], value: float = 0.0) -> None:
    """Zeroes every entry, of every member, of the neurons that are not kept."""
    held, _ = held_tensors(model)
    for axis in axes.free:
        if axis.name not in kept:
            continue
        stay = torch.zeros(axis.size + 1, dtype=torch.bool)
        stay[kept[axis.name]] = True
        stay[-1] = True
        for name, dim, positions in axes.members(axis):
            tensor = held[name]
            if not (tensor.is_floating_point() or tensor.is_complex()):
                continue
            shape = [-1 if index == dim else 1 for index in range(tensor.dim())]
            factors = torch.ones(len(positions), dtype=torch.float64).masked_fill(~stay[positions], value)
            tensor.mul_(factors.to(tensor.dtype).view(shape))


def check_removed_equals_masked(case: Case) -> None:
    """Removing neurons of exact axes gives what the model with those neurons zeroed gives."""
    model, inputs = case.build().eval(), case.inputs()
    axes = find_axes(model, inputs)
    if case.double:
        model, inputs = model.double(), to_double(inputs)
    counts = exact_counts(axes)
    kept = choose(axes, counts, seed=1)
    for name in kept:
        assert axes[name].exact
    for value in (0.0, ALMOST_NOTHING):
        masked = case.build().eval()
        masked = masked.double() if case.double else masked
        mask(masked, axes, kept, value)
        expected = tensors(call(masked, inputs))
        if all(bool(torch.isfinite(tensor).all()) for tensor in expected):
            break
    plan_for(axes, counts, kept).apply(model)
    found = tensors(call(model, inputs))
    assert len(found) == len(expected)
    with pytest.raises(AssertionError, match="close") if case.compared else contextlib.nullcontext():
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=case.tolerance, atol=case.tolerance)


# Laws (d) and (e): what must be found.


def held_tensors(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors by first name, and the first name of every name."""
    held, first, names = {}, {}, {}
    own = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    for name, tensor in [*own, *plain_tensors(model)]:
        names[name] = first.setdefault(id(tensor), name)
        held.setdefault(names[name], tensor)
    return held, names


def plain_tensors(model: nn.Module) -> list[tuple[str, Tensor]]:
    """Tensors that modules keep in attributes and dicts, outside their parameters and buffers."""
    found = []
    for prefix, module in model.named_modules():
        for key, value in vars(module).items():
            inside = {f".{one}": tensor for one, tensor in value.items()} if isinstance(value, dict) else {"": value}
            if not key.startswith("_"):
                names = {f"{prefix}.{key}{one}".lstrip("."): tensor for one, tensor in inside.items()}
                found.extend((name, tensor) for name, tensor in names.items() if isinstance(tensor, Tensor))
    return found


def expand(members: str, model: nn.Module) -> tuple[set[str], set[str]]:
    """The members a line of a case stands for: those that must be there, and those that may."""
    held, names = held_tensors(model)
    must: set[str] = set()
    may: set[str] = set()
    for word in members.split():
        prefix, _, dim = word.lstrip("?").partition(":")
        found = {
            f"{names[name]}:{dim}"
            for name in names
            if (name == prefix or name.startswith(f"{prefix}.")) and held[names[name]].dim() > int(dim)
        }
        assert found, f"{word} names no tensor of the case"
        (may if word.startswith("?") else must).update(found)
    return must, may


def match(case: Case, model: nn.Module, axes: Axes) -> dict[str, Axis]:
    """The found axis of each expected one that has a label; each must be there, free and as exact as it says."""
    _, names = held_tensors(model)
    labelled: dict[str, Axis] = {}
    taken: set[str] = set()
    problems = []
    for expected in case.expected:
        must, may = expand(expected.members, model)
        axis = next(
            (one for one in axes if one.name not in taken and _fits(one, expected.size, must, may, names)), None
        )
        if axis is None:
            problems.append(f"no axis of {expected.size} with members {sorted(must)}; near: {_near(axes, must)}")
            continue
        taken.add(axis.name)
        problems.extend(_wrong(axis, expected))
        if expected.label:
            labelled[expected.label] = axis
    assert not problems, "\n".join([*problems, str(axes)])
    return labelled


def _fits(axis: Axis, size: int, must: set[str], may: set[str], names: Mapping[str, str]) -> bool:
    have = {f"{names[member.tensor]}:{member.dim}" for member in axis.members}
    return axis.size == size and must <= have <= must | may


def _wrong(axis: Axis, expected: Expected) -> list[str]:
    if axis.frozen is not None:
        return [f"{axis} must be free, but {axis.frozen}"]
    if expected.exact is not None and axis.exact is not expected.exact:
        return [f"{axis} must be {'exact' if expected.exact else 'inexact'}; {axis.inexact}"]
    return []


def _near(axes: Axes, must: set[str]) -> list[str]:
    near = []
    for axis in axes:
        have = {str(member) for member in axis.members}
        if must & have:
            near.append(f"{axis} frozen: {axis.frozen}, more {sorted(have - must)}, less {sorted(must - have)}")
    return near


def check_expected_axes(case: Case) -> None:
    """The axes written down in the case are found, and what must stay stays, for the reason the case gives."""
    model = case.build()
    axes = find_axes(model, case.inputs())
    match(case, model, axes)
    for axis in axes:
        assert axis.frozen is None or axis.frozen.strip()
    for key, reason in case.frozen.items():
        member = key.rstrip("!")
        touching = [axis for axis in axes if member in {str(one) for one in axis.members}]
        found = [axis for axis in touching if axis.frozen]
        assert found, f"{member} must be frozen\n{axes}"
        assert not key.endswith("!") or found == touching, f"all of {member} must be frozen\n{axes}"
        said = [axis.frozen for axis in found]
        assert any(re.search(reason, text, re.IGNORECASE) for text in said), f"{member} is frozen because it {said}"


def lookup(model: nn.Module, path: str) -> Any:
    """The value at a dotted path of attributes, items and submodules."""
    value: Any = model
    for step in path.split("."):
        if isinstance(value, (list, tuple)):
            value = value[int(step)]
        elif isinstance(value, Mapping):
            value = next(one for key, one in value.items() if str(key) == step)
        else:
            value = getattr(value, step)
    return value


def check_sizes(case: Case) -> None:
    """After removal every integer a module holds is right: by value, by repr, and by running at another size."""
    original = case.build()
    model, axes, counts = remove_half(case, seed=2)
    numbers = {label: counts[axis.name] for label, axis in match(case, original, axes).items()}
    for path, formula in case.sizes.items():
        wanted = eval(formula, {"__builtins__": {}}, numbers)
        assert lookup(model, path) == wanted, f"{path} is {lookup(model, path)}, not {formula} = {wanted}"
        assert type(lookup(model, path)) is int
    for name, module in model.named_modules():
        check_layer(name, module)
    other = case.other_inputs()
    if other is not None:
        expected = shapes(call(original.eval(), other))
        assert shapes(call(model.eval(), other)) == expected


# What torch's own layers print of themselves, and how their tensors tell it.
LAYERS: tuple[tuple[type[nn.Module] | tuple[type[nn.Module], ...], dict[str, Callable[[Any], int | None]]], ...] = (
    (nn.Linear, {"out_features": lambda m: m.weight.shape[0], "in_features": lambda m: m.weight.shape[1]}),
    (
        (nn.Conv1d, nn.Conv2d, nn.Conv3d),
        {"out_channels": lambda m: m.weight.shape[0], "in_channels": lambda m: m.weight.shape[1] * m.groups},
    ),
    (
        (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
        {"in_channels": lambda m: m.weight.shape[0], "out_channels": lambda m: m.weight.shape[1] * m.groups},
    ),
    (
        (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d),
        {"num_features": lambda m: None if m.running_mean is None else m.running_mean.shape[0]},
    ),
    (nn.GroupNorm, {"num_channels": lambda m: None if m.weight is None else m.weight.shape[0]}),
    (
        (nn.Embedding, nn.EmbeddingBag),
        {"num_embeddings": lambda m: m.weight.shape[0], "embedding_dim": lambda m: m.weight.shape[1]},
    ),
    (
        nn.RNNBase,
        {
            "hidden_size": lambda m: m.weight_hh_l0.shape[0] // {"LSTM": 4, "GRU": 3}.get(m.mode, 1),
            "input_size": lambda m: m.weight_ih_l0.shape[1],
        },
    ),
    (
        nn.RNNCellBase,
        {"hidden_size": lambda m: m.weight_hh.shape[1], "input_size": lambda m: m.weight_ih.shape[1]},
    ),
    (
        nn.MultiheadAttention,
        {"embed_dim": lambda m: m.out_proj.weight.shape[0], "head_dim": lambda m: m.embed_dim // m.num_heads},
    ),
)


def check_layer(name: str, module: nn.Module) -> None:
    """The numbers that torch's own layers print agree with the tensors they hold."""
    if isinstance(module, torch.jit.ScriptModule):
        return
    for kinds, told in LAYERS:
        for attribute, tell in told.items() if isinstance(module, kinds) else ():
            said, true = getattr(module, attribute), tell(module)
            assert true is None or said == true, f"{name}.{attribute} is {said}, its tensors say {true}"
    if isinstance(module, nn.LayerNorm) and module.weight is not None:
        assert tuple(module.normalized_shape) == tuple(module.weight.shape)
    if isinstance(module, (nn.Linear, nn.Conv2d, nn.LayerNorm)) and module.weight is not None:
        assert str(module.weight.shape[0]) in repr(module)


# Law (f): the same question, the same answer.


def check_two_traces_agree(case: Case) -> None:
    """Two traces of the same model, and of a copy, find the same axes."""
    model = case.build()
    first, *others = [find_axes(one, case.inputs()) for one in (model, model, case.build())]
    for other in others:
        assert rows(first) == rows(other)
        assert halves(first) == halves(other)


def check_shapes_are_enough(case: Case) -> None:
    """A model without values, under FakeTensorMode, has the same axes."""
    if case.fake:
        return
    plain = dataclasses.replace(case, stir=False, warm=False)
    expected = [told(axis) for axis in find_axes(plain.build(), plain.inputs())]
    with FakeTensorMode(allow_non_fake_inputs=True), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, when a fake layer is copied
        model, inputs = plain.build(), plain.inputs()
    assert [told(axis) for axis in find_axes(model, inputs)] == expected


def told(axis: Axis) -> tuple[Any, ...]:
    """What an axis says of itself, without its reasons' words: a kernel of another device has another name."""
    return (axis.name, axis.size, axis.members, axis.exact, axis.frozen is None)


def rows(axes: Axes) -> list[tuple[Any, ...]]:
    """Everything an axis says of itself."""
    return [(axis.name, axis.size, axis.members, axis.exact, axis.inexact, axis.frozen) for axis in axes]


LAWS = {
    "reading_leaves_no_trace": check_reading_leaves_no_trace,
    "half_removed_works": check_half_removed_works,
    "removed_equals_masked": check_removed_equals_masked,
    "share": check_share,
    "expected_axes": check_expected_axes,
    "sizes": check_sizes,
    "two_traces_agree": check_two_traces_agree,
    "shapes_are_enough": check_shapes_are_enough,
}
